"""What several scripts need: reading text and checkpoints, and writing a folder whole or not at all."""

import contextlib
import gzip
import itertools
import json
import os
import pickle
import shutil
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import torch
import yaml
from huggingface_hub import metadata_load, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

REPOSITORY = Path(__file__).resolve().parent.parent
CODE_FILES = (
    "configuration_bert.py",
    "bert_padding.py",
    "bert_attention.py",
    "flash_attn_triton.py",
    "bert_layers.py",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
)
# What a model repository holds, and the only files that are pushed.
MODEL_PATTERNS = (*CODE_FILES, *TOKENIZER_FILES, "config.json", "README.md", "LICENSE", "*.safetensors*")


def repository_class(name: str):
    """A class of this repository's model code, loaded the way the Hub's clients load it.

    Args:
        name: `BertConfig` or a model class.

    Returns:
        The class.
    """
    module = "configuration_bert" if name == "BertConfig" else "bert_layers"
    return get_class_from_dynamic_module(f"{module}.{name}", str(REPOSITORY))


def read_texts(paths: list[str]) -> Iterator[str]:
    """Read documents one at a time.

    Args:
        paths: files of JSON lines with a `text` field (`.jsonl`, `.json`) or plain text with one document a
            paragraph (any other name); either may be gzipped (`.gz`).

    Yields:
        The text of each document that is not empty, in the files' order.

    Raises:
        ValueError: a JSON line has no `text` string; names file and line.
    """
    for path in paths:
        opener = gzip.open if str(path).endswith(".gz") else open
        name = str(path).removesuffix(".gz")
        with opener(path, "rt", encoding="utf-8") as lines:
            if not name.endswith((".jsonl", ".json")):
                for filled, paragraph in itertools.groupby(lines, key=lambda line: bool(line.strip())):
                    if filled:
                        yield "".join(paragraph).strip()
                continue
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                    raise ValueError(
                        f"{path}, line {number}: expected an object with a string `text`, got {line[:60]!r}"
                    )
                if record["text"].strip():
                    yield record["text"]


def find_checkpoint(source: str, revision: Optional[str] = None) -> tuple[Path, Optional[str]]:
    """Bring a model repository to this machine.

    Args:
        source: a folder, or a Hub id (`owner/name`).
        revision: branch, tag or commit of a Hub id.

    Returns:
        The folder, and the commit that it holds (None for a folder that is no Hub snapshot).

    Raises:
        ValueError: `revision` was given for a folder.
    """
    folder = Path(source)
    if not folder.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") != 1:
            raise ValueError(f"source: expected a folder or a Hub id (owner/name), got {source!r}")
        folder = Path(snapshot_download(source, revision=revision))
    elif revision is not None:
        raise ValueError(f"revision: only a Hub id has revisions, but {source!r} is a folder")
    commit = folder.resolve().name if folder.resolve().parent.name == "snapshots" else None
    return folder, commit


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a model folder, sharded or whole, safetensors before pickle.

    Args:
        folder: holds `model.safetensors` or `pytorch_model.bin`, or the `.index.json` of either with its shards.

    Returns:
        Name to tensor, on CPU; a LayerNorm's are `weight` and `bias` where old files say `gamma` and `beta`. Pickles
        are opened with `weights_only=True`.

    Raises:
        ValueError: no weights, a shard is missing, or a file is damaged or holds more than tensors.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            shards = [name]
        elif index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            continue
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ValueError(f"{folder}: {index.name} names shards that are not there: {', '.join(missing)}")
        weights = {}
        for shard in shards:
            try:
                if shard.endswith(".safetensors"):
                    weights.update(load_file(folder / shard))
                else:
                    weights.update(torch.load(folder / shard, map_location="cpu", weights_only=True))
            except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
                raise ValueError(f"{folder / shard}: cannot be read, {str(error).splitlines()[0]}") from error
        legacy = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
        for old, new in legacy.items():
            weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
        return weights
    raise ValueError(f"{folder}: expected model.safetensors or pytorch_model.bin, or the index of their shards")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files that exist, without their limits on length."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    lift_limits(target)


def lift_limits(folder: Path) -> None:
    """Remove limits on length from tokenizer files: ALiBi has no longest input, and padding is the caller's choice."""
    limits_of = {"tokenizer.json": ("truncation", "padding"), "tokenizer_config.json": ("model_max_length",)}
    for name, limits in limits_of.items():
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            for limit in limits:
                content.pop(limit, None)
            write_json(folder / name, content)


def write_card(
    target: Path, source: str, folder: Path, revision: Optional[str], made: str, license: Optional[str], notes: str = ""
) -> None:
    """Write the README.md of a model that was made from another one.

    Args:
        target: the new model's folder.
        source: Hub id, folder or file that it was made from; of a local path only the name is told.
        folder: where the source's own README.md may lie.
        revision: commit of the source, None when unknown.
        made: how it was made, one sentence.
        license: identifier such as `apache-2.0`; None: what the source's card says, or `unknown`.
        notes: Markdown to end with.
    """
    is_hub_id = not Path(source).exists()
    name = source if is_hub_id else Path(source).resolve().name
    card = folder / "README.md"
    stated = (metadata_load(card) or {}) if card.is_file() else {}
    license = license or stated.get("license") or "unknown"
    metadata = {"library_name": "transformers", "tags": ["mosaicbert"], **({"base_model": name} if is_hub_id else {})}
    if license != "unknown":
        metadata["license"] = license
    template = string.Template((REPOSITORY / "scripts" / "card_template.md").read_text(encoding="utf-8"))
    text = template.substitute(
        metadata=yaml.safe_dump(metadata, sort_keys=True).strip(),
        title=f"{name.split('/')[-1]} as MosaicBERT",
        source=f"[{name}](https://huggingface.co/{name})" if is_hub_id else f"`{name}`, a local file or folder",
        revision=f"`{revision}`" if revision else "unknown",
        license=license,
        made=made,
        notes=f"\n{notes.strip()}\n" if notes else "",
    )
    (target / "README.md").write_text(text.rstrip() + "\n", encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file as transformers does: sorted, two spaces, a newline at the end."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def staged_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Offer an empty folder beside the target, which takes the target's place when the block ends well.

    Args:
        target: the folder to make.
        overwrite: replace a target that exists and is not empty.

    Yields:
        The folder to write to. It is removed when the block raises; the target is then as it was.

    Raises:
        ValueError: the target is there already and `overwrite` is not set.
    """
    target = Path(target).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not overwrite:
        raise ValueError(f"target: {target} exists and is not an empty folder; pass --overwrite to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        content = stage / "new"
        content.mkdir()
        yield content
        if target.exists():
            os.rename(target, stage / "old")
        os.rename(content, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
