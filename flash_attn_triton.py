"""Packed, bidirectional ALiBi attention in Triton: forward, backward, dropout, and no work on what weighs nothing.

Sequences lie one after another in T tokens; `cu_seqlens` says where each starts. No tensor of size S x S is stored and
no padding is computed. Three kernels walk over tiles: the forward pass and the query gradient own a tile of queries
and walk over keys, the key and value gradient owns a tile of keys and walks over queries. One program writes each
output tile, with a fixed order of additions, so every run gives the same bits. This is why backward has two kernels:
they multiply seven matrices a tile where one kernel with atomic additions would multiply five, but they need neither
atomics nor a float32 buffer for the query gradient.

**The bias** slope * |i - j| costs one addition a score. In a tile on one side of the diagonal it splits into a part of
the row and a part of the column; only tiles on the diagonal need the absolute value.

**What is skipped** (see `_radius`). A query's largest score is at least its score with itself, scale * q_i.k_i, where
the distance is 0. Let `low` be the most negative of these in a sequence and head (0 if none is negative), and
C = |scale| * max|q| * max|k|, which bounds every product (Cauchy-Schwarz). Two bounds hold for the weight of all keys
beyond distance r, as a share of the row:

- 2 * exp(C + low - slope * r) / (1 - exp(-slope)). A key at distance d scores at most C - slope * d, each distance
  occurs at most twice, and the row weighs at least exp(-low).
- 2 * exp(2 * C - slope * r). No product is below -C, and as a key r tokens nearer is at least r positions nearer, the
  keys beyond r are at most the share exp(-slope * r) of those on their side of the query, which are all in the row.
  (Not where keys are masked: the nearer key may be one.)

The smaller counts. It is 2^-24, half a unit in the last place of a float32 sum, at
r = min(C + low + 24 ln 2 + ln(2 / (1 - exp(-slope))), 2 * C + 25 ln 2) / slope.
Distances are symmetric and each key meets each distance at most twice as well, so the same r bounds what a key
gathers in backward. Where a mask has holes, distances in positions are at least distances in token numbers, and r stays
valid when it is counted in tokens. C and low come from one pass over the queries and keys, which short sequences do
without (see `LONGEST_UNSKIPPED`).

Letters: B batch, S padded length, T tokens, N sequences, H heads, D head size. In the kernels, OWN and OTHER are the
rows of the tile that a program owns and of those that it walks over, and BLOCK_DIM is D rounded up to a power of two.
"""

import bisect
import re
from typing import Optional

import torch
from torch.autograd.function import once_differentiable

from .launch_triton import Tile, fastest, is_observed, launch, shared_memory, triton_declines, with_channels

try:
    import triton
    import triton.language as tl
except ImportError:  # The Hub's loader skips imports inside `try`; the caller decides what a missing Triton means.
    raise

MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Where no sequence is longer, nothing is measured or skipped. On an H100 (D = 64, 12 heads) measuring takes 1.7 ns a
# token and the forward pass 6.1 at length 512, of which skipping saves a sixth; at 1,024 it saves a third of 11.
LONGEST_UNSKIPPED = 512
# Tokens that one program of `_measure_kernel` reads.
MEASURED_TOKENS = 256
_MEASURING = Tile(MEASURED_TOKENS, 64, 4, 1)

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
def _flattest_head(place, num_heads, POWER: tl.constexpr):
    """The head that comes at a place when the heads of `alibi_slopes` are sorted by slope, the flattest first.

    The flattest head's programs work longest and must not start last. Other slopes than those of `alibi_slopes` are
    served in this order as well, which costs time at most.

    Args:
        place: int32, from 0.
        num_heads: H.
        POWER: the largest power of two up to H; head POWER + n lies between heads n - 1 and n.
    """
    between = place - (2 * POWER - num_heads)
    pair = num_heads - POWER - 1 - between // 2
    head = tl.where(between % 2 == 0, pair, POWER + pair)
    return tl.where(between < 0, POWER - 1 - place, head)


@triton.jit
def _peaks(peaks, sequence, start, length, head, ROWS: tl.constexpr):
    """The largest of each of the three numbers that `_measure_kernel` found in the tiles of a sequence."""
    num_heads = tl.num_programs(1)
    count = (length + ROWS - 1) // ROWS
    peaks += ((start // ROWS + sequence) * num_heads + head) * 3
    query_peak = 0.0
    key_peak = 0.0
    low = 0.0
    for first in range(0, count, 64):
        tiles = first + tl.arange(0, 64)
        at = peaks + tiles * num_heads * 3
        query_peak = tl.maximum(query_peak, tl.max(tl.load(at, mask=tiles < count, other=0.0), axis=0))
        key_peak = tl.maximum(key_peak, tl.max(tl.load(at + 1, mask=tiles < count, other=0.0), axis=0))
        low = tl.maximum(low, tl.max(tl.load(at + 2, mask=tiles < count, other=0.0), axis=0))
    return query_peak, key_peak, low


@triton.jit
def _radius(query_peak, key_peak, low, slope, scale, MASKED: tl.constexpr):
    """Distance in tokens beyond which keys together weigh under 2^-24 of a row; the proof stands at the top.

    Args:
        query_peak: largest |q|^2 of the sequence and head.
        key_peak: largest |k|^2.
        low: largest -scale * q_i.k_i, at least 0.
        slope: of the head.
        scale: factor of the scores.
        MASKED: whether some keys are padding.
    """
    bound = tl.abs(scale) * tl.sqrt(query_peak) * tl.sqrt(key_peak)
    spread = bound + tl.minimum(low, bound) + tl.log(2.0 / (1.0 - tl.exp(-slope)))
    if not MASKED:
        spread = tl.minimum(spread, 2.0 * bound + LN2)
    radius = (spread + VANISHING) / slope
    # Infinity and NaN (slope 0, values that are not finite) fail the comparison and skip nothing.
    return tl.where(radius < EVERYTHING, radius, EVERYTHING).to(tl.int32)


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
def _start(
    cu_seqlens,
    slopes,
    peaks,
    key_mask,
    scale,
    num_sequences,
    POWER: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    MEASURED: tl.constexpr,
):
    """What a program of an attention kernel owns, and how far it walks.

    Returns:
        The head (int64) and its slope in base 2; the number that tells sequences and heads apart; first token and
        length of the sequence; first row of the tile (see `_locate`); then what `_window` returns.
    """
    num_heads = tl.num_programs(1)
    head = _flattest_head(tl.program_id(1), num_heads, POWER)
    sequence, start, length, first = _locate(cu_seqlens, num_sequences, tl.program_id(0), OWN)
    slope = tl.load(slopes + head)
    if peaks is None:
        radius = EVERYTHING
    else:
        query_peak, key_peak, low = _peaks(peaks, sequence, start, length, head, MEASURED)
        radius = _radius(query_peak, key_peak, low, slope, scale, key_mask is not None)
    begin, diagonal, leave, stop = _window(first, length, radius, OWN, OTHER)
    stream = sequence * num_heads + head
    return head.to(tl.int64), slope * LOG2E, stream, start, length, first, begin, diagonal, leave, stop


@triton.jit
def _steps(begin, diagonal, leave, stop, OTHER: tl.constexpr, IS_FAR: tl.constexpr):
    """How many tiles of the other side a walk visits, off the diagonal (IS_FAR) or on it."""
    if IS_FAR:
        return (diagonal - begin) // OTHER + (stop - leave + OTHER - 1) // OTHER
    else:
        return (leave - diagonal) // OTHER


@triton.jit
def _visit(step, first, begin, diagonal, leave, OTHER: tl.constexpr, IS_FAR: tl.constexpr):
    """First row of the tile that a walk visits at a step, and its row next to the diagonal (on it, any row nearby)."""
    if IS_FAR:
        other = begin + step * OTHER
        other += tl.where(other < diagonal, 0, leave - diagonal)
        return other, tl.where(other < first, other + OTHER - 1, other)
    else:
        return diagonal + step * OTHER, first


@triton.jit
def _read(base, stride, start, first, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """The tile of ROWS rows from `first` of the sequence at `start`, zero beyond the sequence and beyond the head.

    Offsets have 64 bits: T * 3 * H * D may pass 2^31. What a walk does not change comes first in their sum.
    """
    rows = first + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK_DIM)
    pointers = (base + start.to(tl.int64) * stride + channels)[None, :] + rows.to(tl.int64)[:, None] * stride
    exists = (rows < length)[:, None] & (channels < HEAD_DIM)[None, :]  # [ROWS, BLOCK_DIM]
    return tl.load(pointers, mask=exists, other=0.0)


@triton.jit
def _write(
    tile, base, stride, start, first, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Store the rows that the sequence has and the channels that the head has, in the dtype of the output.

    Rows count from `first`: the sums that `_read` needed would otherwise be kept in registers during the whole walk.
    """
    rows = tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK_DIM)
    pointers = base + (start + first).to(tl.int64) * stride + rows[:, None] * stride + channels[None, :]
    exists = (rows < length - first)[:, None] & (channels < HEAD_DIM)[None, :]  # [ROWS, BLOCK_DIM]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=exists)


@triton.jit
def _positions(positions, start, rows, length):
    """Column of each token in its padded row: read where the mask has holes, else the token's number.

    Rows beyond the sequence get the column of its last one, so that no distance has the wrong sign.
    """
    if positions is None:
        return rows
    else:
        return tl.load(positions + start + tl.minimum(rows, length - 1)).to(tl.int32)


@triton.jit
def _keys_valid(key_mask, start, rows, length):
    """Which keys exist and are no padding."""
    valid = rows < length
    if key_mask is not None:
        valid = valid & (tl.load(key_mask + start + rows, mask=valid, other=0) != 0)
    return valid


@triton.jit
def _scores(
    own_tile,
    other_tile,
    own_positions,
    positions,
    start,
    length,
    first,
    other,
    near,
    factor,
    slope,
    extra,
    OTHER: tl.constexpr,
    IS_FAR: tl.constexpr,
):
    """Scaled products of two tiles with their bias, in base 2.

    Off the diagonal the bias splits into a part of the row and a part of the column. Distances are counted from `near`,
    the other tile's row next to the diagonal, so that both parts have one sign and nothing cancels.

    Args:
        own_tile: [OWN, BLOCK_DIM], queries or keys.
        other_tile: [OTHER, BLOCK_DIM], keys or queries.
        own_positions: int32 [OWN].
        positions: see `_positions`.
        start: first token of the sequence.
        length: tokens of the sequence.
        first: first row of the own tile.
        other: first row of the other tile.
        near: see `_visit`.
        factor: multiplies the products.
        slope: of the head, in base 2.
        extra: float32 [OTHER], added to each row.
        OTHER: rows of the other tile.
        IS_FAR: whether the other tile lies off the diagonal.

    Returns:
        float32 [OWN, OTHER] without the row's part of the bias, and that part, float32 [OWN].
    """
    scores = tl.dot(own_tile, tl.trans(other_tile), input_precision="ieee")  # [OWN, OTHER]
    others = other + tl.arange(0, OTHER)
    nearest = _positions(positions, start, near, length)
    row = (own_positions - nearest).to(tl.float32)  # [OWN]
    column = (_positions(positions, start, others, length) - nearest).to(tl.float32)  # [OTHER]
    if IS_FAR:
        side = tl.where(other < first, slope, -slope)
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
    draws, _, _, _ = tl.philox(tl.load(seed), zero + keys, zero + queries, zero + stream, zero, 7)
    return tl.uint_to_uniform_float(draws) >= dropout_p


@triton.jit(do_not_specialize=["num_sequences"])
def _measure_kernel(
    qkv,
    peaks,
    cu_seqlens,
    stride,
    part_stride,
    head_stride,
    scale,
    num_sequences,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Largest |q|^2, |k|^2 and -scale * q_i.k_i (at least 0) of a tile of ROWS tokens, read STEP at a time.

    Writes `peaks` float32 [T // ROWS + N, H, 3], except for tiles without tokens.
    """
    head = tl.program_id(1)
    _, start, length, first = _locate(cu_seqlens, num_sequences, tl.program_id(0), ROWS)
    if first >= length:
        return
    query = qkv + head.to(tl.int64) * head_stride
    key = query + part_stride
    query_peak = tl.zeros((STEP,), tl.float32)
    key_peak = tl.zeros((STEP,), tl.float32)
    low = tl.zeros((STEP,), tl.float32)
    for step in range(0, ROWS, STEP):
        q = _read(query, stride, start, first + step, length, STEP, HEAD_DIM, BLOCK_DIM).to(tl.float32)
        k = _read(key, stride, start, first + step, length, STEP, HEAD_DIM, BLOCK_DIM).to(tl.float32)
        query_peak = tl.maximum(query_peak, _or_infinity(tl.sum(q * q, axis=1)))
        key_peak = tl.maximum(key_peak, _or_infinity(tl.sum(k * k, axis=1)))
        low = tl.maximum(low, _or_infinity(tl.sum(q * k, axis=1) * -scale))
    peaks += (tl.program_id(0) * tl.num_programs(1) + head) * 3
    tl.store(peaks, tl.max(query_peak, axis=0))
    tl.store(peaks + 1, tl.max(key_peak, axis=0))
    tl.store(peaks + 2, tl.max(low, axis=0))


@triton.jit
def _or_infinity(values):
    """Infinity in place of NaN: a maximum would drop NaN, and with it the news that nothing is bounded."""
    return tl.where(values == values, values, float("inf"))


@triton.jit(do_not_specialize=["num_sequences", "total"])
def _forward_kernel(
    qkv,
    out,
    lse,
    cu_seqlens,
    slopes,
    peaks,
    positions,
    key_mask,
    seed,
    stride,
    part_stride,
    head_stride,
    scale,
    dropout_p,
    num_sequences,
    total,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    POWER: tl.constexpr,
    MEASURED: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """A tile of queries walks over the keys.

    Writes `out` [T, H, D] and `lse` float32 [H, T], the base-2 logarithm of each softmax's sum of exponentials.
    """
    head, slope, stream, start, length, first, begin, diagonal, leave, stop = _start(
        cu_seqlens, slopes, peaks, key_mask, scale, num_sequences, POWER, OWN, OTHER, MEASURED
    )
    if first >= length:
        return
    query = qkv + head * head_stride
    key = query + part_stride
    value = key + part_stride
    factor = scale * LOG2E
    rows = first + tl.arange(0, OWN)
    own_positions = _positions(positions, start, rows, length)
    q = _read(query, stride, start, first, length, OWN, HEAD_DIM, BLOCK_DIM)

    row_max = tl.full((OWN,), LOWEST, tl.float32)
    row_sum = tl.zeros((OWN,), tl.float32)
    context = tl.zeros((OWN, BLOCK_DIM), tl.float32)
    for is_far in tl.static_range(2):
        for step in range(_steps(begin, diagonal, leave, stop, OTHER, is_far)):
            other, near = _visit(step, first, begin, diagonal, leave, OTHER, is_far)
            others = other + tl.arange(0, OTHER)
            k = _read(key, stride, start, other, length, OTHER, HEAD_DIM, BLOCK_DIM)
            extra = tl.where(_keys_valid(key_mask, start, others, length), 0.0, float("-inf"))
            scores, row_bias = _scores(
                q, k, own_positions, positions, start, length, first, other, near, factor, slope, extra, OTHER, is_far
            )
            new_max = tl.maximum(row_max, tl.max(scores, axis=1) + row_bias)
            weights = tl.exp2(scores + (row_bias - new_max)[:, None])  # [OWN, OTHER]
            shrink = tl.exp2(row_max - new_max)
            row_max = new_max
            row_sum = row_sum * shrink + tl.sum(weights, axis=1)
            if seed is not None:
                keep = _keep(seed, stream, rows[:, None], others[None, :], dropout_p)
                weights = tl.where(keep, weights, 0.0)
            v = _read(value, stride, start, other, length, OTHER, HEAD_DIM, BLOCK_DIM)
            context = tl.dot(weights.to(v.dtype), v, context * shrink[:, None], input_precision="ieee")

    # Only a row whose keys are all masked has no sum; its output is zero, and an infinite sum silences it in backward.
    has_keys = row_sum > 0
    share = 1.0 / tl.where(has_keys, row_sum, 1.0)
    if seed is not None:
        share = share / (1.0 - dropout_p)
    row_lse = tl.where(has_keys, row_max + tl.log2(row_sum), float("inf"))
    tl.store(lse + head * total + start + rows, row_lse, mask=rows < length)
    out_stride = tl.num_programs(1) * HEAD_DIM
    out += head * HEAD_DIM
    _write(context * share[:, None], out, out_stride, start, first, length, OWN, HEAD_DIM, BLOCK_DIM)


@triton.jit(do_not_specialize=["num_sequences", "total"])
def _query_gradient_kernel(
    qkv,
    out,
    out_gradient,
    gradient,
    lse,
    delta,
    cu_seqlens,
    slopes,
    peaks,
    positions,
    key_mask,
    seed,
    stride,
    part_stride,
    head_stride,
    out_gradient_stride,
    out_gradient_head_stride,
    scale,
    dropout_p,
    num_sequences,
    total,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    POWER: tl.constexpr,
    MEASURED: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """A tile of queries walks over the keys.

    Writes the query's part of `gradient` [T, 3, H, D], and `delta` float32 [H, T], the products out . out_gradient.
    """
    head, slope, stream, start, length, first, begin, diagonal, leave, stop = _start(
        cu_seqlens, slopes, peaks, key_mask, scale, num_sequences, POWER, OWN, OTHER, MEASURED
    )
    if first >= length:
        return
    query = qkv + head * head_stride
    key = query + part_stride
    value = key + part_stride
    out += head * HEAD_DIM
    out_gradient += head * out_gradient_head_stride
    out_stride = tl.num_programs(1) * HEAD_DIM
    factor = scale * LOG2E
    rows = first + tl.arange(0, OWN)
    valid = rows < length
    own_positions = _positions(positions, start, rows, length)
    q = _read(query, stride, start, first, length, OWN, HEAD_DIM, BLOCK_DIM)
    do = _read(out_gradient, out_gradient_stride, start, first, length, OWN, HEAD_DIM, BLOCK_DIM)
    o = _read(out, out_stride, start, first, length, OWN, HEAD_DIM, BLOCK_DIM)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)  # [OWN]
    tl.store(delta + head * total + start + rows, row_delta, mask=valid)
    row_lse = tl.load(lse + head * total + start + rows, mask=valid, other=float("inf"))

    dq = tl.zeros((OWN, BLOCK_DIM), tl.float32)
    for is_far in tl.static_range(2):
        for step in range(_steps(begin, diagonal, leave, stop, OTHER, is_far)):
            other, near = _visit(step, first, begin, diagonal, leave, OTHER, is_far)
            others = other + tl.arange(0, OTHER)
            k = _read(key, stride, start, other, length, OTHER, HEAD_DIM, BLOCK_DIM)
            v = _read(value, stride, start, other, length, OTHER, HEAD_DIM, BLOCK_DIM)
            extra = tl.where(_keys_valid(key_mask, start, others, length), 0.0, float("-inf"))
            scores, row_bias = _scores(
                q, k, own_positions, positions, start, length, first, other, near, factor, slope, extra, OTHER, is_far
            )
            weights = tl.exp2(scores + (row_bias - row_lse)[:, None])  # [OWN, OTHER]
            dweights = tl.dot(do, tl.trans(v), input_precision="ieee")
            if seed is not None:
                keep = _keep(seed, stream, rows[:, None], others[None, :], dropout_p)
                dweights = tl.where(keep, dweights / (1.0 - dropout_p), 0.0)
            dscores = weights * (dweights - row_delta[:, None])
            dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")

    gradient += head * HEAD_DIM
    _write(dq * scale, gradient, 3 * out_stride, start, first, length, OWN, HEAD_DIM, BLOCK_DIM)


@triton.jit(do_not_specialize=["num_sequences", "total"])
def _key_value_gradient_kernel(
    qkv,
    out_gradient,
    gradient,
    lse,
    delta,
    cu_seqlens,
    slopes,
    peaks,
    positions,
    key_mask,
    seed,
    stride,
    part_stride,
    head_stride,
    out_gradient_stride,
    out_gradient_head_stride,
    scale,
    dropout_p,
    num_sequences,
    total,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    POWER: tl.constexpr,
    MEASURED: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """A tile of keys walks over the queries.

    Writes the key's and the value's part of `gradient` [T, 3, H, D]. Scores stand transposed, [keys, queries], so that
    they enter the next product from registers.
    """
    head, slope, stream, start, length, first, begin, diagonal, leave, stop = _start(
        cu_seqlens, slopes, peaks, key_mask, scale, num_sequences, POWER, OWN, OTHER, MEASURED
    )
    if first >= length:
        return
    query = qkv + head * head_stride
    key = query + part_stride
    value = key + part_stride
    out_gradient += head * out_gradient_head_stride
    lse += head * total + start
    delta += head * total + start
    part = tl.num_programs(1) * HEAD_DIM
    gradient += head * HEAD_DIM + part
    factor = scale * LOG2E
    rows = first + tl.arange(0, OWN)
    own_positions = _positions(positions, start, rows, length)
    k = _read(key, stride, start, first, length, OWN, HEAD_DIM, BLOCK_DIM)
    v = _read(value, stride, start, first, length, OWN, HEAD_DIM, BLOCK_DIM)

    dk = tl.zeros((OWN, BLOCK_DIM), tl.float32)
    dv = tl.zeros((OWN, BLOCK_DIM), tl.float32)
    for is_far in tl.static_range(2):
        for step in range(_steps(begin, diagonal, leave, stop, OTHER, is_far)):
            other, near = _visit(step, first, begin, diagonal, leave, OTHER, is_far)
            others = other + tl.arange(0, OTHER)
            q = _read(query, stride, start, other, length, OTHER, HEAD_DIM, BLOCK_DIM)
            do = _read(out_gradient, out_gradient_stride, start, other, length, OTHER, HEAD_DIM, BLOCK_DIM)
            # Queries beyond the sequence need no mask: they weigh exp2(bias), at most 1, and multiply zeros.
            extra = -tl.load(lse + others, mask=others < length, other=0.0)  # [OTHER]
            scores, row_bias = _scores(
                k, q, own_positions, positions, start, length, first, other, near, factor, slope, extra, OTHER, is_far
            )
            weights = tl.exp2(scores + row_bias[:, None])  # [OWN, OTHER]
            if key_mask is not None:
                weights = tl.where(_keys_valid(key_mask, start, rows, length)[:, None], weights, 0.0)
            dropped = weights
            if seed is not None:
                keep = _keep(seed, stream, others[None, :], rows[:, None], dropout_p)
                dropped = tl.where(keep, weights / (1.0 - dropout_p), 0.0)
            dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision="ieee")
            dweights = tl.dot(v, tl.trans(do), input_precision="ieee")  # [OWN, OTHER]
            if seed is not None:
                dweights = tl.where(keep, dweights / (1.0 - dropout_p), 0.0)
            column_delta = tl.load(delta + others, mask=others < length, other=0.0)  # [OTHER]
            dscores = weights * (dweights - column_delta[None, :])
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")

    _write(dk * scale, gradient, 3 * part, start, first, length, OWN, HEAD_DIM, BLOCK_DIM)
    _write(dv, gradient + part, 3 * part, start, first, length, OWN, HEAD_DIM, BLOCK_DIM)


# Tile sizes to try, by what they are for. The first of each is safe on any card, and runs where nothing can be timed.
# The others of "usual" were the fastest of 37 sizes at lengths 2,048 and 8,192 (H100, bfloat16, D = 64), the first ones
# of the gradients at 512; no size with 8 warps was among the best three. The rest follows from the compiler's report:
# the largest that keep everything in registers on sm_90 (Triton 3.7.1).
_TILES = {
    _forward_kernel: {
        "usual": [Tile(64, 64, 4, 3), Tile(128, 64, 4, 3)],
        "dropout": [Tile(64, 32, 4, 3), Tile(64, 64, 4, 3)],
        "wide": [Tile(64, 32, 4, 2), Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)],
        "wide dropout": [Tile(64, 32, 4, 2)],
        "float32": [Tile(32, 16, 4, 1), Tile(32, 32, 8, 2)],
    },
    _query_gradient_kernel: {
        "usual": [Tile(64, 64, 4, 3), Tile(128, 64, 4, 2)],
        "dropout": [Tile(64, 32, 4, 3), Tile(64, 64, 4, 3)],
        "wide": [Tile(64, 32, 4, 2), Tile(64, 64, 4, 3)],
        "wide dropout": [Tile(64, 32, 4, 2)],
        "float32": [Tile(32, 16, 4, 1), Tile(32, 32, 8, 2)],
    },
    _key_value_gradient_kernel: {
        "usual": [Tile(64, 32, 4, 3), Tile(64, 128, 4, 2)],
        "dropout": [Tile(64, 32, 4, 3)],
        "wide": [Tile(64, 32, 4, 2), Tile(64, 32, 4, 3)],
        "wide dropout": [Tile(32, 32, 4, 2)],
        "float32": [Tile(16, 16, 4, 1), Tile(32, 32, 8, 2)],
    },
}
# A tile size is chosen for each of four ranges of lengths.
_LENGTHS = (256, 1024, 4096)
_chosen = {}


def tiles_for(kernel, dtype: torch.dtype, head_dim: int, has_dropout: bool, memory: int) -> list[Tile]:
    """The tile sizes among which the fastest is looked for.

    Args:
        kernel: one of the three attention kernels.
        dtype: of `qkv`.
        head_dim: D.
        has_dropout: whether weights are dropped.
        memory: bytes of shared memory that a block may use.

    Returns:
        At least one.
    """
    if dtype == torch.float32:
        kind = "float32"  # multiplied in registers: larger tiles spill, and compile for minutes
    else:
        kinds = ("wide",) * (head_dim > 64) + ("dropout",) * has_dropout  # the draws take registers too
        kind = " ".join(kinds) or "usual"

    def fits(tile):
        # Two owned tiles, and two of the other side for each stage of the pipeline.
        rows = 2 * (tile.own + tile.other * tile.stages)
        return rows * _block_dim(head_dim) * dtype.itemsize <= memory

    return [tile for tile in _TILES[kernel][kind] if fits(tile)] or [Tile(32, 32, 4, 1)]


def _block_dim(head_dim: int) -> int:
    """D rounded up to a power of two of at least 16, which is what tl.dot multiplies."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _run(kernel, qkv, cu_seqlens, max_seqlen, seed, tensors, strides, numbers) -> None:
    """Launch an attention kernel with its fastest tile size, which is found at the first call of a kind."""
    total, _, heads, head_dim = qkv.shape
    constants = (head_dim, _block_dim(head_dim), 1 << heads.bit_length() - 1, MEASURED_TOKENS)

    def run(tile):
        grid = (total // tile.own + cu_seqlens.shape[0] - 1, heads, 1)
        launch(kernel, grid, tensors, strides, numbers, (*constants, tile.own, tile.other), tile)

    key = (kernel, qkv.device, qkv.dtype, head_dim, seed is None, bisect.bisect_left(_LENGTHS, max_seqlen))
    tile = _chosen.get(key)
    if tile is None:
        memory = shared_memory(qkv.device) if qkv.is_cuda else 2**20
        tiles = tiles_for(kernel, qkv.dtype, head_dim, seed is not None, memory)
        tile = tiles[0]
        if qkv.is_cuda and torch.cuda.is_current_stream_capturing():
            return run(tile)  # nothing can be timed while a graph is captured
        if qkv.is_cuda and len(tiles) > 1:
            with torch.cuda.device(qkv.get_device()):  # the current device is the one whose time is taken
                tile = fastest(tiles, run)
        _chosen[key] = tile
    run(tile)


def _as_bytes(key_mask: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    return None if key_mask is None else key_mask.view(torch.uint8)


def _forward(
    qkv, cu_seqlens, slopes, positions, key_mask, seed, scale, dropout_p, max_seqlen, skip
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward kernels: one, or two where something may be skipped.

    Args:
        qkv: float16, bfloat16 or float32 [T, 3, H, D].
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
        The context [T, H, D] in the dtype of `qkv`, and what backward needs: float32 [H, T] base-2 logarithms of the
        softmax's sums, and float32 [T // MEASURED_TOKENS + N, H, 3] from `_measure_kernel` ([0, H, 3] without `skip`).
    """
    qkv = with_channels(qkv)
    out, lse, peaks = _empty_results(qkv, cu_seqlens, skip)
    if out.numel() == 0:
        return out, lse, peaks
    total, _, heads, head_dim = qkv.shape
    strides, numbers = qkv.stride()[:3], (scale, dropout_p, cu_seqlens.shape[0] - 1, total)
    if skip:
        constants = (head_dim, _block_dim(head_dim), *_MEASURING[:2])
        tensors = (qkv, peaks, cu_seqlens)
        launch(_measure_kernel, (peaks.shape[0], heads, 1), tensors, strides, numbers[::2], constants, _MEASURING)
    tensors = (qkv, out, lse, cu_seqlens, slopes, peaks if skip else None, positions, _as_bytes(key_mask), seed)
    _run(_forward_kernel, qkv, cu_seqlens, max_seqlen, seed, tensors, strides, numbers)
    return out, lse, peaks


def _empty_results(qkv, cu_seqlens, skip):
    """Memory for what `_forward` returns."""
    total, _, heads, head_dim = qkv.shape
    tiles = total // MEASURED_TOKENS + cu_seqlens.shape[0] - 1 if skip else 0
    return (
        qkv.new_empty(total, heads, head_dim),
        qkv.new_empty(heads, total, dtype=torch.float32),
        qkv.new_empty(tiles, heads, 3, dtype=torch.float32),
    )


def _backward(
    out_gradient,
    qkv,
    out,
    lse,
    peaks,
    cu_seqlens,
    slopes,
    positions,
    key_mask,
    seed,
    scale,
    dropout_p,
    max_seqlen,
    skip,
) -> torch.Tensor:
    """Launch the two backward kernels.

    Args:
        out_gradient: [T, H, D].
        qkv: as for `_forward`, and so are the arguments from `cu_seqlens` on.
        out: what `_forward` returned, and so are `lse` and `peaks`.

    Returns:
        The gradient of `qkv`, [T, 3, H, D] in its dtype.
    """
    qkv, out_gradient = with_channels(qkv), with_channels(out_gradient)
    gradient = qkv.new_empty(qkv.shape)
    if out.numel() == 0:
        return gradient
    delta = torch.empty_like(lse)
    shared = (gradient, lse, delta, cu_seqlens, slopes, peaks if skip else None, positions, _as_bytes(key_mask), seed)
    strides = (*qkv.stride()[:3], *out_gradient.stride()[:2])
    numbers = (scale, dropout_p, cu_seqlens.shape[0] - 1, qkv.shape[0])
    for kernel, own in (
        (_query_gradient_kernel, (qkv, out, out_gradient)),  # first, because it writes `delta`
        (_key_value_gradient_kernel, (qkv, out_gradient)),
    ):
        _run(kernel, qkv, cu_seqlens, max_seqlen, seed, (*own, *shared), strides, numbers)
    return gradient


class _Attention(torch.autograd.Function):
    """The attention in eager mode, where a custom operator would cost about 0.1 ms of Python a call."""

    @staticmethod
    def forward(ctx, qkv, *rest):
        results = _forward(qkv, *rest)
        ctx.save_for_backward(qkv, *results, *rest[:5])
        ctx.numbers = rest[5:]
        return results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, out_gradient):
        return _backward(out_gradient, *ctx.saved_tensors, *ctx.numbers), *[None] * 9


# The Hub's loader gives each revision of this file a module name of its own, and several may live in one process.
_NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{_NAMESPACE}::alibi_attention", mutates_args=())
def _attention(
    qkv: torch.Tensor,
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
    """`_forward` as one operator, for whoever traces: torch.compile, fake tensors, dispatch modes, functorch."""
    return _forward(qkv, cu_seqlens, slopes, positions, key_mask, seed, scale, dropout_p, max_seqlen, skip)


@_attention.register_fake
def _(qkv, cu_seqlens, slopes, positions, key_mask, seed, scale, dropout_p, max_seqlen, skip):
    return _empty_results(qkv, cu_seqlens, skip)


@torch.library.custom_op(f"{_NAMESPACE}::alibi_attention_backward", mutates_args=())
def _attention_backward(
    out_gradient: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    peaks: torch.Tensor,
    cu_seqlens: torch.Tensor,
    slopes: torch.Tensor,
    positions: Optional[torch.Tensor],
    key_mask: Optional[torch.Tensor],
    seed: Optional[torch.Tensor],
    scale: float,
    dropout_p: float,
    max_seqlen: int,
    skip: bool,
) -> torch.Tensor:
    """`_backward` as one operator."""
    forward = (out, lse, peaks, cu_seqlens, slopes, positions, key_mask, seed, scale, dropout_p, max_seqlen, skip)
    return _backward(out_gradient, qkv, *forward)


@_attention_backward.register_fake
def _(out_gradient, qkv, *_):
    return qkv.new_empty(qkv.shape)


def _save_for_backward(ctx, inputs, output) -> None:
    qkv, *rest = inputs
    ctx.save_for_backward(qkv, *output, *rest[:5])
    ctx.numbers = rest[5:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, out_gradient, *_):
    return _attention_backward(out_gradient, *ctx.saved_tensors, *ctx.numbers), *[None] * 9


_attention.register_autograd(_gradients, setup_context=_save_for_backward)


def _attend(
    qkv, cu_seqlens, max_seqlen, slopes, scale, dropout_p, positions=None, key_mask=None, skip=True
) -> torch.Tensor:
    """Draw the dropout's key where there is dropout, and run the kernels."""
    # The kernels index these by place alone.
    cu_seqlens, slopes, positions, key_mask = (
        None if tensor is None else tensor.contiguous() for tensor in (cu_seqlens, slopes, positions, key_mask)
    )
    seed = None
    if dropout_p > 0:
        # From torch's generator on the device: torch.manual_seed reproduces it, checkpointing restores it, and nothing
        # waits for the host.
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=qkv.device)
    skip = skip and max_seqlen > LONGEST_UNSKIPPED
    arguments = (
        *(qkv, cu_seqlens, slopes, positions, key_mask, seed),
        *(float(scale), float(dropout_p), max_seqlen, skip),
    )
    if is_observed(qkv):
        return _attention(*arguments)[0]
    if qkv.requires_grad and torch.is_grad_enabled():
        return _Attention.apply(*arguments)
    return _forward(*arguments)[0]


def triton_attention(qkv, packed, alibi_slopes, scale, dropout_p):
    """The `triton` row of the backend table.

    Args:
        qkv: float16, bfloat16 or float32 [T, 3, H, D], D at most 128; any strides, copied only if its channels are not
            contiguous. float32 is computed in float32, without TensorFloat-32.
        packed: the `PackedBatch` that says which tokens form a sequence, where they stand and which are padding.
        alibi_slopes: float32 [H], positive, on the device of `qkv`; gets no gradient.
        scale: factor of the scores.
        dropout_p: probability of dropping a weight, in [0, 1).

    Returns:
        [T, H, D] in the dtype of `qkv`. Positions that hold padding (`packed.key_mask`) get values without meaning.
        The gradient of `qkv` is one dense tensor [T, 3, H, D].

    Source: https://arxiv.org/abs/2307.08691, sections 3.1 and 3.2, for tiles and online softmax; the bias and the
    skipping are ours.
    """
    return _attend(
        qkv,
        packed.cu_seqlens,
        packed.max_seqlen,
        alibi_slopes,
        scale,
        dropout_p,
        positions=packed.positions if packed.has_holes else None,
        key_mask=packed.key_mask,
    )


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
    return _attend(qkv, cu_seqlens, max_seqlen, slopes, scale, dropout_p, skip=skip)


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
