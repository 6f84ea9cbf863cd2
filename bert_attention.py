"""ALiBi slopes and the two attention functions that need plain torch only: eager and SDPA.

Both follow the contract of the backend table: `(query, key, value, packed, alibi_slopes, scale, dropout_p) -> context`.

Letters: N sequences, T tokens, H heads, D head size, M row length.
"""

import torch
import torch.nn.functional as F


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


def eager_attention(query, key, value, packed, alibi_slopes, scale, dropout_p, return_weights=False):
    """ALiBi attention by the plain formula; memory grows with M².

    Args:
        query: floating [T, H, D].
        key: like `query`.
        value: like `query`.
        packed: the `PackedBatch` that says which tokens form a sequence and where they stand.
        alibi_slopes: float32 [H], positive.
        scale: factor of the scores.
        dropout_p: probability of dropping a weight, in [0, 1).
        return_weights: also return the weights, as used (after dropout).

    Returns:
        [T, H, D] in the dtype of `query`; with `return_weights` also [N, H, M, M] in that dtype.

    Source: ours.
    """
    weights = eager_attention_weights(query, key, packed, alibi_slopes, scale)
    weights = F.dropout(weights, dropout_p, training=dropout_p > 0).to(query.dtype)
    context = packed.from_rows(torch.einsum("nhqk,nkhd->nqhd", weights, packed.to_rows(value)))
    return (context, weights) if return_weights else context


def sdpa_attention(query, key, value, packed, alibi_slopes, scale, dropout_p):
    """ALiBi attention by torch's scaled_dot_product_attention; see `eager_attention` for the arguments.

    The bias depends on i - j only. With the queries flipped, i' = n - 1 - i, it depends on i' + j, so the n × n mask
    is a strided view of 2n - 1 numbers a head, and no n × n tensor exists.

    Source: ours.
    """
    rows = packed.keeps_padding or packed.has_holes
    lengths = [packed.row_length] * packed.num_sequences if rows else packed.lengths
    if rows:
        is_token = packed.row_mask()
        query, key, value = (packed.to_rows(x).flatten(0, 1) for x in (query, key, value))
    if not len(query):
        return value
    span = max(lengths)
    steps = torch.arange(1 - span, span, device=query.device).abs()  # [2 * span - 1]
    bias = (-alibi_slopes[:, None] * steps).to(query.dtype)
    width = 2 * span - 1
    contexts = []
    # One split: the backward of a slice would add a zero [T, H, D] a sequence.
    parts = zip(*(x.split(lengths) for x in (query, key, value)))
    for number, (length, part) in enumerate(zip(lengths, parts)):
        if length:
            mask = bias.as_strided((1, bias.shape[0], length, length), (0, width, 1, 1), span - length)
            if rows:
                mask = mask.masked_fill(~is_token[number], torch.finfo(bias.dtype).min)
            q, k, v = (x.transpose(0, 1)[None] for x in part)
            q = q.flip(2)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
            contexts.append(out[0].transpose(0, 1).flip(0))
    context = torch.cat(contexts) if contexts else query
    return packed.from_rows(context.unflatten(0, (packed.num_sequences, packed.row_length))) if rows else context
