"""Checks that several files share: whether torch is tracing, whether a layer is plain, whether an argument is valid.

All private names of torch that the model files use are here too, each with a fallback for releases that lack it.
"""

import numbers
import re
from typing import Optional

import torch
from torch import nn

# As setup.cfg declares it.
OLDEST_TORCH = (2, 6)
if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < OLDEST_TORCH:
    raise ImportError(f"MosaicBERT needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer, got {torch.__version__}")


def private(path: str, fallback=None):
    """A private name of torch, attributes from `torch` on in a dotted path; `fallback` in a release without it."""
    found = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return fallback if found is None else found


def global_hooks_by_kind() -> bool:
    """Whether hooks are registered for all modules; torch before 2.8 has no function that tells."""
    kinds = ("forward_pre", "forward", "backward_pre", "backward")
    return any(getattr(nn.modules.module, f"_global_{kind}_hooks", None) for kind in kinds)


def plain_softmax_gradient(grad: torch.Tensor, weights: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Gradient of softmax's argument, in `dtype`, from `grad`, that of its result `weights`."""
    return (weights * (grad - (grad * weights).sum(dim, keepdim=True))).to(dtype)


def assert_now(condition: torch.Tensor, message: str) -> None:
    """Raise RuntimeError unless a bool scalar is True, waiting for its device."""
    if not condition:
        raise RuntimeError(message)


any_global_hook = private("nn.modules.module._has_any_global_hook", global_hooks_by_kind)
functorch_is_active = private("_C._are_functorch_transforms_active", lambda: False)
dispatch_mode_is_active = private("utils._python_dispatch.is_in_torch_dispatch_mode", lambda: False)
softmax_gradient = private("_softmax_backward_data", plain_softmax_gradient)
assert_on_device = private("_assert_async", assert_now)
# Where these are None, another attention or torch's public linear layer serves the call.
onednn_pointwise = private("ops.mkldnn._linear_pointwise")
flash_forward = private("ops.aten._scaled_dot_product_flash_attention_for_cpu")
flash_backward = private("ops.aten._scaled_dot_product_flash_attention_for_cpu_backward")


def is_traced() -> bool:
    """Whether torch.compile, export, a trace or torch.func is active, so that no Python may depend on data."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or functorch_is_active()


def is_plain(layer: nn.Module, kind: type = nn.Linear) -> bool:
    """Whether a layer is exactly `kind` and nothing hooks, wraps, quantizes or shards it."""
    return (
        type(layer) is kind
        and type(layer.weight) in (nn.Parameter, torch.Tensor)
        and "forward" not in vars(layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and not any_global_hook()
    )


def check_tensor(name: str, tensor) -> None:
    """Raise TypeError unless `tensor` is a tensor; the message names it."""
    if not torch.is_tensor(tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")


def check_shape(name: str, tensor, expected: tuple) -> None:
    """Raise TypeError unless `tensor` is one, ValueError unless it has the `expected` shape; the message names it."""
    check_tensor(name, tensor)
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {list(expected)}, got {list(tensor.shape)}")


def as_integers(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as int64, which holds -100 and any class number.

    Raises:
        TypeError: it is not a tensor.
        ValueError: its dtype is not an integer type; the message names it.
    """
    check_tensor(name, tensor)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {tensor.dtype}")
    return tensor.long()


def refuse(name: str, values: torch.Tensor, wrong: torch.Tensor, expected: str) -> None:
    """Raise ValueError if some of `values` are `wrong`; the message names the first."""
    if wrong.any():
        position = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name} must {expected}, got {values[tuple(position)].item()} at {position}")


def check_ids(name: str, ids, size: int, ignored: Optional[int] = None) -> torch.Tensor:
    """`as_integers`; raises ValueError, too, when one lies outside [0, size) and is not `ignored`.

    Values are checked on the CPU only: on an accelerator this would force a synchronization.
    """
    ids = as_integers(name, ids)
    if ids.device.type == "cpu" and ids.numel() and not is_traced():
        low, high = ids.aminmax()
        if low < 0 or high >= size:
            outside = (ids < 0) | (ids >= size)
            refuse(name, ids, outside if ignored is None else outside & (ids != ignored), f"lie in [0, {size})")
    return ids


def check_boundaries(cu_seq_lens_q, max_length_q: Optional[int], total: int) -> None:
    """Raise ValueError unless `cu_seq_lens_q` and `max_length_q` describe `total` tokens; values as for `check_ids`."""
    check_tensor("cu_seq_lens_q", cu_seq_lens_q)
    if cu_seq_lens_q.dim() != 1 or cu_seq_lens_q.is_floating_point() or cu_seq_lens_q.shape[0] < 1:
        raise ValueError(
            f"cu_seq_lens_q must be integers of shape [N + 1], got {cu_seq_lens_q.dtype} {list(cu_seq_lens_q.shape)}"
        )
    if is_traced():
        return
    if max_length_q is not None and not isinstance(max_length_q, numbers.Integral):
        raise ValueError(f"max_length_q must be an int or None, got {max_length_q!r}")
    if cu_seq_lens_q.device.type != "cpu":
        return
    bounds = cu_seq_lens_q.tolist()
    if bounds[0] != 0 or bounds[-1] != total or bounds != sorted(bounds):
        raise ValueError(f"cu_seq_lens_q must rise from 0 to the {total} tokens given, got {bounds}")
    longest = max((end - start for start, end in zip(bounds, bounds[1:])), default=0)
    if max_length_q is not None and max_length_q < longest:
        raise ValueError(f"max_length_q must be at least the longest sequence, {longest} tokens, got {max_length_q}")
