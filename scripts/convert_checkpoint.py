#!/usr/bin/env python3
"""Turn a published MosaicBERT-family checkpoint, or Composer's, into a complete repository with this code.

SOURCE is a Hub id or a folder of any repository of the family (mosaic-bert-base, DNABERT-2, their fine-tuned
descendants, …), or a Composer checkpoint (`.pt`) together with the config and tokenizer that Composer put into it, or
that lie beside it. TARGET gets the code, safetensors, config.json with the full `auto_map`, the tokenizer and a card.
Weights keep their values and dtype. Vocabulary slots beyond the tokenizer's vocabulary are never predicted afterwards.

    convert_checkpoint.py mosaicml/mosaic-bert-base my-mosaic-bert --tokenizer bert-base-uncased --verify
    convert_checkpoint.py runs/ep1-ba70000-rank0.pt my-mosaic-bert --verify --text validation.jsonl.gz
    convert_checkpoint.py ./my-bert my-padded-bert --pad-vocab 64
"""

import argparse
import json
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy
import torch
import transformers
from common import (
    TOKENIZER_FILES,
    copy_tokenizer,
    find_checkpoint,
    lift_limits,
    load_weights,
    read_texts,
    repository_class,
    staged_folder,
    write_card,
)
from transformers import AutoTokenizer

Weights = dict[str, torch.Tensor]

MODEL_CLASSES = {
    "BertModel": "AutoModel",
    "BertForMaskedLM": "AutoModelForMaskedLM",
    "BertForSequenceClassification": "AutoModelForSequenceClassification",
    "BertForTokenClassification": "AutoModelForTokenClassification",
    "BertForQuestionAnswering": "AutoModelForQuestionAnswering",
    "BertForMultipleChoice": "AutoModelForMultipleChoice",
}
HEAD_PREFIXES = ("cls.", "classifier.", "qa_outputs.")
DECODER = "cls.predictions.decoder.weight"
EMBEDDING = "bert.embeddings.word_embeddings.weight"


@dataclass
class Checkpoint:
    """What was found at the source.

    Attributes:
        weights: as saved.
        config: fields of config.json.
        folder: where tokenizer files and a card may lie.
        tokenizer_files: name to content (text) of tokenizer files stored inside a Composer checkpoint.
        revision: commit of a Hub id, or None.
    """

    weights: Weights
    config: dict
    folder: Path
    tokenizer_files: dict[str, str]
    revision: Optional[str]


def read_composer(path: Path) -> Checkpoint:
    """Open a Composer checkpoint.

    Args:
        path: the `.pt` file, holding `state/model/model.*`.

    Returns:
        Its weights without the `model.` prefix, and the config and tokenizer files stored in it or beside it.

    Raises:
        ValueError: the file holds pickled objects besides tensors and numbers, or no model.
    """
    # Composer keeps the random state of NumPy next to the weights: arrays of integers, under NumPy's old and new names.
    reconstruct = numpy.zeros(1).__reduce__()[0]
    integers = [type(numpy.dtype(kind)) for kind in ("uint32", "int64")]
    names = [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals([numpy.ndarray, numpy.dtype, *integers, *names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"source: {path.name} holds more than tensors and numbers, so it is not opened: "
            f"{str(error).splitlines()[0]} Where you trust it, save its state/model and state/integrations alone."
        ) from error
    state = content.get("state", {}) if isinstance(content, dict) else {}
    if "model" not in state:
        raise ValueError(f"source: {path.name} has no state/model, so it is no Composer checkpoint")
    weights = {name.removeprefix("module."): tensor for name, tensor in state["model"].items()}
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")}
    stored = state.get("integrations", {}).get("huggingface", {})
    files = {}
    for name, file in stored.get("tokenizer", {}).items():
        name, content = name + file["file_extension"], file["content"]
        if name in TOKENIZER_FILES:
            if name.endswith(".json"):
                content = json.dumps(content, ensure_ascii=False)
            files[name] = content if isinstance(content, str) else "\n".join(content)
    config = stored.get("model", {}).get("config", {}).get("content")
    if config is None:
        config = read_config(path.parent)
    return Checkpoint(weights, config, path.parent, files, None)


def read_config(folder: Path) -> dict:
    """Read config.json of a folder.

    Raises:
        ValueError: there is none.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"source: expected a config.json in {folder}; pass --config FILE")
    return json.loads(path.read_text(encoding="utf-8"))


def read_checkpoint(source: str, revision: Optional[str]) -> Checkpoint:
    """Find and read the source: a Composer file, a folder, or a Hub id.

    Raises:
        ValueError: it is none of these or is incomplete.
    """
    if Path(source).is_file():
        return read_composer(Path(source))
    folder, commit = find_checkpoint(source, revision)
    return Checkpoint(load_weights(folder), read_config(folder), folder, {}, commit)


def family_names(weights: Weights) -> Weights:
    """Give every tensor its name in this architecture.

    Args:
        weights: with or without `module.` and `bert.`.

    Returns:
        The tensors that are parameters; encoder names with `bert.`.
    """
    named = {}
    for name, tensor in weights.items():
        name = name.removeprefix("module.")
        if not name.startswith(("bert.", *HEAD_PREFIXES)):
            name = f"bert.{name}"
        if not name.endswith(("position_ids", ".alibi")):  # buffers of older code
            named[name] = tensor
    return named


def choose_architecture(config: dict, weights: Weights) -> str:
    """Which model class the weights belong to: what the config says, else what the weights look like.

    Returns:
        A key of `MODEL_CLASSES`.
    """
    for name in config.get("architectures") or ():
        if name in MODEL_CLASSES:
            return name
    if "cls.predictions.transform.dense.weight" in weights:
        return "BertForMaskedLM"
    if "qa_outputs.weight" in weights:
        return "BertForQuestionAnswering"
    if "classifier.weight" in weights:
        pooled = "bert.pooler.dense.weight" in weights
        return "BertForSequenceClassification" if pooled else "BertForTokenClassification"
    return "BertModel"


def build_model(checkpoint: Checkpoint) -> tuple[torch.nn.Module, Weights]:
    """Build the model with the checkpoint's weights.

    Args:
        checkpoint: as read.

    Returns:
        The model in eval mode, and the weights that its class has no place for but others of the family do (a pooler
        beside an MLM head).

    Raises:
        ValueError: weights are missing, unknown, or of another shape; each is named.
    """
    weights = family_names(checkpoint.weights)
    architecture = choose_architecture(checkpoint.config, weights)
    dropped = ("_name_or_path", "architectures", "auto_map", "model_type", "torch_dtype", "dtype")
    fields = {
        name: value for name, value in checkpoint.config.items() if name not in (*dropped, "transformers_version")
    }
    if DECODER in weights:
        embedding = weights.setdefault(EMBEDDING, weights[DECODER])
        # Older code lost the tie on loading, and trained the two apart.
        fields["tie_word_embeddings"] = torch.equal(weights[DECODER], embedding)
    dtypes = {tensor.dtype for tensor in weights.values()}
    model = repository_class(architecture)(repository_class("BertConfig")(**fields)).eval()
    model.to(dtypes.pop() if len(dtypes) == 1 else torch.float32)

    expected = model.state_dict()
    if architecture == "BertModel":
        expected = {f"bert.{name}": tensor for name, tensor in expected.items()}
    extra = {name: weights[name] for name in weights if name.startswith("bert.pooler.") and name not in expected}
    problems = []
    missing = expected.keys() - weights.keys() - {DECODER}
    unknown = weights.keys() - expected.keys() - extra.keys()
    shapes = [
        f"{name} {list(weights[name].shape)} for {list(expected[name].shape)}"
        for name in sorted(expected.keys() & weights.keys())
        if weights[name].shape != expected[name].shape
    ]
    for problem, names in (("missing", sorted(missing)), ("unknown", sorted(unknown)), ("of another shape", shapes)):
        if names:
            problems.append(f"{problem}: {', '.join(names)}")
    if problems:
        stock = any(name.endswith("attention.self.query.weight") for name in weights)
        hint = ". These are stock BERT's weights; convert_bert.py makes a warm start of them" if stock else ""
        raise ValueError(f"source: the weights do not fit {architecture}; {'; '.join(problems)}{hint}")
    own = {name: tensor for name, tensor in weights.items() if name not in extra}
    if architecture == "BertModel":
        own = {name.removeprefix("bert."): tensor for name, tensor in own.items()}
    model.load_state_dict(own, strict=False)
    model.tie_weights()
    return model, extra


def write_tokenizer(checkpoint: Checkpoint, tokenizer: Optional[str], target: Path):
    """Put tokenizer files into the target.

    Args:
        checkpoint: the source.
        tokenizer: Hub id or folder of another tokenizer to take, or None for the source's.
        target: the target's folder.

    Returns:
        The loaded tokenizer, or None when there are no files.
    """
    if tokenizer or not checkpoint.tokenizer_files:
        copy_tokenizer(find_checkpoint(tokenizer)[0] if tokenizer else checkpoint.folder, target)
    else:
        for name, content in checkpoint.tokenizer_files.items():
            (target / name).write_text(content, encoding="utf-8")
        lift_limits(target)
    if not any((target / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json")):
        return None
    return AutoTokenizer.from_pretrained(target)


@torch.no_grad()
def sample_outputs(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """First output of the model (logits, or hidden states), floating."""
    if type(model).__name__ == "BertForMultipleChoice":
        ids, mask = ids[:, None], mask[:, None]
    return model(ids, attention_mask=mask, return_dict=False)[0]


def sample_batch(tokenizer, texts: Optional[list[str]], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A small padded batch to compare outputs on.

    Args:
        tokenizer: or None.
        texts: files for `read_texts`; None: seeded random tokens.
        vocab_size: exclusive upper bound of random tokens.

    Returns:
        int64 [B, S] ids and int64 [B, S] mask.

    Raises:
        ValueError: there are texts, but no tokenizer to read them with.
    """
    if not texts:
        lengths = torch.tensor([64, 23, 1])
        ids = torch.randint(0, vocab_size, (3, 64), generator=torch.Generator().manual_seed(0))
        return ids, (torch.arange(64) < lengths[:, None]).long()
    if tokenizer is None:
        raise ValueError("text: needs a tokenizer; pass --tokenizer")
    rows = [text[:2000] for text, _ in zip(read_texts(texts), range(16))]
    batch = tokenizer(rows, truncation=True, max_length=128, padding=True, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


@torch.no_grad()
def masked_loss(model, tokenizer, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean cross entropy in nats over a seeded 15% of the real tokens, each replaced by the mask token."""
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    chosen = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.15) & mask.bool() & ~special
    masked = ids.masked_fill(chosen, tokenizer.mask_token_id)
    return model(masked, attention_mask=mask, labels=ids.masked_fill(~chosen, -100)).loss.item()


def verify(before: torch.Tensor, model_folder: Path, architecture: str, ids: torch.Tensor, mask: torch.Tensor):
    """Load the written repository as a user would and compare.

    Args:
        before: what the source's weights gave.
        model_folder: the new repository.
        architecture: a key of `MODEL_CLASSES`.
        ids: int64 [B, S].
        mask: int64 [B, S].

    Returns:
        The loaded model, and the largest difference relative to the largest output.

    Raises:
        ValueError: outputs differ by more than 1e-4 of the largest (2e-2 below float32).
    """
    auto = getattr(transformers, MODEL_CLASSES[architecture])
    model = auto.from_pretrained(model_folder, trust_remote_code=True).eval()
    after = sample_outputs(model, ids, mask)[..., : before.shape[-1]]
    difference = ((after - before).abs().max() / before.abs().max()).item()
    limit = 1e-4 if before.dtype == torch.float32 else 2e-2
    if not difference <= limit:
        raise ValueError(
            f"verify: outputs before and after differ by {difference:.1e} of the largest, over {limit:.0e}"
        )
    return model, difference


def convert(
    source: str,
    target: Path,
    revision: Optional[str] = None,
    config: Optional[Path] = None,
    tokenizer: Optional[str] = None,
    pad_vocab: Optional[int] = None,
    max_shard_size: str = "5GB",
    license: Optional[str] = None,
    check: bool = False,
    texts: Optional[list[str]] = None,
) -> list[str]:
    """Convert one checkpoint.

    Args:
        source: Hub id, folder, or Composer file.
        target: folder to fill; made when it does not exist.
        revision: of a Hub id.
        config: a config.json to take instead of the source's.
        tokenizer: Hub id or folder of a tokenizer to take instead of the source's.
        pad_vocab: make the vocabulary a multiple of this with slots that are never predicted; None: as it is.
        max_shard_size: largest weight file, such as `5GB`.
        license: for the card; None: what the source's card says.
        check: compare outputs before and after.
        texts: files to take the comparison's text from; None: random tokens.

    Returns:
        What was done and found, a line each.

    Raises:
        ValueError: the source cannot be converted, or outputs differ.
    """
    target.mkdir(parents=True, exist_ok=True)
    checkpoint = read_checkpoint(source, revision)
    if config is not None:
        checkpoint.config = json.loads(config.read_text(encoding="utf-8"))
    words = write_tokenizer(checkpoint, tokenizer, target)
    if words is not None and checkpoint.config.get("pad_token_id") is None:
        checkpoint.config["pad_token_id"] = words.pad_token_id
    model, extra = build_model(checkpoint)
    architecture = type(model).__name__
    lines = [f"{architecture}, {sum(p.numel() for p in model.parameters()):,} parameters"]
    if words is None:
        lines.append("no tokenizer files found; add them with --tokenizer")

    num_tokens = min(len(words), model.config.vocab_size) if words is not None else model.config.vocab_size
    if check:
        ids, mask = sample_batch(words, texts, num_tokens)
        before = sample_outputs(model, ids, mask)
        if architecture == "BertForMaskedLM":
            before = before[..., :num_tokens]
    if pad_vocab:
        model.resize_token_embeddings(pad_to_multiple_of=pad_vocab, mean_resizing=False)
    if architecture == "BertForMaskedLM" and num_tokens < model.config.vocab_size:
        model.silence_dead_slots(num_tokens)
        lines.append(f"{model.config.vocab_size - num_tokens} vocabulary slots without a token will never be predicted")
    if not model.config.tie_word_embeddings:
        lines.append("decoder and embeddings differ in the source: both are kept, untied")
    model.save_pretrained(target, state_dict={**model.state_dict(), **extra}, max_shard_size=max_shard_size)
    write_card(
        target,
        source,
        checkpoint.folder,
        checkpoint.revision,
        "`scripts/convert_checkpoint.py`: same weights, current code",
        license,
    )
    if check:
        loaded, difference = verify(before, target, architecture, ids, mask)
        lines.append(f"outputs before and after differ by {difference:.1e} of the largest")
        if texts and architecture == "BertForMaskedLM" and words.mask_token_id is not None:
            loss = masked_loss(loaded, words, ids, mask)
            guess = torch.tensor(float(num_tokens)).log().item()
            lines.append(f"masked-token loss on the text: {loss:.2f} nats (a uniform guess: {guess:.2f})")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="Hub id, folder, or Composer .pt file")
    parser.add_argument("target", type=Path, help="folder to make")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.json to use instead of the source's")
    parser.add_argument("--tokenizer", metavar="ID", help="Hub id or folder of a tokenizer, instead of the source's")
    parser.add_argument("--pad-vocab", type=int, metavar="N", help="pad the vocabulary to a multiple of N, such as 64")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file (default: 5GB)")
    parser.add_argument("--license", help="licence for the card (default: what the source's card says)")
    parser.add_argument("--verify", action="store_true", help="compare outputs before and after")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="verify on this text instead of random tokens")
    parser.add_argument("--overwrite", action="store_true", help="replace a target that exists")
    args = parser.parse_args()
    try:
        with staged_folder(args.target, args.overwrite) as stage:
            lines = convert(
                args.source,
                stage,
                args.revision,
                args.config,
                args.tokenizer,
                args.pad_vocab,
                args.max_shard_size,
                args.license,
                args.verify,
                args.text,
            )
    except (ValueError, OSError) as error:
        sys.exit(f"convert_checkpoint.py: {error}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
