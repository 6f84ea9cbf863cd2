#!/usr/bin/env python3
"""Push a model folder to the Hugging Face Hub: weights, config, tokenizer, card and code, in one commit.

The folder is checked first: every code file that its `auto_map` needs must lie in it, and no reference may lead to
another repository. A branch that does not exist is made. Log in with `hf auth login` or set HF_TOKEN.

    push_to_hub.py my-mosaic-bert me/my-mosaic-bert --private
    push_to_hub.py my-mosaic-bert me/my-mosaic-bert --branch seqlen-2048 --message "Longer sequences"
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Optional

from common import CODE_FILES, MODEL_PATTERNS
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError


def check_folder(folder: Path) -> None:
    """Make sure that a folder is a complete repository.

    Args:
        folder: to be pushed.

    Raises:
        ValueError: config, weights, card, tokenizer or code is missing, or `auto_map` leads to another repository.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder: expected a config.json in {folder}")
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map", {})
    foreign = sorted(reference for reference in auto_map.values() if "--" in reference)
    if foreign:
        raise ValueError(f"folder: auto_map leads to another repository: {', '.join(foreign)}")
    missing = [name for name in ("AutoConfig", "AutoModel", "AutoModelForMaskedLM") if name not in auto_map]
    if missing:
        raise ValueError(f"folder: auto_map in config.json lacks {', '.join(missing)}")
    missing = [name for name in (*CODE_FILES, "README.md", "tokenizer_config.json") if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise ValueError(f"folder: missing {', '.join(missing)}")


def push(
    folder: Path,
    repo_id: str,
    private: Optional[bool],
    branch: Optional[str],
    message: str,
    token: Optional[str] = None,
) -> str:
    """Check a folder and push it as one commit.

    Args:
        folder: to be pushed; only the files of a model repository are taken.
        repo_id: `owner/name`; made when it does not exist.
        private: whether a new repository is private; None: what the account's settings say.
        branch: where the commit goes, made when it does not exist; None: the main branch.
        message: of the commit.
        token: None: the one that is logged in.

    Returns:
        The commit's hash.

    Raises:
        ValueError: the folder is not complete.
        HfHubHTTPError: the Hub refused.
    """
    check_folder(folder)
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if branch is not None:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, revision=branch, commit_message=message, allow_patterns=MODEL_PATTERNS
    )
    return commit.oid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="model folder to push")
    parser.add_argument("repo_id", help="owner/name on the Hub; made when it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--branch", help="branch to push to; made when it does not exist (default: main)")
    parser.add_argument("--message", default="Upload MosaicBERT", help="of the commit")
    args = parser.parse_args()
    try:
        commit = push(args.folder, args.repo_id, args.private, args.branch, args.message)
    except (ValueError, HfHubHTTPError) as error:
        sys.exit(f"push_to_hub.py: {error}")
    print(f'pushed; pin it with revision="{commit}"')


if __name__ == "__main__":
    main()
