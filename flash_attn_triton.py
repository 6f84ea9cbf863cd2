"""Packed, bidirectional ALiBi attention in Triton: forward, backward, dropout, and no work on what weighs nothing.

Sequences lie one after another in T tokens; `cu_seqlens` says where each starts. Nothing of size S x S is stored, and
no padding is computed. Three kernels walk over tiles: the forward pass and the query gradient own a tile of queries
and walk over keys, the key and value gradient owns a tile of keys and walks over queries. Each output tile is written
by one program, in a fixed order of additions, so that every run gives the same bits. That is the reason for two
backward kernels: they multiply seven matrices a tile where one kernel with atomic additions would multiply five, but
they need neither atomics nor a float32 buffer for the query gradient.

**The bias** slope * |i - j| costs one addition a score. In a tile on one side of the diagonal it splits into a part of
the row and a part of the column; only tiles on the diagonal need the absolute value.

**What is skipped** (see `_radius`). A query's largest score is at least its score with itself, scale * q_i.k_i, where
the distance is 0. Let `low` be the most negative of these in a sequence and head (0 if none is negative), and
C = |scale| * max|q| * max|k|, which bounds every product (Cauchy-Schwarz). Two bounds hold for the weight of all keys
beyond distance r, as a share of the row:

- 2 * exp(C + low - slope * r) / (1 - exp(-slope)). A key at distance d scores at most C - slope * d, each distance
  occurs at most twice, and the row weighs at least exp(-low).
- 2 * exp(2 * C - slope * r). No product is below -C, and as a key r tokens nearer is at least r places nearer, the
  keys beyond r are at most the share exp(-slope * r) of those on their side of the query, which are all in the row.
  (Not where keys are masked: the nearer key may be one.)

The smaller counts. It is 2^-24, half a unit in the last place of a float32 sum, at
r = min(C + low + 24 ln 2 + ln(2 / (1 - exp(-slope))), 2 * C + 25 ln 2) / slope.
Distances are symmetric and each key meets each distance at most twice as well, so the same r bounds what a key
gathers in backward. Where a mask has holes, distances in positions are at least distances in token numbers, and r stays
valid when it is counted in tokens. C and low come from one pass over the queries and keys.

**Tile sizes** are tuned at first use: up to six a kernel are compiled and timed for a head size and a dtype, and timed
again in each of four ranges of lengths.

Letters: B batch, S padded length, T tokens, N sequences, H heads, D head size.
"""

import bisect
import functools
import logging
import re
from typing import Optional

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # The Hub's loader skips imports inside `try`; the caller decides what a missing Triton means.
    raise

logger = logging.getLogger(__name__)

MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Rows of the tiles in which `_measure_kernel` reads queries and keys.
MEASURE_ROWS = 64

LOG2E = tl.constexpr(1.4426950408889634)
# ln(2^24): shares under 2^-24 vanish in a float32 sum.
VANISHING = tl.constexpr(16.635532333438686)
LN2 = tl.constexpr(0.6931471805599453)
# Finite, so that a row whose keys are all masked never computes inf - inf.
LOWEST = tl.constexpr(-3.4e38)
# More tokens than a sequence can have; keeps tile arithmetic inside int32.
EVERYTHING = tl.constexpr(1 << 29)


@triton.jit
def _locate(cu_seqlens, num_sequences, program, ROWS: tl.constexpr):
    """The sequence and the tile that a program of the packed grid owns.

    Sequence n owns the programs from cu_seqlens[n] // ROWS + n on: never fewer than its tiles, at most one more. The
    grid's size, T // ROWS + N, is known without reading lengths back to the host.

    Returns:
        int32 scalars: the sequence, its first token, its length, the tile's first row (at or beyond the length for a
        program without work).
    """
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        owned = tl.load(cu_seqlens + middle) // ROWS + middle <= program
        low = tl.where(owned, middle, low)
        high = tl.where(owned, high, middle)
    start = tl.load(cu_seqlens + low)
    length = tl.load(cu_seqlens + low + 1) - start
    return low, start, length, (program - start // ROWS - low) * ROWS


@triton.jit
def _radius(peaks, slope, scale, SKIP: tl.constexpr, MASKED: tl.constexpr):
    """Distance in tokens beyond which keys together weigh under 2^-24 of a row; the proof stands at the top."""
    if SKIP:
        bound = tl.abs(scale) * tl.sqrt(tl.load(peaks)) * tl.sqrt(tl.load(peaks + 1))
        spread = bound + tl.minimum(tl.load(peaks + 2), bound) + tl.log(2.0 / (1.0 - tl.exp(-slope)))
        if not MASKED:
            spread = tl.minimum(spread, 2.0 * bound + LN2)
        radius = (spread + VANISHING) / slope
        # Infinity and NaN (slope 0, values that are not finite) fail the comparison and skip nothing.
        return tl.where(radius < EVERYTHING, radius, EVERYTHING).to(tl.int32)
    else:
        return EVERYTHING


@triton.jit
def _window(first, length, radius, OWN: tl.constexpr, OTHER: tl.constexpr):
    """Where the walk of the tile [first, first + OWN) begins, meets the diagonal, leaves it and stops.

    Works on scalars and on blocks of tiles alike; `benchmarks/triton_report.py` counts with it.

    Returns:
        int32 rows of the other side: begin <= diagonal < leave <= stop; all but the stop are multiples of OTHER.
    """
    end = tl.minimum(first + OWN, length)
    begin = tl.maximum(first - radius, 0) // OTHER * OTHER
    diagonal = first // OTHER * OTHER
    leave = (end + OTHER - 1) // OTHER * OTHER
    stop = tl.maximum(tl.minimum(end + radius, length), leave)
    return begin, diagonal, leave, stop


@triton.jit
def _far_tile(step, begin, diagonal, leave, OTHER: tl.constexpr):
    """First row of the step-th tile that does not meet the diagonal: those before it, then those after it."""
    before = (diagonal - begin) // OTHER
    return tl.where(step < before, begin + step * OTHER, leave + (step - before) * OTHER)


@triton.jit
def _read(base, stride, start, first, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """The tile of ROWS rows from `first` of the sequence at `start`, with zeros in channels beyond the head.

    Rows beyond the sequence repeat its last one and must get no weight; a mask would cost registers. Offsets have 64
    bits: T * 3 * H * D may pass 2^31.
    """
    rows = tl.minimum(first + tl.arange(0, ROWS), length - 1).to(tl.int64) * stride
    channels = tl.arange(0, BLOCK_DIM)
    pointers = base + start.to(tl.int64) * stride + rows[:, None] + channels[None, :]
    if HEAD_DIM == BLOCK_DIM:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(channels < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _write(
    tile, base, stride, start, first, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Store the rows that the sequence has and the channels that the head has, in the dtype of the output."""
    rows = first + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK_DIM)
    pointers = base + start.to(tl.int64) * stride + rows.to(tl.int64)[:, None] * stride + channels[None, :]
    exists = (rows < length)[:, None] & (channels < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=exists)


@triton.jit
def _places(positions, start, rows, valid, HOLES: tl.constexpr):
    """Column of each token in its padded row: read where the mask has holes, else the token's number."""
    if HOLES:
        return tl.load(positions + start + rows, mask=valid, other=0).to(tl.int32)
    else:
        return rows


@triton.jit
def _keys_valid(key_mask, start, rows, length, MASKED: tl.constexpr):
    """Which keys exist and are no padding."""
    valid = rows < length
    if MASKED:
        valid = valid & (tl.load(key_mask + start + rows, mask=valid, other=0) != 0)
    return valid


@triton.jit
def _add_bias(scores, factor, slope, own, other, nearest, is_before, extra, IS_FAR: tl.constexpr):
    """Scores with their bias, which splits into a part of the row and a part of the column off the diagonal.

    Distances are counted from `nearest`, the place of the other tile next to the diagonal, so that both parts have one
    sign and nothing cancels.

    Args:
        scores: float32 [OWN, OTHER], products of queries and keys.
        factor: multiplies them.
        slope: float32 scalar.
        own: int32 [OWN], places.
        other: int32 [OTHER], places.
        nearest: int32 scalar, a place; on the diagonal any place nearby.
        is_before: whether the other tile comes first; without meaning on the diagonal.
        extra: float32 [OTHER], added to each row.
        IS_FAR: whether the tile lies off the diagonal.

    Returns:
        float32 [OWN, OTHER] without the row's part, and that part, float32 [OWN].
    """
    row = (own - nearest).to(tl.float32)
    column = (other - nearest).to(tl.float32)
    if IS_FAR:
        side = tl.where(is_before, slope, -slope)
        return scores * factor + (extra + column * side)[None, :], row * -side
    else:
        return scores * factor + extra[None, :] - slope * tl.abs(row[:, None] - column[None, :]), row * 0.0


@triton.jit
def _keep(seed, stream, queries, keys, dropout_p):
    """Which weights dropout keeps, for token numbers that broadcast to the tile.

    Philox keyed by the seed and counted by (key, query, stream): a weight's fate depends on its place alone, not on
    tile sizes. Seven rounds are the fewest that pass BigCrush (https://doi.org/10.1145/2063384.2063405). One draw a
    weight costs about as much as moving four neighbouring draws to the threads that need them.
    """
    zero = (queries + keys) * 0
    draws, _, _, _ = tl.philox(seed, zero + keys, zero + queries, zero + stream, zero, 7)
    return tl.uint_to_uniform_float(draws) >= dropout_p


@triton.jit(do_not_specialize=["num_sequences"])
def _measure_kernel(
    query,
    key,
    cu_seqlens,
    slopes,
    peaks,
    order,
    scale,
    num_sequences,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Largest |q|^2, |k|^2 and -scale * q_i.k_i of each sequence and head, and the heads by their slopes.

    `peaks` is float32 [N, H, 3], zero on entry. `order` is int32 [H]: the flattest head, whose programs work longest,
    comes first, so that no long program starts last.
    """
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    if tl.program_id(0) == 0:
        heads = tl.arange(0, HEADS)
        own = tl.load(slopes + head)
        others = tl.load(slopes + heads, mask=heads < num_heads, other=float("inf"))
        is_earlier = (others < own) | ((others == own) & (heads < head))
        tl.store(order + tl.sum(is_earlier.to(tl.int32), axis=0), head)
    sequence, start, length, first = _locate(cu_seqlens, num_sequences, tl.program_id(0), ROWS)
    if first < length:
        at_query = query + head.to(tl.int64) * query_head_stride
        at_key = key + head.to(tl.int64) * key_head_stride
        q = _read(at_query, query_stride, start, first, length, ROWS, HEAD_DIM, BLOCK_DIM)
        k = _read(at_key, key_stride, start, first, length, ROWS, HEAD_DIM, BLOCK_DIM)
        q = q.to(tl.float32)
        k = k.to(tl.float32)
        peak = peaks + (sequence * num_heads + head) * 3
        for which in tl.static_range(3):
            if which == 0:
                value = tl.sum(q * q, axis=1)
            elif which == 1:
                value = tl.sum(k * k, axis=1)
            else:
                value = tl.maximum(tl.sum(q * k, axis=1) * -scale, 0.0)
            # A maximum would drop NaN, and with it the news that nothing is bounded.
            value = tl.where(value == value, value, float("inf"))
            tl.atomic_max(peak + which, tl.max(value, axis=0))


def is_worth_trying(config, dtype: torch.dtype, has_dropout: bool) -> bool:
    """Whether a tile size may be the fastest for a dtype, with or without dropout."""
    own, other = config.kwargs["OWN"], config.kwargs["OTHER"]
    scores = own * other // (32 * config.num_warps)  # a thread
    if dtype == torch.float32:
        # Multiplied in registers: beyond four scores a thread it spills, and compiles for minutes.
        return scores <= 4
    if has_dropout:
        # Its draws take registers too; these are the sizes that do not spill on sm_90 at D = 64.
        return 16 <= scores <= 32 and own <= 16 * config.num_warps
    return min(own, other) >= 32 and scores >= 8


def _fitting(configs, named_args, **constants):
    """The tile sizes to try: those worth it whose tiles fit into the card's shared memory."""
    query = named_args["query"]
    properties = triton.runtime.driver.active.utils.get_device_properties(query.device.index)

    def fits(config):
        # Two owned tiles, and two of the other side for each stage of the pipeline.
        rows = 2 * (config.kwargs["OWN"] + config.kwargs["OTHER"] * config.num_stages)
        needed = rows * constants["BLOCK_DIM"] * query.element_size()
        worth_trying = is_worth_trying(config, query.dtype, constants["DROPOUT"])
        return needed <= properties["max_shared_mem"] and worth_trying

    return [config for config in configs if fits(config)] or configs[:1]


def _tuned(sizes):
    """Autotune a kernel over (OWN, OTHER, warps, stages); the first is also what runs untuned."""
    configs = [
        triton.Config({"OWN": own, "OTHER": other}, num_warps=warps, num_stages=stages)
        for own, other, warps, stages in sizes
    ]

    def decorate(kernel):
        # What `triton.autotune` makes, but for `do_bench`: left out, Triton 3.2 and 3.3 ask for a GPU while this file
        # is imported, and their `autotune` does not pass it on.
        return triton.runtime.Autotuner(
            kernel,
            kernel.arg_names,
            configs,
            key=["HEAD_DIM", "length_bucket", "DROPOUT", "SKIP"],
            reset_to_zero=None,
            restore_value=None,
            prune_configs_by={"early_config_prune": _fitting},
            do_bench=lambda launch, quantiles: triton.testing.do_bench(launch, quantiles=quantiles),
        )

    return decorate


# Small enough for every card, then those for float32.
_SMALL_TILES = [(32, 32, 4, 2), (16, 16, 4, 1), (32, 16, 4, 1), (32, 32, 8, 2)]


@_tuned([*_SMALL_TILES, (64, 32, 4, 3), (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2)])
@triton.jit(do_not_specialize=["num_sequences", "total", "length_bucket"])
def _forward_kernel(
    query,
    key,
    value,
    out,
    normalizer,
    cu_seqlens,
    positions,
    key_mask,
    slopes,
    peaks,
    order,
    seed,
    scale,
    dropout_p,
    num_sequences,
    total,
    length_bucket,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    HOLES: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    SKIP: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """A tile of queries walks over the keys.

    Writes `out` [T, H, D] and `normalizer` float32 [H, T], the base-2 logarithm of each softmax's sum.
    """
    num_heads = tl.num_programs(1)
    head = tl.load(order + tl.program_id(1)).to(tl.int64)
    sequence, start, length, first = _locate(cu_seqlens, num_sequences, tl.program_id(0), OWN)
    if first >= length:
        return
    slope = tl.load(slopes + head)
    radius = _radius(peaks + (sequence * num_heads + head) * 3, slope, scale, SKIP, MASKED)
    begin, diagonal, leave, stop = _window(first, length, radius, OWN, OTHER)
    slope = slope * LOG2E
    factor = scale * LOG2E

    rows = first + tl.arange(0, OWN)
    valid = rows < length
    own_places = _places(positions, start, rows, valid, HOLES)
    q = _read(query + head * query_head_stride, query_stride, start, first, length, OWN, HEAD_DIM, BLOCK_DIM)
    key += head * key_head_stride
    value += head * value_head_stride

    top = tl.full((OWN,), LOWEST, tl.float32)
    mass = tl.zeros((OWN,), tl.float32)
    sums = tl.zeros((OWN, BLOCK_DIM), tl.float32)
    for is_far in tl.static_range(2):
        if is_far:
            steps = (diagonal - begin) // OTHER + (stop - leave + OTHER - 1) // OTHER
        else:
            steps = (leave - diagonal) // OTHER
        for step in range(steps):
            if is_far:
                other = _far_tile(step, begin, diagonal, leave, OTHER)
                near = tl.where(other < first, other + OTHER - 1, other)
            else:
                other = diagonal + step * OTHER
                near = first
            others = other + tl.arange(0, OTHER)
            exists = others < length
            k = _read(key, key_stride, start, other, length, OTHER, HEAD_DIM, BLOCK_DIM)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            attended = _keys_valid(key_mask, start, others, length, MASKED)
            places = _places(positions, start, others, exists, HOLES)
            nearest = _places(positions, start, near, True, HOLES)
            extra = tl.where(attended, 0.0, float("-inf"))
            scores, row_bias = _add_bias(
                scores, factor, slope, own_places, places, nearest, other < first, extra, is_far
            )
            new_top = tl.maximum(top, tl.max(scores, axis=1) + row_bias)
            weights = tl.exp2(scores + (row_bias - new_top)[:, None])
            shrink = tl.exp2(top - new_top)
            top = new_top
            mass = mass * shrink + tl.sum(weights, axis=1)
            if DROPOUT:
                stream = (sequence * num_heads + head).to(tl.int32)
                keep = _keep(tl.load(seed), stream, rows[:, None], others[None, :], dropout_p)
                weights = tl.where(keep, weights, 0.0)
            v = _read(value, value_stride, start, other, length, OTHER, HEAD_DIM, BLOCK_DIM)
            sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")

    # Only a row whose keys are all masked has no mass; its output is zero, and an infinite sum silences it in backward.
    has_mass = mass > 0
    share = 1.0 / tl.where(has_mass, mass, 1.0)
    if DROPOUT:
        share = share / (1.0 - dropout_p)
    log_mass = tl.where(has_mass, top + tl.log2(mass), float("inf"))
    tl.store(normalizer + head * total + start + rows, log_mass, mask=valid)
    _write(
        sums * share[:, None],
        out + head * HEAD_DIM,
        num_heads * HEAD_DIM,
        start,
        first,
        length,
        OWN,
        HEAD_DIM,
        BLOCK_DIM,
    )


@_tuned([*_SMALL_TILES, (64, 32, 4, 3), (64, 64, 4, 3), (128, 32, 4, 3), (128, 64, 8, 3)])
@triton.jit(do_not_specialize=["num_sequences", "total", "length_bucket"])
def _query_gradient_kernel(
    query,
    key,
    value,
    out,
    out_gradient,
    query_gradient,
    normalizer,
    delta,
    cu_seqlens,
    positions,
    key_mask,
    slopes,
    peaks,
    order,
    seed,
    scale,
    dropout_p,
    num_sequences,
    total,
    length_bucket,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    out_gradient_stride,
    out_gradient_head_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    HOLES: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    SKIP: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """A tile of queries walks over the keys.

    Writes `query_gradient` [T, H, D] and `delta` float32 [H, T], the products out . out_gradient.
    """
    num_heads = tl.num_programs(1)
    head = tl.load(order + tl.program_id(1)).to(tl.int64)
    sequence, start, length, first = _locate(cu_seqlens, num_sequences, tl.program_id(0), OWN)
    if first >= length:
        return
    slope = tl.load(slopes + head)
    radius = _radius(peaks + (sequence * num_heads + head) * 3, slope, scale, SKIP, MASKED)
    begin, diagonal, leave, stop = _window(first, length, radius, OWN, OTHER)
    slope = slope * LOG2E
    factor = scale * LOG2E

    rows = first + tl.arange(0, OWN)
    valid = rows < length
    own_places = _places(positions, start, rows, valid, HOLES)
    dense_stride = num_heads * HEAD_DIM
    q = _read(query + head * query_head_stride, query_stride, start, first, length, OWN, HEAD_DIM, BLOCK_DIM)
    do = _read(
        out_gradient + head * out_gradient_head_stride,
        out_gradient_stride,
        start,
        first,
        length,
        OWN,
        HEAD_DIM,
        BLOCK_DIM,
    )
    o = _read(out + head * HEAD_DIM, dense_stride, start, first, length, OWN, HEAD_DIM, BLOCK_DIM)
    key += head * key_head_stride
    value += head * value_head_stride
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    tl.store(delta + head * total + start + rows, row_delta, mask=valid)
    log_mass = tl.load(normalizer + head * total + start + rows, mask=valid, other=float("inf"))

    dq = tl.zeros((OWN, BLOCK_DIM), tl.float32)
    for is_far in tl.static_range(2):
        if is_far:
            steps = (diagonal - begin) // OTHER + (stop - leave + OTHER - 1) // OTHER
        else:
            steps = (leave - diagonal) // OTHER
        for step in range(steps):
            if is_far:
                other = _far_tile(step, begin, diagonal, leave, OTHER)
                near = tl.where(other < first, other + OTHER - 1, other)
            else:
                other = diagonal + step * OTHER
                near = first
            others = other + tl.arange(0, OTHER)
            exists = others < length
            k = _read(key, key_stride, start, other, length, OTHER, HEAD_DIM, BLOCK_DIM)
            v = _read(value, value_stride, start, other, length, OTHER, HEAD_DIM, BLOCK_DIM)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            attended = _keys_valid(key_mask, start, others, length, MASKED)
            places = _places(positions, start, others, exists, HOLES)
            nearest = _places(positions, start, near, True, HOLES)
            extra = tl.where(attended, 0.0, float("-inf"))
            scores, row_bias = _add_bias(
                scores, factor, slope, own_places, places, nearest, other < first, extra, is_far
            )
            weights = tl.exp2(scores + (row_bias - log_mass)[:, None])
            dweights = tl.dot(do, tl.trans(v), input_precision="ieee")
            if DROPOUT:
                stream = (sequence * num_heads + head).to(tl.int32)
                keep = _keep(tl.load(seed), stream, rows[:, None], others[None, :], dropout_p)
                dweights = tl.where(keep, dweights / (1.0 - dropout_p), 0.0)
            dscores = weights * (dweights - row_delta[:, None])
            dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")

    _write(dq * scale, query_gradient + head * HEAD_DIM, dense_stride, start, first, length, OWN, HEAD_DIM, BLOCK_DIM)


# Without (32, 16), which spills here in float32.
@_tuned(
    [(32, 32, 4, 2), (16, 16, 4, 1), (32, 32, 8, 2), (64, 32, 4, 3), (64, 64, 4, 2), (128, 32, 8, 3), (128, 64, 8, 2)]
)
@triton.jit(do_not_specialize=["num_sequences", "total", "length_bucket"])
def _key_value_gradient_kernel(
    query,
    key,
    value,
    out_gradient,
    key_gradient,
    value_gradient,
    normalizer,
    delta,
    cu_seqlens,
    positions,
    key_mask,
    slopes,
    peaks,
    order,
    seed,
    scale,
    dropout_p,
    num_sequences,
    total,
    length_bucket,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    out_gradient_stride,
    out_gradient_head_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    HOLES: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    SKIP: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """A tile of keys walks over the queries.

    Writes `key_gradient` and `value_gradient`, both [T, H, D]. Scores stand transposed, [keys, queries], so that they
    enter the next product from registers.
    """
    num_heads = tl.num_programs(1)
    head = tl.load(order + tl.program_id(1)).to(tl.int64)
    sequence, start, length, first = _locate(cu_seqlens, num_sequences, tl.program_id(0), OWN)
    if first >= length:
        return
    slope = tl.load(slopes + head)
    radius = _radius(peaks + (sequence * num_heads + head) * 3, slope, scale, SKIP, MASKED)
    begin, diagonal, leave, stop = _window(first, length, radius, OWN, OTHER)
    slope = slope * LOG2E
    factor = scale * LOG2E

    rows = first + tl.arange(0, OWN)
    valid = rows < length
    attended = _keys_valid(key_mask, start, rows, length, MASKED)
    own_places = _places(positions, start, rows, valid, HOLES)
    k = _read(key + head * key_head_stride, key_stride, start, first, length, OWN, HEAD_DIM, BLOCK_DIM)
    v = _read(value + head * value_head_stride, value_stride, start, first, length, OWN, HEAD_DIM, BLOCK_DIM)
    query += head * query_head_stride
    out_gradient += head * out_gradient_head_stride
    normalizer += head * total + start
    delta += head * total + start

    dk = tl.zeros((OWN, BLOCK_DIM), tl.float32)
    dv = tl.zeros((OWN, BLOCK_DIM), tl.float32)
    for is_far in tl.static_range(2):
        if is_far:
            steps = (diagonal - begin) // OTHER + (stop - leave + OTHER - 1) // OTHER
        else:
            steps = (leave - diagonal) // OTHER
        for step in range(steps):
            if is_far:
                other = _far_tile(step, begin, diagonal, leave, OTHER)
                near = tl.where(other < first, other + OTHER - 1, other)
            else:
                other = diagonal + step * OTHER
                near = first
            others = other + tl.arange(0, OTHER)
            exists = others < length
            q = _read(query, query_stride, start, other, length, OTHER, HEAD_DIM, BLOCK_DIM)
            do = _read(out_gradient, out_gradient_stride, start, other, length, OTHER, HEAD_DIM, BLOCK_DIM)
            clamped = tl.minimum(others, length - 1)
            log_mass = tl.load(normalizer + clamped)
            column_delta = tl.load(delta + clamped)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")
            places = _places(positions, start, others, exists, HOLES)
            nearest = _places(positions, start, near, True, HOLES)
            extra = tl.where(exists, -log_mass, float("-inf"))
            scores, row_bias = _add_bias(
                scores, factor, slope, own_places, places, nearest, other < first, extra, is_far
            )
            weights = tl.exp2(scores + row_bias[:, None])
            if MASKED:
                weights = tl.where(attended[:, None], weights, 0.0)
            dropped = weights
            if DROPOUT:
                stream = (sequence * num_heads + head).to(tl.int32)
                keep = _keep(tl.load(seed), stream, others[None, :], rows[:, None], dropout_p)
                dropped = tl.where(keep, weights / (1.0 - dropout_p), 0.0)
            dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision="ieee")
            dweights = tl.dot(v, tl.trans(do), input_precision="ieee")
            if DROPOUT:
                dweights = tl.where(keep, dweights / (1.0 - dropout_p), 0.0)
            dscores = weights * (dweights - column_delta[None, :])
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")

    dense_stride = num_heads * HEAD_DIM
    _write(dk * scale, key_gradient + head * HEAD_DIM, dense_stride, start, first, length, OWN, HEAD_DIM, BLOCK_DIM)
    _write(dv, value_gradient + head * HEAD_DIM, dense_stride, start, first, length, OWN, HEAD_DIM, BLOCK_DIM)


def _with_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its channels are contiguous, as the kernels need, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _launch(kernel, tune: bool, query, cu_seqlens, *arguments, **constants) -> None:
    """Run an autotuned kernel on the packed grid; without `tune`, with the first of its tile sizes."""
    total, heads, _ = query.shape

    def grid(meta):
        return (total // meta["OWN"] + cu_seqlens.shape[0] - 1, heads)

    if tune:
        kernel[grid](query, *arguments, **constants)
    else:
        config = kernel.configs[0]
        warps_and_stages = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        kernel.fn[grid](query, *arguments, **constants, **config.kwargs, **warps_and_stages)


def _shared_arguments(
    query, key, value, cu_seqlens, positions, key_mask, slopes, peaks, order, seed, scale, dropout_p, max_seqlen
) -> tuple:
    """The arguments that stand in the middle of all three attention kernels, in their order."""
    key_mask = None if key_mask is None else key_mask.view(torch.uint8)
    # Tiles are tuned once for each of four ranges of lengths, not for each length.
    length_bucket = bisect.bisect_left((256, 1024, 4096), max_seqlen)
    numbers = (scale, dropout_p, cu_seqlens.shape[0] - 1, query.shape[0], length_bucket)
    strides = (*query.stride()[:2], *key.stride()[:2], *value.stride()[:2])
    return (cu_seqlens, positions, key_mask, slopes, peaks, order, seed, *numbers, *strides)


def _constants(head_dim: int, positions, key_mask, dropout_p: float, skip: bool) -> dict:
    """What the three attention kernels are compiled for, beside their tiles."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": max(16, triton.next_power_of_2(head_dim)),
        "HOLES": positions is not None,
        "MASKED": key_mask is not None,
        "DROPOUT": dropout_p > 0,
        "SKIP": skip,
        # Multiply and add in one instruction: Triton's default up to 3.9, its option from 3.10 on.
        "enable_fp_fusion": True,
    }


def _forward(
    query, key, value, cu_seqlens, slopes, positions, key_mask, seed, scale, dropout_p, max_seqlen, skip, tune
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward kernels; arguments and results are those of `_attention`."""
    query, key, value = _with_rows(query), _with_rows(key), _with_rows(value)
    total, heads, head_dim = query.shape
    sequences = cu_seqlens.shape[0] - 1
    out = query.new_empty(total, heads, head_dim)
    normalizer = query.new_empty(heads, total, dtype=torch.float32)
    peaks = query.new_zeros(sequences, heads, 3, dtype=torch.float32)
    order = query.new_zeros(heads, dtype=torch.int32)
    if out.numel() == 0:
        return out, normalizer, peaks, order
    constants = _constants(head_dim, positions, key_mask, dropout_p, skip)
    with torch.cuda.device_of(query):
        _measure_kernel[(total // MEASURE_ROWS + sequences, heads)](
            *(query, key, cu_seqlens, slopes, peaks, order, scale, sequences),
            *(*query.stride()[:2], *key.stride()[:2]),
            ROWS=MEASURE_ROWS,
            HEADS=triton.next_power_of_2(heads),
            HEAD_DIM=head_dim,
            BLOCK_DIM=constants["BLOCK_DIM"],
        )
        shared = _shared_arguments(
            *(query, key, value, cu_seqlens, positions, key_mask, slopes, peaks, order, seed),
            *(scale, dropout_p, max_seqlen),
        )
        _launch(_forward_kernel, tune, query, cu_seqlens, key, value, out, normalizer, *shared, **constants)
    return out, normalizer, peaks, order


# The Hub's loader gives each revision of this file a module name of its own, and several may live in one process.
_NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{_NAMESPACE}::alibi_attention", mutates_args=())
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    slopes: torch.Tensor,
    positions: Optional[torch.Tensor],
    key_mask: Optional[torch.Tensor],
    seed: Optional[torch.Tensor],
    scale: float,
    dropout_p: float,
    max_seqlen: int,
    skip: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The attention as one operator, so that torch.compile, autograd and checkpointing see a whole.

    Args:
        query: float16, bfloat16 or float32 [T, H, D].
        key: like `query`.
        value: like `query`.
        cu_seqlens: int32 [N + 1].
        slopes: float32 [H].
        positions: int32 or int64 [T], increasing within a sequence; None: tokens are neighbours.
        key_mask: bool, T entries, False where a key is padding; None: none is.
        seed: int64 [1], key of the dropout; None without dropout.
        scale: factor of the scores.
        dropout_p: probability of dropping a weight, in [0, 1).
        max_seqlen: tokens of the longest sequence; chooses tile sizes, never results.
        skip: leave out what weighs nothing.

    Returns:
        The context [T, H, D] in the dtype of `query`, and what backward needs: float32 [H, T] base-2 logarithms of the
        softmax's sums, float32 [N, H, 3] and int32 [H] of `_measure_kernel`.
    """
    arguments = (query, key, value, cu_seqlens, slopes, positions, key_mask, seed, scale, dropout_p, max_seqlen, skip)
    return _forward(*arguments, tune=query.is_cuda)


@_attention.register_fake
def _(query, key, value, cu_seqlens, slopes, positions, key_mask, seed, scale, dropout_p, max_seqlen, skip):
    total, heads, _ = query.shape
    return (
        query.new_empty(query.shape),
        query.new_empty(heads, total, dtype=torch.float32),
        query.new_empty(cu_seqlens.shape[0] - 1, heads, 3, dtype=torch.float32),
        query.new_empty(heads, dtype=torch.int32),
    )


@torch.library.custom_op(f"{_NAMESPACE}::alibi_attention_backward", mutates_args=())
def _attention_backward(
    out_gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    normalizer: torch.Tensor,
    peaks: torch.Tensor,
    order: torch.Tensor,
    cu_seqlens: torch.Tensor,
    slopes: torch.Tensor,
    positions: Optional[torch.Tensor],
    key_mask: Optional[torch.Tensor],
    seed: Optional[torch.Tensor],
    scale: float,
    dropout_p: float,
    max_seqlen: int,
    skip: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, each [T, H, D] in the dtype of `query`; slopes have none."""
    query, key, value, out_gradient = (_with_rows(tensor) for tensor in (query, key, value, out_gradient))
    query_gradient, key_gradient, value_gradient = (query.new_empty(query.shape) for _ in range(3))
    if out.numel() == 0:
        return query_gradient, key_gradient, value_gradient
    delta = torch.empty_like(normalizer)
    shared = _shared_arguments(
        *(query, key, value, cu_seqlens, positions, key_mask, slopes, peaks, order, seed),
        *(scale, dropout_p, max_seqlen),
    )
    strides = out_gradient.stride()[:2]
    constants = _constants(query.shape[-1], positions, key_mask, dropout_p, skip)
    with torch.cuda.device_of(query):
        # First, because it leaves `delta` for the other.
        _launch(
            *(_query_gradient_kernel, query.is_cuda, query, cu_seqlens),
            *(key, value, out, out_gradient, query_gradient, normalizer, delta, *shared, *strides),
            **constants,
        )
        _launch(
            *(_key_value_gradient_kernel, query.is_cuda, query, cu_seqlens),
            *(key, value, out_gradient, key_gradient, value_gradient, normalizer, delta, *shared, *strides),
            **constants,
        )
    return query_gradient, key_gradient, value_gradient


@_attention_backward.register_fake
def _(out_gradient, query, *_):
    return tuple(query.new_empty(query.shape) for _ in range(3))


def _save_for_backward(ctx, inputs, output) -> None:
    query, key, value, *places_and_seed, scale, dropout_p, max_seqlen, skip = inputs
    ctx.save_for_backward(query, key, value, *output, *places_and_seed)
    ctx.numbers = (scale, dropout_p, max_seqlen, skip)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, out_gradient, *_):
    gradients = _attention_backward(out_gradient, *ctx.saved_tensors, *ctx.numbers)
    return (*gradients, *[None] * 9)


_attention.register_autograd(_gradients, setup_context=_save_for_backward)


def _attend(
    query, key, value, cu_seqlens, max_seqlen, slopes, scale, dropout_p, positions=None, key_mask=None, skip=True
):
    """Draw the dropout's key where there is dropout, and call the operator."""
    # The kernels index these by place alone.
    cu_seqlens, slopes, positions, key_mask = (
        None if tensor is None else tensor.contiguous() for tensor in (cu_seqlens, slopes, positions, key_mask)
    )
    seed = None
    if dropout_p > 0:
        # From torch's generator on the device: torch.manual_seed reproduces it, checkpointing restores it, and nothing
        # waits for the host.
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    return _attention(
        query, key, value, cu_seqlens, slopes, positions, key_mask, seed, scale, dropout_p, max_seqlen, skip
    )[0]


def triton_attention(qkv, packed, alibi_slopes, scale, dropout_p):
    """The `triton` row of the backend table.

    Args:
        qkv: float16, bfloat16 or float32 [T, 3, H, D], D at most 128; any strides. float32 is computed in float32,
            without TensorFloat-32.
        packed: the `PackedBatch` that says which tokens form a sequence, where they stand and which are padding.
        alibi_slopes: float32 [H], positive, on the device of `qkv`; gets no gradient.
        scale: factor of the scores.
        dropout_p: probability of dropping a weight, in [0, 1).

    Returns:
        [T, H, D] in the dtype of `qkv`. Positions that hold padding (`packed.key_mask`) get values without meaning.

    Source: https://arxiv.org/abs/2307.08691, sections 3.1 and 3.2, for tiles and online softmax; the bias and the
    skipping are ours.
    """
    return _attend(
        *qkv.unbind(1),
        packed.cu_seqlens,
        packed.max_seqlen,
        alibi_slopes,
        scale,
        dropout_p,
        positions=packed.positions if packed.has_holes else None,
        key_mask=packed.key_mask,
    )


@functools.cache
def _reason_against(device: torch.device) -> Optional[str]:
    """Why the kernels cannot run on a device, found by running one on 16 tokens, once."""
    if device.type == "cpu":
        is_interpreted = not isinstance(_measure_kernel, triton.runtime.JITFunction)
        return None if is_interpreted else "Triton runs on the CPU under its interpreter only"
    if device.type != "cuda":
        return f"it is written for CUDA and ROCm devices, got {device.type}"
    try:
        tokens = torch.zeros(16, 1, 16, dtype=torch.float16, device=device)
        cu_seqlens = torch.tensor([0, 16], dtype=torch.int32, device=device)
        slopes = torch.ones(1, device=device)
        _forward(tokens, tokens, tokens, cu_seqlens, slopes, None, None, None, 1.0, 0.0, 16, True, tune=False)
        torch.cuda.synchronize(device)
    except Exception as error:  # Drivers, compilers and cards fail in more ways than can be named.
        reason = f"a kernel of 16 tokens failed on {device}: {type(error).__name__}: {error}"
        logger.warning("Triton attention is not used: %s", reason)
        return reason
    return None


@torch.compiler.assume_constant_result
def triton_declines(device: torch.device) -> Optional[str]:
    """Whether this backend refuses a device.

    The first call for a device compiles and runs one small kernel; a failure is logged once as a warning.

    Args:
        device: where the attention would run, with its index.

    Returns:
        The reason in words, or None when the kernels run there.

    Source: ours.
    """
    return _reason_against(device)


def _check_arguments(qkv, rank: int, dropout_p, alibi_slopes, causal) -> None:
    if not isinstance(qkv, torch.Tensor) or qkv.dim() != rank or qkv.shape[-3] != 3:
        layout = "[T, 3, H, D]" if rank == 4 else "[B, S, 3, H, D]"
        got = tuple(qkv.shape) if isinstance(qkv, torch.Tensor) else type(qkv).__name__
        raise ValueError(f"qkv must be a tensor {layout}, got {got}")
    if qkv.dtype not in DTYPES:
        raise ValueError(f"qkv must be {', '.join(str(dtype) for dtype in DTYPES)}, got {qkv.dtype}")
    heads, head_dim = qkv.shape[-2:]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"qkv must have heads of 1 to {MAX_HEAD_DIM} channels, got {head_dim}")
    if reason := triton_declines(qkv.device):
        raise ValueError(f"qkv must be on a device that Triton can use: {reason}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if causal:
        raise ValueError("causal must be False: this attention looks both ways")
    if alibi_slopes is None:
        return
    if not isinstance(alibi_slopes, torch.Tensor) or alibi_slopes.shape != (heads,):
        got = tuple(alibi_slopes.shape) if isinstance(alibi_slopes, torch.Tensor) else type(alibi_slopes).__name__
        raise ValueError(f"alibi_slopes must be a tensor [H] with H = {heads}, got {got}")
    if alibi_slopes.dtype != torch.float32 or alibi_slopes.device != qkv.device:
        raise ValueError(
            f"alibi_slopes must be float32 on {qkv.device}, got {alibi_slopes.dtype} on {alibi_slopes.device}"
        )


def _check_values(total: int, cu_seqlens, alibi_slopes) -> None:
    """Check what only the device knows; waits for it once."""
    facts = [cu_seqlens[0], cu_seqlens[-1], cu_seqlens.diff().amin()]
    if alibi_slopes is not None:
        facts.append(alibi_slopes.amin())
    start, end, shortest, *slope = torch.stack([fact.double() for fact in facts]).tolist()
    if start != 0 or end != total or shortest < 0:
        raise ValueError(
            f"cu_seqlens must start at 0, never fall and end at T = {total}; it starts at {start:.0f}, ends at "
            f"{end:.0f}, and its smallest step is {shortest:.0f}"
        )
    if slope and not slope[0] > 0:
        raise ValueError(f"alibi_slopes must be positive, got {slope[0]}")


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    alibi_slopes=None,
    *,
    causal=False,
    skip=True,
    check=True,
):
    """Bidirectional ALiBi attention over packed sequences; names and order of the flash-attn 2 package.

    Deterministic forward and backward. Softmax and sums are float32; float32 input is computed in float32, without
    TensorFloat-32. Gradients reach `qkv`; slopes get none.

    Args:
        qkv: float16, bfloat16 or float32 [T, 3, H, D], D from 1 to 128; any strides (copied unless the last axis is
            contiguous).
        cu_seqlens: int32 [N + 1] on the device of `qkv`, the first token of each sequence, then T.
        max_seqlen: tokens of the longest sequence; chooses tile sizes, never results.
        dropout_p: probability of dropping an attention weight, in [0, 1); drawn from torch's generator.
        softmax_scale: factor of the scores; None: 1 / sqrt(D).
        alibi_slopes: float32 [H], positive, on the device of `qkv`; None: no bias.
        causal: must be False.
        skip: leave out tiles that weigh under 2^-24 of a row (see the top of this file).
        check: also check the values of `cu_seqlens` and `alibi_slopes`, which waits for the device; not done under
            torch.compile.

    Returns:
        [T, H, D] in the dtype of `qkv`.

    Raises:
        ValueError: an argument is not as described; the message names it.

    Source: as for `triton_attention`.
    """
    _check_arguments(qkv, 4, dropout_p, alibi_slopes, causal)
    total, _, heads, head_dim = qkv.shape
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        got = tuple(cu_seqlens.shape) if isinstance(cu_seqlens, torch.Tensor) else type(cu_seqlens).__name__
        raise ValueError(f"cu_seqlens must be a tensor [N + 1] with N at least 1, got {got}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.device != qkv.device:
        raise ValueError(f"cu_seqlens must be int32 on {qkv.device}, got {cu_seqlens.dtype} on {cu_seqlens.device}")
    if check and not torch.compiler.is_compiling():
        _check_values(total, cu_seqlens, alibi_slopes)
    slopes = qkv.new_zeros(heads, dtype=torch.float32) if alibi_slopes is None else alibi_slopes
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    return _attend(*qkv.unbind(1), cu_seqlens, max_seqlen, slopes, scale, dropout_p, skip=skip)


def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, alibi_slopes=None, *, causal=False, skip=True, check=True
):
    """Bidirectional ALiBi attention over B sequences of equal length.

    Args:
        qkv: float16, bfloat16 or float32 [B, S, 3, H, D].
        dropout_p: as for `flash_attn_varlen_qkvpacked_func`.
        softmax_scale: as there.
        alibi_slopes: as there.
        causal: as there.
        skip: as there.
        check: as there.

    Returns:
        [B, S, H, D] in the dtype of `qkv`.

    Raises:
        ValueError: an argument is not as described; the message names it.

    Source: as for `triton_attention`.
    """
    _check_arguments(qkv, 5, dropout_p, alibi_slopes, causal)
    batch, length = qkv.shape[:2]
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=qkv.device) * length
    context = flash_attn_varlen_qkvpacked_func(
        qkv.flatten(0, 1),
        cu_seqlens,
        length,
        dropout_p,
        softmax_scale,
        alibi_slopes,
        skip=skip,
        check=check,
    )
    return context.unflatten(0, (batch, length))
