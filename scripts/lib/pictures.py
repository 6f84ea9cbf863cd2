"""Draw the loss of a training, a confusion matrix, and measurements by sequence length."""

from pathlib import Path
from typing import Union

import numpy as np

from .staging import staged_file


def _axes(width: float, height: float, panels: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, panels, figsize=(width, height), layout="constrained")


def _save(figure, path: Union[str, Path]) -> None:
    from matplotlib import pyplot

    with staged_file(path) as new:
        figure.savefig(new, dpi=100)
    pyplot.close(figure)


def draw_losses(histories: dict[str, list[dict]], path: Path) -> None:
    """Draw the loss by step.

    Args:
        histories: the `log_history` of each training, by its name. Losses in training are lines, those in evaluation
            (`eval_loss`, `eval_NAME_loss`) are lines with dots.
        path: of the picture.
    """
    figure, axes = _axes(6, 4)
    for name, history in histories.items():
        keys = dict.fromkeys(key for entry in history for key in entry if key.endswith("loss") and key != "train_loss")
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            label = " ".join(filter(None, [name, key.removesuffix("loss").strip("_").replace("_", " ")])) or "training"
            axes.plot(*zip(*points), marker="" if key == "loss" else "o", markersize=3, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if axes.lines:
        axes.legend(fontsize="small")
    _save(figure, path)


def draw_confusion(truth: np.ndarray, predicted: np.ndarray, names: list[str], path: Path) -> None:
    """Draw the confusion matrix of class numbers [N]: counts of texts, coloured by their share of the true class."""
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    counts = confusion_matrix(truth, predicted, labels=range(len(names)))
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    figure, axes = _axes(3 + 0.5 * len(names), 3 + 0.5 * len(names))
    display = ConfusionMatrixDisplay(shares, display_labels=names)
    display.plot(xticks_rotation="vertical", colorbar=False, ax=axes, im_kw={"vmin": 0, "vmax": 1})
    for text, count in zip(display.text_.ravel(), counts.ravel()):
        text.set_text(f"{count:,}")
    axes.set_title(f"accuracy {np.mean(predicted == truth):.3f}, {len(truth):,} texts")
    _save(figure, path)


def draw_lengths(rows: list[dict], path: str) -> None:
    """Draw loss, accuracy, speed and memory by length, with one line per model of the rows of `evaluate`."""
    titles = {
        "loss": "loss (nats)",
        "top1": "top-1 accuracy",
        "tokens_per_second": "tokens per second",
        "peak_mib": "peak memory (MiB)",
    }
    # Memory is not measured on every system.
    titles = {column: title for column, title in titles.items() if any(row[column] != "" for row in rows)}
    figure, panels = _axes(4 * len(titles), 3.6, len(titles))
    for (column, title), axes in zip(titles.items(), panels):
        for name in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if row["model"] == name and row[column] != ""]
            axes.plot([row["length"] for row in own], [row[column] for row in own], marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("sequence length (tokens)")
        axes.set_title(title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    _save(figure, path)
