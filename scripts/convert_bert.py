#!/usr/bin/env python3
"""Turn any Hugging Face BERT into a MosaicBERT to train on from: a warm start.

Attention: query, key and value merge into `Wqkv`. Positions: ALiBi takes the place of the position embedding, whose
mean goes into the token types. Feed-forward: MosaicBERT multiplies gelu(gate) by a value and has no bias, BERT has a
bias and no value. On every LayerNorm output x some vector v has v·x close to 1, so that with

    gate rows = W1 + b1 vᵀ        value rows = v

the new block computes gelu(W1 x + b1 (v·x)) · (v·x), almost what the old one did. v is fitted by least squares on the
text given with --text, layer by layer, on what the new model itself feeds to that layer. A fifth of the text is kept
out of the fit; the report is about that fifth.

The MLM head is the source's. Without one, the decoder is tied to the embeddings, its bias is the log of how often each
token occurs in the text, and the transform is the identity with a LayerNorm scale of 0.3: measured on MiniLM, answers
then start near the frequencies and leave them sooner than with a scale of 1 or a random transform.

    convert_bert.py bert-base-uncased my-warm-start --text corpus/*.jsonl.gz
    convert_bert.py ./MiniLM my-warm-start --text corpus/*.jsonl.gz --layers 0 1 2 3 --pad-vocab 64
"""

import argparse
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from common import (
    copy_tokenizer,
    find_checkpoint,
    load_weights,
    read_texts,
    repository_class,
    staged_folder,
    write_card,
)
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoTokenizer

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LayerReport:
    """How well one feed-forward block kept its function, on text that the fit has not seen.

    Attributes:
        layer: number of the layer in the source.
        mean: of v·x over the tokens; 1 would be exact.
        std: of v·x over the tokens; 0 would be exact.
        inner_error: ‖new − old‖ / ‖old‖ of the feed-forward output, before residual and LayerNorm.
        block_error: the same after them, which is what the next layer sees.
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


def read_source(weights: Weights, num_layers: int) -> Weights:
    """Give a BERT state dict the names that this script reads.

    Args:
        weights: as `load_weights` returns it, with or without `bert.`.
        num_layers: encoder layers that must be there.

    Returns:
        float32 tensors; encoder names without `bert.`, the MLM head as `cls.predictions.…`.

    Raises:
        ValueError: this is no BERT, or a part of one; names what is missing.
    """
    named = {}
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            named[name.removeprefix("module.").removeprefix("bert.")] = tensor.float()
    modules = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    modules += ["attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"]
    modules = [f"encoder.layer.{layer}.{module}" for layer in range(num_layers) for module in modules]
    needed = [f"{module}.{kind}" for module in ("embeddings.LayerNorm", *modules) for kind in ("weight", "bias")]
    needed += [f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
    missing = [name for name in needed if name not in named]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise ValueError(f"source: expected the weights of a BERT, but it lacks {', '.join(missing[:8])}{more}")
    return named


def convert_embeddings(source: Weights) -> Weights:
    """Take the embeddings over, the mean position embedding added to each token type.

    Args:
        source: as `read_source` returns it.

    Returns:
        The embeddings' tensors under the target's names.
    """
    kept = ("word_embeddings.weight", "token_type_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")
    converted = {f"bert.embeddings.{name}": source[f"embeddings.{name}"] for name in kept}
    mean_position = source["embeddings.position_embeddings.weight"].mean(dim=0)
    types = "bert.embeddings.token_type_embeddings.weight"
    converted[types] = converted[types] + mean_position
    return converted


def convert_layer(source: Weights, old: int, new: int) -> Weights:
    """Convert all of an encoder layer but its feed-forward gate and value.

    Args:
        source: as `read_source` returns it.
        old: number of the layer in the source.
        new: number of the layer in the target.

    Returns:
        The layer's tensors under the target's names, `mlp.gated_layers.weight` missing.
    """
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
    """Find the vector v whose product with every input is as close to 1 as can be, by least squares.

    An exact solution exists: (x − b) / w sums to zero over the channels of a LayerNorm output x with weight w and bias
    b, so v = (1/w) / Σ(b/w). Where Σ(b/w) is near zero that v is long, and long value rows are no good start for
    training: in MiniLM's fourth layer its length is 138, while with a ridge of 1e-6 it is 16 and misses 1 by 0.03.

    Args:
        inputs: float32 [T, E].
        ridge: added to the diagonal of the normal equations, in units of its mean; 0 asks for the exact solution.

    Returns:
        float32 [E]. Solved in float64.

    Source: ours.
    """
    inputs = inputs.double()
    gram = inputs.T @ inputs
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.solve(gram, inputs.sum(dim=0)).float()


def fold_bias(weight: torch.Tensor, bias: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
    """Build the bias-free gate and value rows: gate = W1 + b1 vᵀ, value = v.

    Args:
        weight: float32 [F, E], W1.
        bias: float32 [F], b1.
        constant: float32 [E], v.

    Returns:
        float32 [2F, E], `gated_layers.weight`.
    """
    return torch.cat((weight + torch.outer(bias, constant), constant.expand_as(weight)))


class GatedLayerFit:
    """Fits a feed-forward block when its first input arrives, then lets it run: a forward pre-hook.

    Args:
        layer: number of the layer in the source.
        weight: float32 [F, E], W1.
        bias: float32 [F], b1.
        held_out: bool [T], the tokens to report on; the others are fitted.
        ridge: see `fit_constant`.
    """

    def __init__(self, layer: int, weight: torch.Tensor, bias: torch.Tensor, held_out: torch.Tensor, ridge: float):
        self.layer, self.weight, self.bias, self.held_out, self.ridge = layer, weight, bias, held_out, ridge
        self.report: Optional[LayerReport] = None

    def __call__(self, mlp, args) -> None:
        (hidden,) = args  # [T, E]
        constant = fit_constant(hidden[~self.held_out], self.ridge)
        mlp.gated_layers.weight.copy_(fold_bias(self.weight, self.bias, constant))
        hidden = hidden[self.held_out]
        gate, value = mlp.gated_layers(hidden).chunk(2, dim=-1)
        new = mlp.wo(F.gelu(gate) * value)
        old = mlp.wo(F.gelu(F.linear(hidden, self.weight, self.bias)))
        products = hidden @ constant
        self.report = LayerReport(
            self.layer,
            products.mean().item(),
            products.std().item(),
            relative_error(new, old),
            relative_error(mlp.layernorm(new + hidden), mlp.layernorm(old + hidden)),
        )


@torch.no_grad()
def fit_encoder(
    model, source: Weights, layers: list[int], windows: list[torch.Tensor], ridge: float
) -> list[LayerReport]:
    """Run the model on text once, and fit each feed-forward block on what reaches it.

    Args:
        model: a MosaicBERT with all of the source's weights but the gated layers'; in eval mode.
        source: as `read_source` returns it.
        layers: which layer of the source each layer of the model comes from.
        windows: int64 [S] token ids each; every fifth is kept out of the fit.
        ridge: see `fit_constant`.

    Returns:
        A report a layer.
    """
    ids = pad_sequence(windows, batch_first=True)
    mask = pad_sequence([torch.ones_like(window) for window in windows], batch_first=True).bool()
    held_out = (torch.arange(len(windows)) % 5 == 0)[:, None].expand(mask.shape)[mask]
    fits = []
    for old, layer in zip(layers, model.bert.encoder.layer):
        dense = f"encoder.layer.{old}.intermediate.dense."
        fits.append(GatedLayerFit(old, source[f"{dense}weight"], source[f"{dense}bias"], held_out, ridge))
        layer.mlp.register_forward_pre_hook(fits[-1])
    model.bert(ids, attention_mask=mask)
    return [fit.report for fit in fits]


def relative_error(new: torch.Tensor, old: torch.Tensor) -> float:
    """‖new − old‖ / ‖old‖ over all elements."""
    return ((new - old).norm() / old.norm()).item()


def convert_head(source: Weights) -> Weights:
    """Take the source's MLM head over.

    Args:
        source: as `read_source` returns it, with a head.

    Returns:
        The target's `cls.…` tensors.

    Raises:
        ValueError: the source's decoder is not tied to its embeddings.
    """
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
    """Make an MLM head to start from.

    Args:
        embeddings: float32 [V, E], the word embeddings.
        counts: int64 [V], how often each token occurs in the text.

    Returns:
        The target's `cls.…` tensors.
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


def count_tokens(paths: list[str], tokenizer, length: int, num_tokens: int, vocab_size: int) -> torch.Tensor:
    """Count how often each token occurs in text; arguments as for `read_windows`, and V.

    Returns:
        int64 [V], zero for special tokens.
    """
    windows = read_windows(paths, tokenizer, length, num_tokens)
    counts = torch.bincount(torch.tensor(list(itertools.chain(*windows))), minlength=vocab_size)
    counts[tokenizer.all_special_ids] = 0
    return counts


def read_windows(paths: list[str], tokenizer, length: int, num_tokens: int) -> list[list[int]]:
    """Cut text into windows, an equal share from every file.

    Args:
        paths: files for `read_texts`.
        tokenizer: a fast tokenizer.
        length: tokens a window at most, special tokens included.
        num_tokens: how many to read, about.

    Returns:
        Token ids of each window, special tokens included.

    Raises:
        ValueError: the files hold too little text.
    """
    windows = []
    for path in tqdm(paths, desc="text", unit="file"):
        quota = num_tokens / len(paths)
        for text in read_texts([path]):
            # Four windows a document, lest one book fill its file's share.
            encoded = tokenizer(
                text[: 40 * length], max_length=length, truncation=True, return_overflowing_tokens=True, verbose=False
            )
            windows += encoded["input_ids"][:4]
            quota -= sum(map(len, encoded["input_ids"][:4]))
            if quota <= 0:
                break
    if len(windows) < 5:
        raise ValueError(f"text: expected at least 5 windows of text to fit on, got {len(windows)}")
    return windows


def convert_config(config: dict, num_layers: int, vocab_size: int) -> dict:
    """Choose the fields of the target's config.

    Args:
        config: the source's config.json.
        num_layers: L.
        vocab_size: V, padded.

    Returns:
        Arguments for MosaicBERT's `BertConfig`.

    Raises:
        ValueError: the source has another feed-forward activation than the exact GELU, or other positions than learned
            absolute ones.
    """
    for name, expected in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if config.get(name, expected) != expected:
            raise ValueError(f"source: expected {name} {expected}, got {config[name]!r}")
    kept = ("attention_probs_dropout_prob", "classifier_dropout", "hidden_dropout_prob", "hidden_size")
    kept += ("initializer_range", "intermediate_size", "layer_norm_eps", "num_attention_heads", "pad_token_id")
    kept += ("type_vocab_size",)
    fields = {name: config[name] for name in kept if name in config}
    return {**fields, "num_hidden_layers": num_layers, "vocab_size": vocab_size}


@torch.no_grad()
def load_rows(model, weights: Weights) -> None:
    """Copy weights into a model whose vocabulary may be longer; its further rows become zero.

    Args:
        model: a MosaicBERT.
        weights: some of its tensors, by name.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in weights.items():
        parameters[name].zero_()[: len(tensor)].copy_(tensor)


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
        layers: which encoder layers to keep; None: all.
        multiple: the vocabulary size becomes a multiple of this.
        length: tokens a window of text at most.
        tokens: how many tokens to fit and report on, about.
        ridge: see `fit_constant`.

    Returns:
        A report a layer.

    Raises:
        ValueError: the source is no BERT that can be converted, or `layers` names one that it lacks.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    weights = read_source(load_weights(source), config["num_hidden_layers"])
    layers = list(range(config["num_hidden_layers"])) if layers is None else layers
    if not layers or min(layers) < 0 or max(layers) >= config["num_hidden_layers"]:
        raise ValueError(f"layers: expected numbers from 0 to {config['num_hidden_layers'] - 1}, got {layers}")
    tokenizer = AutoTokenizer.from_pretrained(source)
    vocab_size = -(-config["vocab_size"] // multiple) * multiple
    model_config = repository_class("BertConfig")(**convert_config(config, len(layers), vocab_size))
    model = repository_class("BertForMaskedLM")(model_config).eval()

    if "cls.predictions.transform.dense.weight" in weights:
        head = convert_head(weights)
    else:  # frequencies need more text than the fit of E numbers
        counts = count_tokens(texts, tokenizer, length, 40 * tokens, config["vocab_size"])
        head = new_head(weights["embeddings.word_embeddings.weight"], counts)
    converted = {**convert_embeddings(weights), **head}
    for new, old in enumerate(layers):
        converted.update(convert_layer(weights, old, new))
    load_rows(model, converted)
    model.silence_dead_slots(len(tokenizer))
    windows = [torch.tensor(window) for window in read_windows(texts, tokenizer, length, tokens)]
    reports = fit_encoder(model, weights, layers, windows, ridge)

    model.save_pretrained(target)  # makes the folder
    copy_tokenizer(source, target)
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder or Hub id of a BERT")
    parser.add_argument("target", type=Path, help="folder to make")
    parser.add_argument(
        "--text", nargs="+", required=True, metavar="FILE", help="text, or JSON lines with a `text`; .gz too"
    )
    parser.add_argument("--layers", nargs="+", type=int, metavar="N", help="encoder layers to keep (default: all)")
    parser.add_argument(
        "--pad-vocab", type=int, default=64, metavar="N", help="make the vocabulary a multiple of N (default: 64)"
    )
    parser.add_argument("--length", type=int, default=128, help="tokens a window of text (default: 128)")
    parser.add_argument("--tokens", type=int, default=25_000, help="tokens to fit and report on (default: 25000)")
    parser.add_argument("--ridge", type=float, default=1e-6, help="shortens v; 0: exact, maybe long (default: 1e-6)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--license", help="licence for the card (default: what the source's card says)")
    parser.add_argument("--overwrite", action="store_true", help="replace a target that exists")
    args = parser.parse_args()
    try:
        folder, commit = find_checkpoint(args.source, args.revision)
        with staged_folder(args.target, args.overwrite) as stage:
            reports = convert(
                folder, stage, args.text, args.layers, args.pad_vocab, args.length, args.tokens, args.ridge
            )
            report = "\n".join(map(str, reports))
            made = "`scripts/convert_bert.py`: a warm start, not trained since"
            write_card(stage, args.source, folder, commit, made, args.license, f"## Fit\n\n```\n{report}\n```")
        print(report)
    except (ValueError, OSError) as error:
        sys.exit(f"convert_bert.py: {error}")


if __name__ == "__main__":
    main()
