"""Helpers of several scripts: read and check configs, weights and tokenizers, and load models.

Functions import torch and transformers where they use them, so that a script's `--help` stays fast.
"""

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from .cli import listed, one_line
from .growth import check_backend, check_growth
from .references import foreign_references, without_references

if TYPE_CHECKING:
    import torch

REPOSITORY = Path(__file__).resolve().parents[2]
# The code of a model repository: the entry file and its imports, as transformers copies them.
CODE_FILES = (
    "bert_layers.py",
    *(
        f"{leaf}.py"
        for leaf in re.findall(r"^\s*from \.(\w+) import", (REPOSITORY / "bert_layers.py").read_text(), re.M)
    ),
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
# The files to download from the Hub; a repository may hold the weights in a dozen other formats too.
SOURCE_PATTERNS = (*TOKENIZER_FILES, "config.json", "README.md", "model*.safetensors*", "pytorch_model*.bin*")
# The JSON files of a model repository in which transformers looks for code.
REFERRING_FILES = ("config.json", "tokenizer_config.json", "special_tokens_map.json")
# The most bytes of a config or a tokenizer file; those of models with 250,000 tokens reach a quarter of it.
LARGEST_FILE = 2**26
# The most bytes of a card.
LARGEST_CARD = 2**20
# The most levels of a JSON file, each of which takes several calls to walk.
DEEPEST = 100
# What the heads of the models that scripts load do, for messages, and the module of a BERT that all of them have.
HEADS = {"ForMaskedLM": "masked language modeling", "ForSequenceClassification": "classification"}
HEAD_MODULES = {"ForMaskedLM": "cls.predictions", "ForSequenceClassification": "classifier"}
# Length limits in tokenizer files. ALiBi has no maximum length, and padding is the caller's choice.
LIMITS = {"tokenizer.json": ("truncation", "padding"), "tokenizer_config.json": ("model_max_length",)}


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _names_numbers(value) -> bool:
    numbers = isinstance(value, dict) and {str(number) for number in value} == set(map(str, range(len(value))))
    return numbers and all(isinstance(name, str) for name in value.values())


def _numbers_names(value) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and _is_whole(v) for k, v in value.items())


# Fields of transformers' own configs that are kept: the expected value in words, and a function that checks it.
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
LABELS = {
    "id2label": ("names by number, from 0", _names_numbers),
    "label2id": ("numbers by name", _numbers_names),
    "problem_type": (f"one of {', '.join(PROBLEMS)}", lambda value: value in PROBLEMS),
    **{f"{kind}_token_id": ("an integer", _is_whole) for kind in ("bos", "eos", "sep")},
}


def repository_class(name: str):
    """Load `BertConfig` or a model class from this repository's code, in the way that the Hub's clients do."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    module = "configuration_bert" if name == "BertConfig" else "bert_layers"
    return get_class_from_dynamic_module(f"{module}.{name}", str(REPOSITORY))


def foreign_config(fields: dict, where: str = "config.json"):
    """Make a `BertConfig` of foreign fields; messages call their origin `where`.

    Raises:
        ValueError: a field has an invalid value.
    """
    check_labels(fields, where)
    try:
        return repository_class("BertConfig")(**fields)
    except Exception as error:  # a value may have any type
        raise ValueError(f"{where}: {one_line(error)}") from error


def check_labels(fields: dict, where: str = "config.json") -> None:
    """Raise ValueError if a field of `LABELS` has a value of the wrong type."""
    for name, (wanted, accept) in LABELS.items():
        if fields.get(name) is not None and not accept(fields[name]):
            raise ValueError(f"{where}: {name} must be {wanted}, got {str(fields[name])[:60]!r}")


def empty_model(name: str, config):
    """Build a model of the class `name` in eval mode on the meta device, whatever memory it would need.

    Raises:
        ValueError: the config describes no such model.
    """
    import torch

    model_class = repository_class(name)  # first, as transformers 4 cannot be imported on the meta device
    try:
        with torch.device("meta"):
            return model_class(config).eval()
    except Exception as error:  # the config's values may have any type
        raise ValueError(f"config.json describes no {name}, {one_line(error)}") from error


def read_bounded(path: Path, most: int = LARGEST_FILE) -> bytes:
    """Read a file; raise ValueError if it holds more than `most` bytes."""
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path}: expected at most {most:,} bytes")
    return content


def read_json(path: Path) -> dict:
    """Read a JSON file; raise ValueError, which names the file, if it holds no object of at most `DEEPEST` levels."""
    text = read_bounded(path)
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {str(content)[:60]!r}")
    parts = [content]
    for _ in range(DEEPEST):
        inner = [value for part in parts for value in (part.values() if isinstance(part, dict) else part)]
        parts = [value for value in inner if isinstance(value, (dict, list))]
    if parts:
        raise ValueError(f"{path}: expected JSON, got more than {DEEPEST} levels")
    return content


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file as transformers does: sorted, two spaces, a newline at the end."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    try:
        path.write_bytes(text.encode("utf-8"))
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair: "\\ud800"
        raise ValueError(f"{path.name}: expected valid Unicode, {one_line(error)}") from error


def say_float32(folder: Path) -> None:
    """Make a folder's config ask for float32, whatever the dtype of its weights.

    transformers 5 loads in the config's dtype; earlier releases do so in a pipeline and with "auto". Before 4.56 the
    field is called `torch_dtype`.
    """
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "dtype": "float32", "torch_dtype": "float32"})


def load_from(load, source: str, argument: str = "model", files: tuple[str, ...] = ("config.json",), **options):
    """Call `load`, such as `AutoTokenizer.from_pretrained`, with a source and options.

    Args:
        load: the function.
        source: a folder or a Hub id.
        argument: the name of `source` on the command line.
        files: a folder must hold one of these.
        **options: passed on.

    Returns:
        Its result.

    Raises:
        ValueError: the source is neither, or cannot be loaded.
    """
    check_folder(source, argument, files)
    try:
        return load(source, **options)
    except (ImportError, MemoryError):  # `cli.explain` words these
        raise
    except BaseException as error:  # tokenizers, safetensors and the Hub's client raise errors of many types
        if not is_failure(error):
            raise
        raise ValueError(f"{argument}: {source!r} cannot be loaded, {one_line(error)}") from error


def is_failure(error: BaseException) -> bool:
    """Tell an error from a request to stop; a panic of a Rust library is an error, but no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def load_words(source: str, argument: str = "model", trust_remote_code: bool = False, **options):
    """Load a tokenizer by `load_from` and `_load_words`; nothing asks whether its code may run."""
    return load_from(_load_words, source, argument, trust_remote_code=trust_remote_code, **options)


def _load_words(source, trust_remote_code: bool = False):
    """Load a tokenizer, refuse one that makes texts much longer, and try it, as some damage shows only in use."""
    from huggingface_hub import snapshot_download
    from transformers import AutoTokenizer

    pattern = "tokenizer.*json"  # `tokenizer.json`, and those of later releases
    folder = source if Path(source).is_dir() else snapshot_download(source, allow_patterns=[pattern])
    for path in filter(Path.is_file, sorted(Path(folder).glob(pattern))):
        check_growth(read_json(path))  # before loading, which sends the tokenizer's own words through it
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    if not trust_remote_code:  # a model that is trained from here saves these
        tokenizer.init_kwargs = without_references(tokenizer.init_kwargs)
    check_backend(tokenizer)
    tokenizer("A word, and ☃.")
    return tokenizer


def config_fields(source: str, argument: str = "model") -> dict:
    """Read the fields of the config.json of a folder or a Hub id."""
    from transformers import PretrainedConfig

    return load_from(PretrainedConfig.get_config_dict, source, argument)[0]


def own_config(fields: dict, source: str, argument: str = "model", **changes):
    """Make a `BertConfig` of this repository from a MosaicBERT's config, without its references to code or files.

    Args:
        fields: of its config.json.
        source: the folder or Hub id of the config.
        argument: the name of `source` on the command line.
        **changes: fields to set.

    Raises:
        ValueError: a field has an invalid value.
    """
    check_labels(fields, argument)
    return load_from(
        lambda _: repository_class("BertConfig").from_dict(without_references(fields), **changes), source, argument
    )


def load_model(
    head: str, source: str, trust_remote_code: bool = False, new_head: Optional[list[str]] = None, **changes
):
    """Load a model for a task: a MosaicBERT with this repository's code, any other with transformers' own.

    Args:
        head: end of the class's name, a key of `HEADS`.
        source: a folder or a Hub id.
        trust_remote_code: run the code of the source, if it brings any.
        new_head: gets the names of the head's weights that are new, for a training; None: refuse to make new ones.
        **changes: fields of the config to set.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: it cannot be loaded, lacks weights of the encoder or, without `new_head`, of the head, or it needs
            foreign code or files and `trust_remote_code` is not set.
    """
    import transformers

    auto_class = getattr(transformers, f"AutoModel{head}")
    if trust_remote_code:
        return _load_whole(auto_class, head, source, new_head, trust_remote_code=True, **changes)
    fields = config_fields(source)
    if is_family(fields):
        return own_model(head, source, own_config(fields, source, **changes), new_head)
    foreign = next(foreign_references(fields), None)
    if foreign is not None:
        raise ValueError(
            f"model: {source!r} is not a MosaicBERT and refers to code or files of its own, {foreign}; if you trust "
            "these, pass --trust_remote_code"
        )
    return _load_whole(auto_class, head, source, new_head, trust_remote_code=False, **changes)


def _load_whole(model_class, head: str, source: str, new_head: Optional[list[str]], **options):
    """Load a model, and check here which weights were new, instead of transformers' report on them."""
    from transformers.utils import logging

    options |= {"output_loading_info": True, "ignore_mismatched_sizes": new_head is not None}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = load_from(model_class.from_pretrained, source, **options)
    finally:
        logging.set_verbosity(verbosity)
    # Before 5.0 the mismatched keys are names, since then tuples of a name and two shapes.
    mismatched = (key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
    new = sorted({*info["missing_keys"], *mismatched})
    inner = f"{model.base_model_prefix}."
    lacking = [name for name in new if name.startswith(inner) and not name.startswith(f"{inner}pooler.")]
    if lacking:
        raise ValueError(
            f"model: {source!r} lacks weights of the encoder that its config describes ({listed(lacking, 3)})"
        )
    if new and new_head is None:
        raise _no_head(source, head, sorted({name.rpartition(".")[0] for name in new}))
    if new:
        new_head += new
    return model


def _no_head(source: str, head: str, modules: list[str]) -> ValueError:
    return ValueError(f"model: {source!r} holds no head for {HEADS[head]} (no weights of {listed(modules, 3)})")


def own_model(head: str, source: str, config, new_head: Optional[list[str]] = None):
    """Load a MosaicBERT as `load_model` does, in eval mode, so that it also saves this repository's code."""
    model = _load_whole(repository_class(f"Bert{head}"), head, source, new_head, config=config)
    model.config.name_or_path = ""  # where a saved config looks for code
    return model


def is_family(fields: dict) -> bool:
    """Recognize the config.json of a MosaicBERT by a field about ALiBi or by the names of the published code."""
    auto_map = fields.get("auto_map")
    classes = auto_map.values() if isinstance(auto_map, dict) else ()
    return "alibi_starting_size" in fields or any(
        isinstance(name, str) and name.rpartition("--")[2].startswith("bert_layers.") for name in classes
    )


def check_model(source: str, argument: str = "model", files: tuple[str, ...] = ("config.json",)) -> Path:
    """Raise ValueError if a source is neither a folder with one of `files` nor on the Hub; those are fetched.

    Returns:
        The folder.
    """
    check_folder(source, argument, files)
    return find_checkpoint(source, argument=argument, patterns=files)[0]


def check_whole(source: str, trust_remote_code: bool, head: Optional[str] = None) -> dict:
    """Raise early what `load_model` would, if the files of a source show that it lacks weights or a BERT's head.

    Weights that are still on the Hub are left to `load_model`, and so is the head of another kind of model.

    Args:
        source, trust_remote_code: as `load_model` takes them.
        head: a key of `HEADS` that the source must have; None: any.

    Returns:
        The fields of its config.json.

    Raises:
        ValueError: see `check_model` and `weight_files`; or the head is missing.
    """
    folder = check_model(source)
    fields = read_json(folder / "config.json")
    try:
        path = folder / weight_files(folder)[0]
    except ValueError:
        if Path(source).is_dir():
            raise
        return fields
    if head is not None and not trust_remote_code and fields.get("model_type") == "bert":
        names = load_from(lambda _: _names_of_weights(path), source)
        if names is not None and f"{HEAD_MODULES[head]}." not in names:
            raise _no_head(source, head, [HEAD_MODULES[head]])
    return fields


def _names_of_weights(path: Path) -> Optional[str]:
    """Return a text with the names of the weights of a file or an index, read without torch; None if that is hard."""
    if path.suffix == ".json":
        return " ".join(read_json(path)["weight_map"])
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        return " ".join(safe_open(path, "np").keys())
    if not zipfile.is_zipfile(path):  # as torch's files are since 1.6
        return None
    with zipfile.ZipFile(path) as archive:
        pickled = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        return next((archive.open(name).read(LARGEST_FILE).decode("utf-8", "replace") for name in pickled), None)


def check_folder(source: str, argument: str, files: tuple[str, ...]) -> None:
    """Raise ValueError if a source is neither a folder that contains one of `files` nor a possible Hub id."""
    check_source(source, argument)
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in files):
        raise ValueError(f"{argument}: the folder {source!r} holds no {' or '.join(files)}")


def check_checkpoint(source: str) -> None:
    """Raise ValueError if the source of a conversion is not a file of weights, a folder with weights or a Hub id."""
    if not Path(source).is_file():
        check_source(source, "source")
        if Path(source).is_dir():
            weight_files(Path(source))
        return
    with open(source, "rb") as file:
        start = file.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # as torch's files start since 1.6, and before
        raise ValueError(f"source: {source!r} is neither a checkpoint folder nor a file of weights that torch saved")


def check_source(source: str, argument: str) -> None:
    """Raise ValueError if a source is neither a folder nor a possible Hub id; `argument` is its command-line name."""
    if not source or Path(source).is_file():
        raise ValueError(f"{argument}: expected a folder or a Hub id (owner/name), got {source!r}")
    if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ValueError(f"{argument}: there is no folder {source!r}")


def find_checkpoint(
    source: str, revision: Optional[str] = None, argument: str = "source", patterns: tuple[str, ...] = SOURCE_PATTERNS
) -> tuple[Path, Optional[str]]:
    """Find a model repository, downloading it if it is on the Hub.

    Args:
        source: a folder, or a Hub id (`owner/name`, or the `name` of an old repository without owner).
        revision: branch, tag or commit of a Hub id.
        argument: the name of `source` on the command line.
        patterns: files to fetch from the Hub.

    Returns:
        The folder and its commit (None if it is no Hub snapshot).

    Raises:
        ValueError: there is no such folder or repository, or `revision` was given for a folder.
    """
    folder = Path(source)
    check_source(source, argument)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
        except Exception as error:  # the HTTP library behind it changes from release to release
            if "/" in source and folder.parent.is_dir():  # this was meant to be a folder
                raise ValueError(f"{argument}: there is no folder {source!r}") from error
            raise ValueError(
                f"{argument}: {source!r} is not a local folder, and the Hub could not provide it: {one_line(error)}"
            ) from error
    elif revision is not None:
        raise ValueError(f"revision: only a Hub id has revisions, but {source!r} is a folder")
    home = folder.resolve()
    is_commit = home.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", home.name)
    return folder, home.name if is_commit else None


def file_inside(folder: Path, name: str) -> Path:
    """Join a model folder and the name of a file in it; raise ValueError for a link that leads out of the folder."""
    home, path = folder.resolve(), (folder / name).resolve()
    # In the Hub's cache the files of a snapshot are links to `../../blobs`.
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(path.is_relative_to(place) for place in allowed):
        raise ValueError(f"{folder / name}: leads out of the folder, to {path}; put the file itself there")
    return folder / name


def weight_files(folder: Path, kinds: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")) -> list[str]:
    """Find the weight files that loaders read from a model folder.

    Args:
        folder: holds one of `kinds`, or an `.index.json` for it and its shards.
        kinds: names of whole weight files, best first.

    Returns:
        Names of the weight files; an index comes before its shards.

    Raises:
        ValueError: there are no weights, a shard is missing, or the index is malformed.
    """
    for kind in kinds:
        index = f"{kind}.index.json"
        if (folder / kind).is_file():
            names = [kind]
        elif (folder / index).is_file():
            shards = read_json(file_inside(folder, index)).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ValueError(f"{folder / index}: expected a weight_map from names to shards, got {shards!r}")
            for shard in shards.values():
                plain = isinstance(shard, str) and re.fullmatch(r"\w[\w.-]*", shard)
                if not plain or not shard.endswith(Path(kind).suffix):
                    raise ValueError(
                        f"{folder / index}: expected plain names of {Path(kind).suffix} files, got {shard!r}"
                    )
            names = [index, *sorted(set(shards.values()))]
        else:
            continue
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder}: {index} names shards that are not there: {', '.join(missing)}")
        for name in names:
            file_inside(folder, name)
        return names
    either = " or ".join(kinds)
    raise ValueError(f"{folder}: expected {either}, or the index of their shards")


def load_weights(folder: Path) -> dict[str, "torch.Tensor"]:
    """Read the weights of a model folder, sharded or whole, safetensors before pickle.

    Args:
        folder: see `weight_files`.

    Returns:
        Name to tensor, checked by `check_weights`; LayerNorm's `gamma` and `beta` of old files become `weight` and
        `bias`. Pickles are opened with `weights_only=True`.

    Raises:
        ValueError: there are no weights, a shard contradicts the index, a file is damaged or holds more than weights,
            or there are two different tensors for one weight.
    """
    import torch
    from safetensors.torch import load_file

    weights, named = {}, {}
    for name in weight_files(folder):
        path = folder / name
        if name.endswith(".index.json"):
            named = read_json(path)["weight_map"]
            continue
        try:
            if name.endswith(".safetensors"):
                content = load_file(path)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{path}: cannot be read, {unpickling_problem(error)}") from error
        weights.update(check_weights(content, str(path)))
        for key in content.keys() | named.keys():
            if named.get(key, name) != name and key in content:
                raise ValueError(f"{path}: holds {key}, which the index places in {named[key]}")
            if named.get(key) == name and key not in content:
                raise ValueError(f"{path}: lacks {key}, which the index places there")

    def rename(name: str) -> str:
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")

    return rename_weights(weights, rename)


def rename_weights(weights: dict[str, "torch.Tensor"], rename) -> dict[str, "torch.Tensor"]:
    """Rename weights by a function; raise ValueError if two different tensors get the same name."""
    import torch

    renamed, origin = {}, {}
    for name, tensor in weights.items():
        key = rename(name)
        if key in renamed and not torch.equal(renamed[key], tensor):
            raise ValueError(f"source: {origin[key]} and {name} are two different tensors for one weight, {key}")
        renamed[key], origin[key] = tensor, name
    return renamed


def unpickling_problem(error: Exception) -> str:
    """Explain why a pickle of weights was not opened; torch's own message advises opening it anyway."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found:
        return f"it holds {found[1]}, which is not a tensor"
    return "it is damaged or not a pickle of tensors" if isinstance(error, pickle.UnpicklingError) else one_line(error)


def check_weights(content, where: str) -> dict[str, "torch.Tensor"]:
    """Check that the content of a file, called `where` in messages, is the weights of a model.

    Returns:
        The tensors by name, without the buffers of older code (`position_ids`, `alibi`).

    Raises:
        ValueError: there are none, or one is not a dense floating-point tensor with finite values; names it.
    """
    import torch

    if not isinstance(content, dict) or not content:
        raise ValueError(f"{where}: expected tensors by name, got {type(content).__name__} {str(content)[:40]!r}")
    weights = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{where}: expected tensors by name, got {type(tensor).__name__} under {str(name)[:60]!r}")
        if name.endswith(("position_ids", ".alibi")):
            continue
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{where}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        # A tensor larger than its storage repeats itself and may be too large for any memory.
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{where}: {name} is not a dense tensor")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: {name} holds values that are not finite")
        weights[name] = tensor
    return weights


def check_layers(weights, num_layers: int, prefix: str) -> None:
    """Check that the weights have all encoder layers of the config, before a model of that many layers is built.

    Args:
        weights: names of the weights.
        num_layers: `num_hidden_layers` of the config.
        prefix: text before a layer's number, such as `bert.encoder.layer.`.

    Raises:
        ValueError: `num_layers` is not a positive integer, or layers are missing; names them.
    """
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
        raise ValueError(f"config.json: num_hidden_layers must be a positive integer, got {num_layers!r}")
    numbers = (name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix))
    there = {int(number) for number in numbers if re.fullmatch(r"[0-9]{1,9}", number)}
    first = next((layer for layer in range(num_layers) if layer not in there), None)
    if first is None:
        return
    gap = first == num_layers - 1 or any(first < layer < num_layers for layer in there)
    missing = f"layer {first} is" if gap else f"layers {first} to {num_layers - 1} are"
    raise ValueError(
        f"config.json says num_hidden_layers {num_layers}, but {missing} missing from the weights, which hold "
        f"{len(there)} layers"
    )


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files that exist, by `write_tokenizer_file`."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            write_tokenizer_file(target / name, read_bounded(file_inside(source, name)))


def write_tokenizer_file(path: Path, content: bytes) -> None:
    """Write a tokenizer file without its references to code and its limits on length."""
    path.write_bytes(content)
    if path.suffix == ".json":
        fields = read_json(path)
        for limit in LIMITS.get(path.name, ()):
            fields.pop(limit, None)
        # The other files are vocabularies, which may contain any word.
        write_json(path, without_references(fields) if path.name in REFERRING_FILES else fields)


def load_tokenizer(folder: Path, argument: str = "source"):
    """Load the tokenizer of a folder with a config.json and files that `write_tokenizer_file` wrote.

    Raises:
        ValueError: it cannot be loaded; names `argument`, the source on the command line.
    """
    try:
        return _load_words(folder)
    except BaseException as error:  # the tokenizers package raises plain exceptions, and panics
        if not is_failure(error):
            raise
        raise ValueError(f"{argument}: its tokenizer cannot be used, {one_line(error)}") from error


def vocabulary_size(tokenizer) -> int:
    """Return the number of embedding rows that a tokenizer needs: its largest id plus one."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_special(tokenizer, *names: str) -> None:
    """Raise ValueError if a tokenizer lacks one of these special tokens, such as `mask_token`."""
    for name in names:
        if getattr(tokenizer, name) is None:
            raise ValueError(f"tokenizer must have a {name}, {tokenizer.name_or_path!r} has none")


def count_tokens(tokenizer, rows: int, argument: str = "model") -> int:
    """Return how many of a model's embedding rows its tokenizer uses; raise ValueError if it needs more."""
    num_tokens = vocabulary_size(tokenizer)
    if num_tokens > rows:
        raise ValueError(
            f"{argument}: its tokenizer has {num_tokens} entries, more than the {rows} rows of the model's vocabulary"
        )
    return num_tokens


def lower_unused_biases(model, num_tokens: int) -> int:
    """Make the vocabulary rows without a token improbable, by an ordinary bias in the decoder.

    The bias is -30, or 15 below the lowest bias of a token where that is less. The rows train like any other.

    Args:
        model: a `BertForMaskedLM`; changed in place.
        num_tokens: the first row without a token.

    Returns:
        The number of rows without a token.
    """
    bias = model.get_output_embeddings().bias.data
    bias[num_tokens:] = min(-30.0, bias[:num_tokens].min().item() - 15.0)
    return len(bias) - num_tokens
