#!/usr/bin/env python3
"""Turn a published MosaicBERT-family checkpoint, or Composer's, into a complete repository with this code.

SOURCE is a Hub id or a folder of any repository of the family (mosaic-bert-base, DNABERT-2, their fine-tuned
descendants, …), or a Composer checkpoint (`.pt`) with its config and tokenizer inside or beside it. TARGET gets the
code, safetensors, config.json with the full `auto_map`, the tokenizer and a card. Weights keep their values and dtype;
vocabulary rows without a token get a low bias in the decoder. No code of the source runs, and nothing in TARGET refers
to code outside of it.

    convert_checkpoint.py mosaicml/mosaic-bert-base my-mosaic-bert --tokenizer bert-base-uncased --verify
    convert_checkpoint.py runs/ep1-ba70000-rank0.pt my-mosaic-bert --verify --data validation.jsonl.gz
    convert_checkpoint.py ./my-bert my-padded-bert --pad_vocab 64
"""

import argparse
import re
from pathlib import Path

from lib.cli import LICENSE, Parser, command, old_file, positive_integer, run, say_end
from lib.common import check_checkpoint
from lib.records import check_texts
from lib.staging import staged_folder


def size(text: str) -> str:
    """Type of an option that takes the size of a file, such as `5GB`."""
    if not re.fullmatch(r"0*[1-9][0-9]*[KMGT]B", text):
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 5GB, got {text!r}")
    return text


def main() -> None:
    """Parse the command line and convert."""
    parser = Parser(__doc__)
    parser.add_argument("source", help="Hub id, folder, or Composer .pt file")
    parser.add_argument("target", type=Path, help="folder to create")
    parser.option("--revision", "branch, tag or commit of a Hub id")
    parser.option("--config", "config.json to use instead of the source's", old_file, metavar="FILE")
    parser.option("--tokenizer", "Hub id or folder of a tokenizer, instead of the source's", metavar="ID")
    parser.option("--pad_vocab", "pad the vocabulary to a multiple of N, such as 64", positive_integer)
    parser.option("--max_shard_size", "largest weight file", size, "5GB", metavar="SIZE")
    parser.option("--license", **LICENSE)
    parser.option("--verify", "compare outputs before and after", action="store_true")
    parser.option("--data", "verify on this text instead of random tokens", nargs="+", metavar="FILE")
    parser.option("--overwrite", "replace an existing target", action="store_true")
    args = parser.parse_args()
    inputs = {"source": args.source, "config": args.config, "tokenizer": args.tokenizer, "data": args.data}
    with staged_folder(args.target, args.overwrite, **inputs) as stage:
        check_checkpoint(args.source)
        if args.data is not None:
            check_texts(args.data)
        from lib.checkpoint_conversion import convert  # late, as it imports torch

        lines = convert(
            args.source,
            stage,
            args.revision,
            args.config,
            args.tokenizer,
            args.pad_vocab,
            args.max_shard_size,
            args.license,
            args.verify or args.data is not None,
            args.data,
        )
    print("\n".join(lines))
    say_end(
        f"saved in {args.target}: the model with its code, tokenizer and card",
        command("push_to_hub.py", args.target, f"YOUR-NAME/{args.target.resolve().name}", "--dry_run"),
    )


if __name__ == "__main__":
    run(main)
