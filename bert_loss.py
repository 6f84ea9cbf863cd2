"""Losses of the heads: float32 means, and 0 with a gradient where nothing is labelled.

Letters: B batch, S padded length, N sequences, C classes.
"""

from typing import Optional

import torch
import torch.nn.functional as F

from .bert_padding import PackedBatch, check_ids, check_shape


def mean_loss(total: torch.Tensor, count, num_items_in_batch) -> torch.Tensor:
    """The mean of summed losses.

    Args:
        total: float32 scalar, the sum.
        count: items in the sum, an integer or an integer scalar tensor.
        num_items_in_batch: items of the whole accumulated batch, likewise, where the caller counts them; None: `count`.

    Returns:
        float32 scalar; 0, with a gradient, where there is no item.
    """
    items = count if num_items_in_batch is None else num_items_in_batch
    return total / (items.clamp(min=1) if torch.is_tensor(items) else max(items, 1))


def class_loss(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Mean cross entropy, in float32, of logits [..., C] and int64 labels [...]; label -100 does not count."""
    check_ids("labels", labels, logits.shape[-1], ignored=-100)
    logits, labels = logits.flatten(0, -2).float(), labels.flatten()
    total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return mean_loss(total, (labels != -100).sum(), num_items_in_batch)


def packed_labels(packed: PackedBatch, labels: torch.Tensor) -> torch.Tensor:
    """int64 [T] of labels [B, S]; those at padding are dropped, or -100 [B, S] where padding is kept."""
    check_shape("labels", labels, packed.shape)
    labels = packed.pack(labels)
    return labels if packed.key_mask is None else labels.masked_fill(~packed.key_mask, -100)


def sequence_loss(logits, labels, problem_type: Optional[str], num_items_in_batch=None) -> torch.Tensor:
    """Loss of logits [N, C]; `BertForSequenceClassification.forward` says what labels each problem type takes."""
    if problem_type is None:
        integers = not labels.is_floating_point()
        problem_type = (
            "regression"
            if logits.shape[-1] == 1
            else "single_label_classification"
            if integers
            else "multi_label_classification"
        )
    if problem_type == "single_label_classification":
        check_shape("labels", labels, logits.shape[:1])
        return class_loss(logits, labels, num_items_in_batch)
    if problem_type not in ("regression", "multi_label_classification"):
        raise ValueError(
            "problem_type must be regression, single_label_classification or multi_label_classification, "
            f"got {problem_type!r}"
        )
    if logits.shape[-1] == 1 and labels.dim() == 1:
        labels = labels[:, None]
    check_shape("labels", labels, logits.shape)
    formula = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    total = formula(logits.float(), labels.float(), reduction="sum")
    return mean_loss(total, labels.numel(), num_items_in_batch)


def answer_loss(start_logits, end_logits, start_positions, end_positions, num_items_in_batch=None) -> torch.Tensor:
    """Mean of the cross entropies of an answer's first and last place.

    Args:
        start_logits: floating [B, S].
        end_logits: likewise.
        start_positions: int64 [B]; a place outside [0, S) does not count.
        end_positions: likewise.
        num_items_in_batch: see `mean_loss`.

    Returns:
        float32 scalar.
    """
    losses = []
    for name, scores, places in (
        ("start_positions", start_logits, start_positions),
        ("end_positions", end_logits, end_positions),
    ):
        check_shape(name, places, scores.shape[:1])
        outside = (places < 0) | (places >= scores.shape[1])
        losses.append(class_loss(scores, places.masked_fill(outside, -100), num_items_in_batch))
    return sum(losses) / 2
