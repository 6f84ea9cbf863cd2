"""Losses of the heads: float32 means, and 0 with a gradient where nothing is labelled.

Letters: B batch, S padded length, N sequences, C classes.
"""

import torch
import torch.nn.functional as F

from .bert_checks import as_integers, check_ids, check_shape
from .bert_padding import PackedBatch


def mean_loss(total: torch.Tensor, count, num_items_in_batch) -> torch.Tensor:
    """The mean of summed losses.

    Args:
        total: float32 scalar, the sum.
        count: items in the sum, an integer or an integer scalar tensor.
        num_items_in_batch: items of the whole accumulated batch, likewise, where the caller counts them; None: `count`.

    Returns:
        float32 scalar; 0, with a gradient, where there is no item.

    Raises:
        ValueError: `num_items_in_batch` is not a number.
    """
    items = count if num_items_in_batch is None else num_items_in_batch
    if not (torch.is_tensor(items) or isinstance(items, (int, float))):
        raise ValueError(f"num_items_in_batch must be a number or a scalar tensor, got {items!r}")
    return total / (items.clamp(min=1) if torch.is_tensor(items) else max(items, 1))


def class_loss(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Mean cross entropy, in float32, of logits [..., C] and int64 labels [...]; label -100 does not count."""
    check_ids("labels", labels, logits.shape[-1], ignored=-100)
    logits, labels = logits.flatten(0, -2).float(), labels.flatten()
    total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return mean_loss(total, (labels != -100).sum(), num_items_in_batch)


def packed_labels(packed: PackedBatch, labels: torch.Tensor) -> torch.Tensor:
    """int64 [T] of integers [B, S]; those at padding are dropped, or -100 [B, S] where padding is kept."""
    labels = as_integers("labels", labels)
    check_shape("labels", labels, packed.shape)
    labels = packed.pack(labels)
    return labels if packed.key_mask is None else labels.masked_fill(~packed.key_mask, -100)


def row_integers(name: str, values: torch.Tensor, rows: int) -> torch.Tensor:
    """int64 [B] of integers [B] or [B, 1], one for each of `rows` = B rows; error messages call them `name`."""
    values = as_integers(name, values)
    if values.dim() == 2 and values.shape[1] == 1:
        values = values.squeeze(1)
    check_shape(name, values, (rows,))
    return values


def guess_problem_type(num_labels: int, labels: torch.Tensor) -> str:
    """The problem type that labels imply where the config names none, as stock BERT guesses it."""
    if num_labels == 1:
        return "regression"
    several = labels.is_floating_point() or labels.dtype == torch.bool
    return "multi_label_classification" if several else "single_label_classification"


def sequence_loss(logits, labels, problem_type: str, num_items_in_batch=None) -> torch.Tensor:
    """Loss of logits [N, C]; `BertForSequenceClassification.forward` says what labels each problem type takes."""
    if problem_type == "single_label_classification":
        if labels.shape == logits.shape and labels.shape[-1] > 1:
            raise ValueError(f"labels of several classes per text must be floating, got {labels.dtype}")
        return class_loss(logits, row_integers("labels", labels, logits.shape[0]), num_items_in_batch)
    if problem_type not in ("regression", "multi_label_classification"):
        raise ValueError(
            "problem_type must be regression, single_label_classification or multi_label_classification, "
            f"got {problem_type!r}"
        )
    if logits.shape[-1] == 1 and labels.dim() == 1:
        labels = labels[:, None]
    if problem_type == "multi_label_classification" and labels.dim() == 1:
        raise ValueError(
            f"labels of multi_label_classification must have shape {list(logits.shape)}, got {labels.dtype} "
            f"{list(labels.shape)}; one class per text takes integers and single_label_classification"
        )
    check_shape("labels", labels, logits.shape)
    loss = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    total = loss(logits.float(), labels.float(), reduction="sum")
    return mean_loss(total, labels.numel(), num_items_in_batch)


def answer_loss(
    start_logits, end_logits, start_positions, end_positions, attention_mask=None, num_items_in_batch=None
) -> torch.Tensor:
    """Mean, in float32, of the cross entropies of an answer's first and last position.

    Args:
        start_logits, end_logits: floating [B, S].
        start_positions, end_positions: integers [B] or [B, 1]; one outside [0, S) or at padding does not count.
        attention_mask: any dtype [B, S], nonzero at real tokens; None: there is no padding.
        num_items_in_batch: see `mean_loss`.
    """
    losses = []
    for name, scores, positions in (
        ("start_positions", start_logits, start_positions),
        ("end_positions", end_logits, end_positions),
    ):
        positions = row_integers(name, positions, scores.shape[0])
        skipped = (positions < 0) | (positions >= scores.shape[1])
        if attention_mask is not None:
            # With one more column, so that there is one to gather from where rows are empty.
            masked = F.pad(attention_mask == 0, (0, 1), value=True)
            skipped = skipped | masked.gather(1, positions.masked_fill(skipped, scores.shape[1])[:, None])[:, 0]
        losses.append(class_loss(scores, positions.masked_fill(skipped, -100), num_items_in_batch))
    return sum(losses) / 2
