"""Read text and labelled records from files: JSON lines, CSV and plain text, each also gzipped."""

import csv
import glob
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .cli import one_line

TEXT_FILES = (".jsonl", ".json", ".txt")
RECORD_FILES = (".jsonl", ".json", ".csv")
# Bytes of a line, or of a JSON array: far beyond any document, and what memory holds several times.
LONGEST_LINE = 2**29
# Characters of a paragraph of a `.txt` file that are one document; a file without empty lines is cut at such sizes.
LONGEST_PARAGRAPH = 2**26
# Characters that a tokenizer is given at once of one text: its memory is about 80 bytes a character.
PIECE = 1_000_000


def find_files(sources: Sequence[str], suffixes: Sequence[str] = TEXT_FILES, argument: str = "data") -> list[str]:
    """Resolve file names and glob patterns.

    Args:
        sources: names or patterns; `~` is the home directory, `**` any number of folders.
        suffixes: kinds of files that the caller reads, such as `.jsonl`; each may be gzipped (`.gz`).
        argument: name of `sources` on the command line, for messages.

    Returns:
        The files in the order of their sources, those of one pattern sorted. A file named twice is there twice.

    Raises:
        ValueError: nothing matches a source, or a file is of another kind.
    """
    found = []
    for source in sources:
        source = os.path.expanduser(str(source))
        matches = (
            [source] if os.path.isfile(source) else sorted(filter(os.path.isfile, glob.glob(source, recursive=True)))
        )
        if not matches:
            raise ValueError(f"{argument}: no file matches {source!r}")
        for path in matches:
            if kind_of(path) not in suffixes:
                raise ValueError(f"{argument}: expected {', '.join(suffixes)} files, or these with .gz, got {path!r}")
        found += matches
    return found


def check_texts(sources: Sequence[str], text_field: str = "text", argument: str = "data") -> list[str]:
    """Find files of documents, and read the first document of the first, so that a wrong name is reported early.

    Args:
        sources, text_field: as `read_texts` takes them.
        argument: what the user calls the sources.

    Returns:
        The files.

    Raises:
        ValueError: see `read_texts`.
    """
    files = find_files(sources, TEXT_FILES, argument)
    next(read_texts(files[:1], text_field), None)
    return files


def load_dataset(source: str, split: str, argument: str = "data", **options):
    """Load a part of a `datasets` dataset.

    Args:
        source: `id`, `id:config` or `id:config:split`.
        split: the split of a source that names none.
        argument: name of `source` on the command line, for messages.
        **options: of `datasets.load_dataset`.

    Returns:
        What `datasets.load_dataset` returns.

    Raises:
        ValueError: there is no such dataset, or it cannot be reached or read.
    """
    import datasets  # only needed for the Hub and for streams

    name, config, named_split = (*source.split(":"), "", "")[:3]
    try:
        return datasets.load_dataset(name, config or None, split=named_split or split, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{argument}: {source!r} is neither a file nor a dataset, {one_line(error)}") from error


def is_file_name(source: str) -> bool:
    """Whether a source names a file or a pattern rather than a `datasets` id."""
    suffixes = (*TEXT_FILES, ".csv", ".tsv", ".parquet")
    known = kind_of(source) in suffixes or "*" in source or source.startswith(("/", ".", "~"))
    return known or os.path.exists(source)


def kind_of(path: str) -> str:
    """The suffix of a file name without `.gz`, such as `.jsonl`."""
    return Path(str(path).removesuffix(".gz")).suffix


def read_lines(path: str) -> Iterator[tuple[int, str]]:
    """Read the lines of a UTF-8 file, gzipped or not.

    Yields:
        The number of the line, from 1, and the line.

    Raises:
        ValueError: a line is not UTF-8, or the file is not a whole gzip file; names file and line.
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
                if len(line) > LONGEST_LINE:
                    raise ValueError(f"{path}, line {number}: expected at most {LONGEST_LINE:,} bytes in a line")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number}: expected UTF-8, got the byte {error.object[error.start]:#x}"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: the gzip file is damaged after line {number}") from error


def read_records(path: str) -> Iterator[tuple[int, dict]]:
    """Read the records of one file.

    Args:
        path: `.jsonl` or `.json` (one object a line, or one array of objects), or `.csv` with a header.

    Yields:
        The number of the line (of the object in an array) where it starts, from 1, and the record.

    Raises:
        ValueError: something is not a record; names file and line.
    """
    lines = read_lines(path)
    if kind_of(path) == ".csv":
        yield from _read_rows(path, (line for _, line in lines))
        return
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        whole, size = [first[1]], len(first[1])
        for _, line in lines:
            whole.append(line)
            size += len(line)
            if size > LONGEST_LINE:
                raise ValueError(
                    f"{path}: expected at most {LONGEST_LINE:,} characters in a JSON array; use JSON lines"
                )
        parts = enumerate(_parse(path, first[0], "".join(whole)), start=1)
    else:
        filled = ((number, line) for number, line in itertools.chain([first], lines) if line.strip())
        parts = ((number, _parse(path, number, line)) for number, line in filled)
    for number, record in parts:
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {json.dumps(record)[:60]}")
        yield number, record


def _read_rows(path: str, lines: Iterator[str]) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(LONGEST_LINE)  # a text may be a book; the default is 131,072 characters
    # Strict, or else an unclosed quote turns the rest of the file into one text.
    rows, number = csv.DictReader(lines, strict=True), 1
    try:
        names = list(filter(None, rows.fieldnames or ()))
        if len(set(names)) < len(names):
            raise ValueError(f"{path}, line 1: expected distinct column names, got {names}")
        separator = next((sign for sign in ";\t|" if len(names) == 1 and sign in names[0]), None)
        if separator:
            raise ValueError(f"{path}, line 1: expected commas between the columns, got {separator!r} in {names[0]!r}")
        number = rows.line_num + 1
        for record in rows:
            if None in record or None in record.values():
                filled = [value for value in record.values() if value is not None]
                found = len(filled) + len(record.get(None, [None])) - 1
                raise ValueError(f"{path}, line {number}: expected {len(rows.fieldnames)} columns, got {found}")
            yield number, record
            number = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {number}: expected CSV, {error}") from error


def _parse(path: str, number: int, text: str):
    try:
        content = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half a character is valid JSON but not valid text
            json.dumps(content, ensure_ascii=False).encode("utf-8")
        return content
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number + error.lineno - 1}: expected JSON, {error.msg}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}, line {number}: expected valid Unicode, {error.reason}") from error
    except ValueError as error:  # an integer of more digits than Python takes
        raise ValueError(f"{path}, line {number}: expected JSON, {one_line(error)}") from error
    except RecursionError as error:
        raise ValueError(f"{path}, line {number}: the JSON is nested too deeply") from error


def read_texts(sources: Sequence[str], text_field: str = "text") -> Iterator[str]:
    """Read documents one at a time.

    Args:
        sources: names or glob patterns of `TEXT_FILES`. In `.txt` files a document is a paragraph.
        text_field: the field of a JSON record that holds the text.

    Yields:
        The text of each document that is not empty, in the order of the files.

    Raises:
        ValueError: see `find_files`; or a record has no such field or no string there; names file and line.
    """
    for path in find_files(sources, TEXT_FILES):
        if kind_of(path) == ".txt":
            lines = (line for _, line in read_lines(path))
            for filled, paragraph in itertools.groupby(lines, key=lambda line: bool(line.strip())):
                for part in _bounded(paragraph) if filled else ():
                    yield part.strip()
            continue
        for number, record in read_records(path):
            if text_field not in record:
                raise ValueError(
                    f"{path}, line {number}: text_field must be one of {sorted(record)}, got {text_field!r}"
                )
            text = record[text_field]
            if not isinstance(text, str):
                raise ValueError(
                    f"{path}, line {number}: expected a string in {text_field!r}, got {json.dumps(text)[:60]}"
                )
            if text.strip():
                yield text


def _bounded(lines: Iterable[str]) -> Iterator[str]:
    """Join lines, to more than one text where they are longer than `LONGEST_PARAGRAPH`."""
    part, size = [], 0
    for line in lines:
        if part and size + len(line) > LONGEST_PARAGRAPH:
            yield "".join(part)
            part, size = [], 0
        part.append(line)
        size += len(line)
    yield "".join(part)


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Cut a text at white space into pieces that a tokenizer can take one at a time.

    The tokens of the pieces are those of the text, but for a word of more than `size` characters.

    Args:
        text: of any length.
        size: characters of a piece, at most.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        spaces = (position for position in range(end, start, -1) if text[position].isspace())
        end = next(spaces, end)
        yield text[start:end]
        start = end
    yield text[start:]
