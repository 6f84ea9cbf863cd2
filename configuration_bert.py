"""The fields of a MosaicBERT model. Defaults are those of MosaicBERT-Base."""

from typing import Optional

from transformers import BertConfig as StockBertConfig

# What a MosaicBERT reads beyond transformers' BertConfig, with the values that a config without them stands for.
EXTRA_FIELDS = {
    "alibi_starting_size": 512,
    "sparse_prediction": False,
    "low_precision_layernorm": False,
    "classifier_pooling": "cls",
    "unpad_inputs": True,
}

# What a saved config says about its code: the class for each of transformers' auto classes.
AUTO_MAP = {
    "AutoConfig": "configuration_bert.BertConfig",
    "AutoModel": "bert_layers.BertModel",
    "AutoModelForMaskedLM": "bert_layers.BertForMaskedLM",
    "AutoModelForSequenceClassification": "bert_layers.BertForSequenceClassification",
    "AutoModelForTokenClassification": "bert_layers.BertForTokenClassification",
    "AutoModelForQuestionAnswering": "bert_layers.BertForQuestionAnswering",
    "AutoModelForMultipleChoice": "bert_layers.BertForMultipleChoice",
}


class BertConfig(StockBertConfig):
    """Configuration of a MosaicBERT: transformers' BertConfig plus the fields below.

    `model_type` stays `bert`, as in every published checkpoint.

    Args:
        vocab_size: rows of the embedding and of the MLM decoder. Rows past the tokenizer's vocabulary are dead slots:
            see `BertForMaskedLM.silence_dead_slots`.
        hidden_size: E, a multiple of `num_attention_heads`.
        num_hidden_layers: L.
        num_attention_heads: H.
        intermediate_size: F, the width of the gate and of the value in the gated feed-forward layer.
        hidden_act: activation of the MLM head, a name that transformers knows. The gated feed-forward layer always
            uses the exact GELU.
        hidden_dropout_prob: dropout rate after the embedding, the attention output and the gate product.
        attention_probs_dropout_prob: dropout rate of the attention weights. It does not influence the choice of the
            attention implementation where that implementation has dropout (all of ours do).
        type_vocab_size: rows of the token type embedding.
        initializer_range: standard deviation of new linear and embedding weights.
        layer_norm_eps: epsilon of every LayerNorm but the MLM head's, which is 1e-12 in all checkpoints.
        pad_token_id: the embedding row that stays zero; None: no such row.
        classifier_dropout: dropout rate before a classifier; None: `hidden_dropout_prob`.
        alibi_starting_size: tokens that the position bias is prepared for. Any length works whatever it says.
        sparse_prediction: with labels, return logits [M, V] of the M labelled tokens instead of [B, S, V].
        low_precision_layernorm: under autocast, run LayerNorm in the autocast dtype instead of float32.
        classifier_pooling: what a sequence classifier reads: "cls", the pooled first token, as in published
            checkpoints; "mean", the mean over the tokens, which needs no new pooler.
        unpad_inputs: drop padding before the layers, which then see [T, E]. False keeps it, for tools that need the
            batch dimension (per-sample gradients, attributions): layers see [B, S, E].
        max_position_embeddings: tokens after which other libraries cut a text, sentence-transformers among them. The
            model has no limit and does not read it.
        **kwargs: any other field of a transformers config.

    Raises:
        ValueError: a size is not a positive integer, `hidden_size` is no multiple of `num_attention_heads`, or
            `alibi_starting_size` is not a positive integer.

    Source: https://arxiv.org/abs/2312.17482, section 3.
    """

    model_type = "bert"

    def __init__(
        self,
        vocab_size: int = 30528,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.0,
        type_vocab_size: int = 2,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        pad_token_id: Optional[int] = 0,
        classifier_dropout: Optional[float] = None,
        alibi_starting_size: int = 512,
        sparse_prediction: bool = False,
        low_precision_layernorm: bool = False,
        classifier_pooling: str = "cls",
        unpad_inputs: bool = True,
        max_position_embeddings: int = 8192,
        **kwargs,
    ):
        require_positive_integer("alibi_starting_size", alibi_starting_size)
        require_positive_integer("hidden_size", hidden_size)
        require_positive_integer("num_attention_heads", num_attention_heads)
        if classifier_pooling not in ("cls", "mean"):
            raise ValueError(f"classifier_pooling must be cls or mean, got {classifier_pooling!r}")
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {hidden_size} and {num_attention_heads}"
            )
        super().__init__(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            intermediate_size=intermediate_size,
            hidden_act=hidden_act,
            hidden_dropout_prob=hidden_dropout_prob,
            attention_probs_dropout_prob=attention_probs_dropout_prob,
            type_vocab_size=type_vocab_size,
            initializer_range=initializer_range,
            layer_norm_eps=layer_norm_eps,
            pad_token_id=pad_token_id,
            classifier_dropout=classifier_dropout,
            max_position_embeddings=max_position_embeddings,
            **kwargs,
        )
        self.alibi_starting_size = alibi_starting_size
        self.sparse_prediction = sparse_prediction
        self.low_precision_layernorm = low_precision_layernorm
        self.classifier_pooling = classifier_pooling
        self.unpad_inputs = unpad_inputs


def require_positive_integer(name: str, value) -> None:
    """Raise ValueError unless `value` is an int above zero; the message names `name` and shows `value`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
