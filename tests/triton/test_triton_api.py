"""The functions named after flash-attn's: what they take and what they refuse."""

import pytest
import torch
from triton_kernels import DEVICE, leaf, on_kernels


@on_kernels
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"qkv": torch.zeros(4, 3, 2)}, r"qkv must be a tensor \[T, 3, H, D\], got \(4, 3, 2\)"),
        ({"qkv": torch.zeros(4, 2, 2, 16)}, r"qkv must be a tensor \[T, 3, H, D\], got \(4, 2, 2, 16\)"),
        ({"qkv": torch.zeros(4, 3, 2, 16).double()}, "qkv must be .* got torch.float64"),
        ({"qkv": torch.zeros(4, 3, 2, 129)}, "heads of 1 to 128 channels, got 129"),
        ({"qkv": torch.zeros(4, 3, 2, 16, device="meta")}, "qkv must be on a device that Triton can use: .* got meta"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"causal": True}, "causal must be False"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens must be int32 on .* got torch.int64"),
        ({"cu_seqlens": [0, 4]}, r"cu_seqlens must be a tensor \[N \+ 1\] .* got list"),
        ({"cu_seqlens": torch.tensor([1, 4]).int()}, "must start at 0, never fall and end at T = 4; it starts at 1"),
        ({"cu_seqlens": torch.tensor([0, 3]).int()}, "ends at 3"),
        ({"cu_seqlens": torch.tensor([0, 5, 4]).int()}, "smallest step is -1"),
        ({"alibi_slopes": torch.tensor([0.5, 0.0])}, "alibi_slopes must be positive, got 0.0"),
        ({"alibi_slopes": torch.ones(2).double()}, "alibi_slopes must be float32 on .* got torch.float64"),
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes must be a tensor \[H\] with H = 2, got \(3,\)"),
        ({"alibi_slopes": False}, "alibi_slopes must be a tensor .* got bool"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"qkv": torch.zeros(4, 3, 2, 16), "cu_seqlens": torch.tensor([0, 4]).int(), "max_seqlen": 4, **changes}

    def move(value):
        return value.to(DEVICE) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value

    with pytest.raises(ValueError, match=message):
        leaf.flash_attn_varlen_qkvpacked_func(**{name: move(value) for name, value in arguments.items()})


@on_kernels
def test_equal_lengths_name_their_rank():
    with pytest.raises(ValueError, match=r"qkv must be a tensor \[B, S, 3, H, D\], got \(4, 3, 2, 16\)"):
        leaf.flash_attn_qkvpacked_func(torch.zeros(4, 3, 2, 16, device=DEVICE))
