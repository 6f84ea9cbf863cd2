"""Fine-tune a classifier or a regressor on text, over several seeds, beside a bag-of-words baseline.

    python scripts/finetune_classification.py --train_data topics.train.jsonl --validation_data topics.valid.jsonl \\
        --seeds 0 1 2 --baseline --output_dir runs/topics
    python scripts/finetune_classification.py --train_data nyu-mll/glue:mrpc --validation_data nyu-mll/glue:mrpc \\
        --text_fields sentence1 sentence2 --output_dir runs/mrpc

The kind of problem follows from the labels: lists of names are multi-label, numbers with a fraction are a regression,
anything else is one class of several. Written to --output_dir: `metrics.json`, `confusion.png` (one class of several),
and the best seed's model as a repository that loads by itself.
"""

import argparse
import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import datasets
import numpy as np
import torch
from common import REPOSITORY, write_json
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
# What decides between epochs and between seeds; higher is better.
DECIDING = {SINGLE: "accuracy", MULTI: "micro_f1", REGRESSION: "spearman"}


@dataclass
class TaskArguments:
    """The data, the model to start from, and what is measured."""

    train_data: str = field(
        metadata={"help": "A .csv, .json or .jsonl file (also .gz), or a `datasets` id as id[:config[:split]]."}
    )
    validation_data: Optional[str] = field(
        default=None, metadata={"help": "The same (default split: validation). Default: a tenth of the training data."}
    )
    model: str = field(default=str(REPOSITORY), metadata={"help": "Folder or Hub id to start from."})
    text_fields: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "One field, or two for pairs of texts."}
    )
    label_field: str = field(default="label", metadata={"help": "Field of the label, or of the list of labels."})
    label_separator: Optional[str] = field(
        default=None, metadata={"help": "Splits a string of labels into several, for files without lists."}
    )
    max_length: int = field(default=256, metadata={"help": "Wordpieces kept of a text."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One training a seed."})
    patience: int = field(default=2, metadata={"help": "Epochs without a better score before a training stops."})
    baseline: bool = field(default=False, metadata={"help": "Also fit TF-IDF with a linear model."})


@dataclass
class FinetuningArguments(TrainingArguments):
    """TrainingArguments with defaults for fine-tuning."""

    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Texts a process takes in one forward."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "The same in evaluation."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the training data, at most."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two lines of the log."})
    use_cpu: bool = field(default=not torch.cuda.is_available(), metadata={"help": "Train on the CPU."})
    report_to: str = field(default="none", metadata={"help": "tensorboard, wandb, …"})


def load_examples(source: str, task: TaskArguments, split: str) -> datasets.Dataset:
    """Read labelled texts.

    Args:
        source: a file, or a `datasets` id as id[:config[:split]].
        task: names the fields.
        split: the split of a `datasets` id that names none.

    Returns:
        A dataset with the text fields and the label field.

    Raises:
        ValueError: a file's suffix is unknown, a field is missing, or a label is.
    """
    if Path(source).is_file():
        suffix = Path(source.removesuffix(".gz")).suffix
        if suffix not in (".csv", ".json", ".jsonl"):
            raise ValueError(f"data must be a .csv, .json or .jsonl file, or one of these with .gz, got {source!r}")
        kind = "csv" if suffix == ".csv" else "json"
        examples = datasets.load_dataset(kind, data_files=source, split="train")
    else:
        name, config, named_split = (*source.split(":"), "", "")[:3]
        examples = datasets.load_dataset(name, config or None, split=named_split or split)
    wanted = [*task.text_fields, task.label_field]
    missing = [name for name in wanted if name not in examples.column_names]
    if missing:
        raise ValueError(f"{source!r} has no field {missing[0]!r}, it has {examples.column_names}")
    if any(label is None for label in examples[task.label_field]):
        raise ValueError(f"{source!r} has examples without {task.label_field!r}")
    feature = examples.features[task.label_field]
    if isinstance(feature, datasets.ClassLabel):
        names = [feature.names[label] for label in examples[task.label_field]]
        examples = examples.remove_columns(task.label_field).add_column(task.label_field, names)
    elif task.label_separator:
        lists = [[part for part in label.split(task.label_separator) if part] for label in examples[task.label_field]]
        examples = examples.remove_columns(task.label_field).add_column(task.label_field, lists)
    return examples.select_columns(wanted)


def problem_of(labels: list) -> tuple[str, list[str]]:
    """Tell from training labels what kind of problem they are.

    Args:
        labels: lists of names, numbers with a fraction, or names and whole numbers.

    Returns:
        The `problem_type` of transformers, and the sorted names of the classes (none for a regression).
    """
    if isinstance(labels[0], list):
        return MULTI, sorted({str(name) for label in labels for name in label})
    if all(isinstance(label, float) for label in labels):
        return REGRESSION, []
    return SINGLE, [str(name) for name in sorted(set(labels))]


def encode_labels(labels: list, problem: str, names: list[str]) -> np.ndarray:
    """Turn labels to numbers.

    Args:
        labels: as they stand in the data.
        problem: what `problem_of` found.
        names: of the classes.

    Returns:
        int64 [N], the number of the class; float32 [N, C] of zeros and ones for multi-label; float32 [N] for a
        regression.

    Raises:
        ValueError: a label that the training data lacks.
    """
    if problem == REGRESSION:
        return np.array(labels, dtype=np.float32)
    number = {name: i for i, name in enumerate(names)}
    unknown = {str(n) for label in labels for n in (label if problem == MULTI else [label])} - number.keys()
    if unknown:
        raise ValueError(f"labels that the training data lacks: {sorted(unknown)}")
    if problem == SINGLE:
        return np.array([number[str(label)] for label in labels])
    places = np.zeros((len(labels), len(names)), dtype=np.float32)
    for row, label in enumerate(labels):
        places[row, [number[str(name)] for name in label]] = 1
    return places


def score(problem: str, predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Measure predictions.

    Args:
        problem: what `problem_of` found.
        predicted: class numbers [N], zeros and ones [N, C], or numbers [N].
        truth: the same.

    Returns:
        One class of several: accuracy, macro F1, Matthews correlation. Multi-label: micro and macro F1, share of
        examples with every label right. Regression: mean squared error, Pearson and Spearman correlation.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if problem == REGRESSION:
        return {
            "mse": float(np.mean((predicted - truth) ** 2)),
            "pearson": float(pearsonr(predicted, truth)[0]),
            "spearman": float(spearmanr(predicted, truth)[0]),
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
        problem: what `problem_of` found.
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


def finetune(task: TaskArguments, arguments: FinetuningArguments) -> dict:
    """Run the fine-tuning that the arguments describe and write its results to `output_dir`.

    Returns:
        What `metrics.json` holds: the problem, the classes, the scores of each seed, their mean and standard
        deviation, and the baseline's scores where asked.

    Raises:
        ValueError: data that `load_examples` or `encode_labels` refuse, or more than two text fields.
    """
    if not 1 <= len(task.text_fields) <= 2:
        raise ValueError(f"text_fields must name one or two fields, got {task.text_fields}")
    train = load_examples(task.train_data, task, "train")
    if task.validation_data:
        validation = load_examples(task.validation_data, task, "validation")
    else:
        train, validation = train.train_test_split(0.1, seed=0).values()
    problem, names = problem_of(list(train[task.label_field]))
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    sets, labels = {}, {}
    for name, examples in (("train", train), ("validation", validation)):
        labels[name] = encode_labels(list(examples[task.label_field]), problem, names)
        tokens = tokenizer(
            *(list(examples[text]) for text in task.text_fields), truncation=True, max_length=task.max_length
        )
        sets[name] = datasets.Dataset.from_dict({**tokens, "labels": labels[name]})

    output_dir = Path(arguments.output_dir)
    results = {"problem": problem, "classes": names, "seeds": {}}
    best = None
    for seed in task.seeds:
        model = AutoModelForSequenceClassification.from_pretrained(
            task.model,
            trust_remote_code=True,
            problem_type=problem,
            num_labels=max(1, len(names)),
            **({"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {}),
        ).float()
        own = copy.copy(arguments)
        own.seed, own.output_dir = seed, str(output_dir / f"seed-{seed}")
        own.eval_strategy = own.save_strategy = "epoch"
        own.save_total_limit, own.load_best_model_at_end = 1, True
        own.metric_for_best_model, own.greater_is_better = DECIDING[problem], True
        trainer = Trainer(
            model=model,
            args=own,
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=sets["train"],
            eval_dataset=sets["validation"],
            processing_class=tokenizer,
            compute_metrics=lambda p: score(problem, decide(problem, p.predictions), p.label_ids),
            callbacks=[EarlyStoppingCallback(task.patience)],
        )
        trainer.train()
        predicted = decide(problem, trainer.predict(sets["validation"]).predictions)
        results["seeds"][str(seed)] = score(problem, predicted, labels["validation"])
        reached = results["seeds"][str(seed)][DECIDING[problem]]
        if best is None or reached > best[0]:
            best = (reached, predicted)
            trainer.save_model(str(output_dir))
    for name, statistic in (("mean", np.mean), ("standard_deviation", np.std)):
        results[name] = {
            metric: float(statistic([scores[metric] for scores in results["seeds"].values()]))
            for metric in next(iter(results["seeds"].values()))
        }
    if task.baseline:
        texts = [
            ["\n".join(fields) for fields in zip(*(examples[text] for text in task.text_fields))]
            for examples in (train, validation)
        ]
        guess = fit_baseline(problem, texts[0], labels["train"], texts[1])
        results["baseline"] = score(problem, guess, labels["validation"])
    if problem == SINGLE:
        draw_confusion(labels["validation"], best[1], names, output_dir / "confusion.png")
    write_json(output_dir / "metrics.json", results)
    return results


def main() -> None:
    """Parse the command line and fine-tune."""
    parser = HfArgumentParser(
        (TaskArguments, FinetuningArguments),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    print(json.dumps(finetune(*parser.parse_args_into_dataclasses()), indent=2))


if __name__ == "__main__":
    main()
