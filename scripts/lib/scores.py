"""How good predictions are, for each kind of problem: numbers, tables and a picture."""

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .examples import MULTI, REGRESSION, SINGLE, Examples, Task
from .staging import staged_file

# The score that decides between epochs and between seeds; higher is better.
DECIDING = {SINGLE: "accuracy", MULTI: "micro_f1", REGRESSION: "spearman"}
RESAMPLES = 999


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
    from scipy.stats import pearsonr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if problem == REGRESSION:
        varies = np.ptp(predicted) > 0 and np.ptp(truth) > 0
        return {
            "mse": float(np.mean((predicted - truth) ** 2)),
            "pearson": float(pearsonr(predicted, truth)[0]) if varies else 0.0,
            "spearman": _rank_correlation(predicted, truth),
        }
    result = {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
    }
    if problem == MULTI:
        return {**result, "micro_f1": float(f1_score(truth, predicted, average="micro", zero_division=0))}
    varies = len({*truth.tolist(), *predicted.tolist()}) > 1  # else scikit-learn warns, and says 0
    return {**result, "matthews": float(matthews_corrcoef(truth, predicted)) if varies else 0.0}


def _rank_correlation(predicted: np.ndarray, truth: np.ndarray) -> float:
    from scipy.stats import spearmanr

    varies = np.ptp(predicted) > 0 and np.ptp(truth) > 0
    return float(spearmanr(predicted, truth)[0]) if varies else 0.0


def interval(problem: str, predicted: np.ndarray, truth: np.ndarray) -> list[float]:
    """Where the deciding score would lie for 95 of 100 samples of as many texts.

    Args:
        problem, predicted, truth: as `score` takes them.

    Returns:
        The lower and the upper end: Wilson's for accuracy, those of a seeded bootstrap for the others.
    """
    from scipy.stats import binomtest

    if problem == SINGLE:
        found = binomtest(int((predicted == truth).sum()), len(truth)).proportion_ci(0.95, method="wilson")
        return [float(found.low), float(found.high)]

    def deciding(rows):
        if problem == REGRESSION:
            return _rank_correlation(predicted[rows], truth[rows])
        wanted = predicted[rows].sum() + truth[rows].sum()
        return 2 * (predicted[rows] * truth[rows]).sum() / wanted if wanted else 0.0

    generator = np.random.default_rng(0)
    found = [deciding(generator.integers(len(truth), size=len(truth))) for _ in range(RESAMPLES)]
    return np.percentile(found, (2.5, 97.5)).tolist()


def class_scores(predicted: np.ndarray, truth: np.ndarray, names: list[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support (examples that have the label) of each class.

    Args:
        predicted, truth: class numbers [N], or zeros and ones [N, C].
        names: of the classes.

    Returns:
        A dict a class, by name.
    """
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(truth, predicted, labels=range(len(names)), zero_division=0)
    rows = zip(*(column.tolist() for column in columns[:3]), columns[3].astype(int).tolist())
    return {name: dict(zip(("precision", "recall", "f1", "support"), row)) for name, row in zip(names, rows)}


def decide(problem: str, logits: np.ndarray) -> np.ndarray:
    """Predictions of logits [N, C]: the largest, every one above zero, or the number itself."""
    if problem == SINGLE:
        return logits.argmax(-1)
    return (logits > 0).astype(np.float32) if problem == MULTI else logits.reshape(len(logits))


def probabilities(problem: str, logits: np.ndarray) -> np.ndarray:
    """Probability of each class [N, C]: they sum to one for single-label problems only."""
    from scipy.special import expit, softmax

    return softmax(logits, axis=-1) if problem == SINGLE else expit(logits)


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


def write_predictions(path: Path, fields: list[str], examples: Examples, task: Task, logits: np.ndarray) -> None:
    """Write predictions as CSV: each text, what was predicted, and the probability of each class.

    Args:
        path: of the file.
        fields: names of the text fields.
        examples: the texts.
        task: names the problem and the classes.
        logits: [N, C], of the model.
    """
    _write_table(path, {**_columns(fields, examples), **_predictions(task, logits)}, range(len(logits)))


def write_errors(
    path: Path, fields: list[str], examples: Examples, task: Task, logits: np.ndarray, truth: np.ndarray
) -> int:
    """Write the texts with a wrong prediction as CSV: where each stands, its label, and as `write_predictions`.

    The most confident stand first; of a regression all texts are written, the farthest off first.

    Args:
        path, fields, examples, task, logits: as `write_predictions` takes them.
        truth: encoded labels.

    Returns:
        How many texts were written.
    """
    predicted = decide(task.problem, logits)
    if task.problem == REGRESSION:
        weight, is_wrong = np.abs(predicted - truth), np.ones(len(truth), dtype=bool)
    elif task.problem == SINGLE:
        weight, is_wrong = probabilities(task.problem, logits).max(-1), predicted != truth
    else:
        weight = (np.abs(logits) * (predicted != truth)).max(-1)
        is_wrong = (predicted != truth).any(-1)
    order = [row for row in np.argsort(-weight, kind="stable") if is_wrong[row]]
    columns = {"origin": examples.origins, **_columns(fields, examples), "label": _words(task, truth)}
    _write_table(path, {**columns, **_predictions(task, logits)}, order)
    return len(order)


def _columns(fields: list[str], examples: Examples) -> dict[str, list]:
    return {name: [text[number] for text in examples.texts] for number, name in enumerate(fields)}


def _predictions(task: Task, logits: np.ndarray) -> dict[str, list]:
    columns = {"predicted": _words(task, decide(task.problem, logits))}
    if task.problem != REGRESSION:
        chances = np.round(probabilities(task.problem, logits).astype(float), 4)
        columns |= {f"p({name})": chances[:, i].tolist() for i, name in enumerate(task.names)}
    return columns


def _words(task: Task, values: np.ndarray) -> list[str]:
    """Encoded labels or predictions in words; several labels of a text are joined by `|`."""
    if task.problem == REGRESSION:
        return [f"{value:.6g}" for value in values]
    if task.problem == SINGLE:
        return [task.names[value] for value in values]
    return ["|".join(name for name, there in zip(task.names, row) if there) for row in values]


def _write_table(path: Path, columns: dict[str, list], order: Iterable[int]) -> None:
    rows = list(zip(*columns.values()))
    with staged_file(path) as new, open(new, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows[row] for row in order)
