#!/usr/bin/env python3
"""Push a model folder to the Hugging Face Hub: weights, config, tokenizer, card and code, in one commit.

The folder is checked first: every file that loaders need must be there and whole, and nothing may refer to code of
another repository. Only the files of a model repository and the images in its card are pushed; the script lists them
first. Weights and tokenizer files on the Hub that the new ones replace are deleted in the same commit. A branch that
does not exist is created. Log in with `hf auth login` or set HF_TOKEN.

    push_to_hub.py my-mosaic-bert me/my-mosaic-bert --dry_run
    push_to_hub.py my-mosaic-bert me/my-mosaic-bert --private
    push_to_hub.py my-mosaic-bert me/my-mosaic-bert --branch seqlen-2048 --message "Longer sequences"
"""

import fnmatch
import itertools
import os
import re
import sys
from pathlib import Path
from typing import Optional
from urllib.parse import unquote

from lib.cli import Parser, command, listed, one_line, run, say_end
from lib.common import (
    CODE_FILES,
    LARGEST_CARD,
    REFERRING_FILES,
    TOKENIZER_FILES,
    check_layers,
    count_tokens,
    file_inside,
    load_tokenizer,
    read_bounded,
    read_json,
    repository_class,
    weight_files,
)
from lib.references import foreign_references

OWN_MODULES = {name.removesuffix(".py") for name in CODE_FILES}
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForMaskedLM")
NEEDED_FILES = (*CODE_FILES, "config.json", "README.md", "tokenizer_config.json")
# A repository must hold one of these files.
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")
# Files at the top of a repository that loaders may use instead of the pushed ones or in addition to them.
REPLACED_PATTERNS = (*TOKENIZER_FILES, "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")
REPLACED_PATTERNS += ("tf_model*", "flax_model*", "adapter_config.json", "adapter_model*")
REPLACED_PATTERNS += ("generation_config.json", "*processor_config.json")
# No part of the pattern looks beyond the next bracket, which would take quadratic time.
IMAGE = re.compile(
    r"!\[(?:[^\[\]\\]|\\.|\[[^\[\]]*\])*\]\(\s*(?:<([^<>\n]+)>|([^)\s]+))|<img\b[^<>]*?\bsrc=[\"']?([^\"'\s<>]+)",
    re.IGNORECASE,
)
# Only links to JSON, such as metrics.json, are followed; others may lead to files of a checkout.
LINK = re.compile(r"(?<!!)\[[^\[\]]*\]\(\s*(?:<([^<>\n]+)>|([^)\s]+))")
REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
IMAGE_SUFFIXES = (".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp")


def files_to_push(folder: Path) -> list[str]:
    """Check that a folder is a complete repository, and list its files, sorted and with `/` between folders.

    Raises:
        ValueError: a file is missing, damaged or outside the folder, `auto_map` is incomplete, or a file refers to
            code or files elsewhere.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"folder: {folder} holds an adapter; push it with the push_to_hub of its PEFT model, or save what that "
                "model's merge_and_unload() returns and push that"
            )
        raise ValueError(f"folder: expected a config.json in {folder}")
    missing = [name for name in NEEDED_FILES if not (folder / name).is_file()]
    if missing:
        hint = "; README.md is the model's card: write it, or let convert_checkpoint.py make a copy with one"
        raise ValueError(f"folder: missing {', '.join(missing)}{hint if 'README.md' in missing else ''}")
    auto_map = read_json(folder / "config.json").get("auto_map")
    missing = [name for name in AUTO_CLASSES if not isinstance(auto_map, dict) or name not in auto_map]
    if missing:
        raise ValueError(f"folder: auto_map in config.json lacks {', '.join(missing)}")
    optional = [name for name in (*TOKENIZER_FILES, "LICENSE") if os.path.lexists(folder / name)]
    for name in optional:
        if not (folder / name).is_file():
            raise ValueError(f"folder: expected {name} to be a file")
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ValueError(f"folder: expected {' or '.join(VOCABULARIES)}")
    for name in REFERRING_FILES:
        modules = OWN_MODULES if name == "config.json" else ()
        foreign = list(foreign_references(read_json(folder / name), modules)) if (folder / name).is_file() else []
        if foreign:
            raise ValueError(f"folder: {name} leads to code or files outside of the repository: {', '.join(foreign)}")
    files = {*NEEDED_FILES, *optional, *checked_weights(folder), *card_files(folder)}
    for name in files:
        file_inside(folder, name)
    # From here on torch is needed.
    classes = sys.modules[repository_class("BertConfig").__module__].AUTO_MAP
    unknown = [f"{name} {value!r}" for name, value in auto_map.items() if classes.get(name) != value]
    if unknown:
        raise ValueError(f"folder: auto_map in config.json names {unknown[0]}, which this code does not define")
    check_loading(folder)
    return sorted(files)


def check_loading(folder: Path) -> None:
    """Build the model on the meta device, compare it with the weights, and load the tokenizer, as a loader would.

    Raises:
        ValueError: a weight is missing, unknown, of another shape or not finite, or the tokenizer does not fit.
    """
    from lib.checkpoint_conversion import build_model, read_checkpoint

    checkpoint = read_checkpoint(str(folder), None)
    if not checkpoint.config.get("id2label"):
        checkpoint.config["id2label"] = {"0": "LABEL_0", "1": "LABEL_1"}  # as loaders assume
    try:
        model, _ = build_model(checkpoint)
    except ValueError as error:
        raise ValueError(f"folder: {str(error).removeprefix('source: ')}") from error
    count_tokens(load_tokenizer(folder, "folder"), model.config.vocab_size, "folder")


def checked_weights(folder: Path) -> list[str]:
    """List a folder's weight files, and their index if there is one.

    Raises:
        ValueError: there are no safetensors, a file is truncated, the index contradicts the files, or a layer of the
            config is missing.
    """
    from safetensors import SafetensorError, safe_open

    names = weight_files(folder, ("model.safetensors",))
    held = {}
    for name in names:
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, framework="np") as file:
                    held.update(dict.fromkeys(file.keys(), name))
            except SafetensorError as error:
                raise ValueError(f"folder: {name} is damaged, {one_line(error)}") from error
    if names[0].endswith(".index.json"):
        said = read_json(folder / names[0])["weight_map"]
        wrong = sorted(key for key in {*said, *held} if said.get(key) != held.get(key))
        if wrong:
            raise ValueError(f"folder: {names[0]} and the shards disagree about {listed(wrong, 3)}")
    prefix = "bert.encoder.layer." if any(name.startswith("bert.") for name in held) else "encoder.layer."
    check_layers(held, read_json(folder / "config.json").get("num_hidden_layers"), prefix)
    return names


def card_files(folder: Path) -> set[str]:
    """List the files of its own repository that the card shows (images) or links to (JSON).

    Raises:
        ValueError: one is missing, is not an image, or is outside the folder, or the card is not UTF-8.
    """
    files = set()
    try:
        card = read_bounded(folder / "README.md", LARGEST_CARD).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"folder: README.md: expected UTF-8, {one_line(error)}") from error
    for match in itertools.chain(IMAGE.finditer(card), LINK.finditer(card)):
        link = next(filter(None, match.groups())).partition("#")[0].partition("?")[0]
        if re.match(r"[a-z]+:|//", link, re.IGNORECASE) or not link:
            continue  # a web address, or the image itself (`data:`)
        if match.re is LINK and not link.endswith(".json"):
            continue
        name = unquote(link).removeprefix("./")
        plain = not name.startswith("/") and ".." not in Path(name).parts and "\\" not in name
        if match.re is IMAGE and not (plain and name.lower().endswith(IMAGE_SUFFIXES) and (folder / name).is_file()):
            raise ValueError(f"folder: README.md shows {link}, which is not an image in the folder")
        if not plain or not (folder / name).is_file():
            raise ValueError(f"folder: README.md links to {link}, which is not a file in the folder")
        files.add(Path(name).as_posix())
    return files


def card_head(folder: Path) -> str:
    """Return the metadata at the top of the card, as the Hub reads it."""
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    ends = [number for number, line in enumerate(lines) if line.strip() == "---"][:2]
    if len(ends) < 2 or ends[0] != 0:
        return "none: the Hub will not know its licence and task"
    return "\n".join(lines[1 : ends[1]])


def connect(anonymous: bool):
    """Make a client of the Hub with the user's token; raise ValueError without one unless it may be anonymous."""
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if not token and not anonymous:
        raise ValueError("not logged in to the Hub; run `hf auth login` or set HF_TOKEN")
    return HfApi(token=token)


def remote_state(api, repo_id: str, branch: Optional[str]) -> tuple[Optional[str], list[str]]:
    """Inspect a branch of a repository on the Hub, by default and for a missing branch the main branch.

    Returns:
        The commit at its tip, and the paths of its files; None and no files if there is no such repository.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        try:
            info = api.model_info(repo_id, revision=branch)
        except RevisionNotFoundError:
            info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None, []
    return info.sha, [file.rfilename for file in info.siblings]


def replaced_files(there: list[str], files: list[str]) -> list[str]:
    """List the files `there` on the Hub that loaders would still use beside the new ones, sorted."""
    return sorted(
        name
        for name in set(there) - set(files)
        if "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in REPLACED_PATTERNS)
    )


def push(
    folder: Path,
    repo_id: str,
    private: Optional[bool] = None,
    branch: Optional[str] = None,
    message: str = "Upload MosaicBERT",
    dry_run: bool = False,
) -> Optional[str]:
    """Check a folder, print its files, and push them as one commit.

    Args:
        folder: to push.
        repo_id: `owner/name`; created if it does not exist.
        private: whether a new repository is private; None: as the account's settings say.
        branch: to push to, created if it does not exist; None: the main branch.
        message: of the commit.
        dry_run: print, and change nothing on the Hub.

    Returns:
        The commit's hash, or None for a dry run.

    Raises:
        ValueError: the name is not one of the Hub's, the folder is not complete, or nobody is logged in.
        OSError: the Hub refused, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    if not REPO_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id: expected owner/name in letters, digits, '-', '_' and '.', got {repo_id!r}")
    api = connect(anonymous=dry_run)
    files = files_to_push(folder)
    sizes = {name: (folder / name).stat().st_size for name in files}
    for name, size in sizes.items():
        print(f"add     {size:>14,} bytes  {name}")
    print(f"total   {sum(sizes.values()):>14,} bytes  {len(files)} files")
    if dry_run:
        print(f"\nhead of the card, README.md:\n{card_head(folder)}\n")
    try:
        if not dry_run:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if branch is not None:
                api.create_branch(repo_id, branch=branch, exist_ok=True)
        parent, there = remote_state(api, repo_id, branch)
        replaced = replaced_files(there, files)
        for name in replaced:
            print(f"delete  {'':>14}        {name}")
        if dry_run:
            return None
        operations = [CommitOperationAdd(name, str((folder / name).resolve())) for name in files]
        operations += [CommitOperationDelete(name) for name in replaced]
        # The deletions were chosen for this parent; the Hub refuses if somebody else has pushed since.
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=branch, parent_commit=parent)
    except Exception as error:
        # huggingface_hub passes on the errors of its HTTP library: requests' OSErrors before 1.0, httpx's since.
        from_network = isinstance(error, OSError) or type(error).__module__.startswith("httpx")
        if isinstance(error, HfHubHTTPError) or not from_network:
            raise
        if dry_run:
            unknown = "so it is unknown what a push would delete there"
            print(f"{api.endpoint} cannot be reached, {unknown}: {one_line(error)}")
            return None
        raise OSError(f"the Hub at {api.endpoint} cannot be reached: {one_line(error)}") from error
    return commit.oid


def main() -> None:
    """Parse the command line and push."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="model folder to push")
    parser.add_argument("repo_id", help="owner/name on the Hub; created if missing")
    parser.option("--private", "make a new repository private", action="store_true", default=None)
    parser.option("--branch", "branch to push to; created if missing (default: main)")
    parser.option("--message", "commit message", default="Upload MosaicBERT")
    parser.option("--dry_run", "list what would be pushed and deleted, and stop", action="store_true")
    args = parser.parse_args()
    commit = push(args.folder, args.repo_id, args.private, args.branch, args.message, dry_run=args.dry_run)
    if commit is None:
        words = [word for word in sys.argv[1:] if word != "--dry_run"]
        say_end("nothing was pushed", command("push_to_hub.py", *words))
    else:
        say_end(f'pushed to {args.repo_id}; pin it with revision="{commit}"')


if __name__ == "__main__":
    run(main)
