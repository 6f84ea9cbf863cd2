"""Triton attention and its gradients against the float64 reference."""

from dataclasses import replace

import pytest
import reference
import torch
from numerics import assert_same
from triton_kernels import (
    DEVICE,
    INTERPRETED,
    assert_as_good_as_eager,
    attend,
    leaf,
    on_kernels,
    packed_input,
    slopes_of,
    use_tiles,
    with_gradient,
)

from mosaicbert.bert_padding import pack_padded, pack_rows

SHAPES = [
    ([63, 0, 1], 16, torch.float32),
    ([37], 20, torch.float32),
    ([40, 7], 32, torch.bfloat16),
    ([63, 1, 0], 64, torch.float16),
    ([1, 34], 64, torch.bfloat16),
    ([0, 32, 31], 64, torch.float32),
    ([45], 96, torch.float16),
    ([33, 2], 128, torch.float32),
]


@on_kernels
@pytest.mark.parametrize("lengths, head_dim, dtype", SHAPES)
def test_context_and_gradients_match_float64(lengths, head_dim, dtype):
    qkv, packed = packed_input(lengths, 2, head_dim, dtype)
    assert_as_good_as_eager(qkv, packed, slopes_of(2))


@on_kernels
@pytest.mark.parametrize("rows, step", [(64, 32), (32, 64), (128, 32)])
def test_tile_sizes_do_not_change_what_is_computed(monkeypatch, rows, step):
    use_tiles(monkeypatch, rows, step)
    qkv, packed = packed_input([128, 0, 37], 1, 16)
    assert_as_good_as_eager(qkv, packed, slopes_of(1))


@on_kernels
def test_slopes_of_zero_are_no_bias_and_a_scale_is_taken_as_given():
    qkv, packed = packed_input([50], 2, 16)
    context = leaf.triton_attention(qkv, packed, torch.zeros(2, device=DEVICE), -0.7, 0.0)
    truth = reference.attention(*qkv.unbind(1), [0, 50], None, [0.0, 0.0], -0.7)
    assert_same(context, truth, 1e-6)


@on_kernels
@pytest.mark.parametrize("left", [0, 500])  # far to the right, a position read beyond a sequence must not be 0
def test_holes_and_left_padding_keep_their_distances(left):
    whole_mask = torch.zeros(5, left + 80, dtype=torch.long, device=DEVICE)
    mask = whole_mask[:, left:]
    mask[0, 30:] = 1  # left padding
    mask[1, :70] = 1
    mask[1, 10:45] = 0  # a hole wider than a tile
    mask[2, ::2] = 1
    mask[3, 79] = 1  # one token; row 4 has none
    packed = pack_padded(whole_mask, whole_mask.shape, mask.device)
    assert packed.has_holes
    qkv, _ = packed_input([packed.positions.shape[0]], 2, 16)
    assert_as_good_as_eager(qkv, packed, slopes_of(2))


@on_kernels
def test_padding_kept_among_the_tokens_gets_no_weight():
    mask = torch.zeros(3, 48, dtype=torch.long, device=DEVICE)
    mask[0, 40:] = 1  # the first tile holds padding only
    mask[1, :45:3] = 1  # row 2 is all padding
    kept = pack_rows(mask, mask.shape, mask.device)
    packed = pack_padded(mask, mask.shape, mask.device)
    real = mask.flatten().bool()
    qkv, _ = packed_input([mask.numel()], 2, 16)
    slopes = slopes_of(2)

    def kernel(x):
        return leaf.triton_attention(x, kept, slopes, 0.25, 0.0)[real]

    context, (gradient,) = with_gradient(kernel, qkv)
    truth, (true_gradient,) = with_gradient(
        lambda x: reference.attention(
            *x[real].unbind(1), packed.cu_seqlens.tolist(), packed.positions.tolist(), slopes.tolist(), 0.25
        ),
        qkv,
    )
    assert_same(context, truth, 1e-6)
    assert_same(gradient, true_gradient, 1e-6)
    assert (gradient[~real] == 0).all()


@on_kernels
def test_strided_views_and_a_strided_last_axis_give_the_same_numbers():
    qkv, packed = packed_input([40], 2, 16)
    expected = attend(qkv, packed, slopes_of(2))
    wide = torch.randn(2, 40, 3, 24, device=DEVICE)
    wide[..., 4:20] = qkv.detach().permute(2, 0, 1, 3)
    heads_first = wide[..., 4:20].permute(1, 2, 0, 3)  # [T, 3, H, D], heads outermost in memory
    channels_outer = qkv.detach().permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    for view in (heads_first, channels_outer):
        assert not view.is_contiguous()
        assert torch.equal(attend(view, packed, slopes_of(2)), expected)


@on_kernels
def test_strided_boundaries_and_slopes_are_read_by_their_strides():
    qkv, packed = packed_input([20, 13], 2, 16)
    strided = torch.stack((packed.cu_seqlens, packed.cu_seqlens * 0 - 7), dim=1)[:, 0]
    slopes = torch.tensor([0.5], device=DEVICE).expand(2)
    context = attend(qkv, replace(packed, cu_seqlens=strided), slopes)
    assert_same(context, reference.attention(*qkv.unbind(1), [0, 20, 33], None, [0.5, 0.5]), 1e-6)


@on_kernels
def test_offsets_beyond_two_to_the_31():
    # Rows 2^27 elements apart: the 40th starts past 2^32. The memory between them is reserved, never touched.
    torch.use_deterministic_algorithms(False)
    stride, tokens = 1 << 27, 40
    try:
        storage = torch.empty(stride * (tokens - 1) + 3 * 2 * 16, dtype=torch.float16, device=DEVICE)
    except (RuntimeError, MemoryError) as error:
        pytest.skip(f"cannot reserve 10 GiB of address space: {error}")
    view = storage.as_strided((tokens, 3, 2, 16), (stride, 32, 16, 1))
    qkv, packed = packed_input([tokens], 2, 16, torch.float16)
    view.copy_(qkv.detach())
    far, (far_gradient,) = with_gradient(lambda x: attend(x, packed, slopes_of(2)), view.requires_grad_())
    near, (near_gradient,) = with_gradient(lambda x: attend(x, packed, slopes_of(2)), qkv)
    assert torch.equal(far, near)
    assert torch.equal(far_gradient, near_gradient)


@on_kernels
def test_runs_are_bitwise_equal():
    qkv, packed = packed_input([40, 30], 2, 16, torch.float16)
    runs = [with_gradient(lambda x: attend(x, packed, slopes_of(2)), qkv) for _ in range(2 if INTERPRETED else 250)]
    for context, (gradient,) in runs[1:]:
        assert torch.equal(context, runs[0][0]) and torch.equal(gradient, runs[0][1][0])


@on_kernels
def test_no_tokens_at_all():
    qkv, packed = packed_input([0, 0], 2, 16)
    context, (gradient,) = with_gradient(lambda x: attend(x, packed, slopes_of(2)), qkv)
    assert context.shape == (0, 2, 16) and gradient.shape == qkv.shape
