"""scripts/lib/packing.py: text is tokenized once, cut, masked and packed without losing or mixing anything."""

import itertools
import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT
from corpora import WORDS
from lib import packing, records, sources
from transformers import BertTokenizerFast, DataCollatorWithFlattening


def sequences_of(source, tokenizer, lengths=(32,), shares=(1.0,), **settings):
    return packing.load_sequences([str(source)], tokenizer, list(lengths), list(shares), seed=0, **settings)


@pytest.fixture
def tokens(corpus, tokenizer, tmp_path):
    """A folder of tokenized documents."""
    (tmp_path / "tokens").mkdir()
    packing.tokenize(packing.open_sources([str(corpus)], "text"), tokenizer, tmp_path / "tokens")
    return tmp_path / "tokens"


def all_of(sequences):
    """Each sequence as a tuple of token ids."""
    return [tuple(sequences.concatenate(np.array([number]))[0].tolist()) for number in range(len(sequences))]


def test_documents_are_cut_without_losing_or_mixing_anything(tokenizer, tmp_path):
    texts = [" ".join(WORDS * 3), "ba be bi", " ".join(WORDS[::-1])]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    sequences = sequences_of(tmp_path / "a.jsonl", tokenizer)
    cut = all_of(sequences)
    assert [len(ids) for ids in cut] == sequences.lengths.tolist() and max(map(len, cut)) == 32
    assert {(ids[0], ids[-1]) for ids in cut} == {(tokenizer.cls_token_id, tokenizer.sep_token_id)}
    # The second document is shorter than the shortest sequence and left out.
    assert tokenizer.decode([number for ids in cut for number in ids[1:-1]]).split() == WORDS * 3 + WORDS[::-1]


def test_cuts_tile_every_document(tokenizer):
    sizes = np.random.default_rng(1).integers(0, 5000, 300)
    owners, begins, taken = packing.cut_documents(sizes, [16, 64, 128], [0.2, 0.3, 0.5], seed=0)
    assert (taken >= sources.SHORTEST).all() and (taken <= 126).all()
    for document, size in enumerate(sizes):
        own = owners == document
        ends = (begins + taken)[own]
        assert (begins[own] == np.concatenate([[0], ends])[: own.sum()]).all()
        assert size - (ends[-1] if len(ends) else 0) < sources.SHORTEST


def test_lengths_are_mixed_by_their_share_of_tokens():
    _, _, taken = packing.cut_documents([40_000], [16, 64], [0.3, 0.7], seed=0)
    lengths = taken + 2
    # 40,000 tokens make about 1,200 draws: five standard deviations of the share are below 0.05.
    assert abs(lengths[lengths <= 16].sum() / lengths.sum() - 0.3) < 0.05


def test_masking_is_bert_s_80_10_10_and_spares_special_tokens(tokenizer):
    words = np.random.default_rng(0).integers(5, 45, 50_000)
    first = np.array([tokenizer.cls_token_id, *words, tokenizer.sep_token_id])

    def mask(**share):
        masking = packing.Masking(tokenizer, 0.3, **share)
        return masking(first.copy(), np.array([len(first)]), np.random.default_rng(1))

    row = mask()
    chosen = row["labels"] != -100
    assert not chosen[[0, -1]].any()
    assert (row["labels"][chosen] == first[chosen]).all() and (row["input_ids"][~chosen] == first[~chosen]).all()
    assert abs(chosen.mean() - 0.3) < 0.012  # five standard deviations of 50,000 draws
    masked = row["input_ids"][chosen] == tokenizer.mask_token_id
    kept = row["input_ids"][chosen] == first[chosen]
    assert abs(masked.mean() - (0.8 + 0.1 / 45)) < 0.02  # five standard deviations of 15,000 draws; 45 words to draw
    assert abs(kept.mean() - (0.1 + 0.1 / 45)) < 0.015
    row = mask(mask_token_share=1.0)
    assert (row["input_ids"][row["labels"] != -100] == tokenizer.mask_token_id).all()


def test_each_sequence_is_in_one_row_of_a_pass(corpus, tokenizer):
    sequences = sequences_of(corpus, tokenizer)
    rows = packing.PackedRows(sequences, packing.Masking(tokenizer, 0.0), 100, seed=0)
    seen = []
    for i in range(len(rows)):
        row = rows[i]
        assert len(row["input_ids"]) == row["lengths"].sum() <= 100 and sorted(row["lengths"]) == list(row["lengths"])
        seen += [tuple(part.tolist()) for part in np.split(row["input_ids"], row["lengths"].cumsum()[:-1])]
    assert sorted(seen) == sorted(all_of(sequences))


def test_a_row_depends_on_its_number_alone_and_the_next_pass_is_masked_afresh(corpus, tokenizer):
    def make():
        return packing.PackedRows(sequences_of(corpus, tokenizer), packing.Masking(tokenizer, 0.3), 100, seed=0)

    one, other = make(), pickle.loads(pickle.dumps(make()))  # as a worker process gets it
    size = one.rows_per_pass
    before = [one[i] for i in range(2 * size)]
    for i in (size + 3, 5, 0):
        assert all((other[i][name] == before[i][name]).all() for name in before[i])

    def originals(rows):
        return sorted(np.where(row["labels"] == -100, row["input_ids"], row["labels"]).tolist() for row in rows)

    assert originals(before[:size]) == originals(before[size:])
    masks = [sorted((row["labels"] != -100).tolist() for row in part) for part in (before[:size], before[size:])]
    assert masks[0] != masks[1]


def test_a_stream_gives_the_same_text_and_starts_over_in_another_order(corpus, tokenizer):
    pytest.importorskip("datasets")
    stream = packing.stream_sequences([str(corpus)], tokenizer, [32], [1.0], seed=0)
    stored = sequences_of(corpus, tokenizer)
    assert sorted(tuple(row["input_ids"]) for row in stream) == sorted(all_of(stored))
    rows = packing.StreamedRows(stream, packing.Masking(tokenizer, 0.0), 100, seed=0)
    passes, iterator = [], iter(rows)
    for _ in range(2):
        row, taken = [], 0
        while taken < 0.9 * stored.lengths.sum():
            row.append(next(iterator))
            taken += len(row[-1]["input_ids"])
            assert len(row[-1]["input_ids"]) <= 100
        passes.append(np.concatenate([part["input_ids"] for part in row]))
    assert (passes[0][:200] != passes[1][:200]).any()


def test_a_stream_without_text_is_named_and_one_beside_others_is_passed_over(corpus, tokenizer, tmp_path):
    """The library once looked for the first text, and raised StopIteration."""
    (tmp_path / "empty.txt").write_text("\n\n")
    masking = packing.Masking(tokenizer, 0.3)
    empty = packing.stream_sequences([str(tmp_path / "empty.txt")], tokenizer, [32], [1.0], 0)
    with pytest.raises(ValueError, match="^the data holds no document of at least 8 tokens"):
        next(iter(packing.StreamedRows(empty, masking, 64, 0)))
    both = packing.stream_sequences([str(tmp_path / "empty.txt"), str(corpus)], tokenizer, [32], [1.0], 0)
    assert len(next(iter(packing.StreamedRows(both, masking, 64, 0)))["input_ids"]) > 32


def test_a_stream_of_so_many_rows_is_read_once_and_in_one_order(corpus, tokenizer):
    """Validation data that is streamed once had no end."""
    stream = packing.stream_sequences([str(corpus)], tokenizer, [32], [1.0], seed=0)
    rows = packing.StreamedRows(stream, packing.Masking(tokenizer, 0.0), 100, seed=0)
    rows.num_rows = 3
    first, again = (np.concatenate([row["input_ids"] for row in rows]) for _ in range(2))
    assert (first == again).all() and 200 < len(first) <= 300
    rows.num_rows = 10**6
    found = [tuple(part) for row in rows for part in np.split(row["input_ids"], row["lengths"].cumsum()[:-1])]
    assert sorted(found) == sorted(all_of(sequences_of(corpus, tokenizer)))


def test_a_stream_with_a_sequence_that_is_longer_than_a_row_is_named(corpus, tokenizer):
    """It once became a row of its own, beyond the memory that --tokens_per_row allows."""
    stream = packing.stream_sequences([str(corpus)], tokenizer, [32], [1.0], seed=0)
    with pytest.raises(ValueError, match=r"^tokens_per_row must be at least the longest sequence, \d\d, got 20"):
        list(itertools.islice(packing.StreamedRows(stream, packing.Masking(tokenizer, 0.3), 20, 0), 1000))


def test_a_worker_process_without_a_file_of_its_own_gives_no_rows(corpus, tokenizer):
    pytest.importorskip("datasets")
    stream = packing.stream_sequences([str(corpus)], tokenizer, [32], [1.0], seed=0)
    rows = packing.StreamedRows(stream, packing.Masking(tokenizer, 0.0), 100, seed=0)
    loader = iter(torch.utils.data.DataLoader(rows, batch_size=1, num_workers=2, collate_fn=packing.flatten_rows))
    assert [next(loader)["input_ids"].shape[0] for _ in range(4)] == [1] * 4


def test_text_files_and_shards_are_read(corpus, tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    long = " ".join(WORDS)
    (tmp_path / "a.txt").write_text(f"{long}\nba be\n\nca ce ci {long}")
    sequences = sequences_of(tmp_path / "*.txt", tokenizer, [128])
    assert [tokenizer.decode(ids[1:-1]) for ids in all_of(sequences)] == [f"{long} ba be", f"ca ce ci {long}"]
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "index.json").write_text("{}")
    library = types.SimpleNamespace(StreamingDataset=lambda local, **_: [{"content": long}] * 2)
    monkeypatch.setitem(sys.modules, "streaming", library)  # MosaicML Streaming's one class that is used
    expected = all_of(sequences)[0][:41] + (3,)
    assert all_of(sequences_of(shards, tokenizer, [128], text_field="content")) == [expected] * 2
    read = packing.stream_sequences([str(shards)], tokenizer, [128], [1.0], seed=0, text_field="content")
    assert [row["length"] for row in read] == [42, 42]
    with pytest.raises(ValueError, match=r"sample 0: text_field must be one of \['content'\], got 'text'"):
        sequences_of(shards, tokenizer)


def test_tokenized_documents_are_reused_and_can_be_moved(corpus, tokenizer, tmp_path, monkeypatch):
    source = tmp_path / "text.jsonl"
    source.write_bytes(corpus.read_bytes())
    expected = all_of(sequences_of(source, tokenizer, cache_dir=tmp_path / "cache"))
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["bounds.npy", "documents.json", "tokens.bin"]
    monkeypatch.setattr(packing, "tokenize", None)
    monkeypatch.setitem(sys.modules, "datasets", None)  # the machine that trains need not have it
    assert all_of(sequences_of(source, tokenizer, cache_dir=tmp_path / "cache")) == expected
    moved = folder.rename(tmp_path / "elsewhere")
    source.unlink()
    assert all_of(sequences_of(moved, tokenizer)) == expected


def test_text_that_is_named_twice_is_tokenized_once_and_read_twice(corpus, tokenizer, tmp_path):
    once = packing.load_documents([str(corpus)], tokenizer, cache_dir=tmp_path)[0]
    (tmp_path / "other.txt").write_text(" ".join(WORDS))
    sources = [str(corpus), str(tmp_path / "other.txt"), str(corpus)]
    twice = packing.load_documents(sources, tokenizer, cache_dir=tmp_path)[0]
    assert len(twice.tokens) == len(once.tokens) + len(WORDS)
    assert (twice.bounds == np.concatenate([once.bounds, [[len(once.tokens), len(twice.tokens)]], once.bounds])).all()


def test_a_changed_file_is_tokenized_again(tokenizer, tmp_path):
    source = tmp_path / "a.txt"
    for words in (WORDS, WORDS[::-1], WORDS[:20]):
        source.write_text(" ".join(words))
        sequences = sequences_of(source, tokenizer, [128], cache_dir=tmp_path / "cache")
        assert tokenizer.decode(all_of(sequences)[0][1:-1]).split() == words


def test_tokenized_documents_that_do_not_fit_are_named(tokens, tokenizer):
    other = BertTokenizerFast(str(ROOT / "vocab.txt"))
    with pytest.raises(ValueError, match="tokens was tokenized with another vocabulary than that of"):
        sequences_of(tokens, other)
    with pytest.raises(ValueError, match="streaming: '.*tokens' is already tokenized"):
        packing.stream_sequences([str(tokens)], tokenizer, [32], [1.0], seed=0)
    with open(tokens / "tokens.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=r"tokens.bin: expected \d+ bytes, the file is not complete"):
        sequences_of(tokens, tokenizer)


def test_a_long_tokenization_without_a_bar_prints_its_progress(corpus, tokenizer, tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 7))
    monkeypatch.setattr(packing.time, "monotonic", lambda: next(clock))
    packing.tokenize([[" ".join(WORDS)] * 6], tokenizer, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"tokenized {40 * n:,} tokens of {n} documents" for n in (2, 4, 6)]


ENDLESS = "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000000000000, 2)}"
BOUNDS = {
    "empty": b"",
    "text": b"[[0, 10]]",
    "pickle": [{"a": 1}],
    "huge": [[0, 2**62]],
    "below zero": [[-5, 10]],
    "reversed": [[10, 5]],
    "flat": [0, 10],
    "three columns": [[0, 5, 10]],
    "floats": [[0.0, 10.0]],
    "no document": np.zeros((0, 2), np.int64),
    "long header": b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + ENDLESS.ljust(117).encode() + b"\n" + bytes(16),
    "too many": np.tile(np.array([[0, 100]]), (100_000, 1)),
}


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_damaged_bounds_are_named(tokens, tokenizer, bounds):
    """Bounds of 2^62 tokens were once cut without end."""
    path = tokens / "bounds.npy"
    path.write_bytes(bounds) if isinstance(bounds, bytes) else np.save(path, np.array(bounds))
    message = "bounds.npy: expected (an array of NumPy|the starts and ends|each of .* at most 1000 documents)"
    with pytest.raises(ValueError, match=message):
        sequences_of(tokens, tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "documents.json: expected JSON"),
        ("[]", "documents.json: expected a JSON object"),
        ("{}", "documents.json: expected the output of --tokenize_only, got {}"),
        ({"dtype": "object"}, "documents.json: expected the output of --tokenize_only"),
        ({"tokens": "9" * 10}, "documents.json: expected the output of --tokenize_only"),
        ({"tokens": 0}, "documents.json: expected the output of --tokenize_only"),
        ({"tokens": 10**30}, r"tokens.bin: expected 20+ bytes"),
        ({"vocabulary": None}, "another vocabulary than that of"),
    ],
)
def test_damaged_facts_about_tokenized_documents_are_named(tokens, tokenizer, change, message):
    path = tokens / "documents.json"
    content = change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change})
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        sequences_of(tokens, tokenizer)


def test_tokens_beyond_the_vocabulary_are_named(tokens, tokenizer):
    path = tokens / "tokens.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    sequences = sequences_of(tokens, tokenizer)
    with pytest.raises(ValueError, match="tokens: expected tokens below 45, the file is damaged"):
        sequences.concatenate(np.arange(3))


def test_a_long_text_tokenized_in_pieces_has_the_same_tokens(tokenizer, monkeypatch):
    """A text is cut before it is tokenized, as the tokenizer takes 80 bytes of memory a character."""
    cut = []
    monkeypatch.setattr(packing, "pieces", lambda text: cut.append(list(records.pieces(text, 1000))) or cut[-1])
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 3000)
    long = " ".join(WORDS * 90)
    texts = [WORDS[0], long, "", " ".join(WORDS)]
    found = list(packing.encode(enumerate(texts), tokenizer, np.dtype("int32")))
    assert [number for number, _ in found] == [0, 1, 2, 3] and len(cut[1]) > 10
    for text, (_, ids) in zip(texts, found):
        assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"] and ids.dtype == np.int32


def test_a_source_without_a_name_is_named():
    with pytest.raises(ValueError, match="^train_data: expected names of files, folders or `datasets` ids, got ''"):
        sources.check_sources([""], "text", "train_data")


def test_tokenizing_that_fails_leaves_nothing(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": " ".join(WORDS)}) + '\n{"text": null}')
    with pytest.raises(ValueError, match="a.jsonl, line 2: expected a string in 'text', got null"):
        sequences_of(tmp_path / "a.jsonl", tokenizer, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(ValueError, match="cache_dir: .*a.jsonl cannot be written"):
        sequences_of(tmp_path / "a.jsonl", tokenizer, cache_dir=tmp_path / "a.jsonl")


def test_a_tokenizer_without_a_mask_is_named(corpus):
    with pytest.raises(ValueError, match="tokenizer must have a mask_token"):
        sequences_of(corpus, BertTokenizerFast(str(ROOT / "vocab.txt"), mask_token=None))


def test_batches_carry_boundaries_in_the_names_of_transformers(tokenizer):
    parts = [np.array([2, 7, 8, 3]), np.array([2, 9, 3]), np.array([2, 5, 6, 7, 8, 3])]
    masking = packing.Masking(tokenizer, 0.0)

    def row(*parts):
        return masking(np.concatenate(parts), np.array([len(part) for part in parts]), np.random.default_rng(0))

    batch = packing.flatten_rows([row(parts[1], parts[0]), row(parts[2])])
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(
        [{"input_ids": part.tolist()} for part in (parts[1], parts[0], parts[2])]
    )
    for name in ("input_ids", "cu_seq_lens_q", "cu_seq_lens_k"):
        assert batch[name].dtype == flat[name].dtype and torch.equal(batch[name], flat[name])
    assert (batch["max_length_q"], batch["max_length_k"]) == (flat["max_length_q"], flat["max_length_k"]) == (6, 6)
