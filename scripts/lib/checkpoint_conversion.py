"""Convert a checkpoint of the MosaicBERT family to a complete repository with this code."""

import copy
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy
import torch
import transformers

from .cards import write_card
from .cli import listed
from .common import (
    LABELS,
    TOKENIZER_FILES,
    check_layers,
    check_weights,
    copy_tokenizer,
    count_tokens,
    empty_model,
    file_inside,
    find_checkpoint,
    foreign_config,
    load_tokenizer,
    load_weights,
    lower_unused_biases,
    read_json,
    rename_weights,
    repository_class,
    say_float32,
    unpickling_problem,
    write_json,
    write_tokenizer_file,
)
from .records import read_texts

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
    """The content of a source.

    Attributes:
        weights: as saved.
        config: fields of config.json.
        folder: may hold tokenizer files and a card.
        tokenizer_files: name to text of the tokenizer files inside a Composer checkpoint.
        revision: commit of a Hub id, or None.
    """

    weights: Weights
    config: dict
    folder: Path
    tokenizer_files: dict[str, str]
    revision: Optional[str]


def read_composer(path: Path) -> Checkpoint:
    """Open a Composer checkpoint (`.pt`), whose weights are under `state/model/model.*`.

    Raises:
        ValueError: the file holds pickled objects besides tensors and numbers, or no model.
    """
    # Composer also stores NumPy's random state: arrays of integers, under NumPy's old and new module names.
    reconstruct = numpy.zeros(1).__reduce__()[0]
    integers = [type(numpy.dtype(kind)) for kind in ("uint32", "int64")]
    names = [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals([numpy.ndarray, numpy.dtype, *integers, *names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"source: {path.name} is not opened, {unpickling_problem(error)}; if you trust this Composer checkpoint, "
            "save only its state/model and state/integrations"
        ) from error
    model = entry(content, "state", "model")
    if not isinstance(model, dict):
        raise ValueError(f"source: {path.name} has no state/model, so it is not a Composer checkpoint")
    weights = rename_weights(check_weights(model, path.name), lambda name: name.removeprefix("module."))
    weights = {name.removeprefix("model."): weights[name] for name in weights if name.startswith("model.")}
    stored = entry(content, "state", "integrations", "huggingface")
    files = {}
    for name, file in (entry(stored, "tokenizer") or {}).items():
        name, text = f"{name}{entry(file, 'file_extension')}", entry(file, "content")
        if name in TOKENIZER_FILES:
            if name.endswith(".json"):
                text = json.dumps(text, ensure_ascii=False)
            files[name] = text if isinstance(text, str) else "\n".join(map(str, text or ()))
    config = entry(stored, "model", "config", "content")
    if not isinstance(config, dict):
        config = read_config(path.parent)
    return Checkpoint(weights, config, path.parent, files, None)


def entry(content, *names: str):
    """Return the value under a path of keys in nested dicts, or None."""
    for name in names:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def read_config(folder: Path) -> dict:
    """Read config.json of a source's folder; raise ValueError if there is none."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"source: expected a config.json in {folder}; pass --config FILE")
    return read_json(file_inside(folder, "config.json"))


def read_checkpoint(source: str, revision: Optional[str]) -> Checkpoint:
    """Find and read the source: a Composer file, a folder, or a Hub id; raise ValueError if it is incomplete."""
    if Path(source).is_file():
        return read_composer(Path(source))
    folder, commit = find_checkpoint(source, revision)
    return Checkpoint(load_weights(folder), read_config(folder), folder, {}, commit)


def family_names(weights: Weights) -> Weights:
    """Rename tensors with or without `module.` and `bert.` to their names in this architecture."""

    def rename(name: str) -> str:
        name = name.removeprefix("module.")
        return name if name.startswith(("bert.", *HEAD_PREFIXES)) else f"bert.{name}"

    return rename_weights(weights, rename)


def choose_architecture(config: dict, weights: Weights) -> str:
    """Choose the model class, a key of `MODEL_CLASSES`, by the config or else by the names of the weights."""
    names = config.get("architectures")
    for name in names if isinstance(names, list) else ():
        name = str(name).removeprefix("Mosaic")  # as our config saves it, so that no library takes its own class
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


def model_config(config: dict, weights: Weights):
    """Make a `BertConfig` of its own fields in the source's config and of the labels of a task.

    Other fields of a foreign config may lead loaders to code, kernels or quantizers, or have no meaning here. This
    architecture has no `max_position_embeddings`; loaders would truncate texts to it.

    Args:
        config: fields of the source's config.json.
        weights: as `family_names` returns them.

    Raises:
        ValueError: a field has an invalid value, or there are fewer layers than the config says.
    """
    known = {*inspect.signature(repository_class("BertConfig").__init__).parameters, *LABELS}
    known -= {"self", "kwargs", "max_position_embeddings"}
    fields = {name: value for name, value in config.items() if name in known}
    if "classifier.weight" in weights and not fields.get("id2label"):
        fields["num_labels"] = len(weights["classifier.weight"])
    # Older code lost the tie on loading and trained the two separately.
    decoder = weights.get(DECODER)
    fields["tie_word_embeddings"] = decoder is None or torch.equal(decoder, weights[EMBEDDING])
    made = foreign_config(fields)
    check_layers(weights, made.num_hidden_layers, "bert.encoder.layer.")
    return made


def build_model(checkpoint: Checkpoint) -> tuple[torch.nn.Module, Weights]:
    """Build the model with the checkpoint's weights.

    Returns:
        The model in eval mode, and the weights that only other classes of the family have (a pooler beside an
        MLM head).

    Raises:
        ValueError: weights are missing, unknown, or of another shape; names them.
    """
    weights = family_names(checkpoint.weights)
    architecture = choose_architecture(checkpoint.config, weights)
    if DECODER in weights:
        weights.setdefault(EMBEDDING, weights[DECODER])
    config = model_config(checkpoint.config, weights)
    model = empty_model(architecture, config)
    expected = model.state_dict()
    if architecture == "BertModel":
        expected = {f"bert.{name}": tensor for name, tensor in expected.items()}
    extra = {name: weights[name] for name in weights if name.startswith("bert.pooler.") and name not in expected}
    problems = {
        "missing": sorted(expected.keys() - weights.keys() - {DECODER}),
        "unknown": sorted(weights.keys() - expected.keys() - extra.keys()),
        "of another shape": [
            f"{name} {list(weights[name].shape)} for {list(expected[name].shape)}"
            for name in sorted(expected.keys() & weights.keys())
            if weights[name].shape != expected[name].shape
        ],
    }
    found = "; ".join(f"{problem}: {listed(names, 8)}" for problem, names in problems.items() if names)
    if found:
        stock = any(name.endswith("attention.self.query.weight") for name in weights)
        hint = ". These are stock BERT's weights; convert_bert.py makes a warm start of them" if stock else ""
        raise ValueError(f"source: the weights do not fit {architecture}; {found}{hint}")
    own = {name: tensor for name, tensor in weights.items() if name not in extra}
    if len({tensor.dtype for tensor in own.values()}) > 1:
        own = {name: tensor.float() for name, tensor in own.items()}
    if architecture == "BertModel":
        own = {name.removeprefix("bert."): tensor for name, tensor in own.items()}
    model.load_state_dict(own, strict=False, assign=True)
    model.tie_weights()
    return model, extra


def write_tokenizer(checkpoint: Checkpoint, tokenizer: Optional[str], target: Path):
    """Write tokenizer files to the target, and set `pad_token_id` in the checkpoint's config if it is missing.

    Args:
        checkpoint: the source.
        tokenizer: Hub id or folder of another tokenizer to take, or None for the source's.
        target: the target's folder.

    Returns:
        The loaded tokenizer, or None if there are no files.
    """
    argument, folder = "source", checkpoint.folder
    if tokenizer:
        argument, folder = "tokenizer", find_checkpoint(tokenizer, argument="tokenizer", patterns=TOKENIZER_FILES)[0]
    if tokenizer or not checkpoint.tokenizer_files:
        copy_tokenizer(folder, target)
    else:
        for name, content in checkpoint.tokenizer_files.items():
            write_tokenizer_file(target / name, content.encode("utf-8"))
    if not any((target / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json")):
        if tokenizer:
            raise ValueError(f"tokenizer: expected tokenizer.json, vocab.txt or vocab.json in {folder}")
        return None
    write_json(target / "config.json", {"model_type": "bert"})  # for tokenizers that do not name their class
    words = load_tokenizer(target, argument)
    if checkpoint.config.get("pad_token_id") is None:
        checkpoint.config["pad_token_id"] = words.pad_token_id
    return words


@torch.no_grad()
def sample_outputs(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the first output of the model, logits or hidden states."""
    if type(model).__name__ == "BertForMultipleChoice":
        ids, mask = ids[:, None], mask[:, None]
    return model(ids, attention_mask=mask, return_dict=False)[0]


def sample_batch(tokenizer, texts: Optional[list[str]], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a small padded batch to compare outputs on.

    Args:
        tokenizer: or None.
        texts: files for `read_texts`; None: seeded random tokens.
        vocab_size: exclusive upper bound of random tokens.

    Returns:
        int64 [B, S] ids and int64 [B, S] mask.

    Raises:
        ValueError: the files hold no text, or there is no tokenizer for them.
    """
    if not texts:
        lengths = torch.tensor([64, 23, 1])
        ids = torch.randint(0, vocab_size, (3, 64), generator=torch.Generator().manual_seed(0))
        return ids, (torch.arange(64) < lengths[:, None]).long()
    if tokenizer is None:
        raise ValueError("data: needs a tokenizer; pass --tokenizer")
    rows = [text[:2000] for text, _ in zip(read_texts(texts), range(16))]
    if not rows:
        raise ValueError(f"data: there is no text in {', '.join(texts)}")
    batch = tokenizer(rows, truncation=True, max_length=128, padding=True, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


@torch.no_grad()
def masked_loss(model, tokenizer, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """Compute the mean cross entropy in nats of a seeded 15% of the real tokens, each replaced by the mask token."""
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    chosen = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.15) & mask.bool() & ~special
    masked = ids.masked_fill(chosen, tokenizer.mask_token_id)
    return model(masked, attention_mask=mask, labels=ids.masked_fill(~chosen, -100)).loss.item()


def verify(before: torch.Tensor, model_folder: Path, architecture: str, ids: torch.Tensor, mask: torch.Tensor):
    """Load the new repository as a user would, and compare its outputs with those of the source, `before`.

    Returns:
        The loaded model, and the largest difference relative to the largest output.

    Raises:
        ValueError: outputs differ by more than 1e-4 of the largest.
    """
    auto = getattr(transformers, MODEL_CLASSES[architecture])
    model = auto.from_pretrained(model_folder, trust_remote_code=True).eval()
    after = sample_outputs(model, ids, mask)[..., : before.shape[-1]]
    difference = ((after - before).abs().max() / before.abs().max()).item()
    if not difference <= 1e-4:
        raise ValueError(f"verify: outputs before and after differ by {difference:.1e} of the largest, more than 1e-4")
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
        pad_vocab: make the vocabulary a multiple of this; None: as it is.
        max_shard_size: largest weight file, such as `5GB`.
        license: for the card; None: what the source's card says.
        check: compare outputs before and after.
        texts: files with the text of the comparison; None: random tokens.

    Returns:
        Lines that report what was done and found.

    Raises:
        ValueError: the source cannot be converted, or outputs differ.
    """
    target.mkdir(parents=True, exist_ok=True)
    checkpoint = read_checkpoint(source, revision)
    if config is not None:
        checkpoint.config = read_json(config)
    words = write_tokenizer(checkpoint, tokenizer, target)
    model, extra = build_model(checkpoint)
    architecture = type(model).__name__
    lines = [f"{architecture}, {sum(p.numel() for p in model.parameters()):,} parameters"]
    if words is None:
        lines.append("no tokenizer files found; add them with --tokenizer")

    rows = model.config.vocab_size
    num_tokens = rows if words is None else count_tokens(words, rows, "tokenizer" if tokenizer else "source")
    if check:
        ids, mask = sample_batch(words, texts, num_tokens)
        before = sample_outputs(copy.deepcopy(model).float(), ids, mask)
        if architecture == "BertForMaskedLM":
            before = before[..., :num_tokens]
    if pad_vocab:
        model.resize_token_embeddings(pad_to_multiple_of=pad_vocab, mean_resizing=False)
    if architecture == "BertForMaskedLM" and num_tokens < model.config.vocab_size:
        rows = lower_unused_biases(model, num_tokens)
        lines.append(f"{rows} rows of the vocabulary have no token; a low bias makes them improbable")
    if not model.config.tie_word_embeddings:
        lines.append("decoder and embeddings differ in the source: both are kept, untied")
    model.save_pretrained(target, state_dict={**model.state_dict(), **extra}, max_shard_size=max_shard_size)
    say_float32(target)
    made = "`scripts/convert_checkpoint.py`: same weights, current code"
    write_card(target, made, source, checkpoint.folder, checkpoint.revision, license)
    if check:
        loaded, difference = verify(before, target, architecture, ids, mask)
        lines.append(f"outputs before and after differ by {difference:.1e} of the largest")
        if texts and architecture == "BertForMaskedLM" and words.mask_token_id is not None:
            loss = masked_loss(loaded, words, ids, mask)
            guess = torch.tensor(float(num_tokens)).log().item()
            lines.append(f"masked-token loss on the text: {loss:.2f} nats (a uniform guess: {guess:.2f})")
    return lines
