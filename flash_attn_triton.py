"""Packed, bidirectional ALiBi attention in Triton: forward, backward, dropout; skips tiles with negligible weight.

Sequences lie one after another in T tokens; `cu_seqlens` says where each starts. No tensor of size S x S is stored and
no padding is computed. Three kernels walk over tiles: the forward pass and the query gradient own a tile of queries
and walk over keys, the key and value gradient owns a tile of keys and walks over queries. One program writes each
output tile, with a fixed order of additions, so every run gives the same bits. This is why backward has two kernels:
they compute seven matrix products per tile where one kernel with atomic additions would compute five, but they need
neither atomics nor a float32 buffer for the query gradient.

**The bias** slope * |i - j| costs one addition per score. In a tile on one side of the diagonal it splits into a part
of the row and a part of the column; only tiles on the diagonal need the absolute value.

**Skipping.** Tiles beyond the radius within which keys weigh anything are not visited; bert_attention.py proves the
bound. Here it is computed for a whole sequence and head: C from the largest norms, and `own` from the query with the
lowest score with itself, or 0 where none is negative. Both come from one pass over the queries and keys, which short
sequences do without (see `LONGEST_UNSKIPPED`).

Letters: S padded length, T tokens, N sequences, H heads, D head size. As in other attention kernels, a tile has BLOCK_M
queries and BLOCK_N keys, and m_i and l_i are the running maximum and sum of a row. Functions that serve queries and
keys alike say ROWS for the rows that a program owns and STEP for those that it reads at a time. BLOCK_DIM is D rounded
up to a power of two.
"""

import bisect
import functools
import re
from typing import Optional

import torch
from torch.autograd.function import once_differentiable

from .launch_triton import Tile, dropout_seed, fastest, is_observed, launch, shared_memory, with_channels

try:
    import triton
    import triton.language as tl
except ImportError:  # The Hub's loader skips imports inside `try`; the caller decides what a missing Triton means.
    raise

# Where no sequence is longer, nothing is measured or skipped. On an H100 (D = 64, 12 heads) measuring takes 1.7 ns a
# token and the forward pass 6.1 at length 512, of which skipping saves a sixth; at 1,024 it saves a third of 11.
LONGEST_UNSKIPPED = 512
# Tokens that one program of `_measure_kernel` reads.
MEASURED_TOKENS = tl.constexpr(256)
_MEASURING = Tile(MEASURED_TOKENS.value, 64, 4, 1)

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
    seq_start = tl.load(cu_seqlens + low)
    length = tl.load(cu_seqlens + low + 1) - seq_start
    return low, seq_start, length, (program - seq_start // ROWS - low) * ROWS


@triton.jit
def _flattest_head(rank, num_heads, POWER: tl.constexpr):
    """The head of a rank when the heads of `alibi_slopes` are sorted by slope, the flattest first.

    The flattest head's programs work longest and must not start last. Other slopes than those of `alibi_slopes` are
    served in this order as well, which can only cost time.

    Args:
        rank: int32, from 0.
        num_heads: H.
        POWER: the largest power of two up to H; head POWER + n lies between heads n - 1 and n.
    """
    between = rank - (2 * POWER - num_heads)
    pair = num_heads - POWER - 1 - between // 2
    head = tl.where(between % 2 == 0, pair, POWER + pair)
    return tl.where(between < 0, POWER - 1 - rank, head)


@triton.jit
def _peaks(peaks, sequence, seq_start, length, head, ROWS: tl.constexpr):
    """The largest of each of the three numbers that `_measure_kernel` found in the tiles of a sequence."""
    num_heads = tl.num_programs(1)
    count = (length + ROWS - 1) // ROWS
    peaks += ((seq_start // ROWS + sequence) * num_heads + head) * 3
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
    """Distance in tokens beyond which keys together weigh under 2^-24 of a row; bert_attention.py has the proof.

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
def _window(first, length, radius, ROWS: tl.constexpr, STEP: tl.constexpr):
    """Where the walk of the tile [first, first + ROWS) begins, meets the diagonal, leaves it and stops.

    Works on scalars and on blocks of tiles alike.

    Returns:
        int32 rows of the other side: begin <= diagonal < leave <= stop; all but the stop are multiples of STEP.
    """
    end = tl.minimum(first + ROWS, length)
    begin = tl.maximum(first - radius, 0) // STEP * STEP
    diagonal = first // STEP * STEP
    leave = (end + STEP - 1) // STEP * STEP
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
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """What a program of an attention kernel owns, and how far it walks.

    Returns:
        The head (int64) and its slope in base 2; the number that tells sequences and heads apart; first token and
        length of the sequence; first row of the tile (see `_locate`); then what `_window` returns.
    """
    num_heads = tl.num_programs(1)
    head = _flattest_head(tl.program_id(1), num_heads, POWER)
    sequence, seq_start, length, first = _locate(cu_seqlens, num_sequences, tl.program_id(0), ROWS)
    slope = tl.load(slopes + head)
    if peaks is None:
        radius = EVERYTHING
    else:
        query_peak, key_peak, low = _peaks(peaks, sequence, seq_start, length, head, MEASURED_TOKENS)
        radius = _radius(query_peak, key_peak, low, slope, scale, key_mask is not None)
    begin, diagonal, leave, stop = _window(first, length, radius, ROWS, STEP)
    stream = sequence * num_heads + head
    # Ten scalars, since in Triton 3.2, the oldest supported release, one jit function cannot pass a tuple to another.
    return head.to(tl.int64), slope * LOG2E, stream, seq_start, length, first, begin, diagonal, leave, stop


@triton.jit
def _steps(begin, diagonal, leave, stop, STEP: tl.constexpr, IS_FAR: tl.constexpr):
    """How many tiles of the other side a walk visits, off the diagonal (IS_FAR) or on it."""
    if IS_FAR:
        return (diagonal - begin) // STEP + (stop - leave + STEP - 1) // STEP
    else:
        return (leave - diagonal) // STEP


@triton.jit
def _visit(step, first, begin, diagonal, leave, STEP: tl.constexpr, IS_FAR: tl.constexpr):
    """First row of the tile that a walk visits at a step, and its row next to the diagonal (on it, any row nearby)."""
    if IS_FAR:
        other = begin + step * STEP
        other += tl.where(other < diagonal, 0, leave - diagonal)
        return other, tl.where(other < first, other + STEP - 1, other)
    else:
        return diagonal + step * STEP, first


@triton.jit
def _read(base, stride, seq_start, first, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """The tile of ROWS rows from `first` of the sequence at `start`, zero beyond the sequence and beyond the head.

    Offsets have 64 bits: T * 3 * H * D may pass 2^31. What a walk does not change comes first in their sum.
    """
    rows = first + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK_DIM)
    pointers = (base + seq_start.to(tl.int64) * stride + channels)[None, :] + rows.to(tl.int64)[:, None] * stride
    exists = (rows < length)[:, None] & (channels < HEAD_DIM)[None, :]  # [ROWS, BLOCK_DIM]
    return tl.load(pointers, mask=exists, other=0.0)


@triton.jit
def _write(
    tile, base, stride, seq_start, first, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Store the rows that the sequence has and the channels that the head has, in the dtype of the output.

    Rows count from `first`: the sums that `_read` needed would otherwise be kept in registers during the whole walk.
    """
    rows = tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK_DIM)
    pointers = base + (seq_start + first).to(tl.int64) * stride + rows[:, None] * stride + channels[None, :]
    exists = (rows < length - first)[:, None] & (channels < HEAD_DIM)[None, :]  # [ROWS, BLOCK_DIM]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=exists)


@triton.jit
def _positions(positions, seq_start, rows, length):
    """Column of each token in its padded row: read where the mask has holes, else the token's number.

    Rows beyond the sequence get the column of its last one, so that no distance has the wrong sign.
    """
    if positions is None:
        return rows
    else:
        return tl.load(positions + seq_start + tl.minimum(rows, length - 1)).to(tl.int32)


@triton.jit
def _keys_valid(key_mask, seq_start, rows, length):
    """Which keys exist and are not padding."""
    valid = rows < length
    if key_mask is not None:
        valid = valid & (tl.load(key_mask + seq_start + rows, mask=valid, other=0) != 0)
    return valid


@triton.jit
def _add_alibi(s, factor, extra, rows, columns, near, slope, is_left, IS_FAR: tl.constexpr):
    """Scale the scores of a tile and add the bias, in base 2.

    Off the diagonal it splits into a part of the row and a part of the column. Distances are counted from `near`, so
    that both parts have one sign and nothing cancels.

    Args:
        s: float32 [ROWS, STEP], q.k.
        factor: scale of the scores, in base 2.
        extra: float32 [STEP], added to each row.
        rows, columns: int32 [ROWS] and [STEP], their positions.
        near: int32, position of the column next to the diagonal.
        slope: of the head, in base 2.
        is_left: whether the columns come before the rows.
        IS_FAR: whether the tile lies off the diagonal.

    Returns:
        float32 [ROWS, STEP] without the row's part of the bias, and that part, float32 [ROWS].
    """
    row = (rows - near).to(tl.float32)  # [ROWS]
    column = (columns - near).to(tl.float32)  # [STEP]
    if IS_FAR:
        side = tl.where(is_left, slope, -slope)
        return s * factor + (extra + column * side)[None, :], row * -side
    else:
        return s * factor + extra[None, :] - slope * tl.abs(row[:, None] - column[None, :]), row * 0.0


@triton.jit
def _keep(seed, stream, queries, keys, dropout_p):
    """Which weights dropout keeps, for numbers of queries and keys that broadcast to the tile.

    Philox keyed by the seed and counted by (key, query, stream): whether a weight is kept depends on its position, not
    on tile sizes. Seven rounds are the fewest that pass BigCrush (https://doi.org/10.1145/2063384.2063405). One draw
    per weight costs about as much as moving four neighbouring draws to the threads that need them.
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
    _, seq_start, length, first = _locate(cu_seqlens, num_sequences, tl.program_id(0), ROWS)
    if first >= length:
        return
    query = qkv + head.to(tl.int64) * head_stride
    key = query + part_stride
    query_peak = tl.zeros((STEP,), tl.float32)
    key_peak = tl.zeros((STEP,), tl.float32)
    low = tl.zeros((STEP,), tl.float32)
    for step in range(0, ROWS, STEP):
        q = _read(query, stride, seq_start, first + step, length, STEP, HEAD_DIM, BLOCK_DIM).to(tl.float32)
        k = _read(key, stride, seq_start, first + step, length, STEP, HEAD_DIM, BLOCK_DIM).to(tl.float32)
        query_peak = tl.maximum(query_peak, _or_infinity(tl.sum(q * q, axis=1)))
        key_peak = tl.maximum(key_peak, _or_infinity(tl.sum(k * k, axis=1)))
        low = tl.maximum(low, _or_infinity(tl.sum(q * k, axis=1) * -scale))
    peaks += (tl.program_id(0) * tl.num_programs(1) + head) * 3
    tl.store(peaks, tl.max(query_peak, axis=0))
    tl.store(peaks + 1, tl.max(key_peak, axis=0))
    tl.store(peaks + 2, tl.max(low, axis=0))


@triton.jit
def _or_infinity(values):
    """Infinity instead of NaN: a maximum would drop NaN, and with it the information that nothing is bounded."""
    return tl.where(values == values, values, float("inf"))


@triton.jit(do_not_specialize=["num_sequences", "total"])
def _forward_kernel(
    out,
    lse,
    qkv,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of queries walks over the keys.

    Writes `out` [T, H, D] and `lse` float32 [H, T], the base-2 logarithm of each softmax's sum of exponentials.
    """
    head, slope, stream, seq_start, length, start_m, begin, diagonal, leave, stop = _start(
        cu_seqlens, slopes, peaks, key_mask, scale, num_sequences, POWER, BLOCK_M, BLOCK_N
    )
    if start_m >= length:
        return
    query = qkv + head * head_stride
    key = query + part_stride
    value = key + part_stride
    factor = scale * LOG2E
    offs_m = start_m + tl.arange(0, BLOCK_M)
    pos_m = _positions(positions, seq_start, offs_m, length)
    q = _read(query, stride, seq_start, start_m, length, BLOCK_M, HEAD_DIM, BLOCK_DIM)

    m_i = tl.full((BLOCK_M,), LOWEST, tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DIM), tl.float32)
    # The diagonal comes first: it holds each query's own key, whose bias is 0 and whose score is often the largest of
    # the row. m_i then no longer changes, and the tiles that follow scale l_i and acc by exactly 1.
    for is_far in tl.static_range(2):
        for step in range(_steps(begin, diagonal, leave, stop, BLOCK_N, is_far)):
            start_n, near = _visit(step, start_m, begin, diagonal, leave, BLOCK_N, is_far)
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = _read(key, stride, seq_start, start_n, length, BLOCK_N, HEAD_DIM, BLOCK_DIM)
            extra = tl.where(_keys_valid(key_mask, seq_start, offs_n, length), 0.0, float("-inf"))
            s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            near = _positions(positions, seq_start, near, length)
            pos_n = _positions(positions, seq_start, offs_n, length)
            s, row_bias = _add_alibi(s, factor, extra, pos_m, pos_n, near, slope, start_n < start_m, is_far)
            m_new = tl.maximum(m_i, tl.max(s, axis=1) + row_bias)
            p = tl.exp2(s + (row_bias - m_new)[:, None])
            alpha = tl.exp2(m_i - m_new)
            m_i = m_new
            l_i = l_i * alpha + tl.sum(p, axis=1)
            if seed is not None:
                keep = _keep(seed, stream, offs_m[:, None], offs_n[None, :], dropout_p)
                p = tl.where(keep, p, 0.0)
            v = _read(value, stride, seq_start, start_n, length, BLOCK_N, HEAD_DIM, BLOCK_DIM)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")

    # Only a row whose keys are all masked has no sum; its output is zero, and an infinite sum silences it in backward.
    has_keys = l_i > 0
    share = 1.0 / tl.where(has_keys, l_i, 1.0)
    if seed is not None:
        share = share / (1.0 - dropout_p)
    lse_i = tl.where(has_keys, m_i + tl.log2(l_i), float("inf"))
    tl.store(lse + head * total + seq_start + offs_m, lse_i, mask=offs_m < length)
    out_stride = tl.num_programs(1) * HEAD_DIM
    out += head * HEAD_DIM
    _write(acc * share[:, None], out, out_stride, seq_start, start_m, length, BLOCK_M, HEAD_DIM, BLOCK_DIM)


@triton.jit(do_not_specialize=["num_sequences", "total"])
def _query_gradient_kernel(
    out,
    out_gradient,
    gradient,
    lse,
    delta,
    qkv,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of queries walks over the keys.

    Writes the query's part of `gradient` [T, 3, H, D], and `delta` float32 [H, T], the dot products of `out` and
    `out_gradient`.
    """
    head, slope, stream, seq_start, length, start_m, begin, diagonal, leave, stop = _start(
        cu_seqlens, slopes, peaks, key_mask, scale, num_sequences, POWER, BLOCK_M, BLOCK_N
    )
    if start_m >= length:
        return
    query = qkv + head * head_stride
    key = query + part_stride
    value = key + part_stride
    out += head * HEAD_DIM
    out_gradient += head * out_gradient_head_stride
    out_stride = tl.num_programs(1) * HEAD_DIM
    factor = scale * LOG2E
    offs_m = start_m + tl.arange(0, BLOCK_M)
    valid = offs_m < length
    pos_m = _positions(positions, seq_start, offs_m, length)
    q = _read(query, stride, seq_start, start_m, length, BLOCK_M, HEAD_DIM, BLOCK_DIM)
    do = _read(out_gradient, out_gradient_stride, seq_start, start_m, length, BLOCK_M, HEAD_DIM, BLOCK_DIM)
    o = _read(out, out_stride, seq_start, start_m, length, BLOCK_M, HEAD_DIM, BLOCK_DIM)
    delta_i = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)  # [BLOCK_M]
    tl.store(delta + head * total + seq_start + offs_m, delta_i, mask=valid)
    lse_i = tl.load(lse + head * total + seq_start + offs_m, mask=valid, other=float("inf"))

    dq = tl.zeros((BLOCK_M, BLOCK_DIM), tl.float32)
    for is_far in tl.static_range(2):
        for step in range(_steps(begin, diagonal, leave, stop, BLOCK_N, is_far)):
            start_n, near = _visit(step, start_m, begin, diagonal, leave, BLOCK_N, is_far)
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = _read(key, stride, seq_start, start_n, length, BLOCK_N, HEAD_DIM, BLOCK_DIM)
            v = _read(value, stride, seq_start, start_n, length, BLOCK_N, HEAD_DIM, BLOCK_DIM)
            extra = tl.where(_keys_valid(key_mask, seq_start, offs_n, length), 0.0, float("-inf"))
            s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            near = _positions(positions, seq_start, near, length)
            pos_n = _positions(positions, seq_start, offs_n, length)
            s, row_bias = _add_alibi(s, factor, extra, pos_m, pos_n, near, slope, start_n < start_m, is_far)
            p = tl.exp2(s + (row_bias - lse_i)[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            if seed is not None:
                keep = _keep(seed, stream, offs_m[:, None], offs_n[None, :], dropout_p)
                dp = tl.where(keep, dp / (1.0 - dropout_p), 0.0)
            ds = p * (dp - delta_i[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    gradient += head * HEAD_DIM
    _write(dq * scale, gradient, 3 * out_stride, seq_start, start_m, length, BLOCK_M, HEAD_DIM, BLOCK_DIM)


@triton.jit(do_not_specialize=["num_sequences", "total"])
def _key_value_gradient_kernel(
    out_gradient,
    gradient,
    lse,
    delta,
    qkv,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of keys walks over the queries.

    Writes the key's and the value's part of `gradient` [T, 3, H, D]. Scores are transposed, [keys, queries], so that
    they enter the next matrix product from registers.
    """
    head, slope, stream, seq_start, length, start_n, begin, diagonal, leave, stop = _start(
        cu_seqlens, slopes, peaks, key_mask, scale, num_sequences, POWER, BLOCK_N, BLOCK_M
    )
    if start_n >= length:
        return
    query = qkv + head * head_stride
    key = query + part_stride
    value = key + part_stride
    out_gradient += head * out_gradient_head_stride
    lse += head * total + seq_start
    delta += head * total + seq_start
    out_stride = tl.num_programs(1) * HEAD_DIM
    gradient += head * HEAD_DIM + out_stride
    factor = scale * LOG2E
    offs_n = start_n + tl.arange(0, BLOCK_N)
    pos_n = _positions(positions, seq_start, offs_n, length)
    k = _read(key, stride, seq_start, start_n, length, BLOCK_N, HEAD_DIM, BLOCK_DIM)
    v = _read(value, stride, seq_start, start_n, length, BLOCK_N, HEAD_DIM, BLOCK_DIM)

    dk = tl.zeros((BLOCK_N, BLOCK_DIM), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DIM), tl.float32)
    for is_far in tl.static_range(2):
        for step in range(_steps(begin, diagonal, leave, stop, BLOCK_M, is_far)):
            start_m, near = _visit(step, start_n, begin, diagonal, leave, BLOCK_M, is_far)
            offs_m = start_m + tl.arange(0, BLOCK_M)
            q = _read(query, stride, seq_start, start_m, length, BLOCK_M, HEAD_DIM, BLOCK_DIM)
            do = _read(out_gradient, out_gradient_stride, seq_start, start_m, length, BLOCK_M, HEAD_DIM, BLOCK_DIM)
            # Queries beyond the sequence need no mask: they weigh exp2(bias), at most 1, and multiply zeros.
            extra = -tl.load(lse + offs_m, mask=offs_m < length, other=0.0)  # [BLOCK_M]
            s = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
            near = _positions(positions, seq_start, near, length)
            pos_m = _positions(positions, seq_start, offs_m, length)
            s, row_bias = _add_alibi(s, factor, extra, pos_n, pos_m, near, slope, start_m < start_n, is_far)
            p = tl.exp2(s + row_bias[:, None])
            if key_mask is not None:
                p = tl.where(_keys_valid(key_mask, seq_start, offs_n, length)[:, None], p, 0.0)
            dropped = p
            if seed is not None:
                keep = _keep(seed, stream, offs_m[None, :], offs_n[:, None], dropout_p)
                dropped = tl.where(keep, p / (1.0 - dropout_p), 0.0)
            dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
            if seed is not None:
                dp = tl.where(keep, dp / (1.0 - dropout_p), 0.0)
            delta_m = tl.load(delta + offs_m, mask=offs_m < length, other=0.0)  # [BLOCK_M]
            ds = p * (dp - delta_m[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    _write(dk * scale, gradient, 3 * out_stride, seq_start, start_n, length, BLOCK_N, HEAD_DIM, BLOCK_DIM)
    _write(dv, gradient + out_stride, 3 * out_stride, seq_start, start_n, length, BLOCK_N, HEAD_DIM, BLOCK_DIM)


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
    """The tile sizes among which the fastest is looked for, at least one.

    Args:
        kernel: one of the three attention kernels.
        dtype: of `qkv`.
        head_dim: D.
        has_dropout: whether weights are dropped.
        memory: bytes of shared memory that a block may use.
    """
    if dtype == torch.float32:
        kind = "float32"  # multiplied in registers: larger tiles spill, and compile for minutes
    else:
        kinds = ("wide",) * (head_dim > 64) + ("dropout",) * has_dropout  # the draws take registers too
        kind = " ".join(kinds) or "usual"

    def fits(tile):
        # Two owned tiles, and two of the other side for each stage of the pipeline.
        rows = 2 * (tile.rows + tile.step * tile.stages)
        return rows * _block_dim(head_dim) * dtype.itemsize <= memory

    return [tile for tile in _TILES[kernel][kind] if fits(tile)] or [Tile(32, 32, 4, 1)]


def _block_dim(head_dim: int) -> int:
    """D rounded up to a power of two of at least 16, the smallest that tl.dot multiplies."""
    return max(16, 1 << (head_dim - 1).bit_length())


@functools.cache
def constants_of(owns_keys: bool, num_heads: int, head_dim: int, tile: Tile) -> dict:
    """The constexpr arguments of an attention kernel, whose program owns BLOCK_N keys or else BLOCK_M queries."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": _block_dim(head_dim),
        "POWER": 1 << num_heads.bit_length() - 1,
        "BLOCK_M": tile.step if owns_keys else tile.rows,
        "BLOCK_N": tile.rows if owns_keys else tile.step,
    }


def _strides(qkv) -> dict:
    """The strides of `qkv` as arguments of a kernel: of tokens, of query, key and value, and of heads."""
    stride, part_stride, head_stride, _ = qkv.stride()
    return {"stride": stride, "part_stride": part_stride, "head_stride": head_stride}


def _run(
    kernel, own, strides, qkv, peaks, cu_seqlens, slopes, positions, key_mask, seed, scale, dropout_p, max_seqlen: int
) -> None:
    """Launch an attention kernel with its fastest tile size, which is found at the first call of a kind.

    Args:
        own: the tensors that this kernel takes before those that all three share, by name.
        strides: all strides that it takes, by name.
        peaks: see `_empty_results`; the other arguments are those of `_forward`.
    """
    total, _, heads, head_dim = qkv.shape
    tensors = {
        **own,
        "qkv": qkv,
        "cu_seqlens": cu_seqlens,
        "slopes": slopes,
        "peaks": peaks if peaks.numel() else None,
        "positions": positions,
        "key_mask": None if key_mask is None else key_mask.view(torch.uint8),
        "seed": seed,
    }
    numbers = {"scale": scale, "dropout_p": dropout_p, "num_sequences": cu_seqlens.shape[0] - 1, "total": total}
    owns_keys = kernel is _key_value_gradient_kernel

    def run(tile):
        grid = (total // tile.rows + numbers["num_sequences"], heads, 1)
        launch(kernel, grid, tile, tensors, strides, numbers, constants_of(owns_keys, heads, head_dim, tile))

    has_dropout = seed is not None
    key = (kernel.fn, qkv.device, qkv.dtype, head_dim, has_dropout, bisect.bisect_left(_LENGTHS, max_seqlen))
    tile = _chosen.get(key)
    if tile is None:
        memory = shared_memory(qkv.device) if qkv.is_cuda else 2**20
        tiles = tiles_for(kernel, qkv.dtype, head_dim, has_dropout, memory)
        tile = tiles[0]
        if qkv.is_cuda and torch.cuda.is_current_stream_capturing():
            return run(tile)  # nothing can be timed while a graph is captured
        if qkv.is_cuda and len(tiles) > 1:
            with torch.cuda.device(qkv.get_device()):  # the current device is the one whose time is taken
                tile = fastest(tiles, run)
        _chosen[key] = tile
    run(tile)


def _empty_results(qkv, cu_seqlens, max_seqlen: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for the context [T, H, D] in the dtype of `qkv`, and for what backward needs beside it.

    That is `lse`, float32 [H, T], base-2 logarithms of the softmax's sums, and `peaks`, float32 [tiles, H, 3], what
    `_measure_kernel` writes; there are no tiles where nothing is skipped.
    """
    total, _, heads, head_dim = qkv.shape
    tiles = total // _MEASURING.rows + cu_seqlens.shape[0] - 1 if max_seqlen > LONGEST_UNSKIPPED else 0
    return (
        qkv.new_empty(total, heads, head_dim),
        qkv.new_empty(heads, total, dtype=torch.float32),
        qkv.new_empty(tiles, heads, 3, dtype=torch.float32),
    )


def _forward(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    slopes: torch.Tensor,
    positions: Optional[torch.Tensor],
    key_mask: Optional[torch.Tensor],
    seed: Optional[torch.Tensor],
    scale: float,
    dropout_p: float,
    max_seqlen: int,
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
        max_seqlen: tokens of the longest sequence; chooses tile sizes and whether tiles are skipped, never results.

    Returns:
        See `_empty_results`.
    """
    qkv = with_channels(qkv)
    out, lse, peaks = _empty_results(qkv, cu_seqlens, max_seqlen)
    if out.numel() == 0:
        return out, lse, peaks
    heads, head_dim = out.shape[1:]
    strides = _strides(qkv)
    if peaks.numel():
        rows, step = _MEASURING.rows, _MEASURING.step
        launch(
            _measure_kernel,
            grid=(peaks.shape[0], heads, 1),
            tile=_MEASURING,
            tensors={"qkv": qkv, "peaks": peaks, "cu_seqlens": cu_seqlens},
            strides=strides,
            numbers={"scale": scale, "num_sequences": cu_seqlens.shape[0] - 1},
            constants={"HEAD_DIM": head_dim, "BLOCK_DIM": _block_dim(head_dim), "ROWS": rows, "STEP": step},
        )
    shared = (qkv, peaks, cu_seqlens, slopes, positions, key_mask, seed, scale, dropout_p, max_seqlen)
    _run(_forward_kernel, {"out": out, "lse": lse}, strides, *shared)
    return out, lse, peaks


def _backward(
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
) -> torch.Tensor:
    """Launch the two backward kernels.

    Args:
        out_gradient: [T, H, D], any strides.
        qkv: as for `_forward`, and so are the arguments from `cu_seqlens` on.
        out: what `_forward` returned, and so are `lse` and `peaks`.

    Returns:
        The gradient of `qkv`, [T, 3, H, D] in its dtype.
    """
    qkv, out_gradient = with_channels(qkv), with_channels(out_gradient)
    gradient = qkv.new_empty(qkv.shape)
    if out.numel() == 0:
        return gradient
    own = {"out_gradient": out_gradient, "gradient": gradient, "lse": lse, "delta": torch.empty_like(lse)}
    stride, head_stride, _ = out_gradient.stride()
    strides = {**_strides(qkv), "out_gradient_stride": stride, "out_gradient_head_stride": head_stride}
    shared = (qkv, peaks, cu_seqlens, slopes, positions, key_mask, seed, scale, dropout_p, max_seqlen)
    # The query gradient comes first, because it writes `delta`.
    _run(_query_gradient_kernel, {"out": out, **own}, strides, *shared)
    _run(_key_value_gradient_kernel, own, strides, *shared)
    return gradient


class _Attention(torch.autograd.Function):
    """The attention in eager mode, where a custom operator would cost about 0.1 ms of Python per call."""

    @staticmethod
    def forward(ctx, qkv, *rest):
        results = _forward(qkv, *rest)
        ctx.save_for_backward(qkv, *results, *rest[:5])
        ctx.numbers = rest[5:]
        return results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, out_gradient):
        return _backward(out_gradient, *ctx.saved_tensors, *ctx.numbers), *[None] * 8


# The same as operators, for whoever traces: torch.compile, fake tensors, dispatch modes, functorch. The Hub's loader
# gives each revision of this file a module name of its own, and several may live in one process.
_NAMESPACE = re.sub(r"\W", "_", __name__)
_attention = torch.library.custom_op(f"{_NAMESPACE}::alibi_attention", _forward, mutates_args=())
_attention_backward = torch.library.custom_op(f"{_NAMESPACE}::alibi_attention_backward", _backward, mutates_args=())


@_attention.register_fake
def _(qkv, cu_seqlens, *rest):
    return _empty_results(qkv, cu_seqlens, rest[-1])


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
    return _attention_backward(out_gradient, *ctx.saved_tensors, *ctx.numbers), *[None] * 8


_attention.register_autograd(_gradients, setup_context=_save_for_backward)


def triton_attention(qkv, packed, alibi_slopes, scale, dropout_p):
    """The `triton` row of the backend table.

    Args:
        qkv: float16, bfloat16 or float32 [T, 3, H, D], D at most 128; any strides, copied only if its channels are not
            contiguous. float32 is computed in float32, without TensorFloat-32.
        packed: the `PackedBatch` that says which tokens form a sequence, their positions and which are padding.
        alibi_slopes: float32 [H], positive, on the device of `qkv`; gets no gradient.
        scale: factor of the scores.
        dropout_p: probability of dropping a weight, in [0, 1).

    Returns:
        [T, H, D] in the dtype of `qkv`. Ignore the values at padding (`packed.key_mask`). The gradient of `qkv` is one
        dense tensor [T, 3, H, D].

    Source: https://arxiv.org/abs/2307.08691, sections 3.1 and 3.2, for tiles and online softmax.
    """
    # The kernels index these by position alone.
    cu_seqlens, slopes = packed.cu_seqlens.contiguous(), alibi_slopes.contiguous()
    positions = packed.positions.contiguous() if packed.has_holes else None
    key_mask = None if packed.key_mask is None else packed.key_mask.contiguous()
    tensors = (qkv, cu_seqlens, slopes, positions, key_mask, dropout_seed(dropout_p, qkv.device))
    arguments = (*tensors, float(scale), float(dropout_p), packed.max_seqlen)
    if is_observed(qkv):
        return _attention(*arguments)[0]
    if qkv.requires_grad and torch.is_grad_enabled():
        return _Attention.apply(*arguments)
    return _forward(*arguments)[0]
