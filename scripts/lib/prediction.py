"""Predictions of a trained classifier or regressor, and how its texts become tokens."""

import itertools
from collections.abc import Sequence
from typing import Optional

import numpy as np
import torch
from tqdm import tqdm
from transformers import DataCollatorWithPadding

from .examples import REGRESSION, SINGLE, Examples, Task
from .records import pieces

# Whatever the memory, a text may have this many tokens.
SHORTEST = 16
# Distinct characters that one line names.
SHOWN = 8


def task_of(config) -> Task:
    """What a fine-tuned model predicts, without data."""
    guess = REGRESSION if config.num_labels == 1 else SINGLE
    problem = config.problem_type or guess
    names = [] if problem == REGRESSION else [config.id2label[number] for number in range(config.num_labels)]
    return Task(problem, names, {}, {})


def tokenize(
    parts: dict[str, Examples], tokenizer, max_length: Optional[int], batch_size: int, tokens_per_batch: int
) -> tuple[dict[str, list[dict]], int]:
    """Turn texts into tokens, and print what is lost on the way.

    Args:
        parts: texts by what they are for.
        tokenizer: of the model.
        max_length: longer texts are cut to this many tokens; None: see `fitting_length`.
        batch_size, tokens_per_batch: as `fitting_length` takes them.

    Returns:
        The inputs of the model for each text of each part, and the largest number of tokens of a text.
    """
    # The first piece of a text has more tokens than are kept, and fits into memory.
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
    """The largest length of a text with which no batch is too large.

    A batch is packed, so that it holds the tokens of its texts and no padding; the worst batch is that of the longest
    texts. If it is too large, they are cut alike.

    Args:
        lengths: tokens of each text.
        batch_size: texts in a batch.
        tokens_per_batch: tokens that a batch may have.

    Returns:
        Tokens; at least `SHORTEST`.
    """
    longest = sorted(lengths)[-batch_size:]
    for done, length in enumerate(longest):
        share = tokens_per_batch // (len(longest) - done)
        if length > share:
            return max(SHORTEST, share)
        tokens_per_batch -= length
    return max(SHORTEST, longest[-1])


def describe(texts: list[tuple[str, ...]], lengths: list[int], ids: list[list[int]], tokenizer, limit: int) -> str:
    """One line on what a model will not see: cut and empty texts, and characters that its vocabulary lacks."""
    parts = [f"{len(texts):,} texts of up to {max(lengths):,} tokens"]
    cut = sum(length > limit for length in lengths)
    parts.append(f"{cut:,} cut at {limit:,} (see --max_length)" if cut else "none cut")
    empty = sum(not "".join(fields).strip() for fields in texts)
    if empty:
        parts.append(f"{empty:,} empty")
    if tokenizer.unk_token_id is not None:
        unknown = [fields for fields, row in zip(texts, ids) if tokenizer.unk_token_id in row]
        if unknown:
            # Words that become [UNK]; of these, the characters that the vocabulary lacks anywhere in a word.
            words = {word for fields in unknown for text in fields for word in text.split()}
            characters = sorted({sign for word in words for sign in word if not sign.isascii()})
            lost = [sign for sign in characters if tokenizer.unk_token in tokenizer.tokenize(sign)]
            shown = " ".join(lost[:SHOWN]) + (" …" if lost[SHOWN:] else "")
            parts.append(
                f"{len(unknown):,} with what becomes {tokenizer.unk_token}"
                + (f" ({shown})" if lost else " (words too long for the tokenizer)")
            )
    return "; ".join(parts)


@torch.inference_mode()
def predict(model, tokenizer, rows: list[dict], tokens_per_batch: int) -> np.ndarray:
    """Run a model over tokenized texts, sorted by length and in batches.

    Args:
        model: with a classification head.
        tokenizer: of the model.
        rows: as `tokenize` returns them.
        tokens_per_batch: about how many tokens a batch has.

    Returns:
        float32 [N, C], the logits.
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
