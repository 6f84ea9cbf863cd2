"""MosaicBERT: a BERT with ALiBi, gated feed-forward layers and no padding between pack and unpack.

    input_ids [B, S] -> pack -> embed [T, E] -> L x (attention, GeGLU) [T, E] -> head -> unpack what was asked for

The hub: tables of backends, modules in execution order, models and heads. It imports every other file directly:

    configuration_bert.py   fields and their checks
    bert_checks.py          checks that several files share
    bert_padding.py         validate a call's inputs and describe the batch, pack and unpack
    bert_attention.py       ALiBi; eager and SDPA attention, for any device
    bert_attention_cpu.py   attention on the CPU without a tensor of S x S
    bert_linear_cpu.py      faster linear layers on the CPU
    bert_loss.py            losses of the heads
    bert_compat.py          loading, tying and saving across releases of transformers
    flash_attn_triton.py    attention kernels in Triton
    geglu_triton.py         GeGLU as one kernel
    layer_norm_triton.py    residual, dropout and LayerNorm as one kernel
    launch_triton.py        starts Triton kernels, and tells where they can run

Letters: B batch, S padded length, T real tokens, N sequences, H heads, D head size, E = H * D hidden size,
F intermediate size, V vocabulary, M labelled tokens, R row length, C choices. Where padding is kept (see
`PackedBatch`), packed tensors are [B, S, ...] instead of [T, ...].
"""

from dataclasses import dataclass
from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from .bert_attention import eager_attention, sdpa_attention, slopes_on
from .bert_attention_cpu import cpu_attention, cpu_declines
from .bert_checks import assert_on_device, check_ids, check_shape, check_tensor, is_plain, is_traced
from .bert_compat import CompatiblePreTrainedModel, ask_attention, asked_attention, reserve_attention_names
from .bert_linear_cpu import in_parts, linear
from .bert_loss import answer_loss, class_loss, guess_problem_type, packed_labels, row_integers, sequence_loss
from .bert_padding import PackedBatch, pack_batch
from .configuration_bert import AUTO_MAP, BertConfig, complete_config

try:
    from .flash_attn_triton import triton_attention
    from .geglu_triton import triton_geglu
    from .launch_triton import is_observed, triton_declines
    from .layer_norm_triton import triton_add_layer_norm
except ImportError:
    triton_attention = triton_geglu = triton_add_layer_norm = is_observed = triton_declines = None

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation, and the calls that it can serve.

    Attributes:
        function: computes the operation; None when its package is missing.
        dtypes: dtypes of the input.
        devices: device types; empty: all.
        max_channels: largest last dimension of the input, D for attention; None: no limit.
        dropout: whether it supports attention dropout.
        check: `(input, packed) -> reason or None` for what the other fields do not say, asked last.
    """

    function: Optional[Callable]
    dtypes: tuple
    devices: tuple = ()
    max_channels: Optional[int] = None
    dropout: bool = True
    check: Optional[Callable] = None

    def declines(self, x: torch.Tensor, packed: Optional[PackedBatch] = None, dropout_p=0.0) -> Optional[str]:
        """The reason why it cannot serve a call on x [..., channels], or None if it can."""
        if x.dtype not in self.dtypes:
            return f"it supports {', '.join(str(dtype) for dtype in self.dtypes)}, got {x.dtype}"
        if self.devices and x.device.type not in self.devices:
            return f"it supports devices {', '.join(self.devices)}, got {x.device.type}"
        if self.function is None:
            return "its package is not installed"
        if self.max_channels and x.shape[-1] > self.max_channels:
            return f"it supports up to {self.max_channels} channels, got {x.shape[-1]}"
        if dropout_p > 0 and not self.dropout:
            return f"it has no attention dropout, got {dropout_p}"
        return self.check(x, packed) if self.check else None


def attention_kernel_declines(qkv, packed):
    """The reason why the Triton kernel cannot serve attention on a CUDA or ROCm device, or None if it can."""
    if packed.restarts is not None:
        return "compiled code needs cu_seq_lens_q to separate texts in one row, got position_ids"
    return triton_declines(qkv.device)


def fused_kernel_declines(x, packed):
    """The reason why no Triton kernel can compute a fused layer on a CUDA or ROCm device, or None if one can."""
    return "something needs to see torch's operators" if is_observed(x) else triton_declines(x.device)


# Attention, in order of preference: `(qkv [T, 3, H, D], packed, alibi_slopes, scale, dropout_p) -> [T, H, D]`.
ATTENTION_BACKENDS = {
    "triton": Backend(triton_attention, FLOATS[:3], ("cuda",), 128, check=attention_kernel_declines),
    "cpu": Backend(cpu_attention, FLOATS, ("cpu",), dropout=False, check=cpu_declines),
    "sdpa": Backend(sdpa_attention, FLOATS),
    "eager": Backend(eager_attention, FLOATS),
}

# Kernels that fuse several of torch's operators; these operators serve every call that a kernel declines.
FUSED_LAYERS = {
    "geglu": Backend(triton_geglu, FLOATS[:3], ("cuda",), check=fused_kernel_declines),
    "add_norm": Backend(triton_add_layer_norm, FLOATS[:3], ("cuda",), 8192, check=fused_kernel_declines),
}

# What the config holds when no backend was requested: each call takes the first row that can serve it.
AUTOMATIC = "auto"

reserve_attention_names(AUTOMATIC, "triton", "cpu")


def check_attention_name(name: str) -> None:
    """Raise ValueError unless `name` is a key of `ATTENTION_BACKENDS` or `AUTOMATIC`."""
    known = (AUTOMATIC, *ATTENTION_BACKENDS)
    if name not in known:
        raise ValueError(f"attn_implementation must be one of {', '.join(known)}, got {name!r}")


def choose_attention(name: str, qkv: torch.Tensor, packed: PackedBatch, dropout_p: float) -> Callable:
    """The attention function for one call on `qkv` [T, 3, H, D].

    Args:
        name: a key of `ATTENTION_BACKENDS`, or `AUTOMATIC` for the first row that can serve.
        qkv, packed, dropout_p: what the function will be called with.

    Raises:
        ValueError: `name` cannot serve this call; the message gives the reason.
    """
    for candidate in ATTENTION_BACKENDS if name == AUTOMATIC else (name,):
        backend = ATTENTION_BACKENDS[candidate]
        reason = backend.declines(qkv, packed, dropout_p)
        if reason is None:
            return backend.function
    raise ValueError(f"attn_implementation {candidate!r} cannot serve this call: {reason}")


def geglu(gated: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * value: [..., 2 F], gates first, to [..., F]."""
    fused = FUSED_LAYERS["geglu"]
    if fused.declines(gated) is None:
        return fused.function(gated)
    gate, value = gated.chunk(2, dim=-1)
    return F.gelu(gate).mul_(value)


def add_norm(norm: nn.Module, x: torch.Tensor, residual: torch.Tensor, dropout: Optional[nn.Dropout] = None):
    """norm(dropout(x) + residual), [..., E]; the kernel serves only a plain `BertLayerNorm`."""
    fused = FUSED_LAYERS["add_norm"]
    if fused.declines(x) is None and is_plain(norm, BertLayerNorm):
        dropout_p = dropout.p if dropout is not None and dropout.training else 0.0
        dtype = norm.result_dtype(torch.promote_types(x.dtype, residual.dtype), x.device.type)
        return fused.function(x, residual, norm.weight, norm.bias, norm.eps, dropout_p, dtype)
    return norm((x if dropout is None else dropout(x)) + residual)


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

    def result_dtype(self, dtype: torch.dtype, device_type: str) -> torch.dtype:
        """The dtype of the result for an input dtype, by the rules of CUDA's autocast if autocast is on."""
        if not torch.is_autocast_enabled(device_type):
            return dtype
        return torch.get_autocast_dtype(device_type) if self.low_precision else torch.float32

    def forward(self, x):
        if not self.low_precision:
            return super().forward(x)
        device = x.device.type
        if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:  # autocast leaves float64 alone
            return super().forward(x)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return F.layer_norm(
                x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps
            )


class BertEmbeddings(nn.Module):
    """Word and token type embeddings of packed tokens; no position embedding."""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = BertLayerNorm(config.hidden_size, config.layer_norm_eps, config.low_precision_layernorm)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids=None, token_type_ids=None, *, inputs_embeds=None):
        """[T] ids or [T, E] embeddings, and [T] token types or None (all 0), to hidden states [T, E]."""
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            token_type_ids = torch.zeros(words.shape[:-1], dtype=torch.long, device=words.device)
        return self.dropout(self.LayerNorm(words + self.token_type_embeddings(token_type_ids)))


class BertSelfAttention(nn.Module):
    """One fused projection to queries, keys and values, and the attention between them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scale = self.head_dim**-0.5
        self.dropout_rate = config.attention_probs_dropout_prob
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, hidden, packed, slopes, output_attentions):
        """[T, E] to a context [T, E] and, if requested, weights [N, H, R, R]."""
        # torch.export cannot split rows that it has merged, so they are merged before the linear layer.
        hidden = hidden.flatten(0, -2) if is_traced() else hidden
        qkv = linear(self.Wqkv, hidden).reshape(-1, 3, self.num_heads, self.head_dim)
        dropout_p = self.dropout_rate if self.training else 0.0
        if output_attentions:
            context, weights = eager_attention(qkv, packed, slopes, self.scale, dropout_p, return_weights=True)
            return context.reshape(hidden.shape), weights
        attend = choose_attention(self.config._attn_implementation, qkv, packed, dropout_p)
        # Attribution tools copy every output of a module, so no output may be None.
        return (attend(qkv, packed, slopes, self.scale, dropout_p).reshape(hidden.shape),)


class BertSelfOutput(nn.Module):
    """Output projection of the attention, residual, LayerNorm."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = BertLayerNorm(config.hidden_size, config.layer_norm_eps, config.low_precision_layernorm)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, context, residual):
        projected = linear(self.dense, context).view_as(residual)
        return add_norm(self.LayerNorm, projected, residual, self.dropout)


class BertAttention(nn.Module):
    """Self-attention and its output; the names are those of the checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertSelfOutput(config)

    def forward(self, hidden, packed, slopes, output_attentions):
        context, *weights = self.self(hidden, packed, slopes, output_attentions)
        return self.output(context, hidden), *weights


class BertGatedMLP(nn.Module):
    """GeGLU feed-forward layer: wo(dropout(gelu(gate) * value)), residual, LayerNorm.

    Source: https://arxiv.org/abs/2002.05202, equation 6.
    """

    def __init__(self, config):
        super().__init__()
        self.gated_width = 2 * config.intermediate_size
        self.gated_layers = nn.Linear(config.hidden_size, self.gated_width, bias=False)
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layernorm = BertLayerNorm(config.hidden_size, config.layer_norm_eps, config.low_precision_layernorm)

    def project(self, hidden):
        """[T, E] to wo(dropout(gelu(gate) * value)), [T, E]."""
        return linear(self.wo, self.dropout(geglu(linear(self.gated_layers, hidden))))

    def forward(self, hidden):
        return add_norm(self.layernorm, in_parts(self.project, hidden, self.gated_width), hidden)


class BertLayer(nn.Module):
    """Attention, then the gated feed-forward layer."""

    def __init__(self, config):
        super().__init__()
        self.attention = BertAttention(config)
        self.mlp = BertGatedMLP(config)

    def forward(self, hidden, packed, slopes, output_attentions):
        hidden, *weights = self.attention(hidden, packed, slopes, output_attentions)
        return self.mlp(hidden), *weights


class BertEncoder(nn.Module):
    """L layers over packed tokens."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(self, hidden, packed, output_hidden_states, output_attentions):
        """[T, E] to [T, E], the hidden states before and after each layer ([T, E] each) and the weights of each layer;
        None for what was not requested."""
        slopes = slopes_on(hidden.device, self.num_heads, torch.promote_types(hidden.dtype, torch.float32))
        states = (hidden,) if output_hidden_states else None
        weights = ()
        for layer in self.layer:
            arguments = (hidden, packed, slopes, output_attentions)
            if self.gradient_checkpointing and self.training:
                hidden, *attention = self._gradient_checkpointing_func(layer.__call__, *arguments)
            else:
                hidden, *attention = layer(*arguments)
            if output_hidden_states:
                states += (hidden,)
            weights += (*attention,)
        return hidden, states, weights if output_attentions else None


class BertPooler(nn.Module):
    """tanh of a projection of each sequence's first token, or of each row's first position."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden):
        """First tokens [N, E] to [N, E], or hidden states [B, S, E], as stock BERT's pooler takes them, to [B, E]."""
        return torch.tanh(self.dense(hidden[:, 0] if hidden.dim() == 3 else hidden))


class BertPredictionHeadTransform(nn.Module):
    """Projection, activation and LayerNorm before the decoder."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        # Checkpoints were trained with 1e-12 here, whatever layer_norm_eps says.
        self.LayerNorm = BertLayerNorm(config.hidden_size, 1e-12, config.low_precision_layernorm)

    def forward(self, hidden):
        return self.LayerNorm(self.activation(linear(self.dense, hidden)))


class BertLMPredictionHead(nn.Module):
    """Hidden states [..., E] to vocabulary scores [..., V]; the decoder's weight is the word embedding."""

    def __init__(self, config):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden):
        return linear(self.decoder, self.transform(hidden))


class BertOnlyMLMHead(nn.Module):
    """The MLM head, under the name that its weights have in checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def forward(self, hidden):
        return self.predictions(hidden)


class BertPreTrainedModel(CompatiblePreTrainedModel):
    """What all models here share: configuration, loading and saving, the choice of attention."""

    config_class = BertConfig
    auto_map = AUTO_MAP
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["BertLayer"]
    # Weights of our other classes and buffers of older code: expected, so kept out of the loading report.
    _keys_to_ignore_on_load_unexpected = [r"^cls\.", r"^classifier\.", r"^qa_outputs\.", r"pooler\.", r"position_ids$"]
    _supports_sdpa = True

    def __init__(self, config, *inputs, **kwargs):
        complete_config(config)
        if asked_attention(config) is None:
            ask_attention(config, AUTOMATIC)
        check_attention_name(asked_attention(config))  # the message of transformers lists none of ours
        super().__init__(config, *inputs, **kwargs)

    def set_attn_implementation(self, attn_implementation: str, **kwargs):
        """Choose the attention implementation of all layers.

        Args:
            attn_implementation: a key of `ATTENTION_BACKENDS`, or `auto`.
            **kwargs: what some releases of transformers pass along; unused.

        Raises:
            ValueError: an unknown name.
        """
        check_attention_name(attn_implementation)
        ask_attention(self.config, attn_implementation)


# Arguments that callers pass to every model and that change nothing in an encoder: those of a decoder's cache, what is
# known from `cu_seq_lens_q`, what only a loss reads, and the results that sentence-transformers writes beside a call's
# arguments, which it passes on where these serve twice.
HARMLESS_ARGUMENTS = {"use_cache", "cache_position", "cu_seq_lens_k", "max_length_k", "seq_idx", "num_items_in_batch"}
HARMLESS_ARGUMENTS |= {"token_embeddings", "all_layer_embeddings", "sentence_embedding"}


@dataclass
class EncoderOutput(BaseModelOutputWithPooling):
    """Output of the encoder: transformers' fields, and what a head needs beside them."""

    packed: Optional[PackedBatch] = None  # the batch, with `packed_output`; `last_hidden_state` is then [T, E]


def extras(encoded: EncoderOutput) -> dict:
    """What every head returns beside its own fields; no property of the output, as torch 2.6 could not compile one."""
    return {"hidden_states": encoded.hidden_states, "attentions": encoded.attentions}


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

    def embed(self, packed: PackedBatch, input_ids, token_type_ids, inputs_embeds) -> torch.Tensor:
        """Ids or embeddings [B, S, ...] to hidden states [T, E]."""
        words, types = self.embeddings.word_embeddings, self.embeddings.token_type_embeddings
        if input_ids is not None:
            input_ids = check_ids("input_ids", input_ids, getattr(words, "num_embeddings", self.config.vocab_size))
        else:
            self.check_embeddings(inputs_embeds)
        if token_type_ids is not None:
            size = getattr(types, "num_embeddings", self.config.type_vocab_size)
            token_type_ids = check_ids("token_type_ids", token_type_ids, size)
        if input_ids is not None and not (packed.keeps_padding or is_plain(words, nn.Embedding)):
            # Noise, attributions and adapters on the input embeddings rely on [B, S, E].
            input_ids, inputs_embeds = None, words(input_ids)
        ids, types, embeds = (None if x is None else packed.pack(x) for x in (input_ids, token_type_ids, inputs_embeds))
        return self.embeddings(ids, types, inputs_embeds=embeds)

    def check_embeddings(self, inputs_embeds: torch.Tensor) -> None:
        """Raise ValueError unless `inputs_embeds` [B, S, ...] have the width and the dtype of the word embeddings."""
        check_shape("inputs_embeds", inputs_embeds, (*inputs_embeds.shape[:2], self.config.hidden_size))
        given, dtype = inputs_embeds.dtype, self.embeddings.token_type_embeddings.weight.dtype
        autocast = torch.is_autocast_enabled(inputs_embeds.device.type)
        if given != dtype and not (autocast and given.is_floating_point):
            raise ValueError(f"inputs_embeds must be {dtype} as the weights, got {given}")

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        cu_seq_lens_q: Optional[torch.Tensor] = None,
        max_length_q: Optional[int] = None,
        packed_output: bool = False,
        **others,
    ) -> EncoderOutput:
        """Hidden states of a padded batch, or of sequences concatenated in a row.

        Args:
            input_ids: int64 [B, S], below `vocab_size`. Either these or `inputs_embeds`.
            attention_mask: bool, integer or float [B, S], 1 at real tokens and 0 at padding; holes and left padding
                keep the distances that the mask shows. None: all are real.
            token_type_ids: int64 [B, S] below `type_vocab_size`; None: 0 everywhere.
            position_ids: int64 [B, S] or [1, S]. ALiBi reads distances from the layout, not from these. Where they
                restart, a new sequence starts, as `DataCollatorWithFlattening` of transformers writes it. Rows of
                several sequences have no padding.
            inputs_embeds: floating [B, S, E] in place of `input_ids`.
            output_attentions: also return the attention weights, [B, H, S, S] per layer, served by eager attention.
            output_hidden_states: also return L + 1 hidden states [B, S, E], zero at padding.
            cu_seq_lens_q: int32 or int64 [N + 1], where each sequence of one row [1, T] starts, then T.
            max_length_q: tokens of the longest of these; None: read from `cu_seq_lens_q`.
            packed_output: leave `last_hidden_state` packed, [T, E], and return the batch beside it, as heads need it.
            **others: `return_dict` (False returns a tuple); only `HARMLESS_ARGUMENTS` of the others may have a value.

        Returns:
            `EncoderOutput`, a `BaseModelOutputWithPooling`: last_hidden_state [B, S, E], zero at padding; pooler_output
            [B, E] ([N, E] for concatenated sequences), None without a pooler.

        Raises:
            ValueError: an argument with a wrong shape, rank, or value, or one that is unknown or another model's, as
                `head_mask`; the message names it.

        Source: https://arxiv.org/abs/2312.17482.
        """
        for name, value in others.items():
            if value is not None and name not in HARMLESS_ARGUMENTS:
                raise ValueError(f"{name} must be None: {type(self).__name__} has no use for it, got {type(value)}")
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        packed = pack_batch(
            *(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, cu_seq_lens_q, max_length_q),
            keep_padding=not config.unpad_inputs,
        )
        hidden = self.embed(packed, input_ids, token_type_ids, inputs_embeds)
        hidden, states, attentions = self.encoder(hidden, packed, output_hidden_states, output_attentions)
        return EncoderOutput(
            last_hidden_state=hidden if packed_output else packed.unpack(hidden),
            pooler_output=None if self.pooler is None else self.pooler(packed.first_tokens(hidden)),
            hidden_states=None if states is None else tuple(packed.unpack(state) for state in states),
            attentions=attentions,
            packed=packed if packed_output else None,
        )


class BertHead(BertPreTrainedModel):
    """What the heads share: how they call their encoder, `bert`."""

    def encode(self, *arguments, **kwargs) -> EncoderOutput:
        """The encoder's output, still packed; the arguments are those of `BertModel.forward`."""
        return self.bert(*arguments, packed_output=True, return_dict=True, **kwargs)

    def encode_rows(self, *arguments, **kwargs) -> EncoderOutput:
        """The same for a head that needs one text per row.

        Raises:
            ValueError: a row holds several texts, by its `cu_seq_lens_q` or its `position_ids`.
        """
        message = f"%s cannot be served by {type(self).__name__}, which needs one text per row"
        if kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError(message % "cu_seq_lens_q")
        encoded = self.encode(*arguments, **kwargs)
        packed, message = encoded.packed, message % "position_ids that restart"
        if packed.restarts is not None and is_traced():
            assert_on_device(~packed.restarts, message)
        elif packed.num_sequences != packed.shape[0]:
            raise ValueError(message)
        return encoded


class BertForMaskedLM(BertHead):
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

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        labels: Optional[torch.Tensor] = None,
        num_items_in_batch=None,
        masked_lm_positions: Optional[torch.Tensor] = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Vocabulary scores of every token, or of the labelled tokens and their loss.

        Args:
            labels: integers [B, S]; -100 and any label at padding do not count.
            num_items_in_batch: int or integer tensor; divide the summed loss by this instead of by the labels here,
                as `Trainer` asks under gradient accumulation.
            masked_lm_positions: int64 [M], flat indices (row * S + column) of all labels in a batch without padding;
                passing them avoids a device synchronization.
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs: see `BertModel.forward`.

        Returns:
            `MaskedLMOutput`: loss, mean cross entropy over the labels (float32; 0 without any label); logits
            [B, S, V], zero at padding and, where labels are given, at every position without a label. With
            `config.sparse_prediction` and labels: logits [M, V] of the M labelled tokens.

        Raises:
            ValueError: see `BertModel.forward`; labels of another shape or outside the vocabulary;
                masked_lm_positions beside an attention_mask.
        """
        if masked_lm_positions is not None and attention_mask is not None:
            raise ValueError("masked_lm_positions needs a batch without padding, got an attention_mask beside it")
        encoded = self.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        hidden, packed = encoded.last_hidden_state, encoded.packed
        if labels is None:
            return MaskedLMOutput(logits=packed.unpack(self.cls(hidden)), **extras(encoded))
        labels = packed_labels(packed, labels)
        if packed.keeps_padding:  # the number of labels is data
            logits = self.cls(hidden)
            loss = class_loss(logits, labels, num_items_in_batch)
            logits = logits.masked_fill((labels == -100)[..., None], 0)
        else:
            labelled = (labels != -100).nonzero().flatten() if masked_lm_positions is None else masked_lm_positions
            logits = self.cls(hidden[labelled])  # [M, V]
            loss = class_loss(logits, labels[labelled], num_items_in_batch)
            if not self.config.sparse_prediction:
                everywhere = logits.new_zeros(len(labels), logits.shape[-1])
                logits = packed.unpack(everywhere.index_copy(0, labelled, logits))
        return MaskedLMOutput(loss=loss, logits=logits, **extras(encoded))


class BertForSequenceClassification(BertHead):
    """MosaicBERT with a classifier or regressor on each sequence.

    The classifier reads the pooled first token, or with `config.classifier_pooling` "mean" the mean over the tokens.
    """

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=config.classifier_pooling == "cls")
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        labels: Optional[torch.Tensor] = None,
        num_items_in_batch=None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Scores of each sequence.

        Args:
            labels: by `config.problem_type`: integers [B] or [B, 1] for single_label_classification (-100 does not
                count); floating [B, num_labels] of 0 and 1 for multi_label_classification; floating [B] or
                [B, num_labels] for regression. Where the config names none, the first labels decide, and the config
                keeps it: regression for one label, single label for integers, multi label otherwise.
            The others are those of `BertForMaskedLM.forward`.

        Returns:
            `SequenceClassifierOutput`: loss (float32 mean); logits [B, num_labels] ([N, num_labels] for concatenated
            sequences).

        Raises:
            ValueError: see `BertModel.forward`; labels of another shape, or an unknown `problem_type`.
        """
        encoded = self.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        pooled = encoded.pooler_output
        if pooled is None:
            pooled = encoded.packed.mean_tokens(encoded.last_hidden_state)
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            check_tensor("labels", labels)
            problem_type = self.config.problem_type or guess_problem_type(logits.shape[-1], labels)
            loss = sequence_loss(logits, labels, problem_type, num_items_in_batch)
            self.config.problem_type = problem_type  # saved with the model: pipelines read it
        return SequenceClassifierOutput(loss=loss, logits=logits, **extras(encoded))


def classifier_dropout(config) -> float:
    """Dropout rate before a classifier."""
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


class BertForTokenClassification(BertHead):
    """MosaicBERT with a classifier on every token."""

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        labels: Optional[torch.Tensor] = None,
        num_items_in_batch=None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """Scores of each token.

        Args:
            labels: integers [B, S] below `num_labels`; -100 and any label at padding do not count.
            The others are those of `BertForMaskedLM.forward`.

        Returns:
            `TokenClassifierOutput`: loss (float32 mean); logits [B, S, num_labels], zero at padding.

        Raises:
            ValueError: see `BertModel.forward`; labels of another shape.
        """
        encoded = self.encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(encoded.last_hidden_state))
        loss = None
        if labels is not None:
            loss = class_loss(logits, packed_labels(encoded.packed, labels), num_items_in_batch)
        return TokenClassifierOutput(loss=loss, logits=encoded.packed.unpack(logits), **extras(encoded))


# Score of padding as the start or end of an answer: too low to be chosen (exp(-50) = 2e-22), and small enough to be
# averaged, scaled and squared in any dtype.
PADDING_SCORE = -50.0


class BertForQuestionAnswering(BertHead):
    """MosaicBERT with scores for the first and the last token of an answer."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        start_positions: Optional[torch.Tensor] = None,
        end_positions: Optional[torch.Tensor] = None,
        num_items_in_batch=None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """Start and end scores of every position.

        Args:
            start_positions: integers [B] or [B, 1], the answer's first token; a position outside the S given
                (the answer was cut off) or at padding does not count.
            end_positions: its last token, likewise.
            The others are those of `BertForMaskedLM.forward`.

        Returns:
            `QuestionAnsweringModelOutput`: loss, the mean of both cross entropies (float32); start_logits and
            end_logits [B, S], -50 at padding.

        Raises:
            ValueError: see `BertModel.forward`; only one of the positions, or one of another shape.
        """
        if (start_positions is None) != (end_positions is None):
            given = "start_positions" if end_positions is None else "end_positions"
            raise ValueError(f"start_positions and end_positions must be given together, got {given} only")
        encoded = self.encode_rows(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = encoded.packed.unpack(self.qa_outputs(encoded.last_hidden_state))  # [B, S, 2]
        if attention_mask is not None:
            logits = logits.masked_fill((attention_mask == 0)[..., None], PADDING_SCORE)
        start_logits, end_logits = logits.unbind(-1)
        loss = None
        if start_positions is not None:
            positions = (start_positions, end_positions)
            loss = answer_loss(start_logits, end_logits, *positions, attention_mask, num_items_in_batch)
        logits = {"start_logits": start_logits, "end_logits": end_logits}
        return QuestionAnsweringModelOutput(loss=loss, **logits, **extras(encoded))


class BertForMultipleChoice(BertHead):
    """MosaicBERT that scores each of several continuations."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        labels: Optional[torch.Tensor] = None,
        num_items_in_batch=None,
        **kwargs,
    ) -> MultipleChoiceModelOutput:
        """Scores of the choices of each question.

        Args:
            input_ids: int64 [B, C, S], C choices per question; likewise [B, C, S] for attention_mask, token_type_ids
                and position_ids, and [B, C, S, E] for inputs_embeds.
            labels: integers [B] or [B, 1], the right choice, below C; -100 does not count.
            The others are those of `BertForMaskedLM.forward`; hidden states and attention weights have B * C rows.

        Returns:
            `MultipleChoiceModelOutput`: loss (float32 mean); logits [B, C].

        Raises:
            ValueError: see `BertModel.forward`; input of another rank, labels of another shape.
        """
        ids = inputs_embeds is None
        name, tokens, rank = ("input_ids", input_ids, 3) if ids else ("inputs_embeds", inputs_embeds, 4)
        others = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        for other, x in ({} if tokens is None else {name: tokens, **others}).items():
            if x is None:
                continue
            check_tensor(other, x)
            if tokens.dim() != rank:
                raise ValueError(f"{name} must have {rank} dimensions [B, C, S, …], got {list(tokens.shape)}")
            width = [self.config.hidden_size] if other == "inputs_embeds" else []
            check_shape(other, x, (*tokens.shape[:3], *width))
        rows = (None if x is None else x.flatten(0, 1) for x in (input_ids, *others.values(), inputs_embeds))
        encoded = self.encode_rows(*rows, **kwargs)
        logits = self.classifier(self.dropout(encoded.pooler_output)).view(tokens.shape[:2])
        loss = None
        if labels is not None:
            loss = class_loss(logits, row_integers("labels", labels, logits.shape[0]), num_items_in_batch)
        return MultipleChoiceModelOutput(loss=loss, logits=logits, **extras(encoded))


class UnavailableHead(BertPreTrainedModel):
    """Raises ValueError where an auto class has no model here, instead of loading stock BERT with a random encoder."""

    def __init__(self, config, *inputs, **kwargs):
        missing = [name for name, reference in AUTO_MAP.items() if reference.endswith(type(self).__name__)]
        served = [name for name in AUTO_MAP if name not in (*missing, "AutoConfig")]
        raise ValueError(f"MosaicBERT has no model for {' and '.join(missing)}, only for {', '.join(served)}")


BertConfig.register_for_auto_class()
for _name, _reference in AUTO_MAP.items():
    if _name != "AutoConfig":
        globals()[_reference.split(".")[-1]].register_for_auto_class(_name)
