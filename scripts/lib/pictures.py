"""Pictures of a training: its loss, and which class was taken for which."""

from pathlib import Path

import numpy as np


def _axes(width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw_losses(histories: dict[str, list[dict]], path: Path) -> None:
    """Save a picture of the loss by step.

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
    """Save a picture of which class was taken for which: numbers of texts, coloured by their share of the true class.

    Args:
        truth, predicted: class numbers [N].
        names: of the classes.
        path: of the picture.
    """
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
