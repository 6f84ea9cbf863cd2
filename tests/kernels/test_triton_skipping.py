"""Which tiles Triton attention skips, and that their weight is negligible."""

import math

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import reference
import torch
import triton
import triton.language as tl
from numerics import assert_same, relative_error
from triton_kernels import (
    DEVICE,
    INTERPRETED,
    attend,
    leaf,
    on_kernels,
    packed_input,
    skip_at_every_length,
    slopes_of,
    with_gradient,
)

_radius, _window = leaf._radius, leaf._window
leaf_peaks, leaf_flattest_head = leaf._peaks, leaf._flattest_head


@triton.jit
def _bounds_kernel(peaks, slopes, first, length, bounds, ROWS: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr):
    radius = _radius(tl.load(peaks), tl.load(peaks + 1), tl.load(peaks + 2), tl.load(slopes), -0.5, MASKED)
    begin, diagonal, leave, stop = _window(first, length, radius, ROWS, STEP)
    tl.store(bounds, radius)
    tl.store(bounds + 1, begin)
    tl.store(bounds + 2, diagonal)
    tl.store(bounds + 3, leave)
    tl.store(bounds + 4, stop)


def bounds_of(peaks, slope, first=0, length=1, rows=32, step=32, masked=False):
    """Radius, begin, diagonal, leave and stop for peaks |q|^2, |k|^2 and low, and a scale of -0.5."""
    bounds = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    numbers = [torch.tensor(value, dtype=torch.float32, device=DEVICE) for value in (peaks, [slope])]
    _bounds_kernel[(1,)](*numbers, first, length, bounds, ROWS=rows, STEP=step, MASKED=masked)
    return bounds.tolist()


@on_kernels
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("slope", [2**-0.5, 2**-4, 2**-8])
@pytest.mark.parametrize("bound, low", [(0.0, 0.0), (5.0, 0.0), (5.0, 2.0), (40.0, 40.0), (40.0, 90.0)])
def test_keys_beyond_the_radius_weigh_2_to_minus_24_and_those_at_it_more(slope, bound, low, masked):
    # 0.5 * sqrt(4 * bound) * sqrt(bound) = bound
    radius = bounds_of([bound * 4, bound, low], slope, masked=masked)[0]

    def share_from(distance):
        """Two-sided, if each key scores what the bound allows."""
        # Of a row whose largest score is -low.
        tail = 2 / -math.expm1(-slope)
        shares = [tail * math.exp(bound + min(low, bound) - slope * distance)]
        if not masked:
            # Of a row in which no key scores less than -bound.
            shares.append(2 * math.exp(2 * bound - slope * distance))
        return min(shares)

    assert share_from(radius + 1) <= 2**-24 * 1.001
    assert share_from(radius) >= 2**-24 * 0.999


@on_kernels
def test_nothing_is_skipped_where_nothing_is_bounded():
    for key_norm, slope in ((1.0, 0.0), (float("inf"), 0.5)):
        assert bounds_of([1.0, key_norm, 0.0], slope)[0] == 2**29


@on_kernels
@pytest.mark.parametrize("rows, step", [(32, 32), (64, 32), (32, 64)])
def test_walk_visits_exactly_the_tiles_within_the_radius(rows, step):
    radii = set()
    for first, length in ((0, 1), (0, 200), (64, 65), (128, 500), (448, 500)):
        for slope in (0.2, 0.3, 0.5, 0.52, 0.53, 0.56, 1.0, 3.0, 9.0):
            radius, begin, diagonal, leave, stop = bounds_of([0, 0, 0], slope, first, length, rows, step)
            end = min(first + rows, length)
            within = range(max(first - radius, 0), min(end + radius, length))
            assert {j // step for j in within} == set(range(begin // step, -(-stop // step)))
            assert begin <= diagonal <= first < end <= leave
            assert begin % step == diagonal % step == leave % step == 0
            radii.add(radius)
    # Walks that end with a tile and walks that end one row into the next one.
    assert {32, 33} <= radii


def adversarial_input(length, heads, head_dim, dtype, size):
    """Every query scores -C with itself and with the near half of the keys, and +C with the far half."""
    direction = torch.ones(head_dim) / head_dim**0.5
    sides = torch.where(torch.arange(length) < length // 2, 1.0, -1.0)
    query = sides[:, None] * direction * size
    qkv = torch.stack((query, -query, torch.randn(length, head_dim, generator=torch.Generator().manual_seed(2))), 1)
    return qkv[:, :, None].expand(-1, -1, heads, -1).to(dtype).to(DEVICE).contiguous().requires_grad_()


@on_kernels
@pytest.mark.parametrize("norms", ["tiny", "trained", "huge", "adversarial", "adversarial huge"])
def test_skipping_costs_no_accuracy(monkeypatch, norms):
    length, heads = (100, 1) if INTERPRETED else (700, 2)
    slopes = torch.tensor([2.0, 0.9][:heads], device=DEVICE)
    if norms.startswith("adversarial"):
        # Norms multiplied, times 1 / sqrt(16): C = 4 and C = 100.
        qkv = adversarial_input(length, heads, 16, torch.float32, 4.0 if norms == "adversarial" else 20.0)
    else:
        size = {"tiny": 1e-3, "trained": 1.0, "huge": 30.0}[norms]
        qkv, _ = packed_input([length], heads, 16, size=size)
    packed = packed_input([length], heads, 16)[1]
    truth, (true_gradient,) = with_gradient(
        lambda x: reference.attention(*x.unbind(1), [0, length], None, slopes.tolist()), qkv
    )
    errors = {}
    for skip in (False, True):
        skip_at_every_length(monkeypatch, skip)
        context, (gradient,) = with_gradient(lambda x: attend(x, packed, slopes), qkv)
        errors[skip] = relative_error(context, truth), relative_error(gradient, true_gradient)
    for dense, skipped in zip(errors[False], errors[True]):
        # Equal up to one rounding of float32.
        assert skipped <= dense + 1.2e-7


@on_kernels
@pytest.mark.parametrize("skip", [True, False])
def test_far_tiles_are_not_read(monkeypatch, skip):
    skip_at_every_length(monkeypatch, skip)
    qkv, packed = packed_input([200], 2, 16, size=0.1)
    with torch.no_grad():
        qkv[160:, 2] = float("nan")  # values are in no bound: NaN arrives where a tile is visited
    slopes = torch.tensor([2.0, 0.01], device=DEVICE)
    context = attend(qkv, packed, slopes)
    assert context[:, 1].isnan().all()  # the flat head looks everywhere
    assert context[:96, 0].isnan().any().item() is not skip


@on_kernels
def test_values_that_are_not_finite_skip_nothing(monkeypatch):
    skip_at_every_length(monkeypatch)
    for part in (0, 1):
        qkv, packed = packed_input([200], 1, 16)
        with torch.no_grad():
            qkv[199, part] = float("nan")
        context = attend(qkv, packed, torch.tensor([2.0], device=DEVICE))
        is_nan = context.isnan().flatten(1).any(1)
        # A query that is NaN spoils its own row, a key that is NaN every row.
        assert is_nan[199] and is_nan.all().item() == (part == 1)


@on_kernels
def test_measured_norms(monkeypatch):
    monkeypatch.setattr(leaf, "_run", lambda *_, **arguments: None)  # measures, and leaves the rest
    qkv, packed = packed_input([70, 0, 530], 2, 20)
    scale = -0.3
    arguments = (qkv.detach(), packed.cu_seqlens, slopes_of(2), None, None, None, scale, 0.0, 530)
    _, _, peaks = leaf._forward(*arguments)
    query, key, _ = qkv.detach().unbind(1)
    # Sequence n owns the tiles from cu_seqlens[n] // 256 + n on; the others are never read.
    tiles = {0: (0, 70), 2: (70, 326), 3: (326, 582), 4: (582, 600)}
    for tile, (start, end) in tiles.items():
        q, k = query[start:end], key[start:end]
        lowest = (-scale * (q * k).sum(-1)).amax(0).clamp_min(0)
        expected = torch.stack((q.square().sum(-1).amax(0), k.square().sum(-1).amax(0), lowest), -1)
        assert_same(peaks[tile], expected, 1e-6)


@triton.jit
def _peaks_kernel(peaks, out, sequence, start, length, ROWS: tl.constexpr):
    query_peak, key_peak, low = leaf_peaks(peaks, sequence, start, length, tl.program_id(1), ROWS)
    out += tl.program_id(1) * 3
    tl.store(out, query_peak)
    tl.store(out + 1, key_peak)
    tl.store(out + 2, low)


@on_kernels
def test_peaks_of_a_sequence_are_those_of_all_its_tiles_and_of_no_other():
    tiles = torch.rand(140, 2, 3, generator=torch.Generator().manual_seed(0)) + 1.0
    tiles[4] = tiles[104] = 9.0  # of the sequences before and after
    tiles[99, 1, 2] = 5.0  # beyond what one load takes
    tiles[5, 0, 0] = float("inf")
    out = torch.zeros(2, 3, device=DEVICE)
    # Sequence 3 from token 1,000 on: its tiles are 6 to 103 for 16 rows a tile, and 98 of them hold 1,568 tokens.
    _peaks_kernel[(1, 2)](tiles.to(DEVICE), out, 3, 40, 1578, ROWS=16)
    assert torch.equal(out.cpu(), tiles[5:104].amax(0))


@triton.jit
def _heads_kernel(out, POWER: tl.constexpr):
    tl.store(out + tl.program_id(0), leaf_flattest_head(tl.program_id(0), tl.num_programs(0), POWER))


@on_kernels
@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 15, 16])
def test_programs_start_with_the_flattest_head(heads):
    out = torch.zeros(heads, dtype=torch.int32, device=DEVICE)
    _heads_kernel[(heads,)](out, POWER=1 << heads.bit_length() - 1)
    assert out.tolist() == slopes_of(heads).argsort().tolist()
