"""Small repositories as users have them: code, config, weights and tokenizer in a folder or in a Hub cache."""

import hashlib
import json
import shutil

import torch
from conftest import ROOT
from lib.common import CODE_FILES
from models import tiny_config, tiny_model

from mosaicbert.configuration_bert import AUTO_MAP


def published_config(**fields):
    """The config.json dict of a small repository in the way the published ones write it."""
    config = json.loads((ROOT / "tests/data/hub-configs/mosaic-bert-base-seqlen-512.json").read_text())
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "initializer_range")
    config.update({name: getattr(tiny_config(), name) for name in sizes})
    return {**config, "auto_map": dict(AUTO_MAP), **fields}


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
