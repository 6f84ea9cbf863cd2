"""Fine-tuning for classification and regression: what finetune_classification.py does with its options."""

import argparse
import contextlib
import copy
import importlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    TrainingArguments,
    set_seed,
)

from .common import REPOSITORY, load_from, say_float32, write_card, write_json
from .records import RECORD_FILES, find_files, is_file_name, load_dataset, read_records
from .runs import STAGE, CarefulTrainer, Divergence, clear_results, is_finite, publish, start_folder

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
# What decides between epochs and between seeds; higher is better.
DECIDING = {SINGLE: "accuracy", MULTI: "micro_f1", REGRESSION: "spearman"}
# Below this many weights a model needs larger steps and one more epoch.
SMALL_MODEL = 50_000_000


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
    """Yield where an example is, for messages, and its fields."""
    if len(sources) == 1 and not is_file_name(sources[0]):
        import datasets  # needed for the Hub alone

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
    """Labels of a CSV file, where everything is text: numbers if all of them are, otherwise as they are."""
    for kind in (int, float):
        with contextlib.suppress(ValueError, TypeError):
            return [kind(label) for label in labels]
    return labels


def infer_problem(labels: list) -> tuple[str, list[str]]:
    """Tell from training labels what kind of problem they are.

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


def score(problem: str, predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Measure predictions.

    Args:
        problem: what `infer_problem` found.
        predicted: class numbers [N], zeros and ones [N, C], or numbers [N].
        truth: the same.

    Returns:
        Single-label: accuracy, macro F1, Matthews correlation. Multi-label: micro and macro F1, share of
        examples with every label right. Regression: mean squared error, Pearson and Spearman correlation
        (0 where all predictions are the same).
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if problem == REGRESSION:
        varies = np.ptp(predicted) > 0 and np.ptp(truth) > 0
        return {
            "mse": float(np.mean((predicted - truth) ** 2)),
            "pearson": float(pearsonr(predicted, truth)[0]) if varies else 0.0,
            "spearman": float(spearmanr(predicted, truth)[0]) if varies else 0.0,
        }
    result = {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
    }
    if problem == MULTI:
        return {**result, "micro_f1": float(f1_score(truth, predicted, average="micro", zero_division=0))}
    return {**result, "matthews": float(matthews_corrcoef(truth, predicted))}


def decide(problem: str, logits: np.ndarray) -> np.ndarray:
    """Predictions of logits [N, C]: the largest, every one above zero, or the number itself."""
    if problem == SINGLE:
        return logits.argmax(-1)
    return (logits > 0).astype(np.float32) if problem == MULTI else logits.reshape(len(logits))


def fit_baseline(problem: str, train_texts, train_labels, texts) -> np.ndarray:
    """Fit TF-IDF of words with a linear model (logistic or ridge regression).

    Args:
        problem: what `infer_problem` found.
        train_texts: list of strings.
        train_labels: their encoded labels.
        texts: list of strings to predict.

    Returns:
        Predictions like `decide`'s.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline

    linear = Ridge() if problem == REGRESSION else LogisticRegression(C=10, max_iter=1000)
    if problem == MULTI:
        linear = OneVsRestClassifier(linear)
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), linear)
    return model.fit(train_texts, train_labels).predict(texts)


def draw_confusion(truth: np.ndarray, predicted: np.ndarray, names: list[str], path: Path) -> None:
    """Save a picture of which class was taken for which, as shares of the true class."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from sklearn.metrics import ConfusionMatrixDisplay

    size = 3 + 0.5 * len(names)
    figure, axes = pyplot.subplots(figsize=(size, size), layout="constrained")
    ConfusionMatrixDisplay.from_predictions(
        truth,
        predicted,
        labels=range(len(names)),
        display_labels=names,
        normalize="true",
        values_format=".2f",
        xticks_rotation="vertical",
        colorbar=False,
        ax=axes,
    )
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def split_examples(texts: list, labels: list) -> tuple[tuple[list, list], tuple[list, list]]:
    """Keep a seeded tenth of the examples for validation.

    Raises:
        ValueError: there are fewer than two examples.
    """
    if len(labels) < 2:
        raise ValueError("train_data: a single example cannot be split, give validation_data")
    order = np.random.default_rng(0).permutation(len(labels)).tolist()
    held_out = max(1, len(labels) // 10)
    parts = (order[held_out:], order[:held_out])
    return tuple(([texts[i] for i in part], [labels[i] for i in part]) for part in parts)


def default_rates(weights: int) -> tuple[float, float]:
    """The learning rate and the number of epochs for a model of this many weights.

    Source: ours for small models, measured with the checkpoint of this repository; for others what
        https://arxiv.org/abs/1810.04805, appendix A.3, recommends.
    """
    return (3e-4, 4.0) if weights < SMALL_MODEL else (5e-5, 3.0)


def finetune(options: argparse.Namespace, arguments: TrainingArguments) -> dict:
    """Run the fine-tuning that the options describe and write its results to `output_dir`.

    Args:
        options: the own options of finetune_classification.py.
        arguments: the options of transformers' Trainer.

    Returns:
        What `metrics.json` holds: the problem, the classes, the scores of each seed, their mean and standard
        deviation, the seeds that diverged and the step of each, and the baseline's scores where asked.

    Raises:
        ValueError: data that `load_examples`, `infer_problem` or `encode_labels` refuse, more than two text fields, or
            several processes.
        FloatingPointError: every seed diverged.
    """
    if not 1 <= len(options.text_fields) <= 2:
        raise ValueError(f"text_fields must name one or two fields, got {options.text_fields}")
    if arguments.world_size > 1:
        raise ValueError(f"fine-tuning runs in one process, got {arguments.world_size}: start it without torchrun")
    for package in ("sklearn", "matplotlib"):  # before the training rather than after it
        importlib.import_module(package)
    model_name = str(REPOSITORY) if options.model is None else options.model
    tokenizer = load_from(AutoTokenizer.from_pretrained, model_name)
    folder = Path(arguments.output_dir)
    start_folder(folder, options.overwrite)
    train = load_examples(options.train_data, options, "train")
    if options.validation_data:
        validation = load_examples(options.validation_data, options, "validation")
    else:
        train, validation = split_examples(*train)
    problem, names = infer_problem(train[1])
    if arguments.label_smoothing_factor and problem != SINGLE:
        raise ValueError(f"label_smoothing_factor works with single-label problems, this is {problem}")
    print(
        f"{problem} with "
        + (
            f"{len(names)} classes ({', '.join(names[:5])}{', …' if names[5:] else ''})"
            if names
            else "numbers as labels"
        )
        + f"; {len(train[1]):,} training and {len(validation[1]):,} validation examples",
        flush=True,
    )
    truth = [encode_labels(labels, problem, names) for labels in (train[1], validation[1])]
    results = {"problem": problem, "classes": names, "seeds": {}, "diverged": {}}
    if options.baseline:
        texts = [["\n".join(fields) for fields in part] for part in (train[0], validation[0])]
        guess = fit_baseline(problem, texts[0], truth[0], texts[1])
        results["baseline"] = score(problem, guess, truth[1])

    sets = []
    for (texts, _), labels in zip((train, validation), truth):
        tokens = tokenizer(*map(list, zip(*texts)), truncation=True, max_length=options.max_length)
        rows = zip(*tokens.values(), labels.tolist())
        sets.append([dict(zip((*tokens, "labels"), row)) for row in rows])

    clear_results(folder)
    stage, best = folder / STAGE, None
    for seed in options.seeds:
        try:
            trainer = train_seed(seed, model_name, tokenizer, sets, problem, names, options, arguments)
        except Divergence as error:
            print(f"seed {seed}: {error}", flush=True)
            results["diverged"][str(seed)] = error.step
            divergence = error
            continue
        predicted = decide(problem, trainer.predict(sets[1]).predictions)
        results["seeds"][str(seed)] = score(problem, predicted, truth[1])
        reached = results["seeds"][str(seed)][DECIDING[problem]]
        print(f"seed {seed}: {DECIDING[problem]} {reached:.4f}", flush=True)
        if best is None or reached > best[0]:
            best = (reached, predicted)
            shutil.rmtree(stage, ignore_errors=True)
            trainer.save_model(str(stage))
    if best is None:
        raise divergence
    for name, statistic in (("mean", np.mean), ("standard_deviation", np.std)):
        results[name] = {
            metric: float(statistic([scores[metric] for scores in results["seeds"].values()]))
            for metric in next(iter(results["seeds"].values()))
        }
    if problem == SINGLE:
        draw_confusion(truth[1], best[1], names, stage / "confusion.png")
    write_json(stage / "metrics.json", results)
    write_model_card(stage, folder.resolve().name, model_name, results)
    say_float32(stage)
    publish(stage, folder)
    if not options.keep_checkpoints:
        for checkpoints in folder.glob("seed-*"):
            shutil.rmtree(checkpoints)
    for part in ("mean", "baseline"):
        if part in results:
            print(f"{part}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in results[part].items()))
    return results


def train_seed(
    seed: int,
    model_name: str,
    tokenizer,
    sets: list[list[dict]],
    problem: str,
    names: list[str],
    options: argparse.Namespace,
    arguments: TrainingArguments,
) -> CarefulTrainer:
    """Train one model; the trainer that comes back holds the one of the best epoch.

    Args:
        seed: of the head, the order and dropout.
        model_name: folder or Hub id to start from.
        tokenizer: of the model.
        sets: tokenized training and validation examples.
        problem, names: what `infer_problem` found.
        options, arguments: as `finetune` takes them.

    Raises:
        ValueError: the model's weights hold NaN or infinity.
        FloatingPointError: the loss or the weights became NaN or infinite.
    """
    set_seed(seed)
    classes = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {}
    model = load_from(
        AutoModelForSequenceClassification.from_pretrained,
        model_name,
        trust_remote_code=True,
        problem_type=problem,
        num_labels=max(1, len(names)),
        **classes,
    ).float()
    if not is_finite(*model.parameters()):
        raise ValueError(f"model: the weights of {model_name!r} hold NaN or infinity")
    weights = sum(parameter.numel() for parameter in model.parameters())
    learning_rate, epochs = default_rates(weights)
    own = copy.copy(arguments)
    own.learning_rate = options.learning_rate or learning_rate
    own.num_train_epochs = options.num_train_epochs or epochs
    own.gradient_accumulation_steps = max(1, arguments.gradient_accumulation_steps)
    own.seed, own.output_dir = seed, os.path.join(arguments.output_dir, f"seed-{seed}")
    own.eval_strategy = own.save_strategy = "epoch"
    own.load_best_model_at_end = True
    own.metric_for_best_model, own.greater_is_better = DECIDING[problem], True
    rates = f"learning rate {own.learning_rate:g}, at most {own.num_train_epochs:g} epochs"
    print(f"seed {seed}: {weights:,} weights, {rates}", flush=True)
    trainer = CarefulTrainer(
        model=model,
        args=own,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=sets[0],
        eval_dataset=sets[1],
        processing_class=tokenizer,
        compute_metrics=lambda p: score(problem, decide(problem, p.predictions), p.label_ids),
        callbacks=[EarlyStoppingCallback(options.patience)],
    )
    trainer.train()
    trainer.check_weights()
    return trainer


def write_model_card(folder: Path, title: str, model_name: str, results: dict) -> None:
    """Write the README.md of a fine-tuned model, with its scores on the validation data."""
    scores = ", ".join(f"{metric} {value:.4f}" for metric, value in results["mean"].items())
    kind = results["problem"].replace("_", " ")
    source = Path(model_name)
    write_card(
        folder,
        f"Fine-tuned by `scripts/finetune_classification.py` ({kind}); on the validation data, mean over "
        f"{len(results['seeds'])} seed(s): {scores}",
        source=model_name,
        folder=source if source.is_dir() else None,
        title=title,
        notes="Load it with `AutoModelForSequenceClassification`; `metrics.json` holds all scores.",
    )
