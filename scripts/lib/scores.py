"""Score predictions for each kind of problem, and write them as tables."""

from pathlib import Path

import numpy as np

from .examples import MULTI, REGRESSION, SINGLE, Examples, Task
from .records import write_csv

# The metric that decides between epochs and between seeds; higher is better.
DECIDING = {SINGLE: "accuracy", MULTI: "micro_f1", REGRESSION: "spearman"}
RESAMPLES = 999


def score(problem: str, predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Score predictions.

    Args:
        problem: a `problem_type`, see `infer_problem`.
        predicted: class numbers [N], zeros and ones [N, C], or numbers [N].
        truth: the same.

    Returns:
        Single-label: accuracy, macro F1, Matthews correlation. Multi-label: micro and macro F1, share of
        examples with every label right. Regression: mean squared error, Pearson and Spearman correlation
        (0 if all predictions are the same).
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if problem == REGRESSION:
        mse = float(np.mean((predicted - truth) ** 2))
        return {"mse": mse, **{name: _correlation(name, predicted, truth) for name in ("pearson", "spearman")}}
    result = {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
    }
    if problem == MULTI:
        return {**result, "micro_f1": float(f1_score(truth, predicted, average="micro", zero_division=0))}
    varies = len({*truth.tolist(), *predicted.tolist()}) > 1  # otherwise scikit-learn warns and returns 0
    return {**result, "matthews": float(matthews_corrcoef(truth, predicted)) if varies else 0.0}


def _correlation(name: str, predicted: np.ndarray, truth: np.ndarray) -> float:
    from scipy import stats

    varies = np.ptp(predicted) > 0 and np.ptp(truth) > 0
    return float(getattr(stats, f"{name}r")(predicted, truth)[0]) if varies else 0.0


def interval(problem: str, predicted: np.ndarray, truth: np.ndarray) -> list[float]:
    """Estimate the 95% interval of the deciding metric: Wilson's for accuracy, otherwise a seeded bootstrap's."""
    from scipy.stats import binomtest

    if problem == SINGLE:
        found = binomtest(int((predicted == truth).sum()), len(truth)).proportion_ci(0.95, method="wilson")
        return [float(found.low), float(found.high)]

    def deciding(rows):
        if problem == REGRESSION:
            return _correlation("spearman", predicted[rows], truth[rows])
        wanted = predicted[rows].sum() + truth[rows].sum()
        return 2 * (predicted[rows] * truth[rows]).sum() / wanted if wanted else 0.0

    generator = np.random.default_rng(0)
    found = [deciding(generator.integers(len(truth), size=len(truth))) for _ in range(RESAMPLES)]
    return np.percentile(found, (2.5, 97.5)).tolist()


def class_scores(predicted: np.ndarray, truth: np.ndarray, names: list[str]) -> dict[str, dict[str, float]]:
    """Score each class: precision, recall, F1 and support (the number of examples with the label), by its name."""
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(truth, predicted, labels=range(len(names)), zero_division=0)
    rows = zip(*(column.tolist() for column in columns[:3]), columns[3].astype(int).tolist())
    return {name: dict(zip(("precision", "recall", "f1", "support"), row)) for name, row in zip(names, rows)}


def decide(problem: str, logits: np.ndarray) -> np.ndarray:
    """Turn logits [N, C] into predictions: the largest, every one above zero, or the number itself."""
    if problem == SINGLE:
        return logits.argmax(-1)
    return (logits > 0).astype(np.float32) if problem == MULTI else logits.reshape(len(logits))


def probabilities(problem: str, logits: np.ndarray) -> np.ndarray:
    """Turn logits [N, C] into probabilities [N, C]; each row sums to one for single-label problems only."""
    from scipy.special import expit, softmax

    return softmax(logits, axis=-1) if problem == SINGLE else expit(logits)


def fit_baseline(problem: str, train_texts, train_labels, texts) -> np.ndarray:
    """Fit TF-IDF of words with a linear model, and predict `texts` in the form of `decide`."""
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
    """Write predictions as CSV: each text, its prediction, and the probability of each class.

    A column of texts whose name another column has gets the suffix ` (text)`.

    Args:
        path: of the file.
        fields: names of the text fields.
        examples: the texts.
        task: the problem and the classes.
        logits: [N, C], of the model.
    """
    found = _predictions(task, logits)
    columns = {**_columns(fields, examples, [*found]), **found}
    write_csv(path, columns, zip(*columns.values()))


def write_errors(
    path: Path, fields: list[str], examples: Examples, task: Task, logits: np.ndarray, truth: np.ndarray
) -> int:
    """Write the texts with a wrong prediction as CSV: the columns of `write_predictions`, the origin and the label.

    The most confident predictions come first; for a regression, all texts with the largest error first.

    Args:
        path, fields, examples, task, logits: as `write_predictions` takes them.
        truth: encoded labels.

    Returns:
        The number of texts in the file.
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
    found = {"label": _words(task, truth), **_predictions(task, logits)}
    columns = {"origin": examples.origins, **_columns(fields, examples, ["origin", *found]), **found}
    rows = list(zip(*columns.values()))
    write_csv(path, columns, (rows[row] for row in order))
    return len(order)


def _columns(fields: list[str], examples: Examples, taken: list[str]) -> dict[str, list]:
    columns = {}
    for number, name in enumerate(fields):
        while name in taken or name in columns:
            name += " (text)"
        columns[name] = [text[number] for text in examples.texts]
    return columns


def _predictions(task: Task, logits: np.ndarray) -> dict[str, list]:
    columns = {"predicted": _words(task, decide(task.problem, logits))}
    if task.problem != REGRESSION:
        chances = np.round(probabilities(task.problem, logits).astype(float), 4)
        columns |= {f"p({name})": chances[:, i].tolist() for i, name in enumerate(task.names)}
    return columns


def _words(task: Task, values: np.ndarray) -> list[str]:
    """Write encoded labels or predictions in words; several labels of a text are joined by `|`."""
    if task.problem == REGRESSION:
        return [f"{value:.6g}" for value in values]
    if task.problem == SINGLE:
        return [task.names[value] for value in values]
    return ["|".join(name for name, there in zip(task.names, row) if there) for row in values]
