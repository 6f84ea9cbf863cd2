"""Tokenize the texts of a classifier or regressor, and predict with it."""

import itertools
from collections.abc import Sequence
from typing import Optional

import numpy as np
import torch
from tqdm import tqdm
from transformers import DataCollatorWithPadding

from .examples import REGRESSION, SINGLE, Examples, Task
from .records import pieces

# A text is never cut below this many tokens to save memory.
SHORTEST = 16
# The most distinct characters that one line names.
SHOWN = 8
# What pandas and others write for a hole in a table, in lower case.
HOLES = {"nan", "none", "null", "<na>"}


def task_of(config) -> Task:
    """Read the task of a fine-tuned model, without data, from its config."""
    guess = REGRESSION if config.num_labels == 1 else SINGLE
    problem = config.problem_type or guess
    names = [] if problem == REGRESSION else [config.id2label[number] for number in range(config.num_labels)]
    return Task(problem, names, {}, {})


def tokenize(
    parts: dict[str, Examples], tokenizer, max_length: Optional[int], batch_size: int, tokens_per_batch: int
) -> tuple[dict[str, list[dict]], int]:
    """Tokenize texts, and print what gets lost.

    Args:
        parts: texts by their purpose.
        tokenizer: of the model.
        max_length: longer texts are cut to this many tokens; None: see `fitting_length`.
        batch_size, tokens_per_batch: as `fitting_length` takes them.

    Returns:
        The inputs of the model for each text of each part, and the largest number of tokens in a text.
    """
    # The first piece of a text holds more tokens than are kept, and fits into memory.
    fields = {
        name: [[next(pieces(text)) for text in field] for field in zip(*part.texts)] for name, part in parts.items()
    }
    whole = {name: tokenizer(*texts, verbose=False) for name, texts in fields.items()}
    lengths = {name: [len(ids) for ids in tokens["input_ids"]] for name, tokens in whole.items()}
    every = list(itertools.chain(*lengths.values()))
    limit = max_length or min(fitting_length(every, batch_size, tokens_per_batch), tokenizer.model_max_length)
    sets = {}
    for name, texts in fields.items():
        tokens = whole[name]
        if max(lengths[name]) > limit:
            tokens = tokenizer(*texts, truncation=True, max_length=limit)
        sets[name] = [dict(zip(tokens, row)) for row in zip(*tokens.values())]
    texts = list(itertools.chain(*(part.texts for part in parts.values())))
    ids = itertools.chain(*(tokens["input_ids"] for tokens in whole.values()))
    print(describe(texts, every, list(ids), tokenizer, limit), flush=True)
    return sets, limit


def fitting_length(lengths: Sequence[int], batch_size: int, tokens_per_batch: int) -> int:
    """Find the largest length of a text, at least `SHORTEST` tokens, with which no batch is too large.

    A batch is packed: it holds the tokens of its texts and no padding. The largest batch is that of the longest texts;
    if it is too large, they are all cut to one length.

    Args:
        lengths: tokens of each text.
        batch_size: texts in a batch.
        tokens_per_batch: the most tokens of a batch.
    """
    longest = sorted(lengths)[-batch_size:]
    for done, length in enumerate(longest):
        share = tokens_per_batch // (len(longest) - done)
        if length > share:
            return max(SHORTEST, share)
        tokens_per_batch -= length
    return max(SHORTEST, longest[-1])


def describe(texts: list[tuple[str, ...]], lengths: list[int], ids: list[list[int]], tokenizer, limit: int) -> str:
    """Write a line about what a model will not see: cut and empty texts, holes, and characters it has no token for."""
    parts = [f"{len(texts):,} texts of up to {max(lengths):,} tokens"]
    cut = sum(length > limit for length in lengths)
    parts.append(f"{cut:,} cut at {limit:,} (see --max_length)" if cut else "none cut")
    empty = sum(not "".join(fields).strip() for fields in texts)
    if empty:
        parts.append(f"{empty:,} empty")
    stripped = [{field.strip() for field in fields} for fields in texts]
    holes = [found for row in stripped if (found := {field for field in row if field.lower() in HOLES})]
    if holes:
        parts.append(f"{len(holes):,} with {' or '.join(sorted(set().union(*holes)))} in place of a text")
    if tokenizer.unk_token_id is not None:
        unknown = [fields for fields, row in zip(texts, ids) if tokenizer.unk_token_id in row]
        if unknown:
            # The characters of these texts that the vocabulary lacks at any position of a word.
            words = {word for fields in unknown for text in fields for word in text.split()}
            characters = sorted({sign for word in words for sign in word if not sign.isascii()})
            lost = [sign for sign in characters if tokenizer.unk_token in tokenizer.tokenize(sign)]
            shown = " ".join(lost[:SHOWN]) + (" …" if lost[SHOWN:] else "")
            parts.append(
                f"{len(unknown):,} with text that becomes {tokenizer.unk_token}"
                + (f" ({shown})" if lost else " (words too long for the tokenizer)")
            )
    return "; ".join(parts)


@torch.inference_mode()
def predict(model, tokenizer, rows: list[dict], tokens_per_batch: int) -> np.ndarray:
    """Run a classifier on the rows of `tokenize`, sorted by length, in batches of about `tokens_per_batch` tokens.

    Returns:
        float32 [N, C], the logits in the order of the rows.
    """
    model.eval()
    collate = DataCollatorWithPadding(tokenizer)
    logits = np.empty((len(rows), model.config.num_labels), dtype=np.float32)
    batches, size = [[]], 0
    for row in sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"])):
        size += len(rows[row]["input_ids"])
        if size > tokens_per_batch and batches[-1]:
            batches.append([])
            size = len(rows[row]["input_ids"])
        batches[-1].append(row)
    for batch in tqdm(batches, desc="predicting", unit=" batches", leave=False, disable=None):
        inputs = collate([rows[row] for row in batch]).to(model.device)
        logits[batch] = model(**inputs).logits.float().cpu().numpy()
    return logits
