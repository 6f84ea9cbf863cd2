"""ALiBi slopes and the two attention functions that need plain torch only: eager and SDPA.

Both follow the contract of the backend table: `(qkv, packed, alibi_slopes, scale, dropout_p) -> context`.

Letters: N sequences, T tokens, H heads, D head size, M row length, n tokens of one sequence.
"""

import math
import re
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Queries of one call where a head looks at its band only. For n of 2,048 to 8,192, chunks of 128 and 256 are equally
# fast and 512 costs 1.15 times as much: too many keys then lie outside a steep head's reach.
BAND_CHUNK = 256

# The same where a head reaches at least as many tokens: 0.9 of the time of 256 at a reach of 1,750 or 3,500.
WIDE_CHUNK = 1024

# Heads share a group, and so a call, while the widest reaches at most this many times as far as the narrowest.
# 1.25, 1.5 and 2 differ by less than 5%.
BAND_GROWTH = 1.5

# Shorter sequences attend in one call: at n = 512 the band takes 1.15 times as long as one call, at 1,024 0.94.
BAND_FROM = 1024

# The band is used where it keeps at most this share of the scores.
BAND_PAYS = 0.75

# The bias of keys that weigh nothing. With slope * distance, they would weigh denormal numbers, with which processors
# compute slowly: the backward pass then takes 2 times as long at n = 256, 3.4 at 512 and 4.3 at 1,000. Finite, as a
# block of keys may hold nothing else.
NOTHING = -1e30

# Without a backward pass the cut costs 1.1 times as much at n = 256, nothing at 384, and 0.83 at 1,000.
CUT_FROM = 384

# Scores in one product of `attend_by_products`, 2 MiB in float32: they stay in the processor's cache, and memory is
# bounded. 2^18 takes 1.0 to 1.4 times as long, backward 0.8 to 1.7; 2^20 0.8 to 1.0, backward 0.9 to 1.3.
PRODUCT_SCORES = 2**19

# Without a backward pass, products with fewer scores in all take longer than the CPU kernel: 1.7 times at n = 16.
FEWEST_SCORES = 2**14

# Bias entries a head in one call of `chunked_attention`, which bounds its memory: 4 MiB a head in float32.
CHUNK_ENTRIES = 2**20


def alibi_slopes(num_heads: int) -> list[float]:
    """Slope of each head's distance penalty.

    For a power of two, the geometric series from 2^(-8/H) to 2^-8; otherwise the slopes of the largest power of two P
    below H, followed by every second slope of 2P.

    Args:
        num_heads: H, at least 1.

    Returns:
        H positive floats.

    Source: https://arxiv.org/abs/2108.12409, section 3; beyond powers of two the authors' released code.
    """
    power = 1 << (num_heads.bit_length() - 1)
    series = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    between = [2.0 ** (-4.0 * (2 * head + 1) / power) for head in range(num_heads - power)]
    return series + between


def is_traced() -> bool:
    """Whether torch.compile, export or a trace is recording, so that nothing may depend on shapes or data."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


@cache
def processor() -> tuple[str, frozenset]:
    """Vendor and feature flags of this machine's processor, as Linux names them; empty where they are not known."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "", frozenset()
    vendor, flags = (re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE) for name in ("vendor_id", "flags"))
    return vendor[1] if vendor else "", frozenset(flags[1].split() if flags else ())


def eager_attention_weights(query, key, packed, alibi_slopes, scale):
    """Attention weights by the plain formula, one padded row a sequence.

    Args:
        query: floating [T, H, D].
        key: like `query`.
        packed: the `PackedBatch` that says which tokens form a sequence and where they stand.
        alibi_slopes: float32 [H], positive.
        scale: factor of the scores, 1 / sqrt(D) in every published checkpoint.

    Returns:
        float32 (float64 for float64 input) [N, H, M, M]; zero where the query or the key is no token.

    Source: https://arxiv.org/abs/2108.12409, section 3, made symmetric.
    """
    query_rows, key_rows = packed.to_rows(query), packed.to_rows(key)  # [N, M, H, D]
    compute = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("nqhd,nkhd->nhqk", query_rows.to(compute), key_rows.to(compute)) * scale
    place = torch.arange(packed.row_length, device=query.device)
    distance = (place[:, None] - place[None, :]).abs()
    scores = scores - alibi_slopes.to(compute)[:, None, None] * distance
    is_token = packed.row_mask()
    weights = scores.masked_fill(~is_token[:, None, None, :], float("-inf")).softmax(dim=-1)
    # A row without any token has the softmax of nothing, NaN; masking queries clears it as well.
    return weights.masked_fill(~(is_token[:, None, :, None] & is_token[:, None, None, :]), 0.0)


def eager_attention(qkv, packed, alibi_slopes, scale, dropout_p, return_weights=False):
    """ALiBi attention by the plain formula; memory grows with M².

    Args:
        qkv: floating [T, 3, H, D]: query, key and value of each token.
        packed: the `PackedBatch` that says which tokens form a sequence and where they stand.
        alibi_slopes: float32 [H], positive.
        scale: factor of the scores.
        dropout_p: probability of dropping a weight, in [0, 1).
        return_weights: also return the weights, as used (after dropout).

    Returns:
        [T, H, D] in the dtype of `qkv`; with `return_weights` also [N, H, M, M] in that dtype.

    Source: ours.
    """
    query, key, value = qkv.unbind(1)
    weights = eager_attention_weights(query, key, packed, alibi_slopes, scale)
    weights = F.dropout(weights, dropout_p, training=dropout_p > 0).to(query.dtype)
    context = packed.from_rows(torch.einsum("nhqk,nkhd->nqhd", weights, packed.to_rows(value)))
    return (context, weights) if return_weights else context


def sdpa_attention(qkv, packed, alibi_slopes, scale, dropout_p):
    """ALiBi attention by torch's scaled_dot_product_attention (SDPA); see `eager_attention` for the arguments.

    This is the place that decides which formula serves which call:

    - Traced (compile, export): one padded call with the bias written out, as no shape may depend on data.
    - Dropout, holes, or a device other than the CPU: query chunks with the bias written out. torch's CPU kernel has no
      dropout, distances with holes have no strided form, and CUDA's kernels refuse overlapping strides.
    - Otherwise the CPU kernel with a strided bias, in every dtype: 1.4 to 4 times as fast as matmul and softmax with a
      bias from n = 222 up, and no slower below; one call for neighbours of equal length. Gathering equal lengths from
      afar gains nothing (at most 1.05), padding short texts to one call loses (0.4 to 0.95).
    - There, from 1,024 tokens up, only the keys that can weigh anything: 1.07 times as fast at 1,024, 2.3 at 4,096 and
      3.6 at 8,192 (scores up to 5). In shorter sequences the same keys are cut off by their bias (see `NOTHING`).
    - There, bfloat16 on some processors: products in place of the CPU kernel, see `formula_for`.

    Source: ours; measured on an Intel Xeon with avx512_bf16 and without AMX, see benchmarks/README.md.
    """
    query, key, value = qkv.unbind(1)
    if not len(query):
        return query
    slopes = alibi_slopes.to(torch.promote_types(query.dtype, torch.float32))
    if is_traced():
        return padded_attention(query, key, value, packed, slopes, scale, dropout_p)
    if dropout_p > 0 or packed.has_holes or query.device.type != "cpu":
        return chunked_attention(query, key, value, packed, slopes, scale, dropout_p)
    return strided_attention(query, key, value, packed, slopes, scale)


def padded_attention(query, key, value, packed, slopes, scale, dropout_p):
    """One SDPA call over padded rows; memory grows with M². See `sdpa_attention`."""
    q, k, v = (packed.to_rows(x).transpose(1, 2) for x in (query, key, value))  # [N, H, M, D]
    place = torch.arange(packed.row_length, device=query.device)
    bias = -slopes[:, None, None] * (place[:, None] - place[None, :]).abs()  # [H, M, M]
    bias = bias.to(query.dtype)[None]
    if packed.keeps_padding or packed.num_sequences * packed.row_length != len(query):
        # The lowest number, not -inf: a row without any token must not become NaN.
        bias = bias.masked_fill(~packed.row_mask()[:, None, None, :], torch.finfo(bias.dtype).min)
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)
    return packed.from_rows(context.transpose(1, 2))


def chunked_attention(query, key, value, packed, slopes, scale, dropout_p):
    """Query chunks with their bias [H, chunk, n] written out; see `sdpa_attention`.

    A chunk is computed again in the backward pass instead of keeping its bias, so memory is linear in n.
    """

    def attend(q, k, v, query_places, key_places):
        bias = -slopes[:, None, None] * (query_places[:, None] - key_places[None, :]).abs()
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        bias = bias.to(q.dtype)[None]
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)
        return context[0].transpose(0, 1)

    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    contexts = []
    # Splits, not slices: the backward of each slice would add a zero tensor of full size.
    for q, k, v, places in zip(*(x.split(packed.lengths) for x in (query, key, value, packed.positions))):
        chunk = max(1, CHUNK_ENTRIES // max(1, len(q)))
        for queries, query_places in zip(q.split(chunk), places.split(chunk)):
            arguments = (queries, k, v, query_places, places)
            contexts.append(checkpoint(attend, *arguments, use_reentrant=False) if trained else attend(*arguments))
    return torch.cat(contexts)


def strided_attention(query, key, value, packed, slopes, scale):
    """Attention by torch's CPU kernel, with a bias that is a strided view of one vector a head.

    Args:
        query, key, value: floating [T, H, D] on the CPU.
        packed: the `PackedBatch` of the tokens, without holes.
        slopes: float32 (float64 for float64 input) [H], positive.
        scale: factor of the scores.

    Returns:
        [T, H, D] in the dtype of `query`.

    Source: ours.
    """
    lengths = packed.lengths
    longest = max(lengths)
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    smallest = math.log(torch.finfo(slopes.dtype).tiny)
    if longest >= CUT_FROM or trained and slopes.amax() * (1 - longest) < smallest:
        bias = distance_bias(slopes, longest)
        reach = head_reach(query.detach(), key.detach(), slopes, scale, lengths)
        bias.masked_fill_(torch.arange(1 - longest, longest).abs() > torch.tensor(reach)[:, None], NOTHING)
        plan = plan_calls(lengths, reach)
    else:
        bias, plan = packed.shared(
            (slopes.dtype, *slopes.tolist()),
            lambda: (distance_bias(slopes, longest), plan_calls(lengths, [math.inf] * len(slopes))),
        )
    arguments = (query, key, value, bias, scale, plan, packed.reversal)
    return StridedAttention.apply(*arguments) if trained else run_calls(*arguments, trained=False)[0]


def distance_bias(slopes, span):
    """-slope * |distance| for the distances 1 - span to span - 1: [H, 2 * span - 1] in the dtype of `slopes` [H]."""
    return -slopes[:, None] * torch.arange(1 - span, span, device=slopes.device).abs()


class HeadGroup(NamedTuple):
    """Heads that look equally far in sequences of equal length.

    Attributes:
        start: first token of the first sequence.
        count: sequences, one after another.
        length: tokens of each, n.
        heads: head numbers.
        reach: farthest distance in tokens that they look at; n: everywhere.
    """

    start: int
    count: int
    length: int
    heads: list[int]
    reach: int

    @property
    def is_whole(self):
        """Whether the heads look at the whole sequence."""
        return self.reach >= self.length

    @property
    def selection(self):
        """Index of the heads: a slice, which selects a view, where their numbers are evenly spaced; else the list."""
        first, step = self.heads[0], self.heads[1] - self.heads[0] if len(self.heads) > 1 else 1
        even = step > 0 and self.heads == list(range(first, first + step * len(self.heads), step))
        return slice(first, self.heads[-1] + 1, step) if even else self.heads

    def formula(self, dtype, trained):
        """What computes its calls, see `formula_for`."""
        return formula_for(dtype, self.count, len(self.heads), self.length, trained)

    def rows(self, tensor):
        """The group's tokens in [T, H, D], all heads: a view [count, n, H, D]."""
        tokens = tensor[self.start : self.start + self.count * self.length]
        return tokens.view(self.count, self.length, *tensor.shape[1:])

    def windows(self):
        """Query chunks and the keys that they look at, from 0 to n.

        Yields:
            First query, last + 1, first key, last + 1, and how many windows of that shape follow one another, each a
            chunk after the one before. Those share a call, as the bias depends on distances alone.
        """
        chunk = WIDE_CHUNK if self.reach >= WIDE_CHUNK else BAND_CHUNK
        if self.is_whole:
            chunk = self.length
        start = 0
        while start < self.length:
            end = min(start + chunk, self.length)
            low, high = max(0, start - self.reach), min(self.length, end + self.reach)
            is_whole = high - low == chunk + 2 * self.reach
            # Wide windows are few, and the gradients of their keys would need several times the memory of the keys.
            repeats = 1 + (self.length - high) // chunk if is_whole and self.reach < WIDE_CHUNK else 1
            yield start, end, low, high, repeats
            start += repeats * chunk


def spans(rows, start, end, step, repeats):
    """The tokens from `start` to `end`, and the same `step` to `(repeats - 1) * step` tokens further on.

    Args:
        rows: [count, n, heads, D].
        start, end, step, repeats: integers; spans may overlap.

    Returns:
        [count * repeats, heads, end - start, D], a view unless several sequences have several spans.
    """
    if repeats == 1:
        return rows[:, start:end].transpose(1, 2)
    windows = rows[:, start : end + (repeats - 1) * step].unfold(1, end - start, step)  # [count, repeats, heads, D, m]
    return windows.transpose(-1, -2).flatten(0, 1)


def plan_calls(lengths, reach):
    """Which heads of which sequences look how far: a list of `HeadGroup`.

    Args:
        lengths: tokens of each sequence.
        reach: tokens that each head looks at to either side, H numbers.
    """
    plan, start = [], 0
    for length, equals in groupby(lengths):
        group = HeadGroup(start, len(list(equals)), length, list(range(len(reach))), length)
        start += group.count * length
        plan += [group] if length < BAND_FROM else split_by_reach(group, [min(far, length) for far in reach])
    return [group for group in plan if group.length]


def head_reach(query, key, slopes, scale, lengths):
    """Distance r beyond which keys weigh nothing, for each head.

    No score of query i is larger than C_i = |scale| |q_i| max |k|, and each distance occurs at most twice, so all keys
    beyond distance r together weigh less than exp(C_i - slope r) 2 / (1 - exp(-slope)). As a share of the query's row,
    they weigh less than the smallest of three bounds, and so does what a key gathers from all queries beyond r:

    - The row weighs at least what the own key does, at distance 0: exp(scale q_i k_i).
    - It weighs at least what the neighbours do, see `neighbours_weigh`; in sequences from `BAND_FROM` up.
    - No score is below -C_i, and the keys beyond r are the share exp(-slope r) of those on their side of the query, so
      they weigh less than 2 exp(2 C_i - slope r) of the row. (The 2 is for a key, which gathers from two sides.)

    Where it is 2^-24, half a rounding of float32, keys are left out. (2^-53 for float64.)

    Args:
        query, key: floating [T, H, D].
        slopes: float32 or float64 [H].
        scale: factor of the scores.
        lengths: tokens of each sequence, T together.

    Returns:
        H numbers, whole or infinite; infinite where the scores are not finite.

    Source: ours.
    """
    query, key = (x.to(slopes.dtype) for x in (query, key))
    bound = abs(scale) * query.norm(dim=-1) * key.norm(dim=-1).amax(dim=0)  # [T, H]
    # In parts that stay in the processor's cache.
    own = [(q * k).sum(dim=-1) for q, k in zip(query.split(BAND_CHUNK), key.split(BAND_CHUNK))]
    least = scale * torch.cat(own)
    for q, k, weight in zip(*(x.split(lengths) for x in (query, key, least))):
        if len(q) >= BAND_FROM:
            torch.maximum(weight, neighbours_weigh(q, k, slopes, scale), out=weight)
    tail = torch.log(2 / -torch.expm1(-slopes))
    spread = torch.minimum(bound - least + tail, 2 * bound + math.log(2)).amax(dim=0)
    bits = 53 if slopes.dtype == torch.float64 else 24
    reach = (spread + bits * math.log(2)) / slopes
    return [math.ceil(far) if far < math.inf else math.inf for far in reach.tolist()]


def neighbours_weigh(query, key, slopes, scale):
    """Logarithm of what the b keys in a query's block weigh at least, b about 2 / slope.

    Their mean distance is at most (b - 1) / 2, and by Jensen's inequality their weights add up to at least b times the
    exponential of their mean score: exp(scale q_i mean(k_j) - slope (b - 1) / 2) b.

    Args:
        query, key: floating [n, H, D] of one sequence.
        slopes: like `query`, [H].
        scale: factor of the scores.

    Returns:
        [n, H].

    Source: ours.
    """
    length, weights = len(query), []
    for q, k, slope in zip(query.unbind(1), key.unbind(1), slopes.tolist()):
        size = min(length, max(1, 2 ** round(math.log2(2 / slope))))
        whole = length // size * size
        means = k[:whole].unflatten(0, (-1, size)).mean(dim=1)  # [n / b, D]
        scores = torch.einsum("mbd,md->mb", q[:whole].unflatten(0, (-1, size)), means).flatten()
        # Those after the last whole block look at the last b keys.
        scores = torch.cat((scores, q[whole:] @ k[length - size :].mean(dim=0)))
        weights.append(scale * scores + math.log(size) - slope * (size - 1) / 2)
    return torch.stack(weights, dim=1)


def split_by_reach(group, reach):
    """The group cut into groups of heads that look about equally far, where that saves work.

    Args:
        group: sequences of equal length and all their heads.
        reach: tokens that each head looks at to either side, H integers.

    Returns:
        A list of `HeadGroup`.
    """
    kept = sum(min(group.length, 2 * far + BAND_CHUNK) for far in reach) / (group.length * len(reach))
    if kept > BAND_PAYS:
        return [group]
    groups = []
    for head in sorted(group.heads, key=reach.__getitem__):
        if groups and reach[head] <= BAND_GROWTH * reach[groups[-1].heads[0]]:
            groups[-1] = groups[-1]._replace(heads=groups[-1].heads + [head], reach=reach[head])
        else:
            groups.append(group._replace(heads=[head], reach=reach[head]))
    return [group._replace(heads=sorted(group.heads)) for group in groups]


def mask_view(bias, start, end, low, high):
    """The bias of queries in reverse order: [1, H, end - start, high - low], a view of `bias` [H, 2 * span - 1].

    The bias depends on i - j only. With the queries in reverse order, i' = last - i, it depends on i' + j, so the mask
    is a view, both strides 1, of a vector of distances, and no n × n tensor exists.
    """
    heads, width = bias.shape
    first = width // 2 + low - (end - 1)  # distance 0 stands at width // 2
    strides = (0, bias.stride(0), 1, 1)
    return bias.as_strided((1, heads, end - start, high - low), strides, bias.storage_offset() + first)


def write_chunks(tensor, group, start, part):
    """Put the results [count * repeats, heads, chunk, D] of a call from query `start` on into [T, H, D]."""
    _, heads, _, head_dim = part.shape
    rows = part.transpose(1, 2).flip(1).reshape(group.count, -1, heads, head_dim)
    group.rows(tensor)[:, start : start + rows.shape[1], group.selection] = rows


class Formula(NamedTuple):
    """How one call is computed; the arguments are those of torch's CPU flash attention.

    Attributes:
        forward: to the context and the logarithms of the rows' sums (empty where `backward` needs none).
        backward: to the gradients of query, key and value.
    """

    forward: Callable
    backward: Callable


def formula_for(dtype: torch.dtype, count: int, heads: int, length: int, trained: bool) -> Formula:
    """The formula of a call for `count` sequences of `length` tokens on this processor's CPU.

    - bfloat16 on AMD with avx512_bf16: products by oneDNN, 2.0 to 2.2 times as fast as torch's kernel from 64 to 512
      tokens, 1.8 at 2,048, 1.4 at 4,096; backward 2.9 times at 8 × 128, 1.8 at 4 × 512, but 0.86 at 1,024, so with a
      backward pass up to `PRODUCT_SCORES` a head only.
    - Anything else: torch's kernel, which is called by its own name, as autograd of overlapping windows would fill a
      zero tensor of full size for each; in `StridedAttention` all windows add into one gradient.

    Args:
        dtype: of query, key and value.
        count, heads, length: N, H and n of the call.
        trained: whether there will be a backward pass.

    Source: ours; measurements in benchmarks/README.md.
    """
    vendor, flags = processor()
    scores = length * length
    suits = scores <= PRODUCT_SCORES if trained else count * heads * scores >= FEWEST_SCORES
    if dtype == torch.bfloat16 and vendor == "AuthenticAMD" and "avx512_bf16" in flags and suits:
        return Formula(attend_by_products, products_backward)
    return Formula(
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )


def weights_by_products(query, key, mask, scale):
    """Attention weights, float32 [B, H, n, m].

    Scores are rounded once to the dtype of `query` before they are scaled, in float32.

    Args:
        query: floating [B, H, n, D].
        key: the same dtype, [B, H, m, D].
        mask: float32 bias [1, H, n, m].
        scale: factor of the scores.
    """
    scores = query @ key.transpose(-1, -2)
    # Written to dense memory: torch would lay the result out like the overlapping mask, 5 times as slow at 1,024 keys.
    biased = torch.add(mask, scores, alpha=scale, out=scores.new_empty(scores.shape, dtype=mask.dtype))
    return biased.softmax(dim=-1)


def product_parts(query, key):
    """Slices of sequences, heads and queries that hold at most `PRODUCT_SCORES` together, or one query of one head."""
    count, heads, queries, _ = query.shape
    keys = key.shape[2]
    some_queries = min(queries, max(1, PRODUCT_SCORES // keys))
    some_heads = min(heads, max(1, PRODUCT_SCORES // (keys * queries)))
    some = max(1, PRODUCT_SCORES // (keys * queries * heads))
    for n in range(0, count, some):
        for h in range(0, heads, some_heads):
            for i in range(0, queries, some_queries):
                yield slice(n, n + some), slice(h, h + some_heads), slice(i, i + some_queries)


def attend_by_products(query, key, value, attn_mask, scale):
    """`Formula.forward` by matrix products and softmax, in parts of bounded size; see `weights_by_products`.

    Args:
        value: like `key`.
        attn_mask: `mask` there.

    Returns:
        [B, H, n, D] in the dtype of `query`, and an empty tensor.

    Source: ours.
    """
    nothing = query.new_empty(0)
    if query.shape[:3].numel() * key.shape[2] <= PRODUCT_SCORES:
        return weights_by_products(query, key, attn_mask, scale).to(value.dtype) @ value, nothing
    context = torch.empty_like(query)
    for part in product_parts(query, key):
        both = part[:2]
        weights = weights_by_products(query[part], key[both], attn_mask[:, part[1], part[2]], scale)
        context[part] = weights.to(value.dtype) @ value[both]
    return context, nothing


def products_backward(grad, query, key, value, context, logsumexp, dropout_p, is_causal, attn_mask, scale):
    """`Formula.backward` to `attend_by_products`, for at most `PRODUCT_SCORES` scores a head.

    Args:
        grad: of the context, [B, H, n, D]. The others are those of torch's kernel; its switches must be off.

    Returns:
        Gradients of `query`, `key` and `value` in their dtype.

    Source: ours.
    """
    grads = tuple(torch.empty_like(x) for x in (query, key, value))
    for part in product_parts(query, key):
        both = part[:2]
        weights = weights_by_products(query[part], key[both], attn_mask[:, part[1], part[2]], scale)
        grad_weights = (grad[part] @ value[both].transpose(-1, -2)).float()
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, torch.float32)
        grad_scores = grad_scores.mul_(scale).to(query.dtype)
        grads[0][part] = grad_scores @ key[both]
        grads[1][both] = grad_scores.transpose(-1, -2) @ query[part]
        grads[2][both] = weights.to(grad.dtype).transpose(-1, -2) @ grad[part]
    return grads


def run_calls(query, key, value, bias, scale, plan, reversal, trained):
    """The planned calls of attention on the CPU, forward.

    Memory is linear in n. Queries are put in reverse order all at once, or chunk by chunk where some heads look at a
    band.

    Args:
        query, key, value: floating [T, H, D].
        bias: `distance_bias` of the longest sequence.
        scale: factor of the scores.
        plan: list of `HeadGroup`.
        reversal: int64 [T], `PackedBatch.reversal`.
        trained: whether there will be a backward pass.

    Returns:
        [T, H, D], and for each call the logarithms of the rows' sums.
    """
    context, sums = query.new_empty(query.shape), []
    if all(group.is_whole for group in plan):
        reverse = query.index_select(0, reversal)
        for group in plan:
            q, k, v = (group.rows(x).transpose(1, 2) for x in (reverse, key, value))
            mask = mask_view(bias, 0, group.length, 0, group.length)
            attend = group.formula(query.dtype, trained).forward
            part, logsumexp = attend(q, k, v, attn_mask=mask, scale=scale)
            group.rows(context)[:] = part.transpose(1, 2)
            sums.append(logsumexp)
        return context.index_select(0, reversal), sums
    for group in plan:
        heads, penalty = group.selection, bias[group.selection]
        q, k, v = (group.rows(x)[:, :, heads] for x in (query, key, value))  # [count, n, heads, D]
        attend = group.formula(query.dtype, trained).forward
        for start, end, low, high, repeats in group.windows():
            chunk = end - start
            part, logsumexp = attend(
                spans(q, start, end, chunk, repeats).flip(2),
                spans(k, low, high, chunk, repeats),
                spans(v, low, high, chunk, repeats),
                attn_mask=mask_view(penalty, start, end, low, high),
                scale=scale,
            )
            write_chunks(context, group, start, part)
            sums.append(logsumexp)
    return context, sums


class StridedAttention(torch.autograd.Function):
    """`run_calls` with its gradients.

    Source: ours.
    """

    @staticmethod
    def forward(ctx, query, key, value, bias, scale, plan, reversal):
        """The arguments of `run_calls`; returns [T, H, D]."""
        context, sums = run_calls(query, key, value, bias, scale, plan, reversal, trained=True)
        ctx.save_for_backward(query, key, value, bias, reversal, context, *sums)
        ctx.scale, ctx.plan = scale, plan
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Gradient [T, H, D] of the context to those of query, key and value."""
        query, key, value, bias, reversal, context, *sums = ctx.saved_tensors
        grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
        fixed = {"dropout_p": 0.0, "is_causal": False, "scale": ctx.scale}
        sums = iter(sums)
        if all(group.is_whole for group in ctx.plan):
            reverse = [x.index_select(0, reversal) for x in (grad, query, context)]
            for group in ctx.plan:
                grad_out, q, out, k, v = (group.rows(x).transpose(1, 2) for x in (*reverse, key, value))
                mask = mask_view(bias, 0, group.length, 0, group.length)
                attend_back = group.formula(query.dtype, trained=True).backward
                parts = attend_back(grad_out, q, k, v, out, next(sums), attn_mask=mask, **fixed)
                for whole, part in zip((grad_query, grad_key, grad_value), parts):
                    group.rows(whole)[:] = part.transpose(1, 2)
            return grad_query.index_select(0, reversal), grad_key, grad_value, None, None, None, None
        for group in ctx.plan:
            heads, penalty = group.selection, bias[group.selection]
            q, k, v, out, grad_out = (group.rows(x)[:, :, heads] for x in (query, key, value, context, grad))
            # Windows overlap, so their sum is kept in the dtype of the bias.
            grad_k, grad_v = (x.new_zeros(x.shape, dtype=bias.dtype) for x in (k, v))
            attend_back = group.formula(query.dtype, trained=True).backward
            for start, end, low, high, repeats in group.windows():
                chunk = end - start
                part_q, part_k, part_v = attend_back(
                    spans(grad_out, start, end, chunk, repeats).flip(2),
                    spans(q, start, end, chunk, repeats).flip(2),
                    spans(k, low, high, chunk, repeats),
                    spans(v, low, high, chunk, repeats),
                    spans(out, start, end, chunk, repeats).flip(2),
                    next(sums),
                    attn_mask=mask_view(penalty, start, end, low, high),
                    **fixed,
                )
                write_chunks(grad_query, group, start, part_q)
                for whole, part in ((grad_k, part_k), (grad_v, part_v)):
                    windows = part.transpose(1, 2).unflatten(0, (group.count, repeats))
                    for number in range(repeats):
                        whole[:, low + number * chunk : high + number * chunk] += windows[:, number]
            for whole, part in ((grad_key, grad_k), (grad_value, grad_v)):
                group.rows(whole)[:, :, heads] = part
        return grad_query, grad_key, grad_value, None, None, None, None
