"""ALiBi attention on the CPU without a tensor of n * n: a strided bias, and bands for heads with a small radius.

**Strided bias.** The bias depends on i - j only. With the queries of a sequence in reverse order, i' = last - i, it
depends on i' + j, so the mask of torch's CPU kernel can be a view, both strides 1, of one vector of distances per head.

**Bands.** Keys beyond a radius have a negligible weight (bert_attention.py has the proof). In long sequences, chunks of
queries attend within the radius only, and heads with similar radii share a call.

Letters: T tokens, H heads, D head size, n tokens of one sequence.
"""

import math
from itertools import groupby
from typing import Callable, NamedTuple, Optional

import torch
from torch.autograd.function import once_differentiable

from .bert_checks import flash_backward, flash_forward, is_traced, softmax_gradient
from .bert_linear_cpu import is_amd_with_bfloat16

# Queries per call for a head that attends within a band. For n of 2,048 to 8,192, chunks of 128 and 256 are equally
# fast and 512 costs 1.15 times as much: too many keys then lie beyond a steep head's radius.
BAND_CHUNK = 256

# The same for a radius of at least as many tokens: 1.12 times as fast as 256 at 8,192 tokens.
WIDE_CHUNK = 1024

# Heads share a call while the largest radius is at most this many times the smallest. 1.25, 1.5 and 2 differ
# by less than 5%.
BAND_GROWTH = 1.5

# Shorter sequences attend in one call: at n = 512 the band takes 1.15 times as long as one call, at 1,024 0.94.
BAND_FROM = 1024

# The band is used where it keeps at most this share of the scores.
BAND_PAYS = 0.75

# The bias of keys beyond the radius. With -slope * distance their weights would be denormal numbers, with which
# processors compute slowly: the backward pass then takes 2 times as long at n = 256, 3.4 at 512 and 4.3 at 1,000. It is
# finite, since a block may hold no other keys.
NOTHING = -1e30

# Without a backward pass a call with this bias takes 1.1 times as long at n = 256, as long at 384, 0.83 times at 1,000.
CUT_FROM = 384

# Scores in one matrix product of `attend_by_products`, 2 MiB in float32: they stay in the processor's cache, and memory
# is bounded. 2^18 takes 1.0 to 1.4 times as long, backward 0.8 to 1.7; 2^20 0.8 to 1.0, backward 0.9 to 1.3.
PRODUCT_SCORES = 2**19

# Between these, matrix products beat torch's kernel without a backward pass: they take 1.7 times as long for 16 tokens,
# and 1.2 times for 4,096.
FEWEST_SCORES = 2**14
LONGEST_PRODUCT = 2048


def cpu_declines(qkv, packed) -> Optional[str]:
    """The reason why `cpu_attention` cannot serve a call on the CPU, or None if it can."""
    if flash_forward is None or flash_backward is None:
        return f"torch {torch.__version__} lacks the kernel that it calls"
    if packed.has_holes:
        return "the attention mask has holes, and their distances have no strided form"
    if packed.keeps_padding or is_traced():  # a layer that is compiled alone gets a batch without padding
        return "its plan depends on data, so it cannot serve torch.compile, export, torch.func or unpad_inputs=False"
    return None


def cpu_attention(qkv, packed, alibi_slopes, scale, dropout_p):
    """ALiBi attention by torch's CPU kernel with a strided bias; memory is linear in n.

    From 1,024 tokens up heads attend within their radius only: with scores up to 5, 1.8 times as fast as one call over
    all keys at 4,096 tokens and 2.7 times at 8,192. In shorter sequences the bias of the same keys is `NOTHING`.

    Args and returns: see `eager_attention`; `packed` has no holes, and `dropout_p` is 0, since torch has no fused
    attention with dropout on the CPU.
    """
    if not len(qkv):
        return qkv[:, 0]
    slopes = alibi_slopes.to(torch.promote_types(qkv.dtype, torch.float32))
    lengths = packed.lengths
    longest = max(lengths)
    trained = torch.is_grad_enabled() and qkv.requires_grad
    bias, radii = distance_bias(slopes, longest), [longest] * len(slopes)
    smallest = math.log(torch.finfo(slopes.dtype).tiny)
    if longest >= CUT_FROM or trained and slopes.amax() * (1 - longest) < smallest:
        radii = [min(radius, longest) for radius in head_radii(qkv.detach(), slopes, scale)]
        distance = torch.arange(1 - longest, longest, device=bias.device).abs()
        bias.masked_fill_(distance > torch.tensor(radii, device=bias.device)[:, None], NOTHING)
    arguments = (qkv, bias, scale, plan_calls(lengths, radii), packed.reversal)
    return CPUAttention.apply(*arguments) if trained else attend_by_plan(*arguments, trained=False)[0]


def distance_bias(slopes, span):
    """-slope * |distance| for the distances 1 - span to span - 1: [H, 2 * span - 1] in the dtype of `slopes` [H]."""
    return -slopes[:, None] * torch.arange(1 - span, span, device=slopes.device).abs()


def head_radii(qkv, slopes, scale):
    """Radius of each head, see bert_attention.py; in float64 the keys beyond it weigh less than 2^-53 of a row.

    Args:
        qkv: floating [T, 3, H, D].
        slopes: float32 or float64 [H].
        scale: factor of the scores.

    Returns:
        H whole numbers, or infinity where the scores are not finite.
    """
    query, key = qkv[:, :2].to(slopes.dtype).unbind(1)
    bound = abs(scale) * query.norm(dim=-1) * key.norm(dim=-1).amax(dim=0)  # [T, H]
    own = scale * (query * key).sum(dim=-1)
    tail = torch.log(2 / -torch.expm1(-slopes))
    spread = torch.minimum(bound - own + tail, 2 * bound + math.log(2)).amax(dim=0)
    bits = 53 if slopes.dtype == torch.float64 else 24
    radii = (spread + bits * math.log(2)) / slopes
    return [math.ceil(radius) if radius < math.inf else math.inf for radius in radii.tolist()]


class HeadGroup(NamedTuple):
    """Heads with one radius in sequences of equal length.

    Attributes:
        start: first token of the first sequence.
        count: sequences, one after another.
        length: tokens of each, n.
        heads: head numbers, ascending.
        radius: largest distance in tokens that they attend over; n: the whole sequence.
    """

    start: int
    count: int
    length: int
    heads: list[int]
    radius: int

    @property
    def is_whole(self):
        """Whether the heads attend to the whole sequence."""
        return self.radius >= self.length

    @property
    def selection(self):
        """Index of the heads: a slice, which selects a view (1.08 to 1.20 times as fast), where their numbers are
        evenly spaced, else the list."""
        first, step = self.heads[0], self.heads[1] - self.heads[0] if len(self.heads) > 1 else 1
        evenly = self.heads == list(range(first, first + step * len(self.heads), step))
        return slice(first, self.heads[-1] + 1, step) if evenly else self.heads

    def rows(self, tensor):
        """The group's tokens in [T, H, D], all heads: a view [count, n, H, D]."""
        tokens = tensor[self.start : self.start + self.count * self.length]
        return tokens.unflatten(0, (self.count, self.length))

    def windows(self):
        """Yield chunks of queries and the keys that they attend to: first query, last + 1, first key, last + 1."""
        chunk = WIDE_CHUNK if self.radius >= WIDE_CHUNK else BAND_CHUNK
        chunk = self.length if self.is_whole else chunk
        for start in range(0, self.length, chunk):
            end = min(start + chunk, self.length)
            yield start, end, max(0, start - self.radius), min(self.length, end + self.radius)

    def calls(self, bias):
        """Yield for each window what to take from `rows`, and its bias; queries are counted from the last one.

        Args:
            bias: `distance_bias` of all heads.

        Yields:
            The index of the queries, the index of the keys, and the bias [1, heads, queries, keys].
        """
        penalty = bias[self.selection]
        for start, end, low, high in self.windows():
            queries = slice(None), slice(self.length - end, self.length - start), self.selection
            keys = slice(None), slice(low, high), self.selection
            yield queries, keys, mask_view(penalty, start, end, low, high)


def plan_calls(lengths, radii) -> list[HeadGroup]:
    """Which heads of which sequences share a call.

    Neighbours of equal length share a call. Gathering equal lengths from elsewhere is at most 1.05 times as
    fast, and padding short texts to one call 0.4 to 0.95 times as fast.

    Args:
        lengths: tokens of each sequence.
        radii: tokens that each head attends to on either side, H integers.
    """
    plan, start = [], 0
    for length, equals in groupby(lengths):
        group = HeadGroup(start, len(list(equals)), length, list(range(len(radii))), length)
        start += group.count * length
        if length:
            plan += [group] if length < BAND_FROM else split_by_radius(group, [min(radius, length) for radius in radii])
    return plan


def split_by_radius(group, radii) -> list[HeadGroup]:
    """A group of all heads, split where that saves work into groups with similar `radii` (as for `plan_calls`)."""
    kept = sum(min(group.length, 2 * radius + BAND_CHUNK) for radius in radii) / (group.length * len(radii))
    if kept > BAND_PAYS:
        return [group]
    groups = []
    for head in sorted(group.heads, key=radii.__getitem__):
        if groups and radii[head] <= BAND_GROWTH * radii[groups[-1].heads[0]]:
            groups[-1] = groups[-1]._replace(heads=groups[-1].heads + [head], radius=radii[head])
        else:
            groups.append(group._replace(heads=[head], radius=radii[head]))
    return [group._replace(heads=sorted(group.heads)) for group in groups]


def mask_view(bias, start, end, low, high):
    """The bias of the queries from `start` to `end`, in reverse order, and the keys from `low` to `high`.

    Returns:
        [1, H, end - start, high - low], a view of `bias` [H, 2 * span - 1].
    """
    heads, width = bias.shape
    first = width // 2 + low - (end - 1)  # distance 0 is at width // 2
    strides = (0, bias.stride(0), 1, 1)
    return bias.as_strided((1, heads, end - start, high - low), strides, bias.storage_offset() + first)


def choose_kernels(dtype: torch.dtype, group: HeadGroup, trained: bool) -> tuple[Callable, Callable]:
    """The fastest kernels for a group's calls on this processor.

    - bfloat16 on AMD with avx512_bf16: matrix products by oneDNN, 2.0 to 2.2 times as fast as torch's kernel from 64 to
      512 tokens, 1.8 at 2,048; backward 2.9 times at 8 × 128, 1.8 at 4 × 512, but 0.86 at 1,024, so with a backward
      pass up to `PRODUCT_SCORES` a head only.
    - Anything else: torch's kernel. It is called by its own name, as autograd of overlapping windows would fill a zero
      tensor of full size for each; in `CPUAttention` all windows add into one gradient.

    Args:
        dtype: of query, key and value.
        group: the heads and sequences of the calls.
        trained: whether there will be a backward pass.

    Returns:
        Forward, which returns the context and the logarithms of the rows' sums (empty where backward needs none), and
        backward, which returns the gradients of query, key and value. They take the arguments of torch's kernels.

    Measurements: benchmarks/README.md.
    """
    scores = group.length**2
    fits = group.count * len(group.heads) * scores >= FEWEST_SCORES and group.length <= LONGEST_PRODUCT
    if trained:
        fits = scores <= PRODUCT_SCORES
    if dtype == torch.bfloat16 and fits and is_amd_with_bfloat16():
        return attend_by_products, products_backward
    return flash_forward, flash_backward


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
    """Forward by matrix products and softmax, in parts of bounded size; arguments as for `weights_by_products`.

    Returns:
        [B, H, n, D] in the dtype of `query`, and an empty tensor.
    """
    context = torch.empty_like(query)
    for part in product_parts(query, key):
        both = part[:2]
        weights = weights_by_products(query[part], key[both], attn_mask[:, part[1], part[2]], scale)
        context[part] = weights.to(value.dtype) @ value[both]
    return context, query.new_empty(0)


def products_backward(grad, query, key, value, context, logsumexp, dropout_p, is_causal, attn_mask, scale):
    """Backward of `attend_by_products`, for at most `PRODUCT_SCORES` scores a head.

    Args:
        grad: of the context, [B, H, n, D]. The others are those of torch's kernel; its switches must be off.

    Returns:
        Gradients of `query`, `key` and `value` in their dtype.
    """
    grads = tuple(torch.empty_like(x) for x in (query, key, value))
    for part in product_parts(query, key):
        both = part[:2]
        weights = weights_by_products(query[part], key[both], attn_mask[:, part[1], part[2]], scale)
        grad_weights = (grad[part] @ value[both].transpose(-1, -2)).float()
        grad_scores = softmax_gradient(grad_weights, weights, -1, torch.float32)
        grad_scores = grad_scores.mul_(scale).to(query.dtype)
        grads[0][part] = grad_scores @ key[both]
        grads[1][both] = grad_scores.transpose(-1, -2) @ query[part]
        grads[2][both] = weights.to(grad.dtype).transpose(-1, -2) @ grad[part]
    return grads


def attend_by_plan(qkv, bias, scale, plan, reversal, trained):
    """Compute the planned calls of attention.

    Args:
        qkv: floating [T, 3, H, D].
        bias: `distance_bias` of the longest sequence.
        scale: factor of the scores.
        plan: list of `HeadGroup`.
        reversal: int64 [T], `PackedBatch.reversal`.
        trained: whether there will be a backward pass.

    Returns:
        [T, H, D], and for each call the logarithms of the rows' sums.
    """
    query, key, value = qkv.unbind(1)
    query = query.index_select(0, reversal)
    context, sums = torch.empty_like(query), []
    for group in plan:
        q, k, v, out = (group.rows(x) for x in (query, key, value, context))
        attend, _ = choose_kernels(qkv.dtype, group, trained)
        for queries, keys, mask in group.calls(bias):
            operands = (x[part].transpose(1, 2) for x, part in ((q, queries), (k, keys), (v, keys)))
            result, lse = attend(*operands, attn_mask=mask, scale=scale)
            out[queries] = result.transpose(1, 2)
            sums.append(lse)
    return context.index_select(0, reversal), sums


class CPUAttention(torch.autograd.Function):
    """`attend_by_plan` with its gradient."""

    @staticmethod
    def forward(ctx, qkv, bias, scale, plan, reversal):
        """The arguments of `attend_by_plan`; returns [T, H, D]."""
        context, sums = attend_by_plan(qkv, bias, scale, plan, reversal, trained=True)
        ctx.save_for_backward(qkv, bias, reversal, context, *sums)
        ctx.scale, ctx.plan = scale, plan
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Gradient [T, H, D] of the context to that of `qkv`."""
        qkv, bias, reversal, context, *sums = ctx.saved_tensors
        key, value = qkv[:, 1], qkv[:, 2]
        query, context, grad = (x.index_select(0, reversal) for x in (qkv[:, 0], context, grad))
        grad_qkv, grad_query = torch.empty_like(qkv), torch.empty_like(query)
        sums = iter(sums)
        for group in ctx.plan:
            grad_out, q, k, v, out = (group.rows(x) for x in (grad, query, key, value, context))
            _, attend_back = choose_kernels(qkv.dtype, group, trained=True)
            # Windows overlap, so their sum is kept in the dtype of the bias.
            shape = (group.count, group.length, len(group.heads), qkv.shape[-1])
            grad_k, grad_v = (None, None) if group.is_whole else (k.new_zeros(shape, dtype=bias.dtype) for _ in "kv")
            for queries, keys, mask in group.calls(bias):
                operands = ((grad_out, queries), (q, queries), (k, keys), (v, keys), (out, queries))
                operands = (x[part].transpose(1, 2) for x, part in operands)
                switches = {"dropout_p": 0.0, "is_causal": False}
                results = attend_back(*operands, next(sums), attn_mask=mask, scale=ctx.scale, **switches)
                part_q, part_k, part_v = (x.transpose(1, 2) for x in results)
                group.rows(grad_query)[queries] = part_q
                if group.is_whole:
                    grad_k, grad_v = part_k, part_v
                else:
                    grad_k[keys[:2]] += part_k
                    grad_v[keys[:2]] += part_v
            for which, part in ((1, grad_k), (2, grad_v)):
                # A list of heads casts nothing.
                group.rows(grad_qkv[:, which])[:, :, group.selection] = part.to(qkv.dtype)
        grad_qkv[:, 0] = grad_query.index_select(0, reversal)
        return grad_qkv, None, None, None, None
