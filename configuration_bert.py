"""The fields of a MosaicBERT model and their checks. Defaults are those of MosaicBERT-Base."""

import math
import numbers
import re
import shutil
from pathlib import Path
from typing import Optional

from transformers import BertConfig as StockBertConfig
from transformers import __version__ as release
from transformers.activations import ACT2FN
from transformers.dynamic_module_utils import get_relative_import_files

# As setup.cfg declares it. This file is the first that transformers loads.
OLDEST_TRANSFORMERS = (4, 54, 1)
if tuple(map(int, re.findall(r"\d+", release)[:3])) < OLDEST_TRANSFORMERS:
    oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
    raise ImportError(f"MosaicBERT needs transformers {oldest} or newer, got {release}")

# The fields that a MosaicBERT reads beyond those of transformers' BertConfig.
OWN_FIELDS = (
    "alibi_starting_size",
    "sparse_prediction",
    "low_precision_layernorm",
    "classifier_pooling",
    "unpad_inputs",
)

# The `chunk_size_feed_forward` of every config, which no MosaicBERT reads. transformers' own BERT accepts only lengths
# that are multiples of it: where a library builds that BERT, with a random encoder, instead of ours, the first call
# fails.
NO_LENGTH = 2**31 - 1

# Our class for each of transformers' auto classes that know BERT, as saved configs name it. An auto class without an
# entry would load stock BERT with a random encoder.
AUTO_MAP = {
    "AutoConfig": "configuration_bert.BertConfig",
    "AutoModelForCausalLM": "bert_layers.UnavailableHead",
    "AutoModelForNextSentencePrediction": "bert_layers.UnavailableHead",
    "AutoModelForPreTraining": "bert_layers.BertForMaskedLM",
    "AutoModelForTextEncoding": "bert_layers.BertModel",
    "AutoModel": "bert_layers.BertModel",
    "AutoModelForMaskedLM": "bert_layers.BertForMaskedLM",
    "AutoModelForSequenceClassification": "bert_layers.BertForSequenceClassification",
    "AutoModelForTokenClassification": "bert_layers.BertForTokenClassification",
    "AutoModelForQuestionAnswering": "bert_layers.BertForQuestionAnswering",
    "AutoModelForMultipleChoice": "bert_layers.BertForMultipleChoice",
}


def is_size(value) -> bool:
    """Whether `value` is an integer above zero."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value > 0


def is_number(value) -> bool:
    """Whether `value` is a finite real number that fits a float."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer may be too large for a float
        return False


def is_rate(value) -> bool:
    """Whether `value` is a number in [0, 1)."""
    return is_number(value) and 0 <= value < 1


# Deeper than any BERT; a config that asks for a billion layers would otherwise exhaust the memory.
MOST_LAYERS = 1000

# The check of each field, and what the field must be, in words.
FIELD_CHECKS = {
    **dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "type_vocab_size",
            "alibi_starting_size",
            "max_position_embeddings",
            "num_labels",
        ),
        (is_size, "a positive integer"),
    ),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), (is_rate, "a number in [0, 1)")),
    "classifier_dropout": (lambda value: value is None or is_rate(value), "None or a number in [0, 1)"),
    "layer_norm_eps": (lambda value: is_number(value) and value > 0, "a positive number"),
    "initializer_range": (lambda value: is_number(value) and value >= 0, "a non-negative number"),
    "hidden_act": (lambda value: isinstance(value, str) and value in ACT2FN, f"one of {', '.join(sorted(ACT2FN))}"),
    "classifier_pooling": (lambda value: value in ("cls", "mean"), "cls or mean"),
    **dict.fromkeys(
        ("sparse_prediction", "low_precision_layernorm", "unpad_inputs"),
        (lambda value: isinstance(value, bool), "True or False"),
    ),
    **dict.fromkeys(
        ("is_decoder", "add_cross_attention"),
        (lambda value: not value, "False: MosaicBERT is a bidirectional encoder and has no decoder"),
    ),
}


def check_field(name: str, value) -> None:
    """Raise ValueError when no MosaicBERT can have this value of a field; other names are ignored."""
    passes, words = FIELD_CHECKS.get(name, (None, None))
    if passes and not passes(value):
        raise ValueError(f"{name} must be {words}, got {value!r}")


def check_fields(fields: dict) -> None:
    """Raise ValueError when no MosaicBERT can have these values of its fields; the message names the field."""
    for name, value in fields.items():
        check_field(name, value)
    size, heads, layers = (fields[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    if size % heads:
        raise ValueError(f"hidden_size must be a multiple of num_attention_heads, got {size} and {heads}")
    if layers > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers must be at most {MOST_LAYERS}, got {layers}")
    pad, vocabulary = fields.get("pad_token_id"), fields["vocab_size"]
    if pad is not None and (
        not isinstance(pad, numbers.Integral) or isinstance(pad, bool) or not 0 <= pad < vocabulary
    ):
        raise ValueError(f"pad_token_id must be None or lie in [0, {vocabulary}), got {pad!r}")


def stored(name: str, value):
    """The value that a config keeps when a field is set.

    Numbers become int or float, as NumPy's cannot be written to JSON. The names of transformers' models under
    `architectures` become names that no library has: pipelines and servers take the class of that name after any error
    of ours, and would load stock BERT with a random encoder.
    """
    if name == "architectures" and isinstance(value, (list, tuple)):
        return [f"Mosaic{model}" if str(model).startswith("Bert") else model for model in value]
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return value


def cover_starting_size(config) -> None:
    """Raise `max_position_embeddings`, where other libraries cut a text, to `alibi_starting_size` if it is below."""
    size = getattr(config, "alibi_starting_size", 0)
    if config.max_position_embeddings < size:
        config.max_position_embeddings = size


class BertConfig(StockBertConfig):
    """Configuration of a MosaicBERT: transformers' BertConfig plus the fields below.

    `model_type` stays `bert`, as in every published checkpoint.

    Args:
        vocab_size: rows of the embedding and of the MLM decoder. Rows past the tokenizer's vocabulary are
            ordinary rows with a low bias.
        hidden_size: E, a multiple of `num_attention_heads`.
        num_hidden_layers: L.
        num_attention_heads: H.
        intermediate_size: F, the width of the gate and of the value in the gated feed-forward layer.
        hidden_act: activation of the MLM head, a name that transformers knows. The gated feed-forward layer always
            uses the exact GELU.
        hidden_dropout_prob: dropout rate after the embedding, the attention output and the gated activation.
        attention_probs_dropout_prob: dropout rate of the attention weights. Above 0, the implementation `cpu`, which
            has no dropout, leaves training to the next one.
        type_vocab_size: rows of the token type embedding.
        initializer_range: standard deviation of new linear and embedding weights.
        layer_norm_eps: epsilon of every LayerNorm but the MLM head's, which is 1e-12 in all checkpoints.
        pad_token_id: the embedding row that stays zero; None: no such row.
        classifier_dropout: dropout rate before a classifier; None: `hidden_dropout_prob`.
        alibi_starting_size: tokens that the model is meant for. Any length works without touching it, and nothing is
            prepared; `max_position_embeddings` is never below it.
        sparse_prediction: with labels, return logits [M, V] of the M labelled tokens instead of [B, S, V].
        low_precision_layernorm: under autocast, run LayerNorm in the autocast dtype instead of float32.
        classifier_pooling: what a sequence classifier reads: "cls", the pooled first token, as in published
            checkpoints; "mean", the mean over the tokens, which needs no new pooler.
        unpad_inputs: drop padding before the layers, which then see [T, E]. False keeps it, for tools that need the
            batch dimension (per-sample gradients, attributions): layers see [B, S, E].
        max_position_embeddings: tokens after which other libraries cut a text, sentence-transformers among them. The
            model has no limit and does not read it. Below `alibi_starting_size`, as in published configs, it becomes
            that.
        **kwargs: any other field of a transformers config.

    Raises:
        ValueError: a field has a value that no MosaicBERT can have; the message names it.

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
        fields = locals() | kwargs
        for name in ("self", "__class__", "kwargs"):
            del fields[name]
        # First, as the messages of transformers' own checks differ by release.
        check_fields(fields)
        ours = {name: fields.pop(name) for name in OWN_FIELDS}
        super().__init__(**{**fields, "chunk_size_feed_forward": NO_LENGTH})
        for name, value in ours.items():
            setattr(self, name, value)

    def __setattr__(self, name, value):
        """Check and set a field; `EncoderDecoderModel` would otherwise turn our config into a decoder of stock BERT."""
        check_field(name, value)
        super().__setattr__(name, stored(name, value))
        if name in ("alibi_starting_size", "max_position_embeddings"):
            cover_starting_size(self)

    @property
    def output_attentions(self) -> bool:
        """Whether every call returns attention weights. Eager attention serves them, whatever serves other calls."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        """Accept any attention implementation beside it; transformers' own setter accepts eager only."""
        self._output_attentions = value

    def validate_output_attentions(self) -> None:
        """Accept `output_attentions` beside any attention implementation; releases from 5 on ask before saving."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save the config with the code that its `auto_map` names, so that `from_config` can load the folder.

        Arguments are those of transformers' method. A config that was loaded without its code, from the Hub, keeps its
        reference to the code there.
        """
        # transformers copies this file alone where only a config is loaded; the others are still in its folder.
        folders = [Path(__file__).parent, *([Path(self.name_or_path)] if self.name_or_path else [])]
        entry = next((file for file in (folder / "bert_layers.py" for folder in folders) if file.is_file()), None)
        if entry is not None:
            self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        for file in () if entry is None else map(Path, (entry, *get_relative_import_files(entry))):
            target = Path(save_directory, file.name)
            if not (target.exists() and target.samefile(file)):
                shutil.copy(file, target)


def complete_config(config) -> None:
    """Make a config that arrives at a model, ours or transformers' `BertConfig`, one of ours with every field.

    Raises:
        ValueError: a field has a value that no MosaicBERT can have; it may have been set since the config was built.
    """
    if type(config) is StockBertConfig:  # would name the models of transformers when it is saved
        config.__class__ = BertConfig
    for name in OWN_FIELDS:
        if not hasattr(config, name):
            setattr(config, name, getattr(BertConfig(), name))
    config.chunk_size_feed_forward = NO_LENGTH
    names = (*FIELD_CHECKS, "pad_token_id")
    check_fields({name: getattr(config, name) for name in names if hasattr(config, name)})
    cover_starting_size(config)
