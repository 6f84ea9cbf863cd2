"""ALiBi slopes and bias, and the two attention functions for any device: eager and SDPA.

Both follow the contract of the backend table: `(qkv, packed, alibi_slopes, scale, dropout_p) -> context`.

**Radius.** Keys far from a query have a negligible weight, so the backends for GPUs and for long sequences on the CPU
leave them out. Let C = |scale| * |q_i| * max|k|, which bounds the absolute value of query i's scores before their bias
(Cauchy-Schwarz), and `own` = scale * q_i.k_i, its score with its own key, at distance 0. As a share of the row's sum,
all keys beyond distance r weigh at most each of these two:

- 2 * exp(C - own - slope * r) / (1 - exp(-slope)). A key at distance d scores at most C - slope * d, each distance
  occurs at most twice, and the row weighs at least exp(own).
- 2 * exp(2 * C - slope * r). No score is below -C before its bias, and as a key r tokens nearer is at least r positions
  nearer, the keys beyond r are at most the share exp(-slope * r) of those on their side of the query, which are all in
  the row. (The 2 is for a key in the backward pass, which gathers from two sides. The bound does not hold where keys
  are masked: the nearer key may be one of them.)

The smaller one is 2^-24, half a unit in the last place of a float32 sum, at
r = min(C - own + 24 ln 2 + ln(2 / (1 - exp(-slope))), 2 * C + 25 ln 2) / slope.
Distances are symmetric and each key meets each distance at most twice as well, so the largest r of all queries also
bounds what a key gathers in the backward pass. Where a mask has holes, distances in positions are at least distances in
token numbers, and r stays valid when it is counted in tokens.

Letters: N rows, R row length, T tokens, H heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .bert_checks import is_traced

# Scores in one SDPA call, heads and rows together, which bounds the memory of the bias: 16 MiB in float32 on the CPU;
# elsewhere 128 MiB in bfloat16, since a card needs larger calls to be busy.
CPU_CHUNK_SCORES = 2**22
CHUNK_SCORES = 2**26


def alibi_slopes(num_heads: int) -> list[float]:
    """Slope of each head's distance penalty: H positive floats for H heads, at least one.

    For a power of two, the geometric series from 2^(-8/H) to 2^-8; otherwise the slopes of the largest power of two P
    below H, followed by every second slope of 2P.

    Source: https://arxiv.org/abs/2108.12409, section 3; beyond powers of two the authors' released code.
    """
    power = 1 << (num_heads.bit_length() - 1)
    series = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    between = [2.0 ** (-4.0 * (2 * head + 1) / power) for head in range(num_heads - power)]
    return series + between


# Slopes on accelerators, by number of heads, dtype and device; copying them there would wait for all queued work.
_KEPT_SLOPES = {}


def slopes_on(device: torch.device, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """`alibi_slopes` as a tensor [H], made once per accelerator."""
    key = (num_heads, dtype, device)
    if key in _KEPT_SLOPES and not is_traced():
        return _KEPT_SLOPES[key]
    with torch.inference_mode(False):  # a tensor made under inference mode could not be saved for a backward pass
        slopes = torch.tensor(alibi_slopes(num_heads), dtype=dtype, device=device)
    if type(slopes) is torch.Tensor and device.type not in ("cpu", "meta") and not is_traced():
        _KEPT_SLOPES[key] = slopes
    return slopes


def alibi_bias(slopes, queries, keys):
    """-slope * |i - j|, [H, queries, keys] in the dtype of `slopes` [H], for integer positions of queries and keys."""
    return -slopes[:, None, None] * (queries[:, None] - keys[None, :]).abs()


def eager_attention(qkv, packed, alibi_slopes, scale, dropout_p, return_weights=False):
    """ALiBi attention as the paper writes it; memory grows with R².

    Args:
        qkv: floating [T, 3, H, D]: query, key and value of each token.
        packed: the `PackedBatch` that says which tokens form a sequence, and their positions.
        alibi_slopes: float32 or float64 [H], positive.
        scale: factor of the scores, 1 / sqrt(D) in every published checkpoint.
        dropout_p: probability of dropping a weight, in [0, 1).
        return_weights: also return the weights, as used (after dropout).

    Returns:
        [T, H, D] in the dtype of `qkv`; with `return_weights` also [N, H, R, R] in that dtype, zero where the query or
        the key is not a token.

    Source: https://arxiv.org/abs/2108.12409, section 3, made symmetric.
    """
    query, key, value = packed.to_rows(qkv).unbind(2)  # [N, R, H, D] each
    precision = torch.promote_types(qkv.dtype, torch.float32)
    scores = torch.einsum("nqhd,nkhd->nhqk", query.to(precision), key.to(precision)) * scale
    positions = torch.arange(scores.shape[-1], device=qkv.device)
    scores = scores + alibi_bias(alibi_slopes.to(precision), positions, positions)
    attended = packed.attended(0, scores.shape[-1])  # [N, 1 or R, R]
    if attended is None:
        weights = scores.softmax(dim=-1)
    else:
        weights = scores.masked_fill(~attended[:, None], float("-inf")).softmax(dim=-1)
        if (tokens := packed.token_mask()) is not None:
            attended = attended & tokens[:, :, None]
        # The softmax of a row without any token is NaN; this clears it as well.
        weights = weights.masked_fill(~attended[:, None], 0.0)
    weights = F.dropout(weights, dropout_p, training=dropout_p > 0).to(qkv.dtype)
    context = packed.from_rows(torch.einsum("nhqk,nkhd->nqhd", weights, value))
    return (context, weights) if return_weights else context


def sdpa_attention(qkv, packed, alibi_slopes, scale, dropout_p):
    """ALiBi attention by torch's scaled_dot_product_attention (SDPA) over padded rows.

    The bias is written out for some queries of all rows at a time, and again in the backward pass, so memory is linear
    in R. Where padding is kept, no shape may depend on data: there is one call, and its bias grows with R².

    Args and returns: see `eager_attention`.
    """
    if not packed.keeps_padding and not len(qkv):
        return qkv[:, 0]
    query, key, value = (x.transpose(1, 2) for x in packed.to_rows(qkv).unbind(2))  # [N, H, R, D] each
    num_rows, heads, length, _ = query.shape
    slopes = alibi_slopes.to(torch.promote_types(qkv.dtype, torch.float32))
    positions = torch.arange(length, device=qkv.device)

    def attend(query, key, value, start, end):
        bias = alibi_bias(slopes, positions[start:end], positions).to(query.dtype)[None]  # [1, H, end - start, R]
        if (attended := packed.attended(start, end)) is not None:
            # A query without any key attends to all of them, since its softmax would be NaN.
            attended = attended | ~attended.any(dim=-1, keepdim=True)
            bias = bias.masked_fill(~attended[:, None], float("-inf"))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout_p, scale=scale)

    if packed.keeps_padding:
        context = attend(query, key, value, 0, length)
    else:
        scores = CPU_CHUNK_SCORES if qkv.device.type == "cpu" else CHUNK_SCORES
        chunk = max(1, scores // (num_rows * heads * length))
        trained = torch.is_grad_enabled() and qkv.requires_grad
        contexts, start = [], 0
        for part in query.split(chunk, dim=2):
            arguments = (part, key, value, start, start + part.shape[2])
            contexts.append(checkpoint(attend, *arguments, use_reentrant=False) if trained else attend(*arguments))
            start += part.shape[2]
        context = torch.cat(contexts, dim=2)
    return packed.from_rows(context.transpose(1, 2))
