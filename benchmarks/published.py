"""The published formula as a baseline: what the published MosaicBERT computes today, over the weights of our model.

Linear layers see packed tokens. Around the attention of every layer the tokens are padded and unpadded again, and
attention is matmul and softmax with a float32 bias [B, H, S, S], built each forward, in which padded keys get -10,000.

Letters: B batch, S padded length, T real tokens, H heads, D head size, E hidden size, V vocabulary, M labelled tokens.
"""

import torch
import torch.nn.functional as F


class PublishedModel:
    """The published encoder and MLM head, without dropout.

    Args:
        state: name to floating tensor, under the checkpoints' names (with or without the prefix `bert.`). Parameters
            of a model may be handed in: gradients then arrive in them.
        slopes: H floats, the ALiBi slope of each head.
        layer_norm_eps: epsilon of every LayerNorm but the head's.

    Source: https://arxiv.org/abs/2312.17482 and what its released code does; the lines are ours.
    """

    def __init__(self, state: dict, slopes: list, layer_norm_eps: float = 1e-12):
        self.state = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
        self.slopes = torch.tensor(slopes, device=next(iter(state.values())).device)
        self.num_layers = 1 + max(int(name.split(".")[2]) for name in self.state if name.startswith("encoder.layer."))
        self.eps = layer_norm_eps

    def linear(self, x, name):
        return F.linear(x, self.state[name + ".weight"], self.state.get(name + ".bias"))

    def norm(self, x, name, eps=None):
        weight, bias = self.state[name + ".weight"], self.state[name + ".bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self.eps if eps is None else eps)

    def bias(self, attention_mask):
        """float32 [B, H, S, S] of a mask [B, S]."""
        place = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        alibi = -self.slopes[:, None, None] * (place[:, None] - place[None, :]).abs()
        return alibi[None] + (1.0 - attention_mask.float())[:, None, None, :] * -10_000.0

    def attention(self, hidden, attention_mask, places, bias, at):
        """Packed [T, E] to packed [T, E]."""
        batch, length = attention_mask.shape
        heads, size = len(self.slopes), hidden.shape[-1] // len(self.slopes)
        qkv = self.linear(hidden, at + "attention.self.Wqkv")
        padded = qkv.new_zeros(batch * length, qkv.shape[-1]).index_copy(0, places, qkv)
        query, key, value = padded.view(batch, length, 3, heads, size).permute(2, 0, 3, 1, 4)  # [B, H, S, D] each
        scores = query @ key.transpose(-1, -2) / size**0.5 + bias
        context = scores.softmax(dim=-1).to(value.dtype) @ value
        context = context.transpose(1, 2).reshape(batch * length, heads * size)
        return context[attention_mask.flatten().nonzero().flatten()]  # the published code looks them up in each layer

    def encode(self, input_ids, attention_mask, token_type_ids=None):
        """Hidden states of a padded batch.

        Args:
            input_ids: int64 [B, S].
            attention_mask: int64 [B, S], 1 at real tokens.
            token_type_ids: int64 [B, S]; None: 0 everywhere.

        Returns:
            Packed [T, E] and the int64 [T] places of its rows in the flattened layout.
        """
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        hidden = F.embedding(input_ids, self.state["embeddings.word_embeddings.weight"])
        hidden = hidden + F.embedding(types, self.state["embeddings.token_type_embeddings.weight"])
        hidden = self.norm(hidden, "embeddings.LayerNorm")  # [B, S, E]
        bias = self.bias(attention_mask)
        places = attention_mask.flatten().nonzero().flatten()
        hidden = hidden.flatten(0, 1)[places]
        for number in range(self.num_layers):
            at = f"encoder.layer.{number}."
            context = self.attention(hidden, attention_mask, places, bias, at)
            attended = self.linear(context, at + "attention.output.dense") + hidden
            hidden = self.norm(attended, at + "attention.output.LayerNorm")
            gate, value = self.linear(hidden, at + "mlp.gated_layers").chunk(2, dim=-1)
            hidden = self.norm(self.linear(F.gelu(gate) * value, at + "mlp.wo") + hidden, at + "mlp.layernorm")
        return hidden, places

    def last_hidden_state(self, input_ids, attention_mask):
        """[B, S, E], zero at padding; arguments as in `encode`."""
        hidden, places = self.encode(input_ids, attention_mask)
        return self.scatter(hidden, places, input_ids.shape)

    def masked_lm(self, input_ids, attention_mask, labels=None, token_type_ids=None):
        """The loss of int64 labels [B, S] (-100 does not count; None: no loss) and the dense logits [B, S, V]."""
        hidden, places = self.encode(input_ids, attention_mask, token_type_ids)
        if labels is None:
            return None, self.head(self.scatter(hidden, places, input_ids.shape))
        labels = labels.flatten()[places]
        labelled = (labels != -100).nonzero().flatten()
        logits = self.head(hidden[labelled])  # [M, V]
        loss = F.cross_entropy(logits, labels[labelled])
        return loss, self.scatter(logits, places[labelled], input_ids.shape)

    def head(self, hidden):
        """Hidden states [..., E] to vocabulary scores [..., V]."""
        at = "cls.predictions."
        hidden = self.norm(F.gelu(self.linear(hidden, at + "transform.dense")), at + "transform.LayerNorm", 1e-12)
        return F.linear(hidden, self.state["embeddings.word_embeddings.weight"], self.state[at + "decoder.bias"])

    @staticmethod
    def scatter(rows, places, shape):
        """Rows [n, ...] into the zeros of a layout [B, S, ...]."""
        flat = rows.new_zeros(shape[0] * shape[1], *rows.shape[1:]).index_copy(0, places, rows)
        return flat.unflatten(0, tuple(shape))
