"""What a training reads, by name: it is checked before torch is imported."""

import argparse
import os
from collections.abc import Sequence

from .common import REPOSITORY
from .records import check_texts, is_file_name
from .staging import Input

SHORTEST = 8  # tokens without [CLS] and [SEP]: a shorter rest of a document is dropped


def inputs(options: argparse.Namespace) -> dict[str, Input]:
    """What the options of a training name as its inputs, as `check_apart` takes them."""
    names = ("train_data", "validation_data", "test_data", "predict", "config", "tokenizer")
    return {**{name: getattr(options, name, None) for name in names}, "model": options.model or REPOSITORY}


def holds_documents(folder: str) -> bool:
    """Whether a folder holds tokenized documents."""
    return os.path.isfile(os.path.join(folder, "documents.json"))


def is_text_file(source: str, argument: str = "data") -> bool:
    """Whether a source names text files: neither a folder of MDS shards nor a `datasets` id.

    Raises:
        ValueError: the name is empty, or that of another folder.
    """
    if not source:
        raise ValueError(f"{argument}: expected names of files, folders or `datasets` ids, got ''")
    if os.path.isfile(os.path.join(source, "index.json")):
        return False
    if os.path.isdir(source):
        raise ValueError(
            f"{argument}: expected files, got the folder {source!r}; for its files write '{source}/*.jsonl'"
        )
    return is_file_name(source)


def check_sources(sources: Sequence[str], text_field: str, argument: str) -> None:
    """Raise ValueError early if a source cannot be read, or the first file of one does not begin with a document.

    Args:
        sources: as `load_documents` takes them.
        text_field: the field of a JSON record that holds the text.
        argument: what the user calls the sources.
    """
    for source in sources:
        if not holds_documents(source) and is_text_file(source, argument):
            check_texts([source], text_field, argument)
