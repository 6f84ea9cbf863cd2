"""MosaicBERT: a BERT with ALiBi, gated feed-forward layers and no padding between pack and unpack.

Letters: B batch, S padded length, T real tokens, N sequences, H heads, D head size, E = H * D hidden size,
F intermediate size, V vocabulary, M labelled tokens.
"""

import inspect
import math
from dataclasses import dataclass
from typing import Callable, Optional, Union

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .bert_attention import alibi_slopes, eager_attention, is_traced, processor, sdpa_attention
from .bert_padding import PackedBatch, pack_flattened, pack_padded
from .configuration_bert import EXTRA_FIELDS, BertConfig

try:
    from .flash_attn_triton import triton_attention, triton_declines
except ImportError:
    triton_attention = triton_declines = None

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class AttentionBackend:
    """One row of the backend table: what serves a call, and what it can serve.

    Attributes:
        function: `(qkv, packed, alibi_slopes, scale, dropout_p) -> context`, [T, 3, H, D] to [T, H, D]; None when its
            package is missing.
        dtypes: dtypes of `qkv`.
        devices: device types; empty: all.
        max_head_dim: largest D; None: no limit.
        declines: `(device) -> reason or None`, asked last; None: never declines.
        returns_weights: whether it serves `output_attentions`.
    """

    function: Optional[Callable]
    dtypes: tuple
    devices: tuple = ()
    max_head_dim: Optional[int] = None
    declines: Optional[Callable] = None
    returns_weights: bool = False

    def reason_against(self, qkv: torch.Tensor) -> Optional[str]:
        """Why this row cannot serve the call, in words, or None when it can."""
        if self.function is None:
            return "its package is not installed"
        if qkv.dtype not in self.dtypes:
            return f"it supports {', '.join(str(dtype) for dtype in self.dtypes)}, got {qkv.dtype}"
        if self.devices and qkv.device.type not in self.devices:
            return f"it supports devices {', '.join(self.devices)}, got {qkv.device.type}"
        if self.max_head_dim and qkv.shape[-1] > self.max_head_dim:
            return f"it supports heads of up to {self.max_head_dim} channels, got {qkv.shape[-1]}"
        return self.declines(qkv.device) if self.declines else None


# The one table: order is preference. Attention dropout works in every row.
ATTENTION_BACKENDS = {
    "triton": AttentionBackend(triton_attention, FLOATS[:3], ("cuda",), 128, triton_declines),
    "sdpa": AttentionBackend(sdpa_attention, FLOATS),
    "eager": AttentionBackend(eager_attention, FLOATS, returns_weights=True),
}

# Decoder bias of a vocabulary slot without a token: finite in every dtype, and no softmax leaves anything of it.
DEAD_SLOT_BIAS = -10_000.0

# What the config holds when nobody asked for a backend: the first row that can serve the call.
AUTOMATIC = "auto"


def foreign_attention(*args, **kwargs):
    """Stand in the registry of transformers for a name that only MosaicBERT serves.

    Raises:
        ValueError: always; another architecture was given the name.
    """
    raise ValueError(
        f"attn_implementation must be one that this architecture has; {AUTOMATIC!r} and 'triton' are MosaicBERT's"
    )


for _name in (AUTOMATIC, "triton"):
    AttentionInterface.register(_name, foreign_attention)


def choose_attention(name: str, qkv: torch.Tensor, needs_weights: bool) -> Callable:
    """The attention function for one call.

    Args:
        name: a key of `ATTENTION_BACKENDS`, or `AUTOMATIC` for the first row that can serve.
        qkv: the tensor that the choice is made from, [T, 3, H, D].
        needs_weights: whether attention weights are to be returned, which eager alone serves.

    Returns:
        The function of a row.

    Raises:
        ValueError: `name` cannot serve this call; the message gives the reason.
    """
    if needs_weights:
        return ATTENTION_BACKENDS["eager"].function
    names = ATTENTION_BACKENDS if name == AUTOMATIC else (name,)
    for candidate in names:
        backend = ATTENTION_BACKENDS[candidate]
        reason = backend.reason_against(qkv)
        if reason is None:
            return backend.function
    raise ValueError(f"attn_implementation {candidate!r} cannot serve this call: {reason}")


class BertLayerNorm(nn.LayerNorm):
    """LayerNorm that can stay in the autocast dtype.

    Args:
        size: E.
        eps: added to the variance.
        low_precision: under autocast, compute in the autocast dtype; otherwise torch's own rule.

    Source: https://arxiv.org/abs/2312.17482, section 3.2.
    """

    def __init__(self, size: int, eps: float, low_precision: bool):
        super().__init__(size, eps=eps)
        self.low_precision = low_precision

    def forward(self, x):
        if not self.low_precision:
            return super().forward(x)
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(x)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return F.layer_norm(
                x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps
            )


def float32_product(x, weight, bias):
    """x @ weight.T + bias in float32, returned in the dtype of `x`, for processors with slow half-precision units."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def onednn_product(x, weight, bias, activation="none"):
    """activation(x @ weight.T + bias) by oneDNN, which torch asks for float32 under inductor only; `activation` may be
    `gelu`. Knows no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


class OneDNNLinear(torch.autograd.Function):
    """`onednn_product` with its gradients; second derivatives come from torch's own products.

    On AMD in float32, 1,776 rows: 1.8 to 2.3 times as fast as `F.linear`, the gradient of x 1.8 to 1.9 times, that of
    the weight 1.1 to 1.6 times.

    Source: ours.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        """[..., in], [out, in] and [out] or None to [..., out]."""
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        """Gradient [..., out] of the result to those of the three arguments."""
        x, weight = ctx.saved_tensors
        product = F.linear if torch.is_grad_enabled() else onednn_product
        rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad_rows, weight.t(), None).view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight = product(grad_rows.t(), rows.t(), None)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0)
        return grad_x, grad_weight, grad_bias


# The gated layer's output is kept below 32 MiB, as glibc maps (and the kernel clears) larger memory anew at each call:
# 1.05 times as fast at 1,776 and 2,048 tokens of base size, and no buffer of T times 2 F.
GATED_BYTES = 30 * 2**20

# Rows from which on `product_for` may choose anything but `F.linear`.
FEWEST_ROWS = 16


def product_for(dtype: torch.dtype, rows: int) -> Callable:
    """The formula of a linear layer for inference on this processor's CPU: `(x, weight, bias) -> x @ weight.T + bias`.

    - float32 on AMD, from 128 rows up: oneDNN is about 2 times as fast as `F.linear`, which asks MKL; on Intel 0.9 to
      1.05 times. In training too, see `OneDNNLinear`.
    - bfloat16 on AMD with avx512_bf16, from 16 rows up: oneDNN without the detour is 1.01 to 1.07 times as fast.
    - bfloat16 on Intel without AMX, from 80 rows up: float32 is 1.1 times as fast at 80 rows and 1.4 to 1.5 times
      from 128 (for float16 0.8 to 0.9 times).
    - Anything else: `F.linear`.

    Source: ours; measurements in benchmarks/README.md.
    """
    vendor, flags = processor()
    if vendor == "AuthenticAMD" and torch.backends.mkldnn.is_available():
        if dtype == torch.float32 and rows >= 128:
            return onednn_product
        if dtype == torch.bfloat16 and rows >= FEWEST_ROWS and "avx512_bf16" in flags:
            return onednn_product
    if dtype == torch.bfloat16 and vendor == "GenuineIntel" and rows >= 80 and "amx_tile" not in flags:
        return float32_product
    return F.linear


class BertLinear(nn.Linear):
    """nn.Linear that takes `product_for` its dtype and rows on the CPU."""

    def product(self, x):
        """The formula for `x` [..., in]."""
        if (
            is_traced()
            or x.numel() < FEWEST_ROWS * self.in_features
            or x.device.type != "cpu"
            or torch.is_autocast_enabled("cpu")
            or x.dtype != self.weight.dtype
            or type(self.weight) not in (nn.Parameter, torch.Tensor)  # quantized or distributed
        ):
            return F.linear
        product = product_for(x.dtype, x.shape[:-1].numel())
        if not torch.is_grad_enabled():
            return product
        # F.linear has gradients in every dtype, and asks oneDNN itself for bfloat16.
        return OneDNNLinear.apply if product is onednn_product and x.dtype == torch.float32 else F.linear

    def forward(self, x):
        """[..., in] to [..., out]."""
        return self.product(x)(x, self.weight, self.bias)


class BertGatedLinear(BertLinear):
    """The projection to gates and values, [..., E] to [..., 2 F], which may also multiply them."""

    def forward(self, x, gated: bool = False):
        """[..., E] to [..., 2 F], or with `gated` to gelu(gate) * value [..., F], in place where no gradient needs it.

        oneDNN is asked for gates, GELU included, and values apart: 1.03 to 1.06 times as fast from 512 rows up, 1.01 at
        64, 0.98 at 16.
        """
        product = self.product(x)
        if not gated:
            return product(x, self.weight, self.bias)
        if product is onednn_product and x.numel() >= 64 * self.in_features:
            gate, value = self.weight.chunk(2)
            return product(x, gate, None, "gelu").mul_(product(x, value, None))
        gate, value = product(x, self.weight, None).chunk(2, dim=-1)
        return F.gelu(gate) * value if torch.is_grad_enabled() or is_traced() else F.gelu(gate).mul_(value)


class BertEmbeddings(nn.Module):
    """Word and token type embeddings of packed tokens; no position embedding."""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = BertLayerNorm(config.hidden_size, config.layer_norm_eps, config.low_precision_layernorm)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, inputs_embeds, token_type_ids):
        """[T] ids or [T, E] embeddings, and [T] token types or None (all 0), to hidden states [T, E]."""
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        types = self.token_type_embeddings
        types = types.weight[0] if token_type_ids is None else types(token_type_ids)
        return self.dropout(self.LayerNorm(words + types))


class BertSelfAttention(nn.Module):
    """One fused projection to queries, keys and values, and the attention between them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scale = self.head_dim**-0.5
        self.dropout_rate = config.attention_probs_dropout_prob
        self.Wqkv = BertLinear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, hidden, packed, slopes, output_attentions):
        """[T, E] to a context [T, E] and weights [N, H, M, M] or None."""
        qkv = self.Wqkv(hidden).unflatten(-1, (3, self.num_heads, self.head_dim))
        dropout_p = self.dropout_rate if self.training else 0.0
        attend = choose_attention(self.config._attn_implementation, qkv, output_attentions)
        weights = None
        if output_attentions:
            context, weights = attend(qkv, packed, slopes, self.scale, dropout_p, return_weights=True)
        else:
            context = attend(qkv, packed, slopes, self.scale, dropout_p)
        return context.flatten(1), weights


class BertSelfOutput(nn.Module):
    """Output projection of the attention, residual, LayerNorm."""

    def __init__(self, config):
        super().__init__()
        self.dense = BertLinear(config.hidden_size, config.hidden_size)
        self.LayerNorm = BertLayerNorm(config.hidden_size, config.layer_norm_eps, config.low_precision_layernorm)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, context, residual):
        return self.LayerNorm(self.dropout(self.dense(context)) + residual)


class BertAttention(nn.Module):
    """Self-attention and its output; the names are those of the checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertSelfOutput(config)

    def forward(self, hidden, packed, slopes, output_attentions):
        context, weights = self.self(hidden, packed, slopes, output_attentions)
        return self.output(context, hidden), weights


class BertGatedMLP(nn.Module):
    """GeGLU feed-forward layer: wo(dropout(gelu(gate) * value)), residual, LayerNorm.

    Source: https://arxiv.org/abs/2002.05202, equation 6.
    """

    def __init__(self, config):
        super().__init__()
        self.inner_size = config.intermediate_size
        self.gated_layers = BertGatedLinear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.wo = BertLinear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layernorm = BertLayerNorm(config.hidden_size, config.layer_norm_eps, config.low_precision_layernorm)

    def gate(self, hidden):
        """[T, E] to gelu(gate) * value, [T, F]."""
        if isinstance(self.gated_layers, BertGatedLinear):
            return self.gated_layers(hidden, gated=True)
        gate, value = self.gated_layers(hidden).chunk(2, dim=-1)  # an adapter or a quantized layer took its place
        return F.gelu(gate) * value

    def forward(self, hidden):
        """[T, E] to [T, E]; for inference on the CPU in parts of `GATED_BYTES`."""
        if is_traced() or torch.is_grad_enabled() or hidden.device.type != "cpu":
            return self.layernorm(self.wo(self.dropout(self.gate(hidden))) + hidden)
        size = hidden.shape[0] * 2 * self.inner_size * hidden.element_size()
        rows = hidden.chunk(max(1, math.ceil(size / GATED_BYTES)))
        parts = [self.wo(self.dropout(self.gate(part))) for part in rows]
        return self.layernorm((torch.cat(parts) if len(parts) > 1 else parts[0]) + hidden)


class BertLayer(nn.Module):
    """Attention, then the gated feed-forward layer."""

    def __init__(self, config):
        super().__init__()
        self.attention = BertAttention(config)
        self.mlp = BertGatedMLP(config)

    def forward(self, hidden, packed, slopes, output_attentions):
        hidden, weights = self.attention(hidden, packed, slopes, output_attentions)
        return self.mlp(hidden), weights


class BertEncoder(nn.Module):
    """L layers over packed tokens."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(self, hidden, packed, output_hidden_states, output_attentions):
        """[T, E] to [T, E], the hidden states before and after each layer ([T, E] each) and the weights of each layer;
        None for what was not asked for."""
        precision = torch.promote_types(hidden.dtype, torch.float32)
        slopes = torch.tensor(alibi_slopes(self.num_heads), dtype=precision, device=hidden.device)
        states = (hidden,) if output_hidden_states else None
        weights = () if output_attentions else None
        for layer in self.layer:
            if self.gradient_checkpointing and self.training:
                hidden, attention = self._gradient_checkpointing_func(
                    layer.__call__, hidden, packed, slopes, output_attentions
                )
            else:
                hidden, attention = layer(hidden, packed, slopes, output_attentions)
            if output_hidden_states:
                states += (hidden,)
            if output_attentions:
                weights += (attention,)
        return hidden, states, weights


class BertPooler(nn.Module):
    """tanh of a projection of each sequence's first token."""

    def __init__(self, config):
        super().__init__()
        self.dense = BertLinear(config.hidden_size, config.hidden_size)

    def forward(self, first):
        """[N, E] to [N, E]."""
        return torch.tanh(self.dense(first))


class BertPredictionHeadTransform(nn.Module):
    """Projection, activation and LayerNorm before the decoder."""

    def __init__(self, config):
        super().__init__()
        self.dense = BertLinear(config.hidden_size, config.hidden_size)
        self.activation = activation(config.hidden_act)
        # 1e-12 whatever layer_norm_eps says: what the checkpoints were trained with.
        self.LayerNorm = BertLayerNorm(config.hidden_size, 1e-12, config.low_precision_layernorm)

    def forward(self, hidden):
        return self.LayerNorm(self.activation(self.dense(hidden)))


class BertLMPredictionHead(nn.Module):
    """Hidden states [..., E] to vocabulary scores [..., V]; the decoder's weight is the word embedding."""

    def __init__(self, config):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = BertLinear(config.hidden_size, config.vocab_size)

    def forward(self, hidden):
        return self.decoder(self.transform(hidden))


class BertOnlyMLMHead(nn.Module):
    """The MLM head under the name of the checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def forward(self, hidden):
        return self.predictions(hidden)


def activation(name: str) -> nn.Module:
    """The activation that transformers knows under `name`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in ACT2FN:
        raise ValueError(f"hidden_act must be one of {', '.join(sorted(ACT2FN))}, got {name!r}")
    return ACT2FN[name]


class BertPreTrainedModel(PreTrainedModel):
    """What all models here share: configuration, loading, saving, the choice of attention."""

    config_class = BertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["BertLayer"]
    _supports_sdpa = True

    def __init__(self, config, *inputs, **kwargs):
        for name, default in EXTRA_FIELDS.items():  # transformers' BertConfig lacks them
            if not hasattr(config, name):
                setattr(config, name, default)
        if config._attn_implementation_internal is None:
            config._attn_implementation_internal = AUTOMATIC
        super().__init__(config, *inputs, **kwargs)
        check_attention_name(config._attn_implementation)

    def set_attn_implementation(self, attn_implementation: str, **kwargs):
        """Choose the attention implementation of all layers.

        Args:
            attn_implementation: a key of `ATTENTION_BACKENDS`, or `auto`.
            **kwargs: what some releases of transformers pass along; unused.

        Raises:
            ValueError: an unknown name.
        """
        check_attention_name(attn_implementation)
        self.config._attn_implementation_internal = attn_implementation

    def as_asked(self, output, return_dict: Optional[bool]):
        """The output itself, or its tuple where `return_dict` (None: the config) says so."""
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    def refuse_flattened(self, kwargs: dict) -> None:
        """Raise ValueError when `kwargs` hold the boundaries of concatenated texts; for heads that need rows."""
        if kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError(f"cu_seq_lens_q cannot be served by {type(self).__name__}, which needs one row a text")

    def tie_weights(self, *args, **kwargs):
        """Give decoder and word embedding one tensor, whichever of the two a file holds, or both if they are equal."""
        decoder, embedding = self.get_output_embeddings(), self.get_input_embeddings()
        tied = decoder is not None and self.config.tie_word_embeddings
        # Before 5.0 an embedding whose weight is only in the file as the decoder's stays on the meta device.
        if tied and embedding.weight.is_meta and not decoder.weight.is_meta:
            embedding.weight = decoder.weight
        super().tie_weights(*args, **kwargs)
        # 5.0 leaves them apart when a file holds both keys, as every published file does. Where the two differ, the
        # decoder was trained apart (the published code lost the tie on loading), and its numbers are kept.
        if tied and not embedding.weight.is_meta and torch.equal(decoder.weight, embedding.weight):
            decoder.weight = embedding.weight

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save weights, config and code: a complete repository. Arguments are those of transformers' method."""
        self.config.auto_map = dict(AUTO_MAP)
        # 5.0 saves the LayerNorms of a loaded model as gamma and beta, which its Trainer skips when it resumes.
        if "save_original_format" in inspect.signature(PreTrainedModel.save_pretrained).parameters:
            kwargs.setdefault("save_original_format", False)
        # Sharded weights are gathered one by one, so a tied pair arrives as two equal tensors.
        weights = dict(kwargs.get("state_dict") or {})
        tied = self._tied_weights_keys if self.config.tie_word_embeddings else None
        for copy, kept in (tied or {}).items():
            if copy in weights and kept in weights and torch.equal(weights[copy], weights[kept]):
                del weights[copy]
                kwargs["state_dict"] = weights
        # FSDP gives a sharded model a class of torch's own, whose code would be saved instead of this file.
        kinds = type(self).__mro__
        if kinds[1].__name__ != "FSDPModule":
            return super().save_pretrained(save_directory, *args, **kwargs)
        self.__class__ = kinds[2]
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__class__ = kinds[0]

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """Load a checkpoint; arguments are those of transformers' method.

        Raises:
            ValueError: the checkpoint lacks weights of the embeddings or of the encoder (a head may be new).
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        encoder = ("embeddings.", "encoder.")
        missing = sorted(key for key in info["missing_keys"] if key.removeprefix("bert.").startswith(encoder))
        if missing:
            unknown = sorted(info["unexpected_keys"])
            raise ValueError(
                f"the checkpoint is no MosaicBERT or is incomplete: it lacks {len(missing)} weights of the encoder "
                f"({', '.join(missing[:8])}{', …' if len(missing) > 8 else ''})"
                + (
                    f" and holds unknown ones ({', '.join(unknown[:8])}{', …' if len(unknown) > 8 else ''})"
                    if unknown
                    else ""
                )
            )
        return (model, info) if output_loading_info else model


def check_attention_name(name: str) -> None:
    """Raise ValueError unless `name` is a key of `ATTENTION_BACKENDS` or `AUTOMATIC`."""
    known = (AUTOMATIC, *ATTENTION_BACKENDS)
    if name not in known:
        raise ValueError(f"attn_implementation must be one of {', '.join(known)}, got {name!r}")


class BertModel(BertPreTrainedModel):
    """The encoder, with a pooler on the first token.

    Args:
        config: our `BertConfig` or transformers' `BertConfig`.
        add_pooling_layer: whether there is a pooler.
    """

    def __init__(self, config, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    def encode(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        output_attentions=None,
        output_hidden_states=None,
        cu_seq_lens_q=None,
        max_length_q=None,
    ):
        """Pack, embed and run the layers; the arguments are those of `forward`.

        Returns:
            `Encoded`: the packed last hidden state, the batch, and what was asked for beyond it.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        packed = describe_batch(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, cu_seq_lens_q, max_length_q
        )
        if input_ids is not None:
            check_ids("input_ids", input_ids, self.config.vocab_size)
        if token_type_ids is not None:
            check_ids("token_type_ids", token_type_ids, self.config.type_vocab_size)
        hidden = self.embeddings(
            *(None if x is None else packed.pack(x) for x in (input_ids, inputs_embeds, token_type_ids))
        )
        hidden, states, attentions = self.encoder(hidden, packed, output_hidden_states, output_attentions)
        if states is not None:
            states = tuple(packed.unpack(state) for state in states)
        return Encoded(hidden, packed, states, attentions)

    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        cu_seq_lens_q: Optional[torch.Tensor] = None,
        max_length_q: Optional[int] = None,
        **kwargs,
    ) -> Union[tuple, BaseModelOutputWithPooling]:
        """Hidden states of a padded batch, or of sequences concatenated in one row.

        Args:
            input_ids: int64 [B, S], below `vocab_size`. Either these or `inputs_embeds`.
            attention_mask: bool, integer or float [B, S], nonzero at real tokens; holes and left padding keep the
                distances that the mask shows. None: all are real.
            token_type_ids: int64 [B, S] below `type_vocab_size`; None: 0 everywhere.
            position_ids: int64 [B, S]. ALiBi reads distances from the places themselves, so these only matter for
                one row without mask: a position that does not follow its predecessor starts a new sequence, as
                transformers' `DataCollatorWithFlattening` writes it.
            inputs_embeds: floating [B, S, E] in place of `input_ids`.
            output_attentions: also return the attention weights, [B, H, S, S] a layer; served by eager.
            output_hidden_states: also return L + 1 hidden states [B, S, E], zero at padding.
            return_dict: False returns a tuple; None: what the config says.
            cu_seq_lens_q: int32 or int64 [N + 1], where each sequence of one row [1, T] starts, then T.
            max_length_q: tokens of the longest of these; None: read from `cu_seq_lens_q`.
            **kwargs: ignored (collators pass the same boundaries under key names, for example).

        Returns:
            `BaseModelOutputWithPooling`: last_hidden_state [B, S, E], zero at padding; pooler_output [B, E] ([N, E]
            for concatenated sequences), None without a pooler.

        Raises:
            ValueError: an argument with a wrong shape, rank, or value; the message names it.

        Source: https://arxiv.org/abs/2312.17482.
        """
        encoded = self.encode(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            cu_seq_lens_q,
            max_length_q,
        )
        output = BaseModelOutputWithPooling(
            last_hidden_state=encoded.packed.unpack(encoded.hidden),
            pooler_output=None if self.pooler is None else self.pooler(encoded.first_tokens()),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return self.as_asked(output, return_dict)


@dataclass
class Encoded:
    """What the encoder hands to a head.

    Attributes:
        hidden: floating [T, E].
        packed: the batch.
        hidden_states: tuple of L + 1 padded [B, S, E], or None.
        attentions: tuple of L [N, H, M, M], or None.
    """

    hidden: torch.Tensor
    packed: PackedBatch
    hidden_states: Optional[tuple]
    attentions: Optional[tuple]

    def first_tokens(self) -> torch.Tensor:
        """Hidden state [N, E] of the first token of each sequence; zero for an empty one."""
        return self.packed.first_tokens(self.hidden)


def describe_batch(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, cu_seq_lens_q, max_length_q):
    """Check the shapes of a call's arguments (see `BertModel.forward`) and pack them.

    Returns:
        The `PackedBatch`.

    Raises:
        ValueError: both or neither of `input_ids` and `inputs_embeds`; a wrong rank or shape; boundaries that do not
            fit the tokens.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(
            "exactly one of input_ids and inputs_embeds must be given, "
            f"got {'neither' if input_ids is None else 'both'}"
        )
    name, tokens, rank = ("input_ids", input_ids, 2) if inputs_embeds is None else ("inputs_embeds", inputs_embeds, 3)
    if tokens.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions [B, S{', E' * (rank - 2)}], got {list(tokens.shape)}")
    shape = tuple(tokens.shape[:2])
    for other, tensor in (
        ("attention_mask", attention_mask),
        ("token_type_ids", token_type_ids),
        ("position_ids", position_ids),
    ):
        if tensor is not None:
            # Position ids are the same for all rows of a padded batch in stock callers.
            expected = (1, shape[1]) if other == "position_ids" and tensor.shape[0] == 1 else shape
            check_shape(other, tensor, expected)
    traced = is_traced()
    if cu_seq_lens_q is None and attention_mask is None and position_ids is not None and shape[0] == 1 and not traced:
        starts = position_ids[0, 1:] != position_ids[0, :-1] + 1
        if shape[1] and bool(starts.any()):
            starts = starts.nonzero().flatten() + 1
            cu_seq_lens_q = torch.cat((starts.new_zeros(1), starts, starts.new_full((1,), shape[1])))
    if cu_seq_lens_q is None:
        return pack_padded(attention_mask, shape, tokens.device, traced)
    if attention_mask is not None or shape[0] != 1:
        raise ValueError(
            "cu_seq_lens_q describes one row [1, T] without attention_mask, got "
            f"{'a mask' if attention_mask is not None else 'no mask'} and {name} of shape {list(tokens.shape)}"
        )
    if cu_seq_lens_q.dim() != 1 or cu_seq_lens_q.is_floating_point() or len(cu_seq_lens_q) < 1:
        raise ValueError(
            f"cu_seq_lens_q must be integers of shape [N + 1], got {cu_seq_lens_q.dtype} {list(cu_seq_lens_q.shape)}"
        )
    if cu_seq_lens_q.device.type == "cpu" and not traced:
        bounds = cu_seq_lens_q.tolist()
        if bounds[0] != 0 or bounds[-1] != shape[1] or bounds != sorted(bounds):
            raise ValueError(f"cu_seq_lens_q must rise from 0 to the {shape[1]} tokens given, got {bounds}")
        longest = max((end - start for start, end in zip(bounds, bounds[1:])), default=0)
        if max_length_q is not None and max_length_q < longest:
            raise ValueError(
                f"max_length_q must be at least the longest sequence, {longest} tokens, got {max_length_q}"
            )
    return pack_flattened(cu_seq_lens_q.to(tokens.device), max_length_q, shape[1])


def check_shape(name: str, tensor: torch.Tensor, expected: tuple) -> None:
    """Raise ValueError unless `tensor` has the `expected` shape; the message names it."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {list(expected)}, got {list(tensor.shape)}")


def check_ids(name: str, ids: torch.Tensor, size: int, ignored: Optional[int] = None) -> None:
    """Raise ValueError when a value lies outside [0, size) and is not `ignored`.

    Only on CPU, where it costs nothing against the model; a device would have to wait for the answer.

    Args:
        name: the argument to name.
        ids: integers of any shape.
        size: exclusive upper bound.
        ignored: a value that is allowed besides.
    """
    if ids.device.type != "cpu" or ids.numel() == 0 or is_traced():
        return
    low, high = ids.aminmax()
    if low >= 0 and high < size:
        return
    outside = (ids < 0) | (ids >= size)
    if ignored is not None:
        outside &= ids != ignored
    if outside.any():
        place = outside.nonzero()[0].tolist()
        raise ValueError(f"{name} must lie in [0, {size}), got {ids[tuple(place)].item()} at {place}")


def mean_loss(total: torch.Tensor, count, num_items_in_batch) -> torch.Tensor:
    """The mean that a sum of losses stands for: over the items of the whole accumulated batch where the caller counts
    them, else over `count` (an int or a tensor); 0, with a gradient, where there is no item."""
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    return total / count.clamp(min=1) if torch.is_tensor(count) else total / max(count, 1)


class CrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies of float32 logits [M, C] and int64 labels [M], -100 for none, on the CPU.

    The same numbers as `F.cross_entropy`, whose backward fills a second [M, C] with zeros and labels first; this one
    writes the gradient once, some rows at a time. Where the allocator maps large tensors anew each time, as glibc's
    does, that saves 5% of a training step of the shipped model and more on a busy machine; else it costs nothing. A
    second derivative is not defined.
    """

    BLOCK = 2**21  # numbers of the gradient that are written at a time: they stay in the cache

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        log_probabilities = F.log_softmax(logits, dim=-1)
        ctx.save_for_backward(log_probabilities, labels)
        return F.nll_loss(log_probabilities, labels, ignore_index=-100, reduction="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        log_probabilities, labels = ctx.saved_tensors
        gradient = torch.empty_like(log_probabilities)
        rows = max(1, CrossEntropy.BLOCK // gradient.shape[-1])
        for part, logs, classes in zip(gradient.split(rows), log_probabilities.split(rows), labels.split(rows)):
            torch.exp(logs, out=part)
            part[torch.arange(len(part)), classes.clamp(min=0)] -= 1
            part *= torch.where(classes == -100, 0.0, grad)[:, None]
        return gradient, None


def class_loss(logits, labels, num_items_in_batch):
    """Mean cross entropy, in float32, of logits [M, C] and int64 labels [M]; label -100 does not count."""
    check_ids("labels", labels, logits.shape[-1], ignored=-100)
    if logits.device.type == "cpu" and not is_traced():
        total = CrossEntropy.apply(logits.float(), labels)
    else:
        total = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
    return mean_loss(total, (labels != -100).sum(), num_items_in_batch)


def packed_labels(packed: PackedBatch, labels: torch.Tensor) -> torch.Tensor:
    """int64 [T] of labels [B, S]; those at padding are left out, or -100 where padding is kept."""
    check_shape("labels", labels, packed.shape)
    labels = packed.pack(labels)
    return labels.masked_fill(~packed.key_mask.flatten(), -100) if packed.keeps_padding else labels


class BertForMaskedLM(BertPreTrainedModel):
    """MosaicBERT with the masked language model head."""

    # The keys alone are what releases before 5.0 read.
    _tied_weights_keys = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value):
        self.cls.predictions.decoder = value

    @torch.no_grad()
    def silence_dead_slots(self, num_tokens: int) -> None:
        """Make sure that vocabulary slots without a token are never predicted.

        The bias of a dead slot becomes -10,000: its probability is zero in every dtype, and so is its gradient.

        Args:
            num_tokens: entries of the tokenizer's vocabulary; slots from here to `vocab_size` are dead.

        Raises:
            ValueError: there are more tokens than slots.
        """
        bias = self.cls.predictions.decoder.bias
        if not 0 < num_tokens <= len(bias):
            raise ValueError(f"num_tokens must lie in [1, {len(bias)}], the model's vocabulary, got {num_tokens}")
        bias[num_tokens:] = DEAD_SLOT_BIAS

    def resize_token_embeddings(
        self, new_num_tokens: Optional[int] = None, pad_to_multiple_of: Optional[int] = None, *args, **kwargs
    ) -> nn.Embedding:
        """Change the vocabulary; slots that padding adds are dead, and dead slots that become tokens start as new ones.

        Args:
            new_num_tokens: entries of the tokenizer's vocabulary; None: as many as there are.
            pad_to_multiple_of: the vocabulary size becomes a multiple of this; None: no dead slots.
            *args, **kwargs: see transformers' method.

        Returns:
            The word embedding.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return super().resize_token_embeddings()
        # Half way to the dead bias: a low precision rounds it.
        num_tokens = int((self.cls.predictions.decoder.bias > DEAD_SLOT_BIAS / 2).nonzero().max()) + 1
        if num_tokens < self.config.vocab_size:  # transformers draws new rows from all old ones: dead ones go first
            super().resize_token_embeddings(num_tokens)
        num_tokens = num_tokens if new_num_tokens is None else new_num_tokens
        embeddings = super().resize_token_embeddings(num_tokens, pad_to_multiple_of, *args, **kwargs)
        self.silence_dead_slots(num_tokens)
        return embeddings

    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        labels: Optional[torch.Tensor] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        num_items_in_batch=None,
        cu_seq_lens_q: Optional[torch.Tensor] = None,
        max_length_q: Optional[int] = None,
        **kwargs,
    ) -> Union[tuple, MaskedLMOutput]:
        """Vocabulary scores of every token, or of the labelled tokens and their loss.

        Args:
            labels: int64 [B, S]; -100 and any label at padding do not count.
            num_items_in_batch: int or integer tensor; divide the summed loss by this instead of by the labels here,
                as `Trainer` asks under gradient accumulation.
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
                output_hidden_states, return_dict, cu_seq_lens_q, max_length_q, **kwargs: see `BertModel.forward`.

        Returns:
            `MaskedLMOutput`: loss, mean cross entropy over the labels (float32; 0 without any label); logits
            [B, S, V], zero at padding and, where labels are given, at every place without label. With
            `config.sparse_prediction` and labels: logits [M, V] of the M labelled tokens.

        Raises:
            ValueError: see `BertModel.forward`; labels of another shape or outside the vocabulary.
        """
        encoded = self.bert.encode(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            cu_seq_lens_q,
            max_length_q,
        )
        hidden, packed = encoded.hidden, encoded.packed
        loss = None
        if labels is None:
            logits = packed.unpack(self.cls(hidden))
        else:
            labels = packed_labels(packed, labels)
            if is_traced():  # the number of labels is data
                logits = self.cls(hidden)
                loss = class_loss(logits, labels, num_items_in_batch)
                logits = packed.unpack(logits.masked_fill((labels == -100)[:, None], 0))
            else:
                places = (labels != -100).nonzero().flatten()
                logits = self.cls(hidden[places])  # [M, V]
                loss = class_loss(logits, labels[places], num_items_in_batch)
                if not self.config.sparse_prediction:
                    everywhere = logits.new_zeros(len(labels), logits.shape[-1])
                    logits = packed.unpack(everywhere.index_copy(0, places, logits))
        output = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )
        return self.as_asked(output, return_dict)


class BertForSequenceClassification(BertPreTrainedModel):
    """MosaicBERT with a classifier or regressor on the pooled first token."""

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        labels: Optional[torch.Tensor] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        num_items_in_batch=None,
        cu_seq_lens_q: Optional[torch.Tensor] = None,
        max_length_q: Optional[int] = None,
        **kwargs,
    ) -> Union[tuple, SequenceClassifierOutput]:
        """Scores of each sequence.

        Args:
            labels: by `config.problem_type`: int64 [B] for single_label_classification (-100 does not count);
                floating [B, num_labels] of 0 and 1 for multi_label_classification; floating [B] or [B, num_labels]
                for regression. Where the config names none: regression for one label, single label for integers,
                multi label otherwise.
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
                output_hidden_states, return_dict, num_items_in_batch, cu_seq_lens_q, max_length_q, **kwargs: see
                `BertForMaskedLM.forward`.

        Returns:
            `SequenceClassifierOutput`: loss (float32 mean); logits [B, num_labels] ([N, num_labels] for concatenated
            sequences).

        Raises:
            ValueError: see `BertModel.forward`; labels of another shape, or an unknown `problem_type`.
        """
        encoded = self.bert.encode(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            cu_seq_lens_q,
            max_length_q,
        )
        logits = self.classifier(self.dropout(self.bert.pooler(encoded.first_tokens())))
        loss = None
        if labels is not None:
            loss = sequence_loss(logits, labels, self.config.problem_type, num_items_in_batch)
        output = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )
        return self.as_asked(output, return_dict)


def classifier_dropout(config) -> float:
    """Dropout rate before a classifier."""
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


def sequence_loss(logits, labels, problem_type: Optional[str], num_items_in_batch):
    """Loss of logits [N, C]; `BertForSequenceClassification.forward` says what the labels are for each problem type."""
    if problem_type is None:
        integers = not labels.is_floating_point()
        problem_type = (
            "regression"
            if logits.shape[-1] == 1
            else "single_label_classification"
            if integers
            else "multi_label_classification"
        )
    if problem_type == "single_label_classification":
        check_shape("labels", labels, logits.shape[:1])
        return class_loss(logits, labels, num_items_in_batch)
    if problem_type not in ("regression", "multi_label_classification"):
        raise ValueError(
            "problem_type must be regression, single_label_classification or multi_label_classification, "
            f"got {problem_type!r}"
        )
    if logits.shape[-1] == 1 and labels.dim() == 1:
        labels = labels[:, None]
    check_shape("labels", labels, logits.shape)
    formula = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    total = formula(logits.float(), labels.float(), reduction="sum")
    return mean_loss(total, labels.numel(), num_items_in_batch)


class BertForTokenClassification(BertPreTrainedModel):
    """MosaicBERT with a classifier on every token."""

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        labels: Optional[torch.Tensor] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        num_items_in_batch=None,
        cu_seq_lens_q: Optional[torch.Tensor] = None,
        max_length_q: Optional[int] = None,
        **kwargs,
    ) -> Union[tuple, TokenClassifierOutput]:
        """Scores of each token.

        Args:
            labels: int64 [B, S] below `num_labels`; -100 and any label at padding do not count.
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
                output_hidden_states, return_dict, num_items_in_batch, cu_seq_lens_q, max_length_q, **kwargs: see
                `BertForMaskedLM.forward`.

        Returns:
            `TokenClassifierOutput`: loss (float32 mean); logits [B, S, num_labels], zero at padding.

        Raises:
            ValueError: see `BertModel.forward`; labels of another shape.
        """
        encoded = self.bert.encode(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            cu_seq_lens_q,
            max_length_q,
        )
        packed = encoded.packed
        logits = self.classifier(self.dropout(encoded.hidden))
        loss = None if labels is None else class_loss(logits, packed_labels(packed, labels), num_items_in_batch)
        output = TokenClassifierOutput(
            loss=loss,
            logits=packed.unpack(logits),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return self.as_asked(output, return_dict)


class BertForQuestionAnswering(BertPreTrainedModel):
    """MosaicBERT with scores for the first and the last token of an answer."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        start_positions: Optional[torch.Tensor] = None,
        end_positions: Optional[torch.Tensor] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        num_items_in_batch=None,
        **kwargs,
    ) -> Union[tuple, QuestionAnsweringModelOutput]:
        """Scores of each place as start and as end of the answer.

        Args:
            start_positions: int64 [B], the place of the answer's first token; a place outside the S given does not
                count (the answer was cut off).
            end_positions: int64 [B], its last token, likewise.
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
                output_hidden_states, return_dict, num_items_in_batch, **kwargs: see `BertForMaskedLM.forward`.

        Returns:
            `QuestionAnsweringModelOutput`: loss, the mean of both cross entropies (float32); start_logits and
            end_logits [B, S], the lowest number of their dtype at padding.

        Raises:
            ValueError: see `BertModel.forward`; only one of the positions, or one of another shape.
        """
        if (start_positions is None) != (end_positions is None):
            given = "start_positions" if end_positions is None else "end_positions"
            raise ValueError(f"start_positions and end_positions must be given together, got {given} only")
        self.refuse_flattened(kwargs)
        encoded = self.bert.encode(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
        )
        packed = encoded.packed
        logits = packed.unpack(self.qa_outputs(encoded.hidden))  # [B, S, 2]
        if attention_mask is not None:
            logits = logits.masked_fill((attention_mask == 0)[..., None], torch.finfo(logits.dtype).min)
        start_logits, end_logits = logits.unbind(-1)
        loss = None
        if start_positions is not None:
            losses = []
            for name, scores, places in (
                ("start_positions", start_logits, start_positions),
                ("end_positions", end_logits, end_positions),
            ):
                check_shape(name, places, scores.shape[:1])
                outside = (places < 0) | (places >= scores.shape[1])
                losses.append(class_loss(scores, places.masked_fill(outside, -100), num_items_in_batch))
            loss = sum(losses) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return self.as_asked(output, return_dict)


class BertForMultipleChoice(BertPreTrainedModel):
    """MosaicBERT that scores each of several continuations."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        labels: Optional[torch.Tensor] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        num_items_in_batch=None,
        **kwargs,
    ) -> Union[tuple, MultipleChoiceModelOutput]:
        """Scores of the choices of each question.

        Args:
            input_ids: int64 [B, C, S], C choices a question; likewise [B, C, S] for attention_mask, token_type_ids
                and position_ids, and [B, C, S, E] for inputs_embeds.
            labels: int64 [B], the right choice, below C; -100 does not count.
            attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions, output_hidden_states,
                return_dict, num_items_in_batch, **kwargs: see `BertForMaskedLM.forward`; hidden states and attention
                weights are those of the B * C rows.

        Returns:
            `MultipleChoiceModelOutput`: loss (float32 mean); logits [B, C].

        Raises:
            ValueError: see `BertModel.forward`; input of another rank, labels of another shape.
        """
        self.refuse_flattened(kwargs)
        name, tokens = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
        rank = 3 if inputs_embeds is None else 4
        if tokens is not None and tokens.dim() != rank:
            raise ValueError(f"{name} must have {rank} dimensions [B, C, S, …], got {list(tokens.shape)}")
        rows = (
            None if x is None else x.flatten(0, 1)
            for x in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        encoded = self.bert.encode(*rows, output_attentions, output_hidden_states)
        scores = self.classifier(self.dropout(self.bert.pooler(encoded.first_tokens())))  # [B * C, 1]
        logits = scores.view(tokens.shape[:2])
        loss = None
        if labels is not None:
            check_shape("labels", labels, logits.shape[:1])
            loss = class_loss(logits, labels, num_items_in_batch)
        output = MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )
        return self.as_asked(output, return_dict)


# What a saved model's config says about its code, whatever it was loaded from.
AUTO_CLASSES = {
    "AutoModel": BertModel,
    "AutoModelForMaskedLM": BertForMaskedLM,
    "AutoModelForSequenceClassification": BertForSequenceClassification,
    "AutoModelForTokenClassification": BertForTokenClassification,
    "AutoModelForQuestionAnswering": BertForQuestionAnswering,
    "AutoModelForMultipleChoice": BertForMultipleChoice,
}
AUTO_MAP = {"AutoConfig": "configuration_bert.BertConfig"} | {
    name: f"bert_layers.{model.__name__}" for name, model in AUTO_CLASSES.items()
}

BertConfig.register_for_auto_class()
for _name, _model in AUTO_CLASSES.items():
    _model.register_for_auto_class(_name)
