"""Measure masked language models by sequence length: the work behind evaluate_mlm.py."""

import argparse
import contextlib
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import torch
from tqdm import tqdm

from .cli import one_line, say_end
from .common import check_special, count_tokens, load_model, load_words
from .pictures import draw_lengths
from .records import pieces, write_csv
from .sources import SHORTEST

MASKED_SHARE = 0.15
SHORTEST_DOCUMENT = 16  # tokens
COLUMNS = ("model", "length", "windows", "masked", "loss", "perplexity", "top1", "tokens_per_second", "peak_mib")


def sample_documents(texts: list[str], tokenizer, longest: int, several: bool, tokens: int) -> list[list[int]]:
    """Sample documents in a seeded order until there are enough tokens.

    Args:
        texts: the documents.
        tokenizer: of the model.
        longest: the longest length to measure, in tokens.
        several: whether other lengths are measured too. Documents shorter than `longest` are then left out. Each
            document is read up to four times `longest`, otherwise sixteen times, so that no book fills the sample.
        tokens: the number of tokens to reach.

    Returns:
        The tokens of each document, without special tokens.

    Raises:
        ValueError: no document is long enough.
    """
    chosen, total = [], 0
    for index in torch.randperm(len(texts), generator=torch.Generator().manual_seed(7)).tolist():
        ids = []
        for piece in pieces(texts[index]):
            ids += tokenizer(piece, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
            if len(ids) >= longest * 16:
                break
        if len(ids) < max(longest if several else 0, SHORTEST_DOCUMENT):
            continue
        chosen.append(ids[: longest * (4 if several else 16)])
        total += len(chosen[-1])
        if total >= tokens:
            break
    if not chosen:
        raise ValueError(f"data holds no document of at least {longest if several else SHORTEST_DOCUMENT} tokens")
    return chosen


def masked_batches(documents: list[list[int]], tokenizer, length: int, batch_tokens: int) -> Iterator[dict]:
    """Cut documents into windows and mask the same tokens at every length.

    Args:
        documents: token ids, as `sample_documents` returns them.
        tokenizer: of the model.
        length: of a window in tokens, [CLS] and [SEP] included.
        batch_tokens: approximate number of tokens in a batch.

    Yields:
        `input_ids`, `attention_mask` and `labels`, int64 [B, S] each; labels are -100 except at masked tokens.
    """
    body = length - 2
    generator = torch.Generator().manual_seed(13)
    windows = []
    for ids in documents:
        chosen = torch.rand(len(ids), generator=generator) < MASKED_SHARE
        windows += zip(torch.tensor(ids).split(body), chosen.split(body))
    windows = [(ids, chosen) for ids, chosen in windows if len(ids) >= SHORTEST]
    size = max(1, batch_tokens // length)
    for start in range(0, len(windows), size):
        chunk = windows[start : start + size]
        rows = [torch.tensor([tokenizer.cls_token_id, *ids.tolist(), tokenizer.sep_token_id]) for ids, _ in chunk]
        choices = [torch.tensor([False, *chosen.tolist(), False]) for _, chosen in chunk]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        chosen = torch.nn.utils.rnn.pad_sequence(choices, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        yield {
            "input_ids": input_ids.masked_fill(chosen, tokenizer.mask_token_id),
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "labels": input_ids.masked_fill(~chosen, -100),
        }


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[dict]:
    """Measure the peak memory of a block: of tensors on a CUDA device, of the process on the CPU of a Linux system.

    Yields:
        A dict whose `mib` is the peak in MiB after the block; NaN if it could not be measured.
    """
    result = {"mib": math.nan}
    status = Path("/proc/self/status")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif status.exists():
        with contextlib.suppress(PermissionError):  # in some containers; the peak is then that since the start
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the current use
    yield result
    if device.type == "cuda":
        result["mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    elif status.exists():
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)  # some sandboxes do not state it
        result["mib"] = int(found[1]) / 2**10 if found else math.nan


@torch.inference_mode()
def measure(model, tokenizer, documents: list[list[int]], length: int, batch_tokens: int) -> dict:
    """Score a masked language model in eval mode on the windows of `masked_batches`.

    Returns:
        windows, masked (tokens scored), loss (nats), perplexity, top1 (share), tokens_per_second (of the
        model's time only), peak_mib (see `peak_memory`).
    """
    loss, hits, masked, windows, tokens, seconds = 0.0, 0, 0, 0, 0, 0.0
    sparse = hasattr(model.config, "sparse_prediction")
    if sparse:
        model.config.sparse_prediction = True  # the model then scores the masked tokens only
    with peak_memory(model.device) as memory:
        batches = masked_batches(documents, tokenizer, length, batch_tokens)
        for batch in tqdm(batches, desc=f"length {length}", unit=" batches", leave=False, disable=None):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            began = time.perf_counter()
            if sparse:
                logits = model(**batch, labels=labels).logits.float().cpu()
            else:
                logits = model(**batch).logits[labels != -100].float().cpu()
            seconds += time.perf_counter() - began
            truth = labels[labels != -100].cpu()
            loss += torch.nn.functional.cross_entropy(logits, truth, reduction="sum").item()
            hits += (logits.argmax(-1) == truth).sum().item()
            masked += len(truth)
            windows += len(labels)
            tokens += batch["attention_mask"].sum().item()
    if not masked:
        raise ValueError(f"tokens: too few were read to mask one at length {length}")
    loss /= masked
    return {
        "windows": windows,
        "masked": masked,
        "loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 2),
        "top1": round(hits / masked, 4),
        "tokens_per_second": round(tokens / seconds),
        "peak_mib": round(memory["mib"]) if math.isfinite(memory["mib"]) else "",
    }


def find_device(name: Optional[str]) -> torch.device:
    """Find the device called `name`, or for None the GPU if there is one; raise ValueError if it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used, {one_line(error)}") from error
    return device


def compare(losses: dict[int, float], first: dict[int, float]) -> str:
    """Say how the losses of a model, by length, differ from those of the first model in the table."""
    parts = []
    for length in [length for length in losses if length in first]:
        difference = losses[length] - first[length]
        judged = f"{abs(difference):.4f} {'higher, so worse' if difference > 0 else 'lower, so better'}"
        parts.append(f"{judged if difference else 'equal'} at length {length}")
    return f"against the first model the loss is {'; '.join(parts)}" if parts else "no length of the first model"


def evaluate(options: argparse.Namespace, texts: list[str]) -> list[dict]:
    """Measure the models named by the options of evaluate_mlm.py, and print and write the table.

    Returns:
        A dict for each row of the table, see `COLUMNS`.

    Raises:
        ValueError: the device or a model cannot be used, or no document is long enough.
    """
    device = find_device(options.device)
    tokenizers = [load_words(source, trust_remote_code=options.trust_remote_code) for source in options.model]
    for tokenizer in tokenizers:
        check_special(tokenizer, "cls_token", "sep_token", "mask_token", "pad_token")
    if options.png:
        import matplotlib  # noqa: F401  (so that a missing package is noticed before the measurements)

    rows, losses, longest = [], [], 0
    for name, source, tokenizer in zip(options.name, options.model, tokenizers):
        model = load_model("ForMaskedLM", source, options.trust_remote_code)
        count_tokens(tokenizer, model.config.vocab_size)
        model.to(device, getattr(torch, options.dtype)).eval()
        several = len(options.max_length) > 1
        documents = sample_documents(texts, tokenizer, max(options.max_length), several, options.tokens)
        longest = max(longest, *(len(ids) + 2 for ids in documents))
        losses.append({})
        learned = not hasattr(model.config, "alibi_starting_size")  # its position table limits the length
        for length in options.max_length:
            if not learned or length <= model.config.max_position_embeddings:
                row = measure(model, tokenizer, documents, length, options.batch_tokens)
                if not rows:
                    print(",".join(COLUMNS))
                rows.append({"model": name, "length": length, **row})
                losses[-1][length] = row["loss"]
                print(",".join(str(rows[-1][column]) for column in COLUMNS), flush=True)
    if longest < max(options.max_length):
        print(f"the longest text read has {longest:,} tokens, fewer than --max_length {max(options.max_length):,}")
    for name, own, tokenizer in zip(options.name[1:], losses[1:], tokenizers[1:]):
        same = tokenizer.get_vocab() == tokenizers[0].get_vocab()
        print(f"{name}: {compare(own, losses[0]) if same else 'another tokenizer: losses cannot be compared'}")
    if options.csv:
        write_csv(options.csv, COLUMNS, ([row[column] for column in COLUMNS] for row in rows))
    if options.png:
        draw_lengths(rows, options.png)
    written = [path for path in (options.csv, options.png) if path]
    if written:
        say_end(f"saved in {' and '.join(written)}: {len(rows)} rows")
    return rows
