"""Read text and labelled records from JSON lines, CSV and plain text, gzipped or not, and write CSV."""

import collections
import csv
import glob
import gzip
import itertools
import json
import os
import re
import shlex
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Union

from .cli import listed, one_line
from .staging import staged_file

TEXT_FILES = (".jsonl", ".json", ".txt")
RECORD_FILES = (".jsonl", ".json", ".csv")
# The most bytes of a line or a JSON array: far more than any document, and little enough for several copies in memory.
LONGEST_LINE = 2**29
# The most characters of a document in a `.txt` file; a longer paragraph becomes several documents.
LONGEST_PARAGRAPH = 2**26
# The most characters that a tokenizer gets at once, as it needs about 80 bytes of memory for each.
PIECE = 1_000_000


def find_files(sources: Sequence[str], suffixes: Sequence[str] = TEXT_FILES, argument: str = "data") -> list[str]:
    """Resolve file names and glob patterns.

    Args:
        sources: names or patterns; `~` is the home directory, `**` any number of folders.
        suffixes: kinds of files that the caller reads, such as `.jsonl`; each may be gzipped (`.gz`).
        argument: the name of `sources` on the command line.

    Returns:
        The files in the order of their sources, those of one pattern sorted. A file named twice occurs twice.

    Raises:
        ValueError: nothing matches a source, or a file is of another kind.
    """
    found = []
    for source in sources:
        source = os.path.expanduser(str(source))
        names = [source] if os.path.isfile(source) else glob.glob(source, recursive=True)
        matches = sorted(filter(os.path.isfile, names))
        if not matches:
            raise ValueError(f"{argument}: {_why_none(source, suffixes)}")
        for path in matches:
            if kind_of(path) not in suffixes:
                raise ValueError(f"{argument}: expected {', '.join(suffixes)} files, or these with .gz, got {path!r}")
        found += matches
    return found


def _why_none(source: str, suffixes: Sequence[str]) -> str:
    if not os.path.isdir(source):
        return f"no file matches {source!r}"
    found = collections.Counter(
        f"*{kind_of(name)}{'.gz' if name.endswith('.gz') else ''}"
        for name in os.listdir(source)
        if kind_of(name) in suffixes and os.path.isfile(os.path.join(source, name))
    )
    if not found:
        return f"{source!r} is a folder, and holds no {', '.join(suffixes)} files"
    return f"{source!r} is a folder; name its files, such as '{os.path.join(source, found.most_common(1)[0][0])}'"


def check_texts(sources: Sequence[str], text_field: str = "text", argument: str = "data") -> list[str]:
    """Find the files of `read_texts`, and read the first document to report a wrong name or empty files early."""
    files = find_files(sources, TEXT_FILES, argument)
    if next(read_texts(files, text_field), None) is None:
        raise ValueError(f"{argument}: there is no text in {listed(files, 3)}")
    return files


def load_dataset(source: str, split: str, argument: str = "data", **options):
    """Call `datasets.load_dataset`.

    Args:
        source: `id`, `id:config` or `id:config:split`.
        split: the split of a source that names none.
        argument: the name of `source` on the command line.
        **options: passed on.

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
    """Tell the name of a file or a pattern from a `datasets` id."""
    suffixes = (*TEXT_FILES, ".csv", ".tsv", ".parquet")
    known = kind_of(source) in suffixes or "*" in source or source.startswith(("/", ".", "~"))
    return known or os.path.exists(source)


def kind_of(path: str) -> str:
    """Return the suffix of a file name without `.gz`, such as `.jsonl`."""
    return Path(str(path).removesuffix(".gz")).suffix


def read_lines(path: str) -> Iterator[tuple[int, str]]:
    """Read the lines of a UTF-8 file, gzipped or not.

    Yields:
        The number of the line, from 1, and the line.

    Raises:
        ValueError: a line is not UTF-8 or too long, or the gzip file is damaged; names file and line.
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
            f"{path}, line {number}: expected UTF-8, got the byte {error.object[error.start]:#x}; a Latin-1 file is "
            f"converted by: iconv -f latin1 -t utf-8 {shlex.quote(str(path))} > NEW"
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
        ValueError: the content is not a record; names file and line.
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
    # Without `strict`, an unclosed quote turns the rest of the file into one text.
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
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half a surrogate pair is valid JSON, but not valid text
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


def write_csv(path: Union[str, Path], header: Iterable[str], rows: Iterable[Iterable]) -> None:
    """Write a CSV file, whole or not at all."""
    with staged_file(path) as new, open(new, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def read_texts(sources: Sequence[str], text_field: str = "text") -> Iterator[str]:
    """Read documents one at a time.

    Args:
        sources: names or glob patterns of `TEXT_FILES`. In `.txt` files a document is a paragraph.
        text_field: the field of a JSON record that holds the text.

    Yields:
        The text of each document that is not empty, in the order of the files.

    Raises:
        ValueError: see `find_files` and `read_records`; or a record has no string in that field; names file and line.
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
    """Join lines to texts of up to `LONGEST_PARAGRAPH` characters, but for a longer line."""
    part, size = [], 0
    for line in lines:
        if part and size + len(line) > LONGEST_PARAGRAPH:
            yield "".join(part)
            part, size = [], 0
        part.append(line)
        size += len(line)
    yield "".join(part)


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Cut a text at white space into pieces of at most `size` characters, which a tokenizer can take one at a time.

    The tokens of the pieces are those of the text, except in a word of more than `size` characters.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        spaces = (position for position in range(end, start, -1) if text[position].isspace())
        end = next(spaces, end)
        yield text[start:end]
        start = end
    yield text[start:]
