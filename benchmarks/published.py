"""The published MosaicBERT as a baseline: what it computes today, over the weights of our model.

Linear layers see packed tokens. Around the attention of every layer the tokens are padded and unpadded again, and
attention is matmul and softmax with a float32 bias [B, H, S, S], built each forward, in which padded keys get -10,000.
It is made of modules, as the published code is, so that both sides pay for theirs.

Letters: B batch, S padded length, T real tokens, H heads, D head size, E hidden size, F inner size, V vocabulary,
M labelled tokens.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class SelfAttention(nn.Module):
    """One projection to queries, keys and values, and padded attention by matmul and softmax."""

    def __init__(self, size, heads):
        super().__init__()
        self.heads = heads
        self.Wqkv = nn.Linear(size, 3 * size)
        self.dropout = nn.Dropout(0.0)

    def forward(self, hidden, attention_mask, indices, bias):
        """Packed [T, E] to packed [T, E]."""
        batch, length = attention_mask.shape
        size = hidden.shape[-1] // self.heads
        qkv = self.Wqkv(hidden)
        padded = qkv.new_zeros(batch * length, qkv.shape[-1]).index_copy(0, indices, qkv)
        query, key, value = padded.view(batch, length, 3, self.heads, size).permute(2, 0, 3, 1, 4)  # [B, H, S, D] each
        scores = query @ key.transpose(-1, -2) / size**0.5 + bias
        context = self.dropout(scores.softmax(dim=-1).to(value.dtype)) @ value
        context = context.transpose(1, 2).reshape(batch * length, self.heads * size)
        return context[attention_mask.flatten().nonzero().flatten()]  # the published code looks them up in each layer


class SelfOutput(nn.Module):
    """Output projection, residual, LayerNorm."""

    def __init__(self, size, eps):
        super().__init__()
        self.dense = nn.Linear(size, size)
        self.dropout = nn.Dropout(0.0)
        self.LayerNorm = nn.LayerNorm(size, eps=eps)

    def forward(self, context, residual):
        return self.LayerNorm(self.dropout(self.dense(context)) + residual)


class GatedMLP(nn.Module):
    """GeGLU feed-forward layer, residual, LayerNorm."""

    def __init__(self, size, inner, eps):
        super().__init__()
        self.gated_layers = nn.Linear(size, 2 * inner, bias=False)
        self.dropout = nn.Dropout(0.0)
        self.wo = nn.Linear(inner, size)
        self.layernorm = nn.LayerNorm(size, eps=eps)

    def forward(self, hidden):
        gate, value = self.gated_layers(hidden).chunk(2, dim=-1)
        return self.layernorm(self.wo(self.dropout(F.gelu(gate) * value)) + hidden)


class Layer(nn.Module):
    """Attention and feed-forward layer; `attention` is the class of the attention."""

    def __init__(self, size, inner, heads, eps, attention):
        super().__init__()
        self.attention = nn.Module()
        self.attention.self = attention(size, heads)
        self.attention.output = SelfOutput(size, eps)
        self.mlp = GatedMLP(size, inner, eps)

    def forward(self, hidden, *batch):
        return self.mlp(self.attention.output(self.attention.self(hidden, *batch), hidden))


class PublishedModel(nn.Module):
    """The published encoder and MLM head, without dropout.

    Args:
        state: name to floating tensor, under the checkpoints' names (with or without the prefix `bert.`). Parameters
            of a model may be handed in: they are used as they are, and gradients arrive in them.
        slopes: H floats, the ALiBi slope of each head.
        layer_norm_eps: epsilon of every LayerNorm but the head's.

    Raises:
        ValueError: weights are missing.

    Source: https://arxiv.org/abs/2312.17482 and what its released code does; the lines are ours.
    """

    attention = SelfAttention

    def __init__(self, state: dict, slopes: list, layer_norm_eps: float = 1e-12):
        super().__init__()
        state = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
        words = state["embeddings.word_embeddings.weight"]
        vocabulary, size = words.shape
        inner = state["encoder.layer.0.mlp.wo.weight"].shape[1]
        layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layer."))
        with torch.device("meta"):
            self.embeddings = nn.Module()
            self.embeddings.word_embeddings = nn.Embedding(vocabulary, size)
            types = state["embeddings.token_type_embeddings.weight"].shape[0]
            self.embeddings.token_type_embeddings = nn.Embedding(types, size)
            self.embeddings.LayerNorm = nn.LayerNorm(size, eps=layer_norm_eps)
            self.embeddings.dropout = nn.Dropout(0.0)
            self.encoder = nn.Module()
            self.encoder.layer = nn.ModuleList(
                Layer(size, inner, len(slopes), layer_norm_eps, self.attention) for _ in range(layers)
            )
            self.cls = nn.Module()
            self.cls.predictions = nn.Module()
            self.cls.predictions.transform = nn.Module()
            self.cls.predictions.transform.dense = nn.Linear(size, size)
            self.cls.predictions.transform.LayerNorm = nn.LayerNorm(size, eps=1e-12)
            self.cls.predictions.decoder = nn.Linear(size, vocabulary)
        missing, _ = self.load_state_dict({**state, "cls.predictions.decoder.weight": words}, strict=False, assign=True)
        if missing:
            raise ValueError(f"state must hold the weights of encoder and MLM head, it lacks {missing}")
        self.cls.predictions.decoder.weight = self.embeddings.word_embeddings.weight
        self.slopes = torch.tensor(slopes, device=words.device)
        self.num_layers = layers

    def bias(self, attention_mask):
        """float32 [B, H, S, S] of a mask [B, S]."""
        positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        alibi = -self.slopes[:, None, None] * (positions[:, None] - positions[None, :]).abs()
        return alibi[None] + (1.0 - attention_mask.float())[:, None, None, :] * -10_000.0

    def encode(self, input_ids, attention_mask, token_type_ids=None):
        """Hidden states of a padded batch.

        Args:
            input_ids: int64 [B, S].
            attention_mask: int64 [B, S], 1 at real tokens.
            token_type_ids: int64 [B, S]; None: 0 everywhere.

        Returns:
            Packed [T, E] and the int64 [T] indices of its rows in the flattened layout.
        """
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        embeddings = self.embeddings
        hidden = embeddings.word_embeddings(input_ids) + embeddings.token_type_embeddings(types)
        hidden = embeddings.dropout(embeddings.LayerNorm(hidden))  # [B, S, E]
        bias = self.bias(attention_mask)
        indices = attention_mask.flatten().nonzero().flatten()
        hidden = hidden.flatten(0, 1)[indices]
        for layer in self.encoder.layer[: self.num_layers]:
            hidden = layer(hidden, attention_mask, indices, bias)
        return hidden, indices

    def last_hidden_state(self, input_ids, attention_mask):
        """[B, S, E], zero at padding; arguments as in `encode`."""
        hidden, indices = self.encode(input_ids, attention_mask)
        return self.scatter(hidden, indices, input_ids.shape)

    def masked_lm(self, input_ids, attention_mask, labels=None, token_type_ids=None):
        """The loss of int64 labels [B, S] (-100 does not count; None: no loss) and the dense logits [B, S, V]."""
        hidden, indices = self.encode(input_ids, attention_mask, token_type_ids)
        if labels is None:
            return None, self.head(self.scatter(hidden, indices, input_ids.shape))
        labels = labels.flatten()[indices]
        labelled = (labels != -100).nonzero().flatten()
        logits = self.head(hidden[labelled])  # [M, V]
        loss = F.cross_entropy(logits, labels[labelled])
        return loss, self.scatter(logits, indices[labelled], input_ids.shape)

    def head(self, hidden):
        """Hidden states [..., E] to vocabulary scores [..., V]."""
        predictions = self.cls.predictions
        return predictions.decoder(predictions.transform.LayerNorm(F.gelu(predictions.transform.dense(hidden))))

    @staticmethod
    def scatter(rows, indices, shape):
        """Rows [n, ...] into the zeros of a layout [B, S, ...]."""
        flat = rows.new_zeros(shape[0] * shape[1], *rows.shape[1:]).index_copy(0, indices, rows)
        return flat.unflatten(0, tuple(shape))
