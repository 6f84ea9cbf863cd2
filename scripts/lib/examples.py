"""Read labelled texts from files or the Hub, and infer the kind of problem from the labels.

Neither torch nor transformers is imported, so that a mistake in the data is told at once.
"""

import argparse
import contextlib
import json
import math

import numpy as np

from .records import RECORD_FILES, find_files, is_file_name, load_dataset, read_records

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def load_examples(sources: list[str], options: argparse.Namespace, split: str) -> tuple[list[tuple[str, ...]], list]:
    """Read labelled texts.

    Args:
        sources: files, patterns, or one `datasets` id as id[:config[:split]].
        options: of the command line; names the fields.
        split: `train` or `validation`: which option the sources come from, and the split of an id that names none.

    Returns:
        The texts of each example, and the labels.

    Raises:
        ValueError: a file is of another kind, a field is missing, a text is no string, or a label is missing; names the
            file and the line.
    """
    texts, labels = [], []
    for place, record in _read_examples(sources, split):
        for argument, names in (("text_fields", options.text_fields), ("label_field", [options.label_field])):
            missing = [name for name in names if name not in record]
            if missing:
                raise ValueError(f"{place}: {argument} must be among {sorted(record)}, got {missing[0]!r}")
        for name in options.text_fields:
            if not isinstance(record[name], str):
                raise ValueError(f"{place}: expected a string in {name!r}, got {json.dumps(record[name])[:60]}")
        label = record[options.label_field]
        if label is None or label == "" or label != label:
            raise ValueError(f"{place}: {options.label_field!r} is empty")
        parts = label if isinstance(label, list) else [label]
        if not all(isinstance(part, (str, int, float)) for part in parts):
            raise ValueError(
                f"{place}: expected a name, a number or a list of these in {options.label_field!r}, got {label!r}"
            )
        if options.label_separator:
            if not isinstance(label, str):
                raise ValueError(f"{place}: label_separator needs a string in {options.label_field!r}, got {label!r}")
            label = [part for part in label.split(options.label_separator) if part]
        texts.append(tuple(record[name] for name in options.text_fields))
        labels.append(label)
    if not labels:
        raise ValueError(f"{split}_data: there is no example in {', '.join(sources)}")
    if all(source.removesuffix(".gz").endswith(".csv") for source in sources):
        labels = numbers_of(labels)
    endless = [label for label in labels if isinstance(label, float) and not math.isfinite(label)]
    if endless:
        raise ValueError(f"{split}_data: expected finite numbers in {options.label_field!r}, got {endless[0]}")
    return texts, labels


def _read_examples(sources: list[str], split: str):
    """Yield the location of an example, for messages, and its fields."""
    if len(sources) == 1 and not is_file_name(sources[0]):
        import datasets  # only needed for the Hub

        examples = load_dataset(sources[0], split, f"{split}_data")
        names = {k: kind.names for k, kind in examples.features.items() if isinstance(kind, datasets.ClassLabel)}
        for number, example in enumerate(examples):
            # Test splits without labels hold -1.
            classes = {k: names[k][v] if v is not None and v >= 0 else None for k, v in example.items() if k in names}
            yield f"{sources[0]}, example {number}", {**example, **classes}
        return
    for path in find_files(sources, RECORD_FILES, f"{split}_data"):
        for number, record in read_records(path):
            yield f"{path}, line {number}", record


def is_number(label) -> bool:
    """Whether a label is a finite number."""
    return isinstance(label, (int, float)) and not isinstance(label, bool) and math.isfinite(label)


def numbers_of(labels: list) -> list:
    """The labels of a CSV file as numbers if all are numbers, otherwise as text."""
    for kind in (int, float):
        with contextlib.suppress(ValueError, TypeError):
            return [kind(label) for label in labels]
    return labels


def infer_problem(labels: list) -> tuple[str, list[str]]:
    """Infer the kind of problem from training labels.

    Args:
        labels: lists of names, numbers of which one has a fraction or a decimal point, or names and whole numbers.

    Returns:
        The `problem_type` of transformers, and the sorted names of the classes (none for a regression).

    Raises:
        ValueError: lists are mixed with other labels, or all labels are the same.
    """
    are_lists = {isinstance(label, list) for label in labels}
    if len(are_lists) > 1:
        raise ValueError("label_field: some labels are lists and others are not")
    if are_lists == {True}:
        problem, names = MULTI, sorted({str(name) for label in labels for name in label})
        if not names:
            raise ValueError("label_field: no example has a label")
        return problem, names
    if all(map(is_number, labels)) and any(isinstance(label, float) for label in labels):
        problem, names = REGRESSION, []
    else:
        is_sortable = all(map(is_number, labels))
        problem, names = SINGLE, [str(name) for name in sorted(set(labels), key=None if is_sortable else str)]
    if len(set(labels)) == 1:
        raise ValueError(
            f"label_field: every training example has the label {labels[0]!r}, so there is nothing to learn"
        )
    return problem, names


def encode_labels(labels: list, problem: str, names: list[str]) -> np.ndarray:
    """Turn labels into numbers.

    Args:
        labels: as they are in the data.
        problem: what `infer_problem` found.
        names: of the classes.

    Returns:
        int64 [N], the number of the class; float32 [N, C] of zeros and ones for multi-label; float32 [N] for a
        regression.

    Raises:
        ValueError: a label that the training data lacks, a list where that has none or the reverse, or for a
            regression one that is no number.
    """
    odd = next((label for label in labels if isinstance(label, list) != (problem == MULTI)), None)
    if odd is not None:
        raise ValueError(f"label_field: expected {'lists' if problem == MULTI else 'no lists'}, got {odd!r}")
    if problem == REGRESSION:
        if not all(map(is_number, labels)):
            raise ValueError(f"label_field: expected numbers, got {next(x for x in labels if not is_number(x))!r}")
        return np.array(labels, dtype=np.float32)
    number = {name: i for i, name in enumerate(names)}
    unknown = {str(n) for label in labels for n in (label if problem == MULTI else [label])} - number.keys()
    if unknown:
        raise ValueError(f"label_field: the training data has no example of {sorted(unknown)}")
    if problem == SINGLE:
        return np.array([number[str(label)] for label in labels])
    places = np.zeros((len(labels), len(names)), dtype=np.float32)
    for row, label in enumerate(labels):
        places[row, [number[str(name)] for name in label]] = 1
    return places


def split_examples(texts: list, labels: list) -> tuple[tuple[list, list], tuple[list, list]]:
    """Hold out a seeded tenth of the examples for validation.

    Raises:
        ValueError: there are fewer than two examples.
    """
    if len(labels) < 2:
        raise ValueError("train_data: a single example cannot be split, give validation_data")
    order = np.random.default_rng(0).permutation(len(labels)).tolist()
    held_out = max(1, len(labels) // 10)
    parts = (order[held_out:], order[:held_out])
    return tuple(([texts[i] for i in part], [labels[i] for i in part]) for part in parts)
