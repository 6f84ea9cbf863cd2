"""Dropout of attention weights in the Triton kernels."""

import pytest
import reference
import torch
from numerics import assert_same
from triton_kernels import DEVICE, attend, leaf, on_kernels, packed_input, slopes_of, use_tiles, with_gradient

from mosaicbert.bert_padding import pack_flattened


def dropped_weights(lengths, heads, dropout_p, seed):
    """Attention weights after dropout, [T, H, 64]: values are unit vectors that name the key."""
    total = sum(lengths)
    query = torch.zeros(total, heads, 64, device=DEVICE)
    value = torch.cat([torch.eye(64, device=DEVICE)[:length] for length in lengths])[:, None].expand(-1, heads, -1)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(DEVICE)
    torch.manual_seed(seed)
    packed = pack_flattened(cu_seqlens, max(lengths), (1, total))
    qkv = torch.stack((query, query, value), dim=1)
    return leaf.triton_attention(qkv, packed, slopes_of(heads) * 0.01, 1.0, dropout_p)


@on_kernels
def test_dropout_is_reproducible_and_differs_between_calls_sequences_and_heads():
    first = dropped_weights([64, 64], 2, 0.5, seed=3) > 0
    assert torch.equal(first, dropped_weights([64, 64], 2, 0.5, seed=3) > 0)
    others = [dropped_weights([64, 64], 2, 0.5, seed=4) > 0, first.roll(64, 0), first.flip(1)]
    for other in others:
        # 16,384 fair coins agree in half of all cases, give or take 5 standard deviations of 0.0039.
        assert abs((first == other).float().mean().item() - 0.5) < 0.02


@on_kernels
def test_dropout_drops_the_share_that_was_asked_for():
    for dropout_p in (0.1, 0.25):
        kept = dropped_weights([64, 64], 4, dropout_p, seed=5) > 0
        share = kept.float().mean().item()
        deviation = (dropout_p * (1 - dropout_p) / kept.numel()) ** 0.5
        assert abs(share - (1 - dropout_p)) < 5 * deviation
        # No column and no row is favoured: the largest deviation of 64 means of 512 draws, in standard deviations.
        for means in (kept.float().mean((0, 1)), kept.view(2, 64, 4, 64).float().mean((0, 2, 3))):
            spread = (dropout_p * (1 - dropout_p) / 512) ** 0.5
            assert (means - (1 - dropout_p)).abs().max() < 5 * spread


@on_kernels
def test_dropout_does_not_depend_on_tiles(monkeypatch):
    patterns = []
    for tile in ((32, 32), (64, 32), (32, 64)):
        use_tiles(monkeypatch, *tile)
        patterns.append(dropped_weights([64, 30], 2, 0.3, seed=6) > 0)
    assert torch.equal(patterns[0], patterns[1]) and torch.equal(patterns[0], patterns[2])


@on_kernels
@pytest.mark.parametrize("tile", [(32, 32), (64, 32)])
def test_dropout_in_backward_is_the_dropout_of_forward(monkeypatch, tile):
    use_tiles(monkeypatch, *tile)
    lengths, heads, dropout_p = [64, 21], 2, 0.3
    kept = dropped_weights(lengths, heads, dropout_p, seed=7) > 0
    keep = torch.zeros(2, heads, 64, 64, dtype=torch.bool)
    keep[0], keep[1, :, :21] = kept[:64].transpose(0, 1), kept[64:].transpose(0, 1)
    qkv, packed = packed_input(lengths, heads, 16)
    slopes = slopes_of(heads)

    def kernel(x):
        torch.manual_seed(7)
        return attend(x, packed, slopes, dropout_p)

    context, (gradient,) = with_gradient(kernel, qkv)
    truth, (true_gradient,) = with_gradient(
        lambda x: reference.attention(
            *x.unbind(1), [0, 64, 85], None, slopes.tolist(), None, keep.to(DEVICE), dropout_p
        ),
        qkv,
    )
    assert_same(context, truth, 1e-6)
    assert_same(gradient, true_gradient, 2e-6)
