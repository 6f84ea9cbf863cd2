"""scripts/lib/records.py: the kinds of files that scripts read, and errors that name the file and the line."""

import gzip
import json
import sys
import types

import pytest
from lib import records
from lib.records import RECORD_FILES, TEXT_FILES, find_files, read_records, read_texts


def test_texts_are_read_from_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\nstill one\n\n\ntwo\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "three"}\r\n\r\n{"text": "four"}\r\n{"text": " "}')
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(b'\n[{"text": "five"},\n {"text": "six"}]'))
    (tmp_path / "d.json").write_text(r'{"text": "\ud83d\ude00"}')
    (tmp_path / "e.json").write_text("")
    expected = ["one\nstill one", "two", "three", "four", "five", "six", "\N{GRINNING FACE}"]
    assert list(read_texts([str(tmp_path / "*.*")])) == expected
    assert list(read_texts([tmp_path / "b.jsonl", tmp_path / "b.jsonl"])) == expected[2:4] * 2
    (tmp_path / "f.jsonl").write_text('{"body": "seven"}')
    assert list(read_texts([tmp_path / "f.jsonl"], "body")) == ["seven"]


def test_csv_records_are_read_with_their_line(tmp_path):
    book = "word " * 40_000
    (tmp_path / "a.csv").write_text(f'text,label\n"two\nlines",x\n\n"a ""b"", c",y\n{book},y\nd "e" f,x')
    assert [(number, record["text"], record["label"]) for number, record in read_records(tmp_path / "a.csv")] == [
        (2, "two\nlines", "x"),
        (4, 'a "b", c', "y"),
        (6, book, "y"),
        (7, 'd "e" f', "x"),
    ]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": null}', "a.jsonl, line 2: expected a string in 'text', got null"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "x', "a.jsonl, line 3: expected JSON, Unterminated string"),
        ("a.jsonl", b'{"text": "x"}\n["text"]', r'a.jsonl, line 2: expected an object, got \["text"\]'),
        ("a.jsonl", b'{"id": 1, "body": "x"}', r"line 1: text_field must be one of \['body', 'id'\], got 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\uD800 x"}', "a.jsonl, line 2: expected valid Unicode, surrogates not"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: the JSON is nested too deeply"),
        ("a.json", b'[{"text": "x"},\n{"text": 3}]', "a.json, line 2: expected a string in 'text', got 3"),
        ("a.json", b'[{"text": "x"},\n{"text" 3}]', "a.json, line 2: expected JSON, Expecting ':' delimiter"),
        (
            "a.txt",
            "one\ncafé".encode("latin-1"),
            "line 2: expected UTF-8, got the byte 0xe9; .*: iconv -f latin1 -t utf-8 .*a.txt > NEW$",
        ),
        ("a.txt.gz", gzip.compress(b"one\n" * 9999, mtime=0)[:-20], "a.txt.gz: the gzip file is damaged after line"),
        ("a.txt.gz", b"one", "a.txt.gz: the gzip file is damaged after line 0"),
        ("a.csv", b"text,label\nx,y", "data: expected .jsonl, .json, .txt files, or these with .gz, got '.*a.csv'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_text_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts([tmp_path / name]))


@pytest.mark.parametrize(
    "content, message",
    [
        ("text,label\nx,y\nonly one\n", "a.csv, line 3: expected 2 columns"),
        ("text,label\nx,y\none,two,three\n", "a.csv, line 3: expected 2 columns"),
        ('label,text\ny,x\ny,"never closed\ny,x\ny,x\n', "a.csv, line 3: expected CSV, unexpected end of data"),
        ('text,label\n"half" quoted,y\n', "a.csv, line 2: expected CSV, ',' expected after '\"'"),
        ("text,label\rx,y\r", "a.csv, line 1: expected CSV, new-line character seen in unquoted field"),
        ("text,text,label\nx,z,y\n", r"a.csv, line 1: expected distinct column names, got \['text', 'text'"),
        ("text;label\nx;y\n", "a.csv, line 1: expected commas between the columns, got ';' in 'text;label'"),
    ],
)
def test_csv_that_would_be_misread_is_named_with_the_line_where_the_record_starts(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_records(tmp_path / "a.csv"))


def test_files_are_found_by_name_and_pattern(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.jsonl", "[odd].jsonl", "c.csv"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "folder.jsonl").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files(["~/c.csv", "~/[ab]*.jsonl"], RECORD_FILES) == [
        str(tmp_path / name) for name in ("c.csv", "a.jsonl", "b.jsonl")
    ]
    assert find_files([str(tmp_path / "[odd].jsonl")], TEXT_FILES) == [str(tmp_path / "[odd].jsonl")]
    for source in ("missing.jsonl", "*.txt", "fold*"):
        with pytest.raises(ValueError, match="no file matches '.*"):
            find_files([str(tmp_path / source)], TEXT_FILES)
    for folder, kinds, message in (
        (tmp_path, TEXT_FILES, rf"data: '{tmp_path}' is a folder; name its files, such as '{tmp_path}/\*\.jsonl'$"),
        (tmp_path, (".csv",), rf"such as '{tmp_path}/\*\.csv'$"),
        (tmp_path / "folder.jsonl", TEXT_FILES, "is a folder, and holds no .jsonl, .json, .txt files"),
    ):
        with pytest.raises(ValueError, match=message):
            find_files([str(folder)], kinds)


def test_a_dataset_that_cannot_be_loaded_is_named(monkeypatch):
    def load_dataset(name, config, split):
        raise FileNotFoundError(f"no {config} of {name},\nno {split}")

    library = types.SimpleNamespace(load_dataset=load_dataset, exceptions=types.SimpleNamespace(DatasetsError=KeyError))
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(ValueError, match="^data: 'a/b:c' is neither a file nor a dataset, no c of a/b, no train$"):
        records.load_dataset("a/b:c", "train")


def test_lines_arrays_and_csv_fields_without_end_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_LINE", 100)
    texts = [json.dumps({"text": "a" * 80}), json.dumps({"text": "a" * 200})]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(texts))
    (tmp_path / "b.txt").write_text("a" * 99 + "\n" + "a" * 101)
    (tmp_path / "c.json").write_text("[\n" + ",\n".join(texts[:1] * 3) + "]")
    for name, message in (
        ("a.jsonl.gz", "a.jsonl.gz, line 2: expected at most 100 bytes in a line"),
        ("b.txt", "b.txt, line 2: expected at most 100 bytes in a line"),
        ("c.json", "c.json: expected at most 100 characters in a JSON array; use JSON lines"),
    ):
        with pytest.raises(ValueError, match=message):
            list(records.read_texts([str(tmp_path / name)]))
    (tmp_path / "d.csv").write_text('text,label\n"' + "a\n" * 60 + '",b\n')
    with pytest.raises(ValueError, match="d.csv, line 2: expected CSV, field larger than field limit"):
        list(records.read_records(str(tmp_path / "d.csv")))


def test_a_text_file_without_empty_lines_is_cut_at_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_PARAGRAPH", 20)
    (tmp_path / "a.txt").write_text("one two\nthree four\nfive six\nseven\n\nlast\n" + "a" * 30)
    texts = ["one two\nthree four", "five six\nseven", "last", "a" * 30]
    assert list(records.read_texts([str(tmp_path / "a.txt")])) == texts


@pytest.mark.parametrize("text", ["", "a", "a" * 25, "one two three four five", " " * 30, "one\n\n two" * 9])
def test_pieces_are_the_text_cut_at_white_space(text):
    parts = list(records.pieces(text, 10))
    assert "".join(parts) == text and max(map(len, parts)) <= 10
    assert all(part[:1].isspace() or len(before) == 10 for before, part in zip(parts, parts[1:]))
    assert [word for part in parts for word in part.split()] == text.split() or "a" * 11 in text


def test_an_integer_of_too_many_digits_is_named_with_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ' + "9" * 5000 + "}")
    with pytest.raises(ValueError, match="a.jsonl, line 2: expected JSON, Exceeds the limit"):
        list(records.read_records(str(tmp_path / "a.jsonl")))
