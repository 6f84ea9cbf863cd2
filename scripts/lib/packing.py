"""Prepare text for masked language modelling: tokenize it once, and cut, mask and pack it without padding.

Text becomes a folder of tokenized documents (`Documents`): one file of token ids and one of bounds. Cutting
documents into sequences and packing sequences into rows only handles indices; tokens are copied when a row is read. A
stream is tokenized while it is read.
"""

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .cli import one_line
from .common import check_special, read_json, vocabulary_size
from .records import TEXT_FILES, find_files, load_dataset, pieces, read_texts
from .sources import SHORTEST, holds_documents, is_text_file
from .staging import shared_folder

IGNORED = -100  # label of a token that is not predicted
SHUFFLE_BUFFER = 20_000  # sequences in memory to shuffle a stream
BATCH_CHARACTERS = 4_000_000  # characters that the tokenizer gets at once, enough to occupy all cores
MOST_COPIES = 1000  # of a tokenized text, which is copied as often as its source is named
TOO_SHORT = f"the data holds no document of at least {SHORTEST} tokens"
TOO_LONG = "tokens_per_row must be at least the longest sequence, {}, got {}"


class Documents:
    """Tokenized documents in a folder that `tokenize` wrote; the folder can be copied to another machine.

    Args:
        folder: holds `tokens.bin`, `bounds.npy` and `documents.json`.
        tokenizer: must have the vocabulary of the documents; None: not checked.

    Attributes:
        tokens: uint16 or int32 [T], the token ids of all documents, mapped from the file.
        bounds: int64 [N, 2], the start and the end of each document, which may occur more than once.

    Raises:
        ValueError: the folder is not complete, or the vocabulary is another one.
    """

    def __init__(self, folder: Path, tokenizer: Optional[PreTrainedTokenizerBase] = None):
        self.folder = Path(folder)
        about = read_json(self.folder / "documents.json")
        number = about.get("tokens")
        if about.get("dtype") not in ("uint16", "int32") or not isinstance(number, int) or number < 1:
            raise ValueError(f"{self.folder / 'documents.json'}: expected the output of --tokenize_only, got {about}")
        if tokenizer is not None and about.get("vocabulary") != hash_vocabulary(tokenizer):
            raise ValueError(
                f"{self.folder} was tokenized with another vocabulary than that of {tokenizer.name_or_path!r}"
            )
        path = self.folder / "tokens.bin"
        wanted = about["tokens"] * np.dtype(about["dtype"]).itemsize
        if not path.is_file() or path.stat().st_size != wanted:
            raise ValueError(f"{path}: expected {wanted} bytes, the file is not complete")
        path = self.folder / "bounds.npy"
        try:
            self.bounds = np.asarray(np.load(path, mmap_mode="r"))  # a mapped file allocates no memory for its size
        except (OSError, OverflowError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: expected an array of NumPy, {one_line(error)}") from error
        ordered = self.bounds.dtype == np.int64 and self.bounds.ndim == 2 and self.bounds.shape[1] == 2
        starts, ends = self.bounds.T if ordered else (np.ones(1), np.zeros(1))
        if not len(starts) or starts.min() < 0 or (ends < starts).any() or ends.max() > about["tokens"]:
            raise ValueError(f"{path}: expected the starts and ends of documents in {about['tokens']} tokens")
        if (ends - starts).sum(dtype=np.float64) > MOST_COPIES * about["tokens"]:
            raise ValueError(f"{path}: expected each of {about['tokens']} tokens in at most {MOST_COPIES} documents")
        self.tokens = np.asarray(np.memmap(self.folder / "tokens.bin", about["dtype"], "r"))

    def __reduce__(self):  # a worker process opens the files itself
        return Documents, (self.folder,)


def hash_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash a vocabulary in a way that no release of the tokenizers library changes."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def tokenize(parts: Sequence[Iterable[str]], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Tokenize texts without special tokens into a folder that `Documents` opens; a fast tokenizer uses all cores.

    Args:
        parts: the texts, one iterable per source. An iterable that occurs twice is tokenized once.
        tokenizer: of the model.
        folder: an empty one to write to.

    Raises:
        ValueError: no document has `SHORTEST` tokens.
    """
    dtype = np.dtype("uint16" if len(tokenizer) <= 2**16 else "int32")
    unique = {id(part): part for part in parts}
    sizes, owners, total, said = [], [], 0, time.monotonic()
    progress = tqdm(desc="tokenize", unit=" tokens", unit_scale=True, disable=None)
    with open(folder / "tokens.bin", "wb") as file, progress as bar:
        owned = ((number, text) for number, part in unique.items() for text in part)
        for number, ids in encode(owned, tokenizer, dtype):
            file.write(ids.tobytes())
            sizes.append(len(ids))
            owners.append(number)
            bar.update(len(ids))
            total += len(ids)
            if bar.disable and time.monotonic() - said > 10:
                said = time.monotonic()
                print(f"tokenized {total:,} tokens of {len(sizes):,} documents", flush=True)
    if max(sizes, default=0) < SHORTEST:
        raise ValueError(TOO_SHORT)
    ends = np.cumsum(sizes)
    bounds, owners = np.stack([ends - sizes, ends], axis=1), np.array(owners)
    np.save(folder / "bounds.npy", np.concatenate([bounds[owners == id(part)] for part in parts]))
    about = {"dtype": dtype.name, "tokens": int(ends[-1]), "vocabulary": hash_vocabulary(tokenizer)}
    (folder / "documents.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def encode(
    texts: Iterable[tuple[Any, str]], tokenizer: PreTrainedTokenizerBase, dtype: np.dtype
) -> Iterator[tuple[Any, np.ndarray]]:
    """Tokenize texts of any length in batches that occupy all cores and bound the memory.

    Args:
        texts: pairs of an owner, which may be anything, and a text.
        tokenizer: used without special tokens.
        dtype: of the ids.

    Yields:
        The owner of each text, and its token ids, `dtype` [T].
    """
    parts = []
    for batch in _batches(texts):
        ids = tokenizer(
            [piece for _, piece, _ in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        for (owner, _, is_last), piece in zip(batch, ids):
            parts.append(np.array(piece, dtype))
            if is_last:
                yield owner, np.concatenate(parts)
                parts = []


def _batches(texts: Iterable[tuple[Any, str]]) -> Iterator[list[tuple[Any, str, bool]]]:
    """Cut texts into pieces, and yield batches of them: owner, text, and whether it is the document's last piece."""
    batch, characters = [], 0
    for owner, text in texts:
        left = len(text)
        for piece in pieces(text):
            left -= len(piece)
            batch.append((owner, piece, left == 0))
            characters += len(piece)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


@dataclass
class _Source:
    """Text that can be read repeatedly, with an identity for the cache."""

    identity: Any
    read: Any  # () -> Iterator[str]

    def __iter__(self):
        return self.read()


def open_sources(sources: Sequence[str], text_field: str, argument: str = "data") -> list[_Source]:
    """Find the text of `sources`, one entry per file.

    Args:
        sources: names or patterns of `TEXT_FILES`, folders of MDS shards, or `datasets` ids (`id` or `id:config`).
        text_field: the field that holds the text.
        argument: the name of `sources` on the command line.

    Raises:
        ValueError: no file matches, or there is no such text field.
    """
    names = []
    for source in sources:
        names += find_files([source], TEXT_FILES, argument) if is_text_file(source, argument) else [source]
    opened = {name: _open_source(name, text_field) for name in dict.fromkeys(names)}
    return [opened[name] for name in names]


def _open_source(name: str, text_field: str) -> _Source:
    if os.path.isfile(name):
        status = os.stat(name)
        identity = [os.path.abspath(name), status.st_size, status.st_mtime_ns, text_field]
        return _Source(identity, lambda: read_texts([name], text_field))
    if os.path.isdir(name):
        index = Path(name, "index.json").read_text(encoding="utf-8")
        return _Source([os.path.abspath(name), index, text_field], lambda: _read_shards([name], text_field))
    dataset = _load_dataset(name, text_field, streaming=False)
    return _Source([name, dataset._fingerprint], lambda: (text for text in dataset["text"] if text and text.strip()))


def _load_dataset(source: str, text_field: str, streaming: bool):
    part = load_dataset(source, "train", streaming=streaming)
    if part.column_names is not None and text_field not in part.column_names:
        raise ValueError(f"text_field must be one of {part.column_names}, the fields of {source!r}, got {text_field!r}")
    part = part.select_columns(text_field)
    return part if text_field == "text" else part.rename_column(text_field, "text")


def _read_shards(folders: list[str], text_field: str) -> Iterator[str]:
    from streaming import StreamingDataset  # MosaicML Streaming: only needed for MDS shards

    for folder in folders:
        for number, sample in enumerate(StreamingDataset(local=folder, shuffle=False, batch_size=1)):
            if text_field not in sample:
                raise ValueError(
                    f"{folder}, sample {number}: text_field must be one of {sorted(sample)}, got {text_field!r}"
                )
            yield sample[text_field]


def load_documents(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    text_field: str = "text",
    cache_dir: Optional[str] = None,
) -> list[Documents]:
    """Open tokenized documents, and tokenize text, which is cached for the next run.

    Args:
        sources: folders that `tokenize` wrote, and sources of `open_sources`.
        tokenizer: of the model.
        text_field: the field that holds the text.
        cache_dir: the folder for tokenized text; None: `mosaicbert` in the cache of Hugging Face.

    Returns:
        One entry per tokenized folder, and one for all text.

    Raises:
        ValueError: see `open_sources`, `shared_folder`, `tokenize` and `Documents`.
    """
    check_special(tokenizer, "cls_token", "sep_token", "mask_token")
    documents = [Documents(source, tokenizer) for source in sources if holds_documents(source)]
    parts = open_sources([source for source in sources if not holds_documents(source)], text_field)
    if parts:
        vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
        state = json.dumps([[part.identity for part in parts], vocabulary])
        name = hashlib.sha256(state.encode()).hexdigest()[:32]
        folder = Path(cache_dir or Path(HF_HOME, "mosaicbert")) / name
        if not holds_documents(folder):
            with shared_folder(folder, "cache_dir") as stage:
                tokenize(parts, tokenizer, stage)
        documents.append(Documents(folder, tokenizer))
    return documents


def cut_documents(
    sizes: np.ndarray, lengths: Sequence[int], shares: Sequence[float], seed
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents into sequences.

    Args:
        sizes: int [N], tokens of each document.
        lengths: maximum tokens of a sequence, [CLS] and [SEP] included; each cut draws one of these.
        shares: the share of all tokens that is cut to each length; they sum to 1.
        seed: of the draws, as `numpy.random.default_rng` takes it.

    Returns:
        The document of each sequence, its first token there, and its size without [CLS] and [SEP], int64 [M] each.
    """
    sizes = np.asarray(sizes, np.int64)
    odds = np.array(shares) / np.array(lengths)
    generator = np.random.default_rng(seed)
    starts = np.zeros_like(sizes)
    open_documents = np.flatnonzero(sizes >= SHORTEST)
    parts = [(np.zeros(0, np.int64),) * 3]
    while len(open_documents):
        draws = min(256, max(1, 65_536 // len(open_documents)))
        cuts = generator.choice(np.array(lengths) - 2, (len(open_documents), draws), p=odds / odds.sum())
        ends = starts[open_documents, None] + cuts.cumsum(1)
        begins = ends - cuts
        limits = sizes[open_documents, None]
        kept = limits - begins >= SHORTEST
        owners = np.broadcast_to(open_documents[:, None], kept.shape)
        parts.append((owners[kept], begins[kept], (np.minimum(ends, limits) - begins)[kept]))
        starts[open_documents] = ends[:, -1]
        open_documents = open_documents[sizes[open_documents] - ends[:, -1] >= SHORTEST]
    owners, begins, taken = map(np.concatenate, zip(*parts))
    order = np.lexsort((begins, owners))
    return owners[order], begins[order], taken[order]


@dataclass
class Sequences:
    """Sequences of tokenized documents, as indices.

    Attributes:
        documents: hold the tokens.
        part: int64 [N], the index in `documents` of each sequence.
        start: int64 [N], its first token there.
        size: int64 [N], its tokens without [CLS] and [SEP].
        cls_token_id, sep_token_id: put before and after each.
        vocabulary: the bound of all token ids.
    """

    documents: list[Documents]
    part: np.ndarray
    start: np.ndarray
    size: np.ndarray
    cls_token_id: int
    sep_token_id: int
    vocabulary: int

    def __len__(self) -> int:
        return len(self.size)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], tokens of each sequence with [CLS] and [SEP]."""
        return self.size + 2

    def concatenate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Join sequences in order of their length, since attention takes neighbours of equal length in one call.

        Args:
            numbers: int64 [M], indices of the sequences.

        Returns:
            Token ids, int64 [T], and the length of each sequence, int64 [M].
        """
        numbers = numbers[np.argsort(self.size[numbers], kind="stable")]
        lengths = self.lengths[numbers]
        ends = lengths.cumsum()
        input_ids = np.empty(ends[-1], np.int64)
        input_ids[ends - lengths] = self.cls_token_id
        input_ids[ends - 1] = self.sep_token_id
        columns = (self.part[numbers], self.start[numbers], self.size[numbers], ends - lengths + 1)
        for part, start, size, offset in zip(*(column.tolist() for column in columns)):
            input_ids[offset : offset + size] = self.documents[part].tokens[start : start + size]
        if input_ids.min() < 0 or input_ids.max() >= self.vocabulary:
            folders = ", ".join(str(folder.folder) for folder in self.documents)
            raise ValueError(f"{folders}: expected tokens below {self.vocabulary}, the file is damaged")
        return input_ids, lengths


def load_sequences(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    shares: Sequence[float],
    seed: int,
    text_field: str = "text",
    cache_dir: Optional[str] = None,
) -> Sequences:
    """Load documents with the arguments of `load_documents`, and cut them with those of `cut_documents`."""
    documents = load_documents(sources, tokenizer, text_field, cache_dir)
    bounds = np.concatenate([folder.bounds for folder in documents])
    owners, begins, size = cut_documents(bounds[:, 1] - bounds[:, 0], lengths, shares, seed)
    part = np.repeat(np.arange(len(documents)), [len(folder.bounds) for folder in documents])
    start = bounds[owners, 0] + begins
    special = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    return Sequences(documents, part[owners], start, size, *special, vocabulary_size(tokenizer))


def stream_sequences(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    shares: Sequence[float],
    seed: int,
    text_field: str = "text",
):
    """Do as `load_sequences`, but tokenize and cut documents while they are read, for data that is too large to store.

    Returns:
        A `datasets.IterableDataset` with the columns `input_ids` and `length`, one sequence a row.

    Raises:
        ValueError: see `open_sources`; the tokenizer lacks a special token, or a source is already tokenized.
    """
    check_special(tokenizer, "cls_token", "sep_token", "mask_token")
    for source in filter(holds_documents, sources):
        raise ValueError(f"streaming: {source!r} is already tokenized; leave out --streaming")
    import datasets

    # Without features the library looks for the first text, and raises an error of its own if there is none.
    features = datasets.Features({"text": datasets.Value("string")})
    parts = []
    for source in sources:
        are_texts = is_text_file(source)
        if not are_texts and not os.path.isdir(source):
            parts.append(_load_dataset(source, text_field, streaming=True))
            continue
        read, names = (read_texts, find_files([source])) if are_texts else (_read_shards, [source])
        settings = {"read": read, "names": names, "text_field": text_field}
        parts.append(datasets.IterableDataset.from_generator(_examples, features=features, gen_kwargs=settings))
    dtype = "uint16" if len(tokenizer) <= 2**16 else "int32"
    return datasets.concatenate_datasets(parts).map(
        _cut_batch,
        features=datasets.Features(
            {"input_ids": datasets.Sequence(datasets.Value(dtype)), "length": datasets.Value("int32")}
        ),
        batched=True,
        batch_size=256,
        with_indices=True,
        remove_columns=["text"],
        fn_kwargs={"tokenizer": tokenizer, "lengths": lengths, "shares": shares, "seed": seed},
    )


def _examples(read, names: list[str], text_field: str) -> Iterator[dict[str, str]]:
    for text in read(names, text_field):
        yield {"text": text}


def _cut_batch(batch: dict[str, list], indices: list[int], tokenizer, lengths, shares, seed: int) -> dict[str, list]:
    ids = [ids for _, ids in encode(enumerate(batch["text"]), tokenizer, np.dtype("int32"))]
    cuts = cut_documents([len(document) for document in ids], lengths, shares, (seed, indices[0]))
    sequences = [
        [tokenizer.cls_token_id, *ids[owner][begin : begin + size], tokenizer.sep_token_id]
        for owner, begin, size in zip(*(column.tolist() for column in cuts))
    ]
    return {"input_ids": sequences, "length": [len(sequence) for sequence in sequences]}


class Masking:
    """Chooses the tokens to predict, as BERT does, but never special tokens.

    Args:
        tokenizer: of the model.
        probability: share of the tokens that is chosen, in [0, 1].
        mask_token_share: share of the chosen tokens that becomes [MASK], in [0, 1]; half of the others become a random
            token, and half stay.

    Source: https://arxiv.org/abs/1810.04805, section 3.1; 30% is https://arxiv.org/abs/2312.17482, section 3.2.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float, mask_token_share: float = 0.8):
        self.probability, self.mask_token_share = probability, mask_token_share
        self.mask_token_id, self.vocabulary = tokenizer.mask_token_id, len(tokenizer)
        self.is_special = np.zeros(max(self.vocabulary, *(number + 1 for number in tokenizer.all_special_ids)), bool)
        self.is_special[tokenizer.all_special_ids] = True

    def __call__(
        self, input_ids: np.ndarray, lengths: np.ndarray, generator: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Mask one row.

        Args:
            input_ids: int64 [T], changed in place.
            lengths: int64 [N], of the sequences in it.
            generator: source of the draws.

        Returns:
            `input_ids` and `labels`, int64 [T], labels -100 where nothing is predicted, and `lengths`.
        """
        drawn = generator.random(len(input_ids), dtype=np.float32) < self.probability
        chosen = np.flatnonzero(drawn & ~self.is_special[input_ids])
        labels = np.full_like(input_ids, IGNORED)
        labels[chosen] = input_ids[chosen]
        fate = generator.random(len(chosen), dtype=np.float32)
        input_ids[chosen[fate < self.mask_token_share]] = self.mask_token_id
        swapped = chosen[(fate >= self.mask_token_share) & (fate < (1 + self.mask_token_share) / 2)]
        input_ids[swapped] = generator.integers(self.vocabulary, size=len(swapped))
        return {"input_ids": input_ids, "labels": labels, "lengths": lengths}


def flatten_rows(rows: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Collate rows of `Masking` into one batch without padding, with the names of DataCollatorWithFlattening.

    Returns:
        `input_ids` and `labels`, int64 [1, T]; `cu_seq_lens_q` and `cu_seq_lens_k`, int32 [N + 1], the start of each
        sequence; `max_length_q` and `max_length_k`, tokens of the longest; `masked_lm_positions`, int64 [M], the
        positions with a label, which avoid a device synchronization.
    """
    batch = {
        name: torch.from_numpy(np.concatenate([row[name] for row in rows]))[None] for name in ("input_ids", "labels")
    }
    lengths = np.concatenate([row["lengths"] for row in rows])
    starts = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
    longest = int(lengths.max())
    boundaries = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    return {**batch, **boundaries, "masked_lm_positions": (batch["labels"][0] != IGNORED).nonzero().flatten()}


class PackedRows(torch.utils.data.Dataset):
    """Masked rows of concatenated sequences; row i is a function of i and the seed alone, so a run can resume anywhere.

    Later passes have the same rows in another order, with other masks.

    Args:
        sequences: as `load_sequences` returns them.
        masking: masks a row.
        tokens_per_row: the most tokens of a row.
        seed: of the order and the masks.

    Attributes:
        rows_per_pass: rows in one pass over all sequences.
        num_rows: the length, one pass at first; a run sets it to the number that it needs.

    Raises:
        ValueError: a sequence is longer than a row.
    """

    def __init__(self, sequences: Sequences, masking: Masking, tokens_per_row: int, seed: int):
        self.sequences, self.masking, self.seed = sequences, masking, seed
        lengths = sequences.lengths
        if lengths.max() > tokens_per_row:
            raise ValueError(TOO_LONG.format(lengths.max(), tokens_per_row))
        self.order = np.random.default_rng(seed).permutation(len(lengths))
        starts, filled = [0], 0
        for index, length in enumerate(lengths[self.order].tolist()):
            if filled + length > tokens_per_row:
                starts.append(index)
                filled = 0
            filled += length
        self.bounds = [*starts, len(lengths)]
        self.rows_per_pass = self.num_rows = len(starts)
        self._pass = None

    def __len__(self):
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        number, position = divmod(index, self.rows_per_pass)
        if number != self._pass:
            self._pass = number
            self._pass_order = np.random.default_rng((self.seed, number)).permutation(self.rows_per_pass)
        row = self._pass_order[position]
        input_ids, lengths = self.sequences.concatenate(self.order[self.bounds[row] : self.bounds[row + 1]])
        return self.masking(input_ids, lengths, np.random.default_rng((self.seed, index)))


class StreamedRows(torch.utils.data.IterableDataset):
    """Rows as in `PackedRows` from the stream of `stream_sequences`, read again in another order at its end.

    Attributes:
        num_rows: infinite at first; with a finite number a process reads the stream once, up to so many rows.

    Raises:
        ValueError: while it is read, if the stream holds no sequence, or one that is longer than a row.
    """

    def __init__(self, sequences, masking: Masking, tokens_per_row: int, seed: int):
        self.sequences = sequences.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER).with_format("numpy")
        self.masking, self.tokens_per_row, self.seed, self.num_rows = masking, tokens_per_row, seed, math.inf

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.id >= self.sequences.num_shards:
            return  # the library reads each shard in one worker, and there are fewer shards than workers
        index, row, filled = 0, [], 0
        for number in itertools.count():
            self.sequences.set_epoch(number)
            for sequence in self.sequences:
                ids = sequence["input_ids"]
                if len(ids) > self.tokens_per_row:
                    raise ValueError(TOO_LONG.format(len(ids), self.tokens_per_row))
                if row and filled + len(ids) > self.tokens_per_row:
                    yield self._mask(row, worker, index)
                    index, row, filled = index + 1, [], 0
                    if index == self.num_rows:
                        return
                row.append(ids)
                filled += len(ids)
            if not row and not index:
                raise ValueError(TOO_SHORT)
            if self.num_rows < math.inf:
                yield self._mask(row, worker, index)
                return

    def _mask(self, row: list[np.ndarray], worker, index: int) -> dict[str, np.ndarray]:
        row.sort(key=len)
        generator = np.random.default_rng((self.seed, worker.id if worker else 0, index))
        return self.masking(np.concatenate(row).astype(np.int64), np.array([len(part) for part in row]), generator)
