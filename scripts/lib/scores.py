"""Scores of predictions for each kind of problem, and the confusion matrix."""

from pathlib import Path

import numpy as np

from .examples import MULTI, REGRESSION, SINGLE

# The score that decides between epochs and between seeds; higher is better.
DECIDING = {SINGLE: "accuracy", MULTI: "micro_f1", REGRESSION: "spearman"}


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
    """Plot the confusion matrix, as shares of the true class."""
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
