"""The judge of numbers: MosaicBERT in float64, one sequence, one head, one query at a time.

Imports torch and einops only and shares nothing with the package. Slow on purpose. Every function is differentiable,
so gradients come from autograd.

Letters: B batch, S padded length, T tokens, H heads, D head size, E hidden size.
"""

import math

import torch
from einops import rearrange


def alibi_slopes(num_heads):
    """Slopes of `num_heads` heads, a list of floats, steepest first within each geometric series."""
    power = 1
    while power * 2 <= num_heads:
        power *= 2
    first = [2.0 ** (-8.0 * n / power) for n in range(1, power + 1)]
    between = [2.0 ** (-8.0 * n / (2 * power)) for n in range(1, 2 * power + 1, 2)]
    return (first + between)[:num_heads]


def attention_weights(query, key, query_positions, key_positions, slope, scale):
    """Softmax weights of one head, float64 [queries, keys], one query at a time."""
    rows = []
    for position, vector in zip(query_positions, query):
        distance = (key_positions - position).abs().double()
        rows.append(torch.softmax((key * vector).sum(-1) * scale - slope * distance, dim=-1))
    return torch.stack(rows)


def attention(query, key, value, cu_seqlens, positions=None, slopes=None, scale=None, keep=None, dropout_p=0.0):
    """ALiBi attention over packed sequences.

    Args:
        query, key, value: [T, H, D], any float dtype; computed in float64.
        cu_seqlens: N + 1 integers, the start of each sequence, then T.
        positions: T integers, the column of each token in its padded row; None counts from the start of the sequence.
        slopes: H floats; None takes those of `alibi_slopes`.
        scale: float; None is 1 / sqrt(D).
        keep: bool [N, H, M, M] by sequence, head, query and key number, False where dropout drops a weight; or None.
        dropout_p: probability that made `keep`.

    Returns:
        float64 [T, H, D].
    """
    query, key, value = query.double(), key.double(), value.double()
    total, heads, size = query.shape
    slopes = alibi_slopes(heads) if slopes is None else [float(slope) for slope in slopes]
    scale = 1 / math.sqrt(size) if scale is None else scale
    bounds = [int(bound) for bound in cu_seqlens]
    assert bounds[0] == 0 and bounds[-1] == total
    parts = []
    for sequence, (start, end) in enumerate(zip(bounds, bounds[1:])):
        if start == end:
            continue
        columns = torch.arange(end - start) if positions is None else torch.as_tensor(positions)[start:end].cpu()
        columns = columns.to(query.device)
        contexts = []
        for head in range(heads):
            weights = attention_weights(
                query[start:end, head], key[start:end, head], columns, columns, slopes[head], scale
            )
            if keep is not None:
                kept = keep[sequence, head, : end - start, : end - start].double()
                weights = weights * kept / (1 - dropout_p)
            contexts.append(weights @ value[start:end, head])
        parts.append(torch.stack(contexts, dim=1))
    return torch.cat(parts) if parts else query * 0.0


def layer_norm(x, weight, bias, eps):
    """LayerNorm over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * weight + bias


def gelu(x):
    """The exact GELU: x times the normal distribution function."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


class Model:
    """MosaicBERT from a state dict, one row at a time.

    Args:
        state: checkpoint tensors under the published names; converted to float64. Pass leaf tensors that require a
            gradient to differentiate.
        config: dict with the published config fields.
    """

    def __init__(self, state, config):
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.config = config
        self.prefix = "bert." if any(name.startswith("bert.") for name in state) else ""

    def weight(self, name):
        return self.state[self.prefix + name]

    def linear(self, x, name, bias=True):
        y = x @ self.weight(name + ".weight").T
        return y + self.weight(name + ".bias") if bias else y

    def norm(self, x, name):
        eps = self.config.get("layer_norm_eps", 1e-12)
        return layer_norm(x, self.weight(name + ".weight"), self.weight(name + ".bias"), eps)

    def row(self, input_ids, positions, token_types):
        """Hidden states of one row of real tokens: a list of layers + 1 float64 [T, E]."""
        heads = self.config["num_attention_heads"]
        hidden = self.weight("embeddings.word_embeddings.weight")[input_ids]
        hidden = hidden + self.weight("embeddings.token_type_embeddings.weight")[token_types]
        hidden = self.norm(hidden, "embeddings.LayerNorm")
        states = [hidden]
        for number in range(self.config["num_hidden_layers"]):
            at = f"encoder.layer.{number}."
            query, key, value = rearrange(
                self.linear(hidden, at + "attention.self.Wqkv"), "t (three h d) -> three t h d", three=3, h=heads
            )
            context = attention(query, key, value, [0, len(input_ids)], positions)
            attended = self.linear(rearrange(context, "t h d -> t (h d)"), at + "attention.output.dense")
            hidden = self.norm(attended + hidden, at + "attention.output.LayerNorm")
            gate, linear = self.linear(hidden, at + "mlp.gated_layers", bias=False).chunk(2, dim=-1)
            forward = self.linear(gelu(gate) * linear, at + "mlp.wo")
            hidden = self.norm(forward + hidden, at + "mlp.layernorm")
            states.append(hidden)
        return states

    def hidden_states(self, input_ids, attention_mask=None, token_type_ids=None):
        """Hidden states of a padded batch: a list of layers + 1 float64 [B, S, E], zero at padding."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        layers = self.config["num_hidden_layers"] + 1
        width = self.weight("embeddings.LayerNorm.weight").shape[0]
        rows = []
        for ids, keep, kinds in zip(input_ids, mask.bool(), types):
            columns = keep.nonzero().flatten()
            padded = [torch.zeros(len(ids), width, dtype=torch.float64) for _ in range(layers)]
            if len(columns):
                states = self.row(ids[columns], columns, kinds[columns])
                padded = [empty.index_put((columns,), state) for empty, state in zip(padded, states)]
            rows.append(torch.stack(padded))
        return list(torch.stack(rows, dim=1))

    def pooled(self, hidden, attention_mask):
        """tanh of the pooler on the first real token of each row: float64 [B, E] of hidden [B, S, E]."""
        first = attention_mask.bool().long().argmax(dim=1)
        return torch.tanh(self.linear(hidden[torch.arange(len(hidden)), first], "pooler.dense"))
