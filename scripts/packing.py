"""From text to rows for masked language modelling: read, tokenise, cut, mask and pack without padding."""

import glob
import itertools
import os
from pathlib import Path
from typing import Any, Optional

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a wordpiece that is not predicted
SHORTEST = 8  # wordpieces without [CLS] and [SEP]: what is left of a document below this is dropped
SHUFFLE_BUFFER = 20_000  # sequences held in memory to shuffle a stream


def load_texts(sources: list[str], text_field: str = "text", streaming: bool = False, cache_dir: Optional[str] = None):
    """Open text as one dataset with the single column `text`.

    Args:
        sources: files, glob patterns, `datasets` ids (`id` or `id:config`), or folders of MDS shards.
        text_field: name of the column that holds the text.
        streaming: read while iterating. MDS shards are always read so.
        cache_dir: where `datasets` keeps what it reads; None: its default.

    Returns:
        A `datasets.Dataset`, or a `datasets.IterableDataset` where something is streamed.

    Raises:
        ValueError: no file matches a pattern, a file's suffix is unknown, or there is no such text field.
    """
    parts = [_load_source(source, text_field, streaming, cache_dir) for source in sources]
    if any(isinstance(part, datasets.IterableDataset) for part in parts):
        parts = [p if isinstance(p, datasets.IterableDataset) else p.to_iterable_dataset() for p in parts]
    return datasets.concatenate_datasets(parts)


def _load_source(source: str, text_field: str, streaming: bool, cache_dir: Optional[str]):
    if os.path.isfile(os.path.join(source, "index.json")):
        return datasets.IterableDataset.from_generator(_read_shards, gen_kwargs={"folder": source, "name": text_field})
    files = sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))
    options = {"split": "train", "streaming": streaming, "cache_dir": cache_dir}
    if files:
        suffixes = {Path(path.removesuffix(".gz")).suffix for path in files}
        if suffixes == {".txt"}:
            return datasets.load_dataset("text", data_files=files, sample_by="paragraph", **options)
        if not suffixes <= {".json", ".jsonl"}:
            raise ValueError(f"data must be .txt, .json or .jsonl files, or these with .gz, got {files[0]!r}")
        part = datasets.load_dataset("json", data_files=files, **options)
    elif "*" in source or source.endswith((".txt", ".json", ".jsonl", ".gz")):
        raise ValueError(f"no file matches {source!r}")
    else:
        name, _, config = source.partition(":")
        part = datasets.load_dataset(name, config or None, **options)
    if part.column_names is not None and text_field not in part.column_names:
        raise ValueError(f"text_field must be one of {part.column_names}, the fields of {source!r}, got {text_field!r}")
    part = part.select_columns(text_field)
    return part if text_field == "text" else part.rename_column(text_field, "text")


def _read_shards(folder: str, name: str):
    from streaming import StreamingDataset  # MosaicML Streaming: only needed for MDS shards

    for sample in StreamingDataset(local=folder, shuffle=False, batch_size=1):
        yield {"text": sample[name]}


def cut_documents(
    batch: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    lengths: list[int],
    shares: list[float],
    seed: int,
) -> dict[str, list]:
    """Tokenise documents and cut each into sequences, [CLS] and [SEP] included.

    Args:
        batch: `text`, the documents.
        indices: number of each document in its dataset; with `seed`, it decides where cuts fall.
        tokenizer: has `cls_token_id` and `sep_token_id`.
        lengths: wordpieces of a sequence, at most; each cut draws one of these.
        shares: for each length, the share of all wordpieces that is cut to it. They add up to 1.
        seed: of the draws.

    Returns:
        `input_ids`, a list of integer arrays, and `length`, the size of each.
    """
    texts = tokenizer(
        batch["text"], add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    dtype = token_dtype(tokenizer)
    odds = np.array(shares) / np.array(lengths)
    odds /= odds.sum()
    sequences = []
    for index, ids in zip(indices, texts["input_ids"]):
        generator = np.random.default_rng((seed, index))
        start = 0
        while len(ids) - start >= SHORTEST:
            end = start + generator.choice(lengths, p=odds) - 2
            sequences.append(np.array([tokenizer.cls_token_id, *ids[start:end], tokenizer.sep_token_id], dtype=dtype))
            start = end
    return {"input_ids": sequences, "length": [len(sequence) for sequence in sequences]}


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> str:
    """The smaller of uint16 and int32 that holds every token id."""
    return "uint16" if len(tokenizer) <= 2**16 else "int32"


def load_sequences(
    texts,
    tokenizer: PreTrainedTokenizerBase,
    lengths: list[int],
    shares: list[float],
    seed: int,
    num_proc: Optional[int] = None,
):
    """Tokenise and cut a dataset of documents, on disk and once, or while it streams.

    Args:
        texts: what `load_texts` returns.
        tokenizer, lengths, shares, seed: as `cut_documents` takes them.
        num_proc: processes that tokenise; None: this one (a fast tokenizer uses all cores by itself).

    Returns:
        A dataset of the same kind with columns `input_ids` and `length`, one sequence a row.

    Raises:
        ValueError: the tokenizer lacks a token that is needed.
    """
    for name in ("cls_token", "sep_token", "mask_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"tokenizer must have a {name}, {tokenizer.name_or_path!r} has none")
    settings = {"tokenizer": tokenizer, "lengths": lengths, "shares": shares, "seed": seed}
    features = datasets.Features(
        {"input_ids": datasets.Sequence(datasets.Value(token_dtype(tokenizer))), "length": datasets.Value("int32")}
    )
    options = {
        "batched": True,
        "batch_size": 256,
        "with_indices": True,
        "remove_columns": ["text"],
        "fn_kwargs": settings,
    }
    if isinstance(texts, datasets.IterableDataset):
        return texts.map(cut_documents, features=features, **options)
    # A tokenizer's pickle changes when it is used, so the name of the cache file comes from what it says about itself.
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    state = [texts._fingerprint, vocabulary, lengths, shares, seed, SHORTEST]
    return texts.map(
        cut_documents,
        features=features,
        new_fingerprint=datasets.fingerprint.Hasher.hash(state),
        num_proc=num_proc,
        desc="tokenise",
        **options,
    )


def mask_row(
    sequences: list[np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    probability: float,
    generator: np.random.Generator,
    mask_token_share: float = 0.8,
) -> dict[str, np.ndarray]:
    """Concatenate sequences to one row and choose what is to be predicted, as BERT does.

    Of the chosen wordpieces `mask_token_share` become [MASK]; of the others half become a random wordpiece, and half
    stay. Special tokens are not chosen.

    Args:
        sequences: integer arrays; they are put in the order of their lengths.
        tokenizer: says what [MASK] and the special tokens are.
        probability: share of the wordpieces that is chosen.
        generator: source of the draws.
        mask_token_share: share of the chosen wordpieces that becomes [MASK], in [0, 1].

    Returns:
        `input_ids` and `labels`, int64 [T], labels -100 where nothing is predicted, and `lengths`, int64 [N].

    Source: https://arxiv.org/abs/1810.04805, section 3.1; 30% is https://arxiv.org/abs/2312.17482, section 3.2.
    """
    sequences = sorted(sequences, key=len)  # attention serves neighbours of equal length in one call
    input_ids = np.concatenate(sequences).astype(np.int64)
    chosen = (generator.random(len(input_ids)) < probability) & ~np.isin(input_ids, tokenizer.all_special_ids)
    labels = np.where(chosen, input_ids, IGNORED)
    fate = generator.random(len(input_ids))
    input_ids[chosen & (fate < mask_token_share)] = tokenizer.mask_token_id
    swapped = chosen & (fate >= mask_token_share) & (fate < (1 + mask_token_share) / 2)
    input_ids[swapped] = generator.integers(len(tokenizer), size=int(swapped.sum()))
    return {"input_ids": input_ids, "labels": labels, "lengths": np.array([len(s) for s in sequences])}


def flatten_rows(rows: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Collate rows of `mask_row` to one batch without padding.

    Returns:
        `input_ids` and `labels`, int64 [1, T]; `cu_seq_lens_q` and `cu_seq_lens_k`, int32 [N + 1], where each sequence
        starts; `max_length_q` and `max_length_k`, wordpieces of the longest. The names are those of transformers'
        DataCollatorWithFlattening.
    """
    batch = {
        name: torch.from_numpy(np.concatenate([row[name] for row in rows]))[None] for name in ("input_ids", "labels")
    }
    lengths = np.concatenate([row["lengths"] for row in rows])
    starts = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
    longest = int(lengths.max())
    return {**batch, "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


class PackedRows(torch.utils.data.Dataset):
    """Masked rows of concatenated sequences; row i is a function of i and the seed alone, so a run can resume anywhere.

    Rows past the first pass repeat the same rows in another order, with other masks.

    Args:
        sequences: what `load_sequences` returns for a `datasets.Dataset`.
        tokenizer: as `mask_row` takes it.
        tokens_per_row: wordpieces of a row, at most.
        mask_probability, mask_token_share: as `mask_row` takes them.
        seed: of the order and the masks.

    Attributes:
        rows_per_pass: rows that hold every sequence once.
        num_rows: what `len` says. Set it to what a run needs; it starts as one pass.

    Raises:
        ValueError: there is no sequence, or one is longer than a row.
    """

    def __init__(
        self,
        sequences,
        tokenizer,
        tokens_per_row: int,
        mask_probability: float,
        seed: int,
        mask_token_share: float = 0.8,
    ):
        self.sequences = sequences.with_format("numpy")
        lengths = self.sequences[:]["length"] if len(sequences) else np.zeros(0)
        if not len(lengths):
            raise ValueError(f"the data holds no document of at least {SHORTEST} wordpieces")
        if lengths.max() > tokens_per_row:
            raise ValueError(
                f"tokens_per_row must be at least the longest sequence, {lengths.max()}, got {tokens_per_row}"
            )
        self.order = np.random.default_rng(seed).permutation(len(lengths))
        starts, filled = [0], 0
        for place, length in enumerate(lengths[self.order]):
            if filled + length > tokens_per_row:
                starts.append(place)
                filled = 0
            filled += length
        self.bounds = [*starts, len(lengths)]
        self.rows_per_pass = self.num_rows = len(starts)
        self.tokenizer, self.seed = tokenizer, seed
        self.mask_probability, self.mask_token_share = mask_probability, mask_token_share
        self._pass = None

    def __len__(self):
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        number, place = divmod(index, self.rows_per_pass)
        if number != self._pass:
            self._pass = number
            self._pass_order = np.random.default_rng((self.seed, number)).permutation(self.rows_per_pass)
        row = self._pass_order[place]
        sequences = self.sequences[self.order[self.bounds[row] : self.bounds[row + 1]]]["input_ids"]
        return mask_row(
            list(sequences),
            self.tokenizer,
            self.mask_probability,
            np.random.default_rng((self.seed, index)),
            self.mask_token_share,
        )


class StreamedRows(torch.utils.data.IterableDataset):
    """The rows of `PackedRows` from a stream, without end: when the stream ends it is read again in another order.

    Args:
        sequences: what `load_sequences` returns for a `datasets.IterableDataset`.
        tokenizer, tokens_per_row, mask_probability, seed, mask_token_share: as `PackedRows` takes them.
    """

    def __init__(
        self,
        sequences,
        tokenizer,
        tokens_per_row: int,
        mask_probability: float,
        seed: int,
        mask_token_share: float = 0.8,
    ):
        self.sequences = sequences.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER).with_format("numpy")
        self.tokenizer, self.tokens_per_row = tokenizer, tokens_per_row
        self.mask_probability, self.mask_token_share, self.seed = mask_probability, mask_token_share, seed

    def __iter__(self):
        index, row, filled = 0, [], 0
        for number in itertools.count():
            self.sequences.set_epoch(number)
            for sequence in self.sequences:
                ids = sequence["input_ids"]
                if row and filled + len(ids) > self.tokens_per_row:
                    generator = np.random.default_rng((self.seed, index))
                    yield mask_row(row, self.tokenizer, self.mask_probability, generator, self.mask_token_share)
                    index, row, filled = index + 1, [], 0
                row.append(ids)
                filled += len(ids)
            if not row and not index:
                raise ValueError(f"the data holds no document of at least {SHORTEST} wordpieces")
