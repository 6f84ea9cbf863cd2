"""Read labelled texts from files or the Hub, and infer the kind of problem from the labels.

This module imports neither torch nor transformers, so that a mistake in the data is reported at once.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Optional

import numpy as np

from .records import RECORD_FILES, find_files, is_file_name, kind_of, load_dataset, read_lines, read_records

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
# Their names on the command line (--problem).
PROBLEMS = {"classification": SINGLE, "multi_label": MULTI, "regression": REGRESSION}
# Up to this many different whole numbers, or a tenth as many as there are examples, are taken for classes.
FEW = 20
# Characters that often separate several labels in one string, and the share of labels with one that makes it likely.
SEPARATORS, SEPARATED = "|;,", 0.2
LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass
class Examples:
    """Texts with their labels and origins.

    Attributes:
        texts: the fields of each text, one or two strings.
        labels: a name, a number or a list of these for each text; empty if none were read.
        origins: the file and line of each text, for messages.
    """

    texts: list[tuple[str, ...]]
    labels: list
    origins: list[str]

    def part(self, numbers: Sequence[int]) -> "Examples":
        """Return the examples with these numbers, in this order."""
        return Examples(*([column[i] for i in numbers] for column in (self.texts, self.labels, self.origins)))


@dataclasses.dataclass
class Task:
    """A problem, and the data for it.

    Attributes:
        problem: the `problem_type` of transformers.
        names: of the classes, sorted; none for a regression.
        parts: `train`, `validation` and, if given, `test` (examples with labels) and `predict` (without).
        truth: the encoded labels of each part that has labels.
    """

    problem: str
    names: list[str]
    parts: dict[str, Examples]
    truth: dict[str, np.ndarray]

    @property
    def judged(self) -> str:
        """The part on which the best model is scored: the test data, or else the validation data."""
        return "test" if "test" in self.parts else "validation"


def read_task(options: argparse.Namespace) -> Task:
    """Read all data that the options of finetune_classification.py name, and print the problem that they pose.

    Raises:
        ValueError: see `load_examples`, `infer_problem` and `encode_labels`.
    """
    sources = {name: getattr(options, f"{name}_data") for name in ("train", "validation", "test")}
    parts = {name: load_examples(data, options, name) for name, data in sources.items() if data}
    if options.predict:
        parts["predict"] = load_examples([options.predict], options, "test", "predict", labelled=False)
    is_split = "validation" not in parts
    if is_split:
        parts["train"], parts["validation"] = split_examples(parts["train"])
    check_names(parts["train"], parts["validation"], options, is_split)
    problem, names = infer_problem(parts["train"], options.problem)
    truth = {name: encode_labels(part, problem, names) for name, part in parts.items() if name != "predict"}
    labels = f"{len(names)} classes ({', '.join(names[:5])}{', …' if names[5:] else ''})" if names else "numbers"
    counts = " and ".join(f"{len(truth[name]):,} {name}" for name in ("train", "validation", "test") if name in truth)
    print(f"{problem} with {labels}; {counts} examples", flush=True)
    known = set(parts["train"].texts)
    for name in truth.keys() - {"train"}:
        again = sum(text in known for text in parts[name].texts)
        if again:
            print(f"{again:,} of {len(truth[name]):,} {name} texts are also in the training data", flush=True)
    for hint in hints(parts["train"].labels, problem, options.problem):
        print(f"hint: {hint}", flush=True)
    return Task(problem, names, parts, truth)


def load_examples(
    sources: list[str], options: argparse.Namespace, split: str, argument: Optional[str] = None, labelled: bool = True
) -> Examples:
    """Read texts; the labels of CSV files become numbers if all of them are numbers.

    Args:
        sources: files, patterns, or one `datasets` id as id[:config[:split]].
        options: of the command line; names the fields.
        split: the split of an id that names none.
        argument: the name of the sources on the command line; None: `split` with `_data`.
        labelled: whether to read labels too.

    Raises:
        ValueError: there are more than two text fields, or the label is in one, a file is of another kind, a field is
            missing, a text is not a string, or a label is missing; names the file and the line.
    """
    if not 1 <= len(options.text_fields) <= 2:
        raise ValueError(f"text_fields must name one or two fields, got {options.text_fields}")
    if labelled and options.label_field in options.text_fields:
        raise ValueError(
            f"label_field must not be among text_fields {options.text_fields}, got {options.label_field!r}"
        )
    argument = argument or f"{split}_data"
    found = Examples([], [], [])
    suffixes = RECORD_FILES if labelled else (*RECORD_FILES, ".txt")
    for origin, record in _read_examples(sources, split, argument, suffixes, options.text_fields[0]):
        fields = [("text_fields", name) for name in options.text_fields]
        fields += [("label_field", options.label_field)] if labelled else []
        for option, name in fields:
            if name not in record:
                raise ValueError(f"{origin}: {option} must be among {sorted(record)}, got {name!r}")
        for name in options.text_fields:
            if not isinstance(record[name], str):
                raise ValueError(f"{origin}: expected a string in {name!r}, got {json.dumps(record[name])[:60]}")
        found.texts.append(tuple(record[name] for name in options.text_fields))
        found.origins.append(origin)
        if labelled:
            found.labels.append(_read_label(record, options, origin))
    if not found.texts:
        raise ValueError(f"{argument}: there is no example in {', '.join(sources)}")
    if labelled and not any(field.strip() for fields in found.texts for field in fields):
        raise ValueError(f"{argument}: all {len(found.texts):,} texts are empty")
    if all(kind_of(source) == ".csv" for source in sources):
        found.labels = numbers_of(found.labels)
    for origin, label in zip(found.origins, found.labels):
        if isinstance(label, float) and not abs(label) <= LARGEST:
            raise ValueError(f"{origin}: expected a number that float32 holds in {options.label_field!r}, got {label}")
    return found


def _read_label(record: dict, options: argparse.Namespace, origin: str):
    name, label = options.label_field, _stripped(record[options.label_field])
    if label is None or label == "" or label != label:
        raise ValueError(f"{origin}: {name!r} is empty")
    parts = [_stripped(part) for part in label] if isinstance(label, list) else [label]
    if not all(isinstance(part, (str, int, float)) for part in parts):
        raise ValueError(f"{origin}: expected a name, a number or a list of these in {name!r}, got {label!r}")
    if options.label_separator:
        if not isinstance(label, str):
            raise ValueError(f"{origin}: label_separator needs a string in {name!r}, got {label!r}")
        return [part.strip() for part in label.split(options.label_separator) if part.strip()]
    return parts if options.problem == "multi_label" or isinstance(label, list) else label


def _stripped(label):
    return label.strip() if isinstance(label, str) else label


def _read_examples(
    sources: list[str], split: str, argument: str, suffixes: Sequence[str], text_field: str
) -> Iterator[tuple[str, dict]]:
    """Yield the origin of each example, for messages, and its fields; a line of a `.txt` file is a text."""
    if len(sources) == 1 and not is_file_name(sources[0]):
        import datasets  # only needed for the Hub

        examples = load_dataset(sources[0], split, argument)
        names = {k: kind.names for k, kind in examples.features.items() if isinstance(kind, datasets.ClassLabel)}
        for number, example in enumerate(examples):
            # Test splits without labels have -1 in their place.
            classes = {k: names[k][v] if v is not None and v >= 0 else None for k, v in example.items() if k in names}
            yield f"{sources[0]}, example {number}", {**example, **classes}
        return
    for path in find_files(sources, suffixes, argument):
        if kind_of(path) == ".txt":
            records = ((number, {text_field: line.strip()}) for number, line in read_lines(path) if line.strip())
        else:
            records = read_records(path)
        for number, record in records:
            yield f"{path}, line {number}", record


def is_number(label) -> bool:
    """Check whether a label is a number that float32 holds."""
    return isinstance(label, (int, float)) and not isinstance(label, bool) and abs(label) <= LARGEST


def numbers_of(labels: list) -> list:
    """Turn the labels of a CSV file into numbers if all of them are numbers."""
    for kind in (int, float):
        with contextlib.suppress(ValueError, TypeError):
            return [kind(label) for label in labels]
    return labels


def label_name(label) -> str:
    """Name a label's class: `1` for 1.0 too, which pandas writes in a column of integers that once had a hole."""
    return str(int(label) if isinstance(label, float) and label.is_integer() else label)


def infer_problem(train: Examples, wanted: Optional[str] = None) -> tuple[str, list[str]]:
    """Infer the kind of problem from training labels, unless `wanted`, a key of `PROBLEMS`, names it.

    Lists are multi-label. Numbers, of which one has a fraction or a decimal point, are a regression, unless they are
    whole and few (see `FEW`). All other labels are classes.

    Returns:
        The `problem_type` of transformers, and the sorted names of the classes (none for a regression).

    Raises:
        ValueError: lists are mixed with other labels, or all labels are the same.
    """
    labels = train.labels
    if wanted is None:
        are_lists = {isinstance(label, list) for label in labels}
        if len(are_lists) > 1:
            raise ValueError("label_field: some labels are lists and others are not")
        problem = MULTI if are_lists == {True} else REGRESSION if _are_amounts(labels) else SINGLE
    else:
        problem = PROBLEMS[wanted]
    check_label_types(train, problem)
    if problem == MULTI:
        names = sorted({label_name(name) for label in labels for name in label})
        if not names:
            raise ValueError("label_field: no example has a label")
        return problem, names
    if len(set(labels)) == 1:
        raise ValueError(
            f"label_field: every training example has the label {labels[0]!r}, so there is nothing to learn"
        )
    if problem == REGRESSION:
        return problem, []
    ordered = sorted(set(labels), key=None if all(map(is_number, labels)) else str)
    return problem, list(dict.fromkeys(map(label_name, ordered)))


def _are_amounts(labels: list) -> bool:
    if not all(map(is_number, labels)) or not any(isinstance(label, float) for label in labels):
        return False
    return not all(float(label).is_integer() for label in labels) or not _are_few(labels)


def _are_few(labels: list) -> bool:
    return len(set(labels)) <= max(FEW, len(labels) // 10)


def hints(labels: list, problem: str, wanted: Optional[str]) -> Iterator[str]:
    """Suggest options where the labels may not mean what `infer_problem` took them for."""
    if wanted is not None or problem == MULTI:
        return
    if all(map(is_number, labels)):
        if not _are_few(labels) and all(float(label).is_integer() for label in labels):
            taken, other = ("amounts", "classification") if problem == REGRESSION else ("classes", "regression")
            yield f"{len(set(labels)):,} different whole numbers were taken for {taken}; see --problem {other}"
        return
    for mark in SEPARATORS:
        held = [label for label in labels if isinstance(label, str) and mark in label]
        if len(held) >= SEPARATED * len(labels):
            yield (
                f"{len(held):,} of {len(labels):,} labels hold {mark!r}, such as {held[0][:60]!r}; if that is several "
                f"labels, pass --label_separator {mark!r}"
            )


def check_label_types(examples: Examples, problem: str) -> None:
    """Raise ValueError for a label of the wrong type: a list or no list for classes, no number for a regression."""
    expected = {SINGLE: "no list", MULTI: "a list", REGRESSION: "a number that float32 holds"}[problem]
    for origin, label in zip(examples.origins, examples.labels):
        is_right = is_number(label) if problem == REGRESSION else isinstance(label, list) == (problem == MULTI)
        if not is_right:
            raise ValueError(f"{origin}: label_field: expected {expected}, got {str(label)[:60]!r}")


def encode_labels(examples: Examples, problem: str, names: list[str]) -> np.ndarray:
    """Turn labels into numbers, by the problem and the class names of `infer_problem`.

    Returns:
        int64 [N], the number of the class; float32 [N, C] of zeros and ones for multi-label; float32 [N] for a
        regression.

    Raises:
        ValueError: a label that the training data lacks, or see `check_label_types`; names file and line.
    """
    check_label_types(examples, problem)
    if problem == REGRESSION:
        return np.array(examples.labels, dtype=np.float32)
    number = {name: i for i, name in enumerate(names)}
    named = [[label_name(part) for part in (label if problem == MULTI else [label])] for label in examples.labels]
    for origin, label in zip(examples.origins, named):
        unknown = [name for name in label if name not in number]
        if unknown:
            known = ", ".join(name[:60] for name in names[:10]) + (", …" if names[10:] else "")
            raise ValueError(
                f"{origin}: label_field: the training data has no example of {unknown[0][:60]!r}, only of {known}"
            )
    if problem == SINGLE:
        return np.array([number[name] for (name,) in named])
    targets = np.zeros((len(named), len(names)), dtype=np.float32)
    for row, label in enumerate(named):
        targets[row, [number[name] for name in label]] = 1
    return targets


def split_examples(examples: Examples) -> tuple[Examples, Examples]:
    """Split examples into those to train on and a seeded tenth for validation, or up to a fifth to reach 100.

    Raises:
        ValueError: there are fewer than two examples.
    """
    count = len(examples.texts)
    if count < 2:
        raise ValueError("train_data: a single example cannot be split, give validation_data")
    order = np.random.default_rng(0).permutation(count).tolist()
    held_out = max(1, count // 10, min(100, count // 5))
    return examples.part(order[held_out:]), examples.part(order[:held_out])


def check_names(train: Examples, validation: Examples, options: argparse.Namespace, is_split: bool) -> None:
    """Explain why the training data lacks a label of the validation data, if it can be told.

    Args:
        train, validation: the examples.
        options: of the command line.
        is_split: whether `split_examples` made the two.

    Raises:
        ValueError: most labels have a single example, or the split took all examples of one.
    """
    columns = ("texts", "labels", "origins")
    whole = Examples(*(getattr(train, column) + getattr(validation, column) for column in columns))
    problem, names = infer_problem(whole, options.problem)
    if problem == REGRESSION:
        return

    def named(examples: Examples) -> collections.Counter:
        labels = (label if problem == MULTI else [label] for label in examples.labels)
        return collections.Counter(label_name(name) for label in labels for name in label)

    counts, kept = named(whole), named(train)
    lost = [name for name in names if name not in kept]
    single = [name for name, count in kept.items() if count == 1]
    if lost and len(kept) > 2 and len(single) > len(train.texts) / 2:
        raise ValueError(
            f"label_field: {len(single):,} of {len(kept):,} labels have a single training example, such as "
            f"{single[0][:60]!r}; is {options.label_field!r} the field of the labels? For numbers pass --problem "
            "regression"
        )
    if lost and is_split:
        examples = "the only example" if counts[lost[0]] == 1 else f"all {counts[lost[0]]} examples"
        raise ValueError(
            f"label_field: the split that makes validation data took {examples} of {lost[0][:60]!r}; give "
            "--validation_data, or more examples"
        )
