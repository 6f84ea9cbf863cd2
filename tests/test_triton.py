"""Triton attention against the float64 reference.

On a machine without a GPU the kernels run under Triton's interpreter, which has to be chosen before Triton is imported:
`test_kernels_under_the_interpreter` runs this file in a process of its own with TRITON_INTERPRET=1. On a GPU, run
`pytest -m gpu tests/test_triton.py`, which runs everything on the device.
"""

import importlib.util
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import reference
import torch
from numerics import FORWARD, GRADIENT, assert_no_worse, assert_same, relative_error

from mosaicbert.bert_attention import alibi_slopes, eager_attention
from mosaicbert.bert_padding import pack_flattened, pack_padded, pack_rows

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from mosaicbert import flash_attn_triton as leaf  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

# Marks what runs the kernels: on the device with `-m gpu`, and under the interpreter in its process.
kernels = [] if INTERPRETED else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def on_kernels(test):
    for mark in kernels:
        test = mark(test)
    return test


@pytest.fixture(autouse=INTERPRETED)
def bfloat16_in_the_interpreter(monkeypatch):
    """NumPy has no bfloat16: the interpreter multiplies its raw bits and truncates where a GPU rounds to even."""
    import numpy as np
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding_convert(data, source, target, *rest):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, *rest)
        floats = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
        return floats.bfloat16().view(torch.int16).numpy().view(np.uint16)

    def widening_dot(self, a, b, *rest):
        def widen(handle):
            if handle.dtype.scalar != tl.bfloat16:
                return handle
            return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        return dot(self, widen(a), widen(b), *rest)

    monkeypatch.setattr(interpreter, "_convert_float", rounding_convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widening_dot)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What torch.empty and its relatives return is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def use_tiles(monkeypatch, own, other, warps=4):
    """Give all three kernels one tile size."""
    for kernel in (leaf._forward_kernel, leaf._query_gradient_kernel, leaf._key_value_gradient_kernel):
        config = triton.Config({"OWN": own, "OTHER": other}, num_warps=warps, num_stages=2)
        monkeypatch.setattr(kernel, "configs", [config])


def packed_input(lengths, heads, head_dim, dtype=torch.float32, size=1.0, seed=0):
    """qkv [T, 3, H, D] that wants a gradient, and cu_seqlens [N + 1]."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=generator) * size
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return qkv.to(dtype).to(DEVICE).requires_grad_(), cu_seqlens.to(DEVICE)


def slopes_of(heads):
    return torch.tensor(alibi_slopes(heads), dtype=torch.float32, device=DEVICE)


def with_gradient(attend, *tensors, seed=1):
    """A context [T, H, D] and the gradients of `tensors` for one random gradient of the context."""
    context = attend(*tensors)
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(context.shape, generator=generator).to(context)
    return context, torch.autograd.grad(context, tensors, gradient)


def assert_as_good_as_eager(kernel, qkv, packed, slopes, positions=None):
    """Context and gradients of `kernel(qkv)` against float64, by the rule of numerics.py.

    `positions` are the columns of the tokens where a mask has holes.
    """
    scale = qkv.shape[-1] ** -0.5
    bounds = packed.cu_seqlens.tolist()
    context, (gradient,) = with_gradient(kernel, qkv)
    plain, (plain_gradient,) = with_gradient(lambda x: eager_attention(x, packed, slopes, scale, 0.0), qkv)
    truth, (true_gradient,) = with_gradient(
        lambda x: reference.attention(*x.unbind(1), bounds, positions, slopes.tolist(), scale), qkv
    )
    assert context.dtype == gradient.dtype == qkv.dtype
    assert_no_worse(context, plain, truth, FORWARD, "context")
    for place, name in enumerate(("query", "key", "value")):
        parts = (tensor[:, place] for tensor in (gradient, plain_gradient, true_gradient))
        assert_no_worse(*parts, GRADIENT, f"gradient of {name}")


# --- the process of its own ------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_kernels_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(Path(__file__))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


# --- numbers ---------------------------------------------------------------------------------------------------------

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
    qkv, cu_seqlens = packed_input(lengths, 2, head_dim, dtype)
    slopes = slopes_of(2)
    packed = pack_flattened(cu_seqlens, max(lengths), (1, sum(lengths)))

    def kernel(x):
        return leaf.flash_attn_varlen_qkvpacked_func(x, cu_seqlens, max(lengths), alibi_slopes=slopes)

    assert_as_good_as_eager(kernel, qkv, packed, slopes)


@on_kernels
@pytest.mark.parametrize("own, other", [(64, 32), (32, 64), (128, 32)])
def test_tile_sizes_do_not_change_what_is_computed(monkeypatch, own, other):
    use_tiles(monkeypatch, own, other)
    lengths = [128, 0, 37]
    qkv, cu_seqlens = packed_input(lengths, 1, 16)
    slopes = slopes_of(1)
    packed = pack_flattened(cu_seqlens, 128, (1, 165))

    def kernel(x):
        return leaf.flash_attn_varlen_qkvpacked_func(x, cu_seqlens, 128, alibi_slopes=slopes)

    assert_as_good_as_eager(kernel, qkv, packed, slopes)


@on_kernels
def test_equal_lengths_are_the_varlen_function_on_rows():
    qkv = packed_input([80], 2, 16)[0].detach().unflatten(0, (2, 40)).requires_grad_()
    slopes = slopes_of(2)
    context, (gradient,) = with_gradient(lambda x: leaf.flash_attn_qkvpacked_func(x, alibi_slopes=slopes), qkv)
    truth, (true_gradient,) = with_gradient(
        lambda x: reference.attention(*x.flatten(0, 1).unbind(1), [0, 40, 80], None, slopes.tolist()).view(
            2, 40, 2, 16
        ),
        qkv,
    )
    assert_same(context, truth, 1e-6)
    assert_same(gradient, true_gradient, 1e-6)


@on_kernels
def test_without_slopes_there_is_no_bias_and_a_scale_is_taken_as_given():
    qkv, cu_seqlens = packed_input([50], 2, 16)
    context = leaf.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 50, softmax_scale=-0.7)
    truth = reference.attention(*qkv.unbind(1), [0, 50], None, [0.0, 0.0], -0.7)
    assert_same(context, truth, 1e-6)


@on_kernels
def test_holes_and_left_padding_keep_their_distances():
    mask = torch.zeros(5, 80, dtype=torch.long, device=DEVICE)
    mask[0, 30:] = 1  # left padding
    mask[1, :70] = 1
    mask[1, 10:45] = 0  # a hole wider than a tile
    mask[2, ::2] = 1
    mask[3, 79] = 1  # one token; row 4 has none
    packed = pack_padded(mask, mask.shape, mask.device)
    total = packed.positions.shape[0]
    assert packed.has_holes
    qkv, _ = packed_input([total], 2, 16)
    slopes = slopes_of(2)

    def kernel(x):
        return leaf.triton_attention(x, packed, slopes, 0.25, 0.0)

    assert_as_good_as_eager(kernel, qkv, packed, slopes, packed.positions.tolist())


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
    qkv, cu_seqlens = packed_input([40], 2, 16)
    expected = leaf.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 40, alibi_slopes=slopes_of(2))
    wide = torch.randn(2, 40, 3, 24, device=DEVICE)
    wide[..., 4:20] = qkv.detach().permute(2, 0, 1, 3)
    heads_first = wide[..., 4:20].permute(1, 2, 0, 3)  # [T, 3, H, D], heads outermost in memory
    channels_outer = qkv.detach().permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    for view in (heads_first, channels_outer):
        assert not view.is_contiguous()
        context = leaf.flash_attn_varlen_qkvpacked_func(view, cu_seqlens, 40, alibi_slopes=slopes_of(2))
        assert torch.equal(context, expected)


@on_kernels
def test_strided_boundaries_and_slopes_are_read_by_their_strides():
    qkv, cu_seqlens = packed_input([20, 13], 2, 16)
    strided = torch.stack((cu_seqlens, cu_seqlens * 0 - 7), dim=1)[:, 0]
    slopes = torch.tensor([0.5], device=DEVICE).expand(2)
    context = leaf.flash_attn_varlen_qkvpacked_func(qkv, strided, 20, alibi_slopes=slopes)
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
    qkv, cu_seqlens = packed_input([tokens], 2, 16, torch.float16)
    view.copy_(qkv.detach())
    far, (far_gradient,) = with_gradient(
        lambda x: leaf.flash_attn_varlen_qkvpacked_func(x, cu_seqlens, tokens, alibi_slopes=slopes_of(2)),
        view.requires_grad_(),
    )
    near, (near_gradient,) = with_gradient(
        lambda x: leaf.flash_attn_varlen_qkvpacked_func(x, cu_seqlens, tokens, alibi_slopes=slopes_of(2)), qkv
    )
    assert torch.equal(far, near)
    assert torch.equal(far_gradient, near_gradient)


@on_kernels
def test_runs_are_bitwise_equal():
    qkv, cu_seqlens = packed_input([40, 30], 2, 16, torch.float16)
    runs = [
        with_gradient(
            lambda x: leaf.flash_attn_varlen_qkvpacked_func(x, cu_seqlens, 40, alibi_slopes=slopes_of(2)), qkv
        )
        for _ in range(2 if INTERPRETED else 250)
    ]
    for context, (gradient,) in runs[1:]:
        assert torch.equal(context, runs[0][0]) and torch.equal(gradient, runs[0][1][0])


@on_kernels
def test_no_tokens_at_all():
    qkv = torch.zeros(0, 3, 2, 16, device=DEVICE, requires_grad=True)
    cu_seqlens = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    context, (gradient,) = with_gradient(
        lambda x: leaf.flash_attn_varlen_qkvpacked_func(x, cu_seqlens, 0, alibi_slopes=slopes_of(2)), qkv
    )
    assert context.shape == (0, 2, 16) and gradient.shape == qkv.shape


# --- skipping --------------------------------------------------------------------------------------------------------

_radius, _window = leaf._radius, leaf._window


@triton.jit
def _bounds_kernel(
    peaks,
    slopes,
    first,
    length,
    bounds,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    SKIP: tl.constexpr,
    MASKED: tl.constexpr,
):
    radius = _radius(peaks, tl.load(slopes), -0.5, SKIP, MASKED)
    begin, diagonal, leave, stop = _window(first, length, radius, OWN, OTHER)
    tl.store(bounds, radius)
    tl.store(bounds + 1, begin)
    tl.store(bounds + 2, diagonal)
    tl.store(bounds + 3, leave)
    tl.store(bounds + 4, stop)


def bounds_of(peaks, slope, first=0, length=1, own=32, other=32, skip=True, masked=False):
    """Radius, begin, diagonal, leave and stop for peaks |q|^2, |k|^2 and low, and a scale of -0.5."""
    bounds = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    numbers = [torch.tensor(value, dtype=torch.float32, device=DEVICE) for value in (peaks, [slope])]
    _bounds_kernel[(1,)](*numbers, first, length, bounds, OWN=own, OTHER=other, SKIP=skip, MASKED=masked)
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
    for key_norm, slope, skip in ((1.0, 0.5, False), (1.0, 0.0, True), (float("inf"), 0.5, True)):
        assert bounds_of([1.0, key_norm, 0.0], slope, skip=skip)[0] == 2**29


@on_kernels
@pytest.mark.parametrize("own, other", [(32, 32), (64, 32), (32, 64)])
def test_walk_visits_exactly_the_tiles_within_the_radius(own, other):
    radii = set()
    for first, length in ((0, 1), (0, 200), (64, 65), (128, 500), (448, 500)):
        for slope in (0.2, 0.3, 0.5, 0.52, 0.53, 0.56, 1.0, 3.0, 9.0):
            radius, begin, diagonal, leave, stop = bounds_of([0, 0, 0], slope, first, length, own, other)
            end = min(first + own, length)
            reached = range(max(first - radius, 0), min(end + radius, length))
            assert {j // other for j in reached} == set(range(begin // other, -(-stop // other)))
            assert begin <= diagonal <= first < end <= leave
            assert begin % other == diagonal % other == leave % other == 0
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
def test_skipping_costs_no_accuracy(norms):
    length, heads = (100, 1) if INTERPRETED else (700, 2)
    slopes = torch.tensor([2.0, 0.9][:heads], device=DEVICE)
    if norms.startswith("adversarial"):
        # Products of norms times 1 / sqrt(16): C = 4 and C = 100.
        qkv = adversarial_input(length, heads, 16, torch.float32, 4.0 if norms == "adversarial" else 20.0)
    else:
        size = {"tiny": 1e-3, "trained": 1.0, "huge": 30.0}[norms]
        qkv, _ = packed_input([length], heads, 16, size=size)
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)
    truth, (true_gradient,) = with_gradient(
        lambda x: reference.attention(*x.unbind(1), [0, length], None, slopes.tolist()), qkv
    )
    errors = {}
    for skip in (False, True):
        context, (gradient,) = with_gradient(
            lambda x, skip=skip: leaf.flash_attn_varlen_qkvpacked_func(
                x, cu_seqlens, length, alibi_slopes=slopes, skip=skip
            ),
            qkv,
        )
        errors[skip] = relative_error(context, truth), relative_error(gradient, true_gradient)
    for dense, skipped in zip(errors[False], errors[True]):
        # Equal up to one rounding of float32.
        assert skipped <= dense + 1.2e-7


@on_kernels
@pytest.mark.parametrize("skip", [True, False])
def test_far_tiles_are_not_read(skip):
    qkv, cu_seqlens = packed_input([200], 2, 16, size=0.1)
    with torch.no_grad():
        qkv[160:, 2] = float("nan")  # values are in no bound: NaN arrives where a tile is visited
    slopes = torch.tensor([2.0, 0.01], device=DEVICE)
    context = leaf.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 200, alibi_slopes=slopes, skip=skip)
    assert context[:, 1].isnan().all()  # the flat head looks everywhere
    assert context[:96, 0].isnan().any().item() is not skip


@on_kernels
def test_values_that_are_not_finite_skip_nothing():
    for place in (0, 1):
        qkv, cu_seqlens = packed_input([200], 1, 16)
        with torch.no_grad():
            qkv[199, place] = float("nan")
        context = leaf.flash_attn_varlen_qkvpacked_func(
            qkv, cu_seqlens, 200, alibi_slopes=torch.tensor([2.0], device=DEVICE)
        )
        is_nan = context.isnan().flatten(1).any(1)
        # A query that is NaN spoils its own row, a key that is NaN every row.
        assert is_nan[199] and is_nan.all().item() == (place == 1)


@on_kernels
def test_measured_norms_and_order_of_heads():
    qkv, cu_seqlens = packed_input([70, 0, 100], 5, 20)
    slopes = torch.tensor([0.5, 0.1, 0.5, 0.01, 0.2], device=DEVICE)
    query, key, value = qkv.detach().unbind(1)
    _, _, peaks, order = leaf._attention(query, key, value, cu_seqlens, slopes, None, None, None, -0.3, 0.0, 100, True)
    assert order.tolist() == [3, 1, 4, 0, 2]
    assert (peaks[1] == 0).all()
    for sequence, (start, end) in enumerate([(0, 70), (70, 70), (70, 170)]):
        if start < end:
            q, k = query[start:end], key[start:end]
            lowest = (0.3 * (q * k).sum(-1)).amax(0).clamp_min(0)
            expected = torch.stack((q.square().sum(-1).amax(0), k.square().sum(-1).amax(0), lowest), -1)
            assert_same(peaks[sequence], expected, 1e-6)


# --- dropout ---------------------------------------------------------------------------------------------------------


def dropped_weights(lengths, heads, dropout_p, seed):
    """Attention weights after dropout, [T, H, 64]: values are unit vectors that name the key."""
    total = sum(lengths)
    query = torch.zeros(total, heads, 64, device=DEVICE)
    value = torch.cat([torch.eye(64, device=DEVICE)[:length] for length in lengths])[:, None].expand(-1, heads, -1)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(DEVICE)
    torch.manual_seed(seed)
    packed = pack_flattened(cu_seqlens, max(lengths), (1, total))
    return leaf.triton_attention(
        torch.stack((query, query, value), dim=1), packed, slopes_of(heads) * 0.01, 1.0, dropout_p
    )


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
    for own, other in ((32, 32), (64, 32), (32, 64)):
        use_tiles(monkeypatch, own, other)
        patterns.append(dropped_weights([64, 30], 2, 0.3, seed=6) > 0)
    assert torch.equal(patterns[0], patterns[1]) and torch.equal(patterns[0], patterns[2])


@on_kernels
@pytest.mark.parametrize("own, other", [(32, 32), (64, 32)])
def test_dropout_in_backward_is_the_dropout_of_forward(monkeypatch, own, other):
    use_tiles(monkeypatch, own, other)
    lengths, heads, dropout_p = [64, 21], 2, 0.3
    kept = dropped_weights(lengths, heads, dropout_p, seed=7) > 0
    keep = torch.zeros(2, heads, 64, 64, dtype=torch.bool)
    keep[0], keep[1, :, :21] = kept[:64].transpose(0, 1), kept[64:].transpose(0, 1)
    qkv, cu_seqlens = packed_input(lengths, heads, 16)
    slopes = slopes_of(heads)

    def kernel(x):
        torch.manual_seed(7)
        return leaf.flash_attn_varlen_qkvpacked_func(x, cu_seqlens, 64, dropout_p, alibi_slopes=slopes)

    context, (gradient,) = with_gradient(kernel, qkv)
    truth, (true_gradient,) = with_gradient(
        lambda x: reference.attention(
            *x.unbind(1), [0, 64, 85], None, slopes.tolist(), None, keep.to(DEVICE), dropout_p
        ),
        qkv,
    )
    assert_same(context, truth, 1e-6)
    assert_same(gradient, true_gradient, 2e-6)


# --- tuning ----------------------------------------------------------------------------------------------------------


def card_with(monkeypatch, shared_memory):
    """A driver that reports a card with that many bytes of shared memory a block."""
    utilities = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": shared_memory})
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=utilities)))


def sizes_tried(kernel, dtype, block_dim, dropout=False):
    query = torch.empty(0, dtype=dtype)
    configs = leaf._fitting(kernel.configs, {"query": query}, BLOCK_DIM=block_dim, DROPOUT=dropout)
    return [(config.kwargs["OWN"], config.kwargs["OTHER"], config.num_warps) for config in configs]


def test_tuning_tries_few_sizes_that_suit_the_dtype_and_the_card(monkeypatch):
    card_with(monkeypatch, 232_448)
    assert len(sizes_tried(leaf._forward_kernel, torch.bfloat16, 64)) == 6
    assert sizes_tried(leaf._forward_kernel, torch.float32, 64) == [(16, 16, 4), (32, 16, 4), (32, 32, 8)]
    with_dropout = sizes_tried(leaf._forward_kernel, torch.bfloat16, 64, dropout=True)
    assert with_dropout == [(64, 32, 4), (64, 64, 4), (128, 64, 8)]
    card_with(monkeypatch, 65_536)
    assert (128, 128, 8) not in sizes_tried(leaf._forward_kernel, torch.bfloat16, 128)
    card_with(monkeypatch, 1024)
    assert sizes_tried(leaf._forward_kernel, torch.bfloat16, 128) == [(32, 32, 4)]


@pytest.mark.skipif(not INTERPRETED, reason="a GPU tunes for real")
def test_tuned_launch_measures_once_for_each_range_of_lengths(monkeypatch):
    card_with(monkeypatch, 65_536)
    kernel = leaf._forward_kernel
    if "num_buffers_warp_spec" in kernel.configs[0].all_kwargs():
        pytest.skip("the interpreter of Triton 3.2 refuses what its tuner passes")
    monkeypatch.setattr(kernel, "configs", [kernel.configs[1], kernel.configs[3]])
    monkeypatch.setattr(kernel, "cache", {})
    measured = []

    def measure(launch, quantiles):
        launch()
        measured.append(None)
        return [1.0] * 3

    monkeypatch.setattr(kernel, "do_bench", measure, raising=False)
    counts = []
    qkv, cu_seqlens = packed_input([40], 1, 16)
    truth = reference.attention(*qkv.unbind(1), [0, 40])
    for max_seqlen in (40, 50, 300):
        arguments = (*qkv.detach().unbind(1), cu_seqlens, slopes_of(1), None, None, None, 0.25, 0.0, max_seqlen, True)
        assert_same(leaf._forward(*arguments, tune=True)[0], truth, 1e-6)
        counts.append(len(measured))
    assert counts == [2, 2, 4]


# --- within torch ----------------------------------------------------------------------------------------------------


@on_kernels
def test_operator_is_registered_as_torch_expects():
    qkv, cu_seqlens = packed_input([20, 13], 2, 16)
    arguments = (*qkv.unbind(1), cu_seqlens, slopes_of(2), None, None, None, 0.25, 0.0, 20, True)
    torch.library.opcheck(
        leaf._attention, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


@on_kernels
def test_compiles_without_graph_breaks_forward_and_backward():
    slopes = slopes_of(2)

    def attend(x, cu_seqlens, max_seqlen):
        return leaf.flash_attn_varlen_qkvpacked_func(x * 2, cu_seqlens, max_seqlen, 0.0, None, slopes) + 1

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor", dynamic=True)
    for lengths in ([30, 5], [20, 30, 7]):
        qkv, cu_seqlens = packed_input(lengths, 2, 16)
        expected, (gradient,) = with_gradient(lambda x, c=cu_seqlens: attend(x, c, 30), qkv)
        context, (compiled_gradient,) = with_gradient(lambda x, c=cu_seqlens: compiled(x, c, 30), qkv)
        assert_same(context, expected.double(), 1e-6)
        assert_same(compiled_gradient, gradient.double(), 1e-6)


@on_kernels
def test_checkpointing_recomputes_the_same_dropout():
    from torch.utils.checkpoint import checkpoint

    qkv, cu_seqlens = packed_input([40], 2, 16)

    def attend(x):
        return leaf.flash_attn_varlen_qkvpacked_func(x.sin(), cu_seqlens, 40, 0.4, alibi_slopes=slopes_of(2))

    def seeded(x, function):
        torch.manual_seed(8)
        return function(x)

    plain = with_gradient(lambda x: seeded(x, attend), qkv)
    recomputed = with_gradient(lambda x: seeded(x, lambda y: checkpoint(attend, y, use_reentrant=False)), qkv)
    assert torch.equal(plain[0], recomputed[0]) and torch.equal(plain[1][0], recomputed[1][0])


@on_kernels
def test_autocast_leaves_the_dtype_of_the_tensors():
    qkv, cu_seqlens = packed_input([30], 2, 16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        context = leaf.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 30, alibi_slopes=slopes_of(2))
        projected = torch.nn.functional.linear(qkv, torch.eye(16, device=DEVICE))
        half = leaf.flash_attn_varlen_qkvpacked_func(projected, cu_seqlens, 30, alibi_slopes=slopes_of(2))
    assert context.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert_same(half, context.double(), 2e-2)
    half.float().sum().backward()
    assert qkv.grad.isfinite().all()


@on_kernels
def test_two_copies_of_the_file_live_in_one_process():
    copies = []
    for name in ("transformers_modules.one.flash_attn_triton", "transformers_modules.two.flash_attn_triton"):
        spec = importlib.util.spec_from_file_location(name, leaf.__file__)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        copies.append(module)
    qkv, cu_seqlens = packed_input([10], 1, 16)
    contexts = [copy.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 10) for copy in (*copies, leaf)]
    assert torch.equal(contexts[0], contexts[1]) and torch.equal(contexts[0], contexts[2])


# --- the whole model -------------------------------------------------------------------------------------------------

CASE = Path(__file__).parent / "data" / "reference" / "mlm-12heads-dim16"


@on_kernels
def test_whole_model_gives_the_published_numbers(monkeypatch):
    from dataclasses import replace

    from numerics import PUBLISHED
    from safetensors.torch import load_file

    from mosaicbert import bert_layers

    row = replace(bert_layers.ATTENTION_BACKENDS["triton"], devices=(DEVICE,))
    monkeypatch.setitem(bert_layers.ATTENTION_BACKENDS, "triton", row)
    use_tiles(monkeypatch, 64, 64)  # fewer steps than 32, for the interpreter
    model = bert_layers.BertForMaskedLM.from_pretrained(CASE, attn_implementation="triton").to(DEVICE)
    expected = load_file(CASE / "expected.safetensors")
    names = ("input_ids", "attention_mask", "token_type_ids", "labels")
    outputs = model(**{name: expected[name].to(DEVICE) for name in names}, output_hidden_states=True)
    attended = expected["attention_mask"].flatten().bool().to(DEVICE)
    for layer, states in enumerate(outputs.hidden_states[1:], start=1):
        states = states.flatten(0, 1)[attended]
        assert_same(states, expected[f"hidden_{layer}_at_attended"], PUBLISHED[torch.float32], f"layer {layer}")
    assert_same(outputs.loss.view(1), expected["loss"].view(1), PUBLISHED[torch.float32], "loss")
    outputs.loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {name[5:]: tensor for name, tensor in expected.items() if name.startswith("grad.")}
    assert gradients
    for name, gradient in gradients.items():
        assert_same(parameters[name].grad, gradient, PUBLISHED[torch.float32], name)


# --- refusals --------------------------------------------------------------------------------------------------------


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


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves CPU tensors")
def test_cpu_tensors_are_refused_with_the_reason():
    assert "interpreter" in leaf.triton_declines(torch.device("cpu"))
    with pytest.raises(ValueError, match="qkv must be on a device that Triton can use: Triton runs on the CPU under"):
        leaf.flash_attn_qkvpacked_func(torch.zeros(1, 4, 3, 2, 16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a device on which launching fails")
def test_a_card_on_which_launching_fails_is_reported_once(caplog):
    leaf._reason_against.cache_clear()
    with caplog.at_level(logging.WARNING):
        reasons = [leaf.triton_declines(torch.device("cuda:0")) for _ in range(2)]
    assert reasons[0] == reasons[1] and "failed on cuda:0" in reasons[0]
    assert len(caplog.records) == 1 and "Triton attention is not used" in caplog.text


# --- what only a GPU shows -------------------------------------------------------------------------------------------


def sampled_truth(qkv, slopes, rows):
    """float64 context of some rows of one sequence, [rows, H, D]."""
    query, key, value = qkv.double().unbind(1)
    places = torch.arange(len(qkv), device=qkv.device)
    scores = torch.einsum("qhd,khd->hqk", query[rows], key) * qkv.shape[-1] ** -0.5
    scores -= slopes.double()[:, None, None] * (rows[:, None] - places[None, :]).abs()
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", leaf.DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 112, 128])
def test_every_head_size_and_dtype_on_the_device(head_dim, dtype):
    lengths = [1, 63, 97, 0, 128, 200]
    qkv, cu_seqlens = packed_input(lengths, 3, head_dim, dtype)
    slopes = slopes_of(3)

    def kernel(x):
        return leaf.flash_attn_varlen_qkvpacked_func(x, cu_seqlens, 200, alibi_slopes=slopes)

    assert_as_good_as_eager(kernel, qkv, pack_flattened(cu_seqlens, 200, (1, sum(lengths))), slopes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("length", [2048, 8192, 32768])
def test_long_sequences_on_the_device(length, skip):
    qkv, cu_seqlens = packed_input([length], 12, 64, torch.bfloat16)
    slopes = slopes_of(12)
    context, (gradient,) = with_gradient(
        lambda x: leaf.flash_attn_varlen_qkvpacked_func(x, cu_seqlens, length, alibi_slopes=slopes, skip=skip), qkv
    )
    rows = torch.randint(length, (64,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    truth = sampled_truth(qkv.detach(), slopes, rows)
    # Two roundings of bfloat16: of the weights before the product, and of the result.
    assert_same(context[rows], truth, 7.9e-3)
    assert gradient.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_memory_grows_with_the_length_only():
    peaks = []
    for length in (4096, 16384):
        qkv, cu_seqlens = packed_input([length], 12, 64, torch.bfloat16)
        for _ in range(2):  # the second run has tuned tiles
            torch.cuda.reset_peak_memory_stats()
            with_gradient(
                lambda x, c=cu_seqlens, n=length: leaf.flash_attn_varlen_qkvpacked_func(
                    x, c, n, alibi_slopes=slopes_of(12)
                ),
                qkv,
            )
        peaks.append(torch.cuda.max_memory_allocated() / length)
        del qkv
    assert peaks[1] < 1.05 * peaks[0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    qkv, cu_seqlens = packed_input([50], 2, 16)
    qkv, cu_seqlens, slopes = qkv.detach().to("cuda:1"), cu_seqlens.to("cuda:1"), slopes_of(2).to("cuda:1")
    with torch.cuda.device(0):
        context = leaf.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 50, alibi_slopes=slopes)
    assert context.device == qkv.device
    assert_same(context, reference.attention(*qkv.cpu().unbind(1), [0, 50], None, slopes.tolist()), 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_whole_model_trains_as_with_eager_attention():
    from models import ragged_batch, tiny_model

    losses = {}
    for name in ("triton", "eager"):
        model = tiny_model(hidden_size=192, attn_implementation=name).cuda().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids, mask = (tensor.cuda() for tensor in ragged_batch([60, 17, 1, 0]))
        losses[name] = []
        for _ in range(5):
            loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["eager"], rel=1e-4)
