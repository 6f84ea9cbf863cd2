"""Convert any BERT to a MosaicBERT for further training: layers, gated feed-forward blocks, head.

The docstring of `convert_bert.py` explains the method.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .cli import listed
from .common import (
    check_layers,
    copy_tokenizer,
    count_tokens,
    empty_model,
    file_inside,
    foreign_config,
    load_tokenizer,
    load_weights,
    lower_unused_biases,
    read_json,
    rename_weights,
    repository_class,
    say_float32,
    write_json,
)
from .records import read_texts

Weights = dict[str, torch.Tensor]

# The fewest tokens of a window; in a shorter one, the blocks would be fitted mostly on [CLS] and [SEP].
SHORTEST = 8


@dataclass(frozen=True)
class LayerReport:
    """The fit of one feed-forward block, measured on held-out text.

    Attributes:
        layer: number of the layer in the source.
        mean: of v·x over the tokens; 1 would be exact.
        std: of v·x over the tokens; 0 would be exact.
        inner_error: ‖new − old‖ / ‖old‖ of the feed-forward output, before residual and LayerNorm.
        block_error: the same after them, in the next layer's input.
    """

    layer: int
    mean: float
    std: float
    inner_error: float
    block_error: float

    def __str__(self) -> str:
        return (
            f"layer {self.layer:2d}: v·x {self.mean:.4f} ± {self.std:.4f}, relative error "
            f"{self.inner_error:.4f} before and {self.block_error:.4f} after residual and LayerNorm"
        )


def read_source(weights: Weights, config: dict) -> Weights:
    """Normalize the names of a BERT's weights, and check their shapes.

    Args:
        weights: as `load_weights` returns them, with or without `bert.`.
        config: fields of the source's config.json.

    Returns:
        float32 tensors; encoder names without `bert.`, the MLM head as `cls.predictions.…`.

    Raises:
        ValueError: this is not a whole BERT, or a shape contradicts the config; names the weights.
    """
    for size in ("hidden_size", "intermediate_size", "vocab_size"):
        value = config.get(size)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"config.json: {size} must be a positive integer, got {value!r}")
    weights = rename_weights(weights, lambda name: name.removeprefix("module.").removeprefix("bert."))
    named = {name: tensor.float() for name, tensor in weights.items()}
    check_layers(named, config.get("num_hidden_layers"), "encoder.layer.")
    expected = source_shapes(config, "cls.predictions.transform.dense.weight" in named)
    missing = [name for name in expected if name not in named]
    if missing:
        raise ValueError(f"source: expected the weights of a BERT, but it lacks {listed(missing, 8)}")
    optional = {"decoder.weight": "VE", "decoder.bias": "V", "bias": "V"}
    expected |= {f"cls.predictions.{name}": optional[name] for name in optional if f"cls.predictions.{name}" in named}
    sizes = {"E": config["hidden_size"], "F": config["intermediate_size"], "V": config["vocab_size"]}
    for name, letters in expected.items():
        # Any number of positions and token types is right.
        free = named[name].shape[0] if named[name].dim() else 0
        shape = [sizes.get(letter, free) for letter in letters]
        if list(named[name].shape) != shape:
            raise ValueError(f"source: {name} must have shape {shape}, got {list(named[name].shape)}")
    return named


def source_shapes(config: dict, has_head: bool) -> dict[str, str]:
    """List the weights that a BERT must have, with their shapes in the letters E, F, V and * (any number).

    Args:
        config: fields of the source's config.json.
        has_head: whether it has an MLM head.
    """
    modules = {"embeddings.LayerNorm": "E"}
    for layer in range(config["num_hidden_layers"]):
        inner = {f"attention.self.{part}": "EE" for part in ("query", "key", "value")}
        inner |= {"attention.output.dense": "EE", "attention.output.LayerNorm": "E"}
        inner |= {"intermediate.dense": "FE", "output.dense": "EF", "output.LayerNorm": "E"}
        modules |= {f"encoder.layer.{layer}.{name}": shape for name, shape in inner.items()}
    if has_head:
        modules |= {"cls.predictions.transform.dense": "EE", "cls.predictions.transform.LayerNorm": "E"}
    shapes = {f"embeddings.{kind}_embeddings.weight": "*E" for kind in ("position", "token_type")}
    shapes["embeddings.word_embeddings.weight"] = "VE"
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[0]}
    return shapes


def convert_embeddings(source: Weights) -> Weights:
    """Copy the embeddings under the target's names, and add the mean position embedding to each token type."""
    kept = ("word_embeddings.weight", "token_type_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")
    converted = {f"bert.embeddings.{name}": source[f"embeddings.{name}"] for name in kept}
    mean_position = source["embeddings.position_embeddings.weight"].mean(dim=0)
    types = "bert.embeddings.token_type_embeddings.weight"
    converted[types] = converted[types] + mean_position
    return converted


def convert_layer(source: Weights, old: int, new: int) -> Weights:
    """Convert layer `old` of the source to layer `new` of the target, except for `mlp.gated_layers.weight`."""
    there, here = f"encoder.layer.{old}.", f"bert.encoder.layer.{new}."
    converted = {}
    for kind in ("weight", "bias"):
        qkv = [source[f"{there}attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
        converted[f"{here}attention.self.Wqkv.{kind}"] = torch.cat(qkv)
        for name in ("attention.output.dense", "attention.output.LayerNorm"):
            converted[f"{here}{name}.{kind}"] = source[f"{there}{name}.{kind}"]
        converted[f"{here}mlp.wo.{kind}"] = source[f"{there}output.dense.{kind}"]
        converted[f"{here}mlp.layernorm.{kind}"] = source[f"{there}output.LayerNorm.{kind}"]
    return converted


def fit_constant(inputs: torch.Tensor, ridge: float) -> torch.Tensor:
    """Find the vector v whose dot product with every input is closest to 1, by least squares.

    An exact solution exists: (x − b) / w sums to zero over the channels of a LayerNorm output x with weight w and bias
    b, so v = (1/w) / Σ(b/w). Where Σ(b/w) is near zero that v is long, and long value rows are a poor start for
    training: in MiniLM's fourth layer its length is 138, while with a ridge of 1e-6 it is 16 and misses 1 by 0.03.

    Args:
        inputs: float32 [T, E].
        ridge: added to the diagonal of the normal equations, in units of its mean; 0 asks for the exact solution.

    Returns:
        float32 [E], solved in float64.

    Raises:
        ValueError: the ridge is too small for a single solution.
    """
    inputs = inputs.double()
    gram = inputs.T @ inputs
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    try:
        return torch.linalg.solve(gram, inputs.sum(dim=0)).float()
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"ridge: {ridge} leaves no single solution on {len(inputs)} tokens of text") from error


def fold_bias(weight: torch.Tensor, bias: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
    """Build the gate and value rows, which have no bias: gate = W1 + b1 vᵀ, value = v.

    Args:
        weight: float32 [F, E], W1.
        bias: float32 [F], b1.
        constant: float32 [E], v.

    Returns:
        float32 [2F, E], `gated_layers.weight`.
    """
    return torch.cat((weight + torch.outer(bias, constant), constant.expand_as(weight)))


def fit_block(mlp, hidden: torch.Tensor, dense: tuple[torch.Tensor, torch.Tensor], held_out, ridge: float):
    """Set the `gated_layers` of a gated block by a fit to its inputs.

    Args:
        mlp: the block.
        hidden: float32 [T, E], its inputs.
        dense: W1, float32 [F, E], and b1, float32 [F].
        held_out: bool [T], the tokens to report on; the fit uses the others.
        ridge: see `fit_constant`.

    Returns:
        The fields of a `LayerReport` after the first.
    """
    constant = fit_constant(hidden[~held_out], ridge)
    mlp.gated_layers.weight.copy_(fold_bias(*dense, constant))
    hidden = hidden[held_out]
    gate, value = mlp.gated_layers(hidden).chunk(2, dim=-1)
    new = mlp.wo(F.gelu(gate) * value)
    old = mlp.wo(F.gelu(F.linear(hidden, *dense)))
    ones = hidden @ constant
    errors = relative_error(new, old), relative_error(mlp.layernorm(new + hidden), mlp.layernorm(old + hidden))
    return ones.mean().item(), ones.std().item(), *errors


@torch.no_grad()
def fit_encoder(
    model, source: Weights, layers: list[int], windows: list[torch.Tensor], ridge: float
) -> list[LayerReport]:
    """Run the model once, and fit each feed-forward block to its input.

    Args:
        model: a MosaicBERT in eval mode with all of the source's weights except the gated layers.
        source: as `read_source` returns it.
        layers: the layer of the source that each layer of the model comes from.
        windows: int64 [S] token ids each; every fifth is held out.
        ridge: see `fit_constant`.
    """
    ids = pad_sequence(windows, batch_first=True)
    mask = pad_sequence([torch.ones_like(window) for window in windows], batch_first=True).bool()
    held_out = (torch.arange(len(windows)) % 5 == 0)[:, None].expand(mask.shape)[mask]
    reports = []

    def fit(old, mlp, args):
        dense = tuple(source[f"encoder.layer.{old}.intermediate.dense.{kind}"] for kind in ("weight", "bias"))
        reports.append(LayerReport(old, *fit_block(mlp, *args, dense, held_out, ridge)))

    for old, layer in zip(layers, model.bert.encoder.layer):
        layer.mlp.register_forward_pre_hook(partial(fit, old))
    model.bert(ids, attention_mask=mask)
    return reports


def relative_error(new: torch.Tensor, old: torch.Tensor) -> float:
    """Return ‖new − old‖ / ‖old‖ over all elements."""
    return ((new - old).norm() / old.norm()).item()


def convert_head(source: Weights) -> Weights:
    """Copy the source's MLM head under the target's names; raise ValueError if it is not tied to the embeddings."""
    embeddings = source["embeddings.word_embeddings.weight"]
    if not torch.equal(source.get("cls.predictions.decoder.weight", embeddings), embeddings):
        raise ValueError("source: its MLM decoder is not tied to its embeddings; MosaicBERT's is")
    bias = source.get("cls.predictions.bias", source.get("cls.predictions.decoder.bias"))
    head = {"cls.predictions.decoder.weight": embeddings}
    head["cls.predictions.decoder.bias"] = torch.zeros(len(embeddings)) if bias is None else bias
    for name in ("dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias"):
        head[f"cls.predictions.transform.{name}"] = source[f"cls.predictions.transform.{name}"]
    return head


def new_head(embeddings: torch.Tensor, counts: torch.Tensor) -> Weights:
    """Make a new MLM head, the target's `cls.…` tensors.

    Args:
        embeddings: float32 [V, E], the word embeddings.
        counts: int64 [V], how often each token occurs in the text.
    """
    width = embeddings.shape[1]
    return {
        "cls.predictions.decoder.weight": embeddings,
        "cls.predictions.decoder.bias": ((counts + 1) / (counts + 1).sum()).log().float(),
        "cls.predictions.transform.dense.weight": torch.eye(width),
        "cls.predictions.transform.dense.bias": torch.zeros(width),
        "cls.predictions.transform.LayerNorm.weight": torch.full((width,), 0.3),
        "cls.predictions.transform.LayerNorm.bias": torch.zeros(width),
    }


def token_counts(paths: list[str], tokenizer, length: int, num_tokens: int, vocab_size: int) -> torch.Tensor:
    """Count how often each token but the special ones occurs in the text of `read_windows`, int64 [V]."""
    windows = read_windows(paths, tokenizer, length, num_tokens)
    counts = torch.bincount(torch.tensor(list(itertools.chain(*windows))), minlength=vocab_size)
    counts[tokenizer.all_special_ids] = 0
    return counts


def read_windows(paths: list[str], tokenizer, length: int, num_tokens: int) -> list[list[int]]:
    """Cut text into windows, an equal share from each file.

    Args:
        paths: files for `read_texts`.
        tokenizer: a fast tokenizer.
        length: maximum number of tokens in a window, special tokens included.
        num_tokens: approximate number of tokens to read.

    Returns:
        Token ids of each window, special tokens included.

    Raises:
        ValueError: the files hold too little text, or `length` is too small.
    """
    if length < SHORTEST:
        raise ValueError(f"max_length: expected at least {SHORTEST} tokens, got {length}")
    windows = []
    for path in tqdm(paths, desc="text", unit="file", disable=None):
        quota = num_tokens / len(paths)
        for text in read_texts([path]):
            # Four windows of each document, so that no book fills its file's share.
            encoded = tokenizer(
                text[: 40 * length], max_length=length, truncation=True, return_overflowing_tokens=True, verbose=False
            )
            windows += encoded["input_ids"][:4]
            quota -= sum(map(len, encoded["input_ids"][:4]))
            if quota <= 0:
                break
    if len(windows) < 5:
        raise ValueError(f"data: expected at least 5 windows of text to fit on, got {len(windows)}")
    return windows


def convert_config(config: dict, num_layers: int, vocab_size: int, num_types: int) -> dict:
    """Choose the fields of the target's config from those of the source's.

    Raises:
        ValueError: the feed-forward activation is not exact GELU, or positions are not learned absolute ones.
    """
    for name, expected in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if config.get(name, expected) != expected:
            raise ValueError(f"source: expected {name} {expected}, got {config[name]!r}")
    kept = ("attention_probs_dropout_prob", "classifier_dropout", "hidden_dropout_prob", "hidden_size")
    kept += ("initializer_range", "intermediate_size", "layer_norm_eps", "num_attention_heads", "pad_token_id")
    fields = {name: config[name] for name in kept if name in config}
    return {**fields, "num_hidden_layers": num_layers, "vocab_size": vocab_size, "type_vocab_size": num_types}


def convert(
    source: Path,
    target: Path,
    texts: list[str],
    layers: Optional[list[int]] = None,
    multiple: int = 64,
    length: int = 128,
    tokens: int = 25_000,
    ridge: float = 1e-6,
) -> list[LayerReport]:
    """Convert one model folder into another.

    Args:
        source: a BERT's folder with its tokenizer.
        target: folder to fill; made when it does not exist.
        texts: files for `read_texts`.
        layers: the encoder layers to keep; None: all.
        multiple: the vocabulary size becomes a multiple of this.
        length: maximum number of tokens in a window of text.
        tokens: approximate number of tokens to fit and report on.
        ridge: see `fit_constant`.

    Raises:
        ValueError: the source is no BERT that can be converted, or lacks one of the `layers`.
    """
    if not (source / "config.json").is_file():
        raise ValueError(f"source: expected a config.json in {source}")
    config = read_json(file_inside(source, "config.json"))
    weights = read_source(load_weights(source), config)
    layers = list(range(config["num_hidden_layers"])) if layers is None else layers
    if not layers or min(layers) < 0 or max(layers) >= config["num_hidden_layers"]:
        raise ValueError(f"layers: expected numbers from 0 to {config['num_hidden_layers'] - 1}, got {layers}")
    target.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(source, target)
    write_json(target / "config.json", {"model_type": "bert"})  # for tokenizers that do not name their class
    tokenizer = load_tokenizer(target)
    entries = count_tokens(tokenizer, config["vocab_size"], "source")
    vocab_size = -(-config["vocab_size"] // multiple) * multiple
    num_types = len(weights["embeddings.token_type_embeddings.weight"])
    new_config = foreign_config(convert_config(config, len(layers), vocab_size, num_types))
    empty_model("BertForMaskedLM", new_config)
    model = repository_class("BertForMaskedLM")(new_config).eval()

    if "cls.predictions.transform.dense.weight" in weights:
        head = convert_head(weights)
    else:  # token frequencies need more text than the fit
        counts = token_counts(texts, tokenizer, length, 40 * tokens, config["vocab_size"])
        head = new_head(weights["embeddings.word_embeddings.weight"], counts)
    converted = {**convert_embeddings(weights), **head}
    for new, old in enumerate(layers):
        converted.update(convert_layer(weights, old, new))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in converted.items():
        parameters[name].data.zero_()[: len(tensor)].copy_(tensor)  # rows that pad the vocabulary become zero
    lower_unused_biases(model, entries)
    windows = [torch.tensor(window) for window in read_windows(texts, tokenizer, length, tokens)]
    reports = fit_encoder(model, weights, layers, windows, ridge)

    model.save_pretrained(target)
    say_float32(target)
    return reports
