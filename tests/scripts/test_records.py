"""scripts/lib/records.py: the kinds of files that scripts read, and errors that name the file and the line."""

import gzip
import json

import pytest
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
        ("a.txt", "one\ncafé".encode("latin-1"), "a.txt, line 2: expected UTF-8, got the byte 0xe9"),
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
        ("text,text,label\nx,z,y\n", r"a.csv, line 1: expected columns with names of their own, got \['text', 'text'"),
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
    for source in ("missing.jsonl", "*.txt", "folder.jsonl"):
        with pytest.raises(ValueError, match="no file matches '.*"):
            find_files([str(tmp_path / source)], TEXT_FILES)
