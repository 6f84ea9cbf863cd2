"""Check the names of a training's inputs before torch is imported."""

import argparse
import os
from collections.abc import Sequence

from .common import REPOSITORY
from .records import check_texts, is_file_name
from .staging import Input

# The fewest tokens of a sequence, without [CLS] and [SEP]; a shorter rest of a document is dropped.
SHORTEST = 8


def inputs(options: argparse.Namespace) -> dict[str, Input]:
    """List the inputs that the options of a training name, as `check_apart` takes them."""
    names = ("train_data", "validation_data", "test_data", "predict", "config", "tokenizer")
    return {**{name: getattr(options, name, None) for name in names}, "model": options.model or REPOSITORY}


def holds_documents(folder: str) -> bool:
    """Check whether a folder holds tokenized documents."""
    return os.path.isfile(os.path.join(folder, "documents.json"))


def is_text_file(source: str, argument: str = "data") -> bool:
    """Tell the name of text files from a folder of MDS shards and a `datasets` id.

    Raises:
        ValueError: the name is empty, or that of a folder of tokenized text.
    """
    if not source:
        raise ValueError(f"{argument}: expected names of files, folders or `datasets` ids, got ''")
    if os.path.isfile(os.path.join(source, "index.json")):
        return False
    if holds_documents(source):
        raise ValueError(f"{argument}: expected texts, got the folder of tokenized texts {source!r}")
    return is_file_name(source)


def check_lengths(lengths: Sequence[int]) -> None:
    """Raise ValueError if a length of sequences leaves too little room beside [CLS] and [SEP]."""
    if min(lengths) < SHORTEST + 2:
        raise ValueError(f"max_length must be at least {SHORTEST + 2}, got {min(lengths)}")


def check_sources(sources: Sequence[str], text_field: str, argument: str) -> None:
    """Raise ValueError early if a source of `load_documents` cannot be found, or its first document not be read."""
    for source in sources:
        if not holds_documents(source) and is_text_file(source, argument):
            check_texts([source], text_field, argument)
