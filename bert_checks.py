"""What several files ask: whether torch traces, whether a layer is plain, whether an argument is what it must be."""

from typing import Optional

import torch
from torch import nn


def is_traced() -> bool:
    """Whether torch.compile, export, a trace or torch.func is at work, so that nothing may depend on data."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def is_plain(layer: nn.Module, kind: type = nn.Linear) -> bool:
    """Whether a layer is an untouched `kind`: no subclass, hook, replaced forward, quantized or sharded weight."""
    return (
        type(layer) is kind
        and type(layer.weight) in (nn.Parameter, torch.Tensor)
        and "forward" not in vars(layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and not nn.modules.module._has_any_global_hook()
    )


def check_tensor(name: str, tensor) -> None:
    """Raise TypeError unless `tensor` is a tensor; the message names it."""
    if not torch.is_tensor(tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")


def check_shape(name: str, tensor: torch.Tensor, expected: tuple) -> None:
    """Raise ValueError unless `tensor` has the `expected` shape; the message names it."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {list(expected)}, got {list(tensor.shape)}")


def as_integers(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as int64, in which -100 and any number of classes have a place.

    Raises:
        TypeError: it is no tensor.
        ValueError: its dtype is no integer's; the message names it.
    """
    check_tensor(name, tensor)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {tensor.dtype}")
    return tensor.long()


def check_ids(name: str, ids: torch.Tensor, size: int, ignored: Optional[int] = None) -> None:
    """Raise ValueError when a value lies outside [0, size) and is not `ignored`.

    Only on the CPU, where it costs nothing next to the model; a device would have to wait for the answer.

    Args:
        name: the argument to name.
        ids: integers of any shape.
        size: exclusive upper bound.
        ignored: another value that is allowed.
    """
    if ids.device.type != "cpu" or ids.numel() == 0 or is_traced():
        return
    low, high = ids.aminmax()
    if low >= 0 and high < size:
        return
    outside = (ids < 0) | (ids >= size)
    if ignored is not None:
        outside &= ids != ignored
    if outside.any():
        place = outside.nonzero()[0].tolist()
        raise ValueError(f"{name} must lie in [0, {size}), got {ids[tuple(place)].item()} at {place}")


def check_boundaries(cu_seq_lens_q: torch.Tensor, max_length_q: Optional[int], total: int) -> None:
    """Raise ValueError unless `cu_seq_lens_q` and `max_length_q` describe `total` tokens; values on the CPU only."""
    if cu_seq_lens_q.dim() != 1 or cu_seq_lens_q.is_floating_point() or cu_seq_lens_q.shape[0] < 1:
        raise ValueError(
            f"cu_seq_lens_q must be integers of shape [N + 1], got {cu_seq_lens_q.dtype} {list(cu_seq_lens_q.shape)}"
        )
    if cu_seq_lens_q.device.type != "cpu" or is_traced():
        return
    bounds = cu_seq_lens_q.tolist()
    if bounds[0] != 0 or bounds[-1] != total or bounds != sorted(bounds):
        raise ValueError(f"cu_seq_lens_q must rise from 0 to the {total} tokens given, got {bounds}")
    longest = max((end - start for start, end in zip(bounds, bounds[1:])), default=0)
    if max_length_q is not None and max_length_q < longest:
        raise ValueError(f"max_length_q must be at least the longest sequence, {longest} tokens, got {max_length_q}")
