"""Export a checkpoint of the MosaicBERT family to the files of other engines: the work behind export.py."""

import argparse
import copy
import importlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from .cards import write_card
from .checkpoint_conversion import build_model, read_checkpoint, write_tokenizer
from .common import LIMITS, count_tokens, lower_unused_biases, read_json, write_json

# Lengths of the texts in the batches on which source and target are compared: one token, one text, ragged, long.
CHECKED_BATCHES = ((1,), (130,), (9, 1, 40), (3, 64, 1, 200, 17), (2048,))
# The largest relative root-mean-square error that rounding explains, by the type of the weights.
FARTHEST = {"float32": 1e-4, "float16": 1e-2, "int8": 0.3}
# The pipeline of each model class, as the Hub and transformers.js call it.
TASKS = {
    "BertModel": "feature-extraction",
    "BertForMaskedLM": "fill-mask",
    "BertForSequenceClassification": "text-classification",
    "BertForTokenClassification": "token-classification",
    "BertForQuestionAnswering": "question-answering",
}
# The model classes that the engines of each format support; none has a pipeline for multiple choice.
SUPPORTED = {"onnx": tuple(TASKS), "gguf": ("BertModel",)}


class File(NamedTuple):
    """A file of an export.

    Attributes:
        name: its path in the target.
        kind: a key of `FARTHEST`.
        size: bytes.
        found: the result of `Comparison.check`.
    """

    name: str
    kind: str
    size: int
    found: str


class Comparison:
    """Compares the outputs of files with those of their source, on random tokens in `CHECKED_BATCHES`.

    Args:
        model: the source, float32, in eval mode.
        num_tokens: vocabulary rows with a token; the scores of the others are ignored.
    """

    @torch.inference_mode()
    def __init__(self, model: torch.nn.Module, num_tokens: int):
        self.last = num_tokens if type(model).__name__ == "BertForMaskedLM" else None
        self.batches, self.expected = [], []
        generator = torch.Generator().manual_seed(0)
        for lengths in CHECKED_BATCHES:
            shape = (len(lengths), max(lengths))
            mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
            ids = torch.randint(num_tokens, shape, generator=generator) * mask
            types = torch.randint(model.config.type_vocab_size, shape, generator=generator) * mask
            self.batches.append((ids, mask, types))
            self.expected.append(model(ids, mask, types, return_dict=False))

    @torch.inference_mode()
    def check(self, kind: str, answer: Callable) -> str:
        """Compare a file with the source, and describe the difference in words.

        Args:
            kind: a key of `FARTHEST`.
            answer: a function from `input_ids`, `attention_mask` and `token_type_ids`, int64 [B, S], to the first
                outputs of the model, or all.

        Raises:
            ValueError: the outputs differ by more than rounding explains.
        """
        largest = farthest = 0.0
        for batch, expected in zip(self.batches, self.expected):
            for output, truth in zip(answer(*batch), expected):
                output, truth = output[..., : self.last], truth[..., : self.last]
                difference = (output - truth).abs()
                distance = (difference.square().mean() / truth.square().mean()).sqrt().item()
                if not distance <= FARTHEST[kind]:  # true for NaN too
                    raise ValueError(
                        f"types: {kind} changes the outputs by {distance:.1e} of their root mean square, more than "
                        f"{FARTHEST[kind]:.0e}; leave it out"
                    )
                farthest = max(farthest, distance)
                largest = max(largest, (difference.max() / truth.abs().max()).item())
        return f"outputs differ by {farthest:.1e} of their root mean square, at most by {largest:.1e} of the largest"


def export(options: argparse.Namespace, target: Path) -> list[str]:
    """Export one checkpoint.

    Args:
        options: of the command line of export.py.
        target: folder to fill.

    Returns:
        Lines that report what was done and found.

    Raises:
        ValueError: the source cannot be exported, or a file gives other answers.
    """
    format, name, types = options.format, options.target.resolve().name, list(dict.fromkeys(options.types))
    importlib.import_module(f".{format}_export", __package__)  # a missing package is reported before the work starts
    checkpoint = read_checkpoint(options.source, options.revision)
    words = write_tokenizer(checkpoint, options.tokenizer, target)
    if words is None:
        raise ValueError("source: it holds no tokenizer; pass --tokenizer")
    model = build_model(checkpoint)[0].float()
    architecture = type(model).__name__
    if options.features or (format == "gguf" and architecture == "BertForMaskedLM"):
        model = model.base_model
    if type(model).__name__ not in SUPPORTED[format]:
        raise ValueError(
            f"source: {format.upper()} does not support the head of a {architecture}; --features exports its encoder"
        )
    num_tokens = count_tokens(words, model.config.vocab_size, "tokenizer" if options.tokenizer else "source")
    if type(model).__name__ == "BertForMaskedLM":
        lower_unused_biases(model, num_tokens)
    comparison = Comparison(model, num_tokens)
    if format == "onnx":
        files = write_onnx(model, words, target, types, options.chunked, comparison)
    else:
        files = write_gguf(model, words, target, name, types, comparison)
    task = TASKS[type(model).__name__]
    limit = model.config.max_position_embeddings
    rows = "\n".join(f"| `{file}` | {kind} | {size / 1e6:,.1f} MB | {found} |" for file, kind, size, found in files)
    library = {"onnx": "transformers.js", "gguf": "gguf"}[format]
    write_card(
        target,
        f"`scripts/export.py --format {format}`",
        options.source,
        checkpoint.folder,
        checkpoint.revision,
        options.license,
        title=f"{name} in {format.upper()}",
        template=f"card_{format}.md",
        metadata={"library_name": library, "pipeline_tag": task, "tags": ["mosaicbert", format]},
        task=task,
        files=rows,
        file=files[0].name,
        limit=f"{limit:,}",
    )
    lines = [f"{file}: {kind}, {size / 1e6:,.1f} MB, {found}" for file, kind, size, found in files]
    if architecture == "BertForMaskedLM" and model.base_model is model:
        lines.append("the MLM head is left out: the files give hidden states and embeddings")
    return [*lines, f"texts of up to {limit:,} tokens"]


def write_onnx(model, tokenizer, target: Path, types: list[str], chunked: bool, comparison: Comparison) -> list[File]:
    """Write the ONNX files of a model, one for each type, and the config and tokenizer that their engines read.

    Raises:
        ValueError: a file gives other answers than the model.
    """
    import onnx

    from .onnx_export import CONVERTED, FILES, onnx_session, to_onnx

    limit = model.config.max_position_embeddings
    fields = model.config.to_dict()
    for field in ("auto_map", "_name_or_path", "architectures", "dtype", "torch_dtype"):
        fields.pop(field, None)
    write_json(target / "config.json", fields)
    if not all((target / file).is_file() for file in LIMITS):
        tokenizer.save_pretrained(target)  # transformers.js reads only these two
    settings = read_json(target / "tokenizer_config.json")
    write_json(target / "tokenizer_config.json", {**settings, "model_max_length": limit})
    (target / "onnx").mkdir()
    whole, files = to_onnx(model, chunked), []
    for kind in types:
        path = target / "onnx" / FILES[kind]
        onnx.save(CONVERTED[kind](whole), path)
        found = comparison.check(kind, onnx_session(path))
        files.append(File(f"onnx/{path.name}", kind, path.stat().st_size, found))
    return files


def write_gguf(model, tokenizer, target: Path, name: str, types: list[str], comparison: Comparison) -> list[File]:
    """Write the GGUF files of a `BertModel`, one for each type, remove all other files, and read the new ones back.

    Raises:
        ValueError: the format does not support the tokenizer or the sizes, or a file holds other weights.
    """
    from .gguf_export import LABELS, read_gguf, to_gguf

    for path in target.iterdir():  # a GGUF file holds the vocabulary too
        path.unlink()
    stem, files = re.sub(r"[^\w.-]", "_", name), []
    reader = copy.deepcopy(model)
    for kind in types:
        path = target / f"{stem}-{LABELS[kind]}.gguf"
        to_gguf(model, tokenizer, path, kind, name)
        for parameter in reader.parameters():
            parameter.data.fill_(math.nan)  # a weight that the file lacks must not stay the source's
        reader.load_state_dict(read_gguf(path), strict=False)
        found = comparison.check(kind, lambda *batch: reader(*batch, return_dict=False)[:1])
        files.append(File(path.name, kind, path.stat().st_size, found))
    return files
