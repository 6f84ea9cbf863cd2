"""From a checkpoint of the MosaicBERT family to the files of other engines: what export.py does once it has parsed its
command line."""

import copy
import importlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Optional

import torch

from .cards import write_card
from .checkpoint_conversion import build_model, read_checkpoint, write_tokenizer
from .common import LIMITS, count_tokens, lower_unused_biases, read_json, write_json

# Lengths of the texts in the batches that source and target are compared on: one token, one text, ragged, long.
CHECKED_BATCHES = ((1,), (130,), (9, 1, 40), (3, 64, 1, 200, 17), (2048,))
# Largest distance of outputs from the source's, as root mean squares; beyond it they are wrong, not rounded.
FARTHEST = {"float32": 1e-4, "float16": 1e-2, "int8": 0.3}
# Model classes to the pipelines that they serve, as the Hub and transformers.js call them.
TASKS = {
    "BertModel": "feature-extraction",
    "BertForMaskedLM": "fill-mask",
    "BertForSequenceClassification": "text-classification",
    "BertForTokenClassification": "token-classification",
    "BertForQuestionAnswering": "question-answering",
}
# The model classes that the engines of each format support. None of their pipelines takes the several texts of a
# multiple choice.
SUPPORTED = {"onnx": tuple(TASKS), "gguf": ("BertModel",)}


class File(NamedTuple):
    """A file of an export.

    Attributes:
        name: its path in the target.
        kind: a key of `FARTHEST`.
        size: bytes.
        found: what the comparison with the source found, in words.
    """

    name: str
    kind: str
    size: int
    found: str


class Comparison:
    """Compares the outputs of files with those of their source, on random tokens in `CHECKED_BATCHES`.

    Args:
        model: the source, float32, in eval mode.
        num_tokens: rows of the vocabulary that have a token; the scores of the others are ignored.
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
        """Compare a file.

        Args:
            kind: a key of `FARTHEST`.
            answer: takes `input_ids`, `attention_mask` and `token_type_ids`, int64 [B, S], and returns the first
                outputs of the model, or all.

        Returns:
            What was found, in words.

        Raises:
            ValueError: the outputs differ by more than rounding explains.
        """
        largest = farthest = 0.0
        for batch, expected in zip(self.batches, self.expected):
            for output, truth in zip(answer(*batch), expected):
                output, truth = output[..., : self.last], truth[..., : self.last]
                difference = (output - truth).abs()
                distance = (difference.square().mean() / truth.square().mean()).sqrt().item()
                if not distance <= FARTHEST[kind]:  # NaN is not
                    raise ValueError(
                        f"types: {kind} changes the outputs by {distance:.1e} of their root mean square, over "
                        f"{FARTHEST[kind]:.0e}; leave it out"
                    )
                farthest = max(farthest, distance)
                largest = max(largest, (difference.max() / truth.abs().max()).item())
        return f"outputs differ by {farthest:.1e} of their root mean square, at most by {largest:.1e} of the largest"


def export(
    source: str,
    target: Path,
    format: str,
    name: str,
    types: list[str],
    features: bool = False,
    chunked: bool = False,
    tokenizer: Optional[str] = None,
    revision: Optional[str] = None,
    license: Optional[str] = None,
) -> list[str]:
    """Export one checkpoint.

    Args:
        source: Hub id, folder, or Composer file.
        target: folder to fill.
        format: `onnx` or `gguf`.
        name: of the model, for the names of GGUF files and for the card.
        types: keys of `FARTHEST`, one file each.
        features: export the encoder without its head.
        chunked: ONNX: attend from some queries at a time.
        tokenizer: Hub id or folder of a tokenizer to take instead of the source's.
        revision: of a Hub id.
        license: for the card; None: what the source's card says.

    Returns:
        What was done and found, a line each.

    Raises:
        ValueError: the source cannot be exported, or a file gives other answers.
    """
    importlib.import_module(f".{format}_export", __package__)  # a missing package is reported before the work starts
    checkpoint = read_checkpoint(source, revision)
    words = write_tokenizer(checkpoint, tokenizer, target)
    if words is None:
        raise ValueError("source: it holds no tokenizer; pass --tokenizer")
    if checkpoint.config.get("pad_token_id") is None:
        checkpoint.config["pad_token_id"] = words.pad_token_id
    model = build_model(checkpoint)[0].float()
    architecture = type(model).__name__
    if features or (format == "gguf" and architecture == "BertForMaskedLM"):
        model = model.base_model
    if type(model).__name__ not in SUPPORTED[format]:
        raise ValueError(
            f"source: {format.upper()} does not support the head of a {architecture}; --features exports its encoder"
        )
    num_tokens = count_tokens(words, model.config.vocab_size, "tokenizer" if tokenizer else "source")
    if type(model).__name__ == "BertForMaskedLM":
        lower_unused_biases(model, num_tokens)
    comparison = Comparison(model, num_tokens)
    if format == "onnx":
        files = write_onnx(model, words, target, types, chunked, comparison)
    else:
        files = write_gguf(model, words, target, name, types, comparison)
    task = TASKS[type(model).__name__]
    limit = model.config.max_position_embeddings
    rows = "\n".join(f"| `{file}` | {kind} | {size / 1e6:,.1f} MB | {found} |" for file, kind, size, found in files)
    made = f"`scripts/export.py --format {format}`"
    metadata = {"library_name": {"onnx": "transformers.js", "gguf": "gguf"}[format], "pipeline_tag": task}
    write_card(
        target,
        made,
        source,
        checkpoint.folder,
        checkpoint.revision,
        license,
        title=f"{name} in {format.upper()}",
        template=f"card_{format}.md",
        metadata={**metadata, "tags": ["mosaicbert", format]},
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
    """Write the ONNX files of a model, and the config and tokenizer that their engines read.

    Args:
        model: of a class of `TASKS`.
        tokenizer: of the model.
        target: the folder, with the tokenizer's files.
        types: keys of `FARTHEST`.
        chunked: attend from some queries at a time.
        comparison: with the model.

    Returns:
        The files.

    Raises:
        ValueError: a file gives other answers.
    """
    import onnx

    from .onnx_export import CONVERTED, FILES, onnx_session, to_onnx

    limit = model.config.max_position_embeddings
    fields = model.config.to_dict()
    for field in ("auto_map", "_name_or_path", "architectures", "dtype", "torch_dtype"):
        fields.pop(field, None)
    write_json(target / "config.json", fields)
    if not all((target / file).is_file() for file in LIMITS):
        tokenizer.save_pretrained(target)  # transformers.js reads no others
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
    """Write the GGUF files of an encoder, and read them back.

    Args:
        model: a `BertModel`.
        tokenizer: of the model.
        target: the folder; other files in it are removed.
        name: of the model.
        types: keys of `FARTHEST`.
        comparison: with the model.

    Returns:
        The files.

    Raises:
        ValueError: the format does not support the tokenizer or the sizes, or a file holds other weights.
    """
    from .gguf_export import LABELS, read_gguf, to_gguf

    for path in target.iterdir():  # the vocabulary is inside
        path.unlink()
    stem, files = re.sub(r"[^\w.-]", "_", name), []
    reader = copy.deepcopy(model)
    for kind in types:
        path = target / f"{stem}-{LABELS[kind]}.gguf"
        to_gguf(model, tokenizer, path, kind, name)
        for parameter in reader.parameters():
            parameter.data.fill_(math.nan)  # a weight that the file lacks must not be the source's
        reader.load_state_dict(read_gguf(path), strict=False)
        found = comparison.check(kind, lambda *batch: reader(*batch, return_dict=False)[:1])
        files.append(File(path.name, kind, path.stat().st_size, found))
    return files
