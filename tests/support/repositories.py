"""Small repositories as users have them: code, config, weights and tokenizer in a folder or in a Hub cache; and whether
one loads as its model."""

import hashlib
import json
import shutil

import numerics
import numpy
import torch
from conftest import ROOT
from folders import write_tokenizer
from lib.common import CODE_FILES
from models import ragged_batch, tiny_config, tiny_model
from transformers import AutoModelForMaskedLM

from mosaicbert.configuration_bert import AUTO_MAP

REMOTE = {"trust_remote_code": True}
IDS, MASK = ragged_batch([12, 7])


def small_config(name):
    """A published config.json with its sizes replaced and every other field, or lack of one, kept."""
    config = json.loads((ROOT / "tests" / "data" / "hub-configs" / f"{name}.json").read_text())
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "initializer_range")
    return {**config, **{size: getattr(tiny_config(), size) for size in sizes}}


def published_config(**fields):
    """The config.json dict of a small repository in the way the published ones write it."""
    return {**small_config("mosaic-bert-base-seqlen-512"), "auto_map": dict(AUTO_MAP), **fields}


def write_repository(folder, model=None, config=None, weights="pytorch_model.bin", without=(), code=True):
    """Write a repository.

    Args:
        folder: where; made when missing.
        model: whose weights; None: `tiny_model()`.
        config: the dict of config.json; None: `published_config()`.
        weights: name of the weight file, `pytorch_model.bin` or `model.safetensors`.
        without: state dict keys to leave out.
        code: whether the code files belong to it.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if code:
        for name in CODE_FILES:
            shutil.copy(ROOT / name, folder)
    (folder / "config.json").write_text(json.dumps(published_config() if config is None else config))
    state = {k: v.clone() for k, v in (model or tiny_model()).state_dict().items() if k not in without}
    if weights.endswith(".bin"):
        torch.save(state, folder / weights)
    else:
        from safetensors.torch import save_file

        save_file(state, folder / weights, metadata={"format": "pt"})
    return folder


def cache_repository(cache, name, folders):
    """Lay folders out as commits of one repository in a Hub cache: blobs, symlinks from snapshots, refs.

    Args:
        cache: the cache directory.
        name: `owner/name`.
        folders: one folder a commit, oldest first; `main` is the last.

    Returns:
        The commit hashes.
    """
    home = cache / ("models--" + name.replace("/", "--"))
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    commits = []
    for number, folder in enumerate(folders):
        commit = hashlib.sha1(f"{name} {number}".encode()).hexdigest()
        snapshot = home / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
        commits.append(commit)
    (home / "refs" / "main").write_text(commits[-1])
    return commits


def expected_logits():
    """What the model of `write_repository` answers to `IDS` and `MASK`."""
    return tiny_model()(IDS, MASK).logits


def is_ours(model):
    """Whether a model was built from a repository's code."""
    return type(model).__module__.startswith("transformers_modules") and hasattr(type(model), "auto_map")


def assert_loads(source, tolerance=0.0, **kwargs):
    """Load what `write_repository` wrote as a user does; fail unless it answers as its model does, and is tied."""
    model = AutoModelForMaskedLM.from_pretrained(source, **REMOTE, **kwargs).eval()
    assert is_ours(model)
    numerics.assert_same(model(IDS, MASK).logits, expected_logits(), tolerance)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    return model


def published_weights():
    """Weights of a tiny MLM under the published names, decoder weight included."""
    return {name: tensor.clone() for name, tensor in tiny_model().state_dict().items()}


def composer_file(path, **state):
    """Write a Composer checkpoint with its config, tokenizer and random state; returns the weights."""
    weights = published_weights()
    folder = path.parent / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder, [f"w{n}" for n in range(96)])
    words, fields = ((folder / name).read_text() for name in ("vocab.txt", "tokenizer_config.json"))
    tokenizer = {
        "vocab": {"file_extension": ".txt", "content": words.split("\n")},
        "tokenizer_config": {"file_extension": ".json", "content": json.loads(fields)},
    }
    config = {"file_extension": ".json", "content": tiny_config().to_dict(), "class": "bert_layers.BertForMaskedLM"}
    torch.save(
        {
            "state": {
                "model": {f"model.{name}": tensor for name, tensor in weights.items()},
                "integrations": {"huggingface": {"model": {"config": config}, "tokenizer": tokenizer}},
                **state,
            },
            "rng": [{"numpy": numpy.random.RandomState(0).get_state(), "torch": torch.get_rng_state()}],
        },
        path,
    )
    return weights
