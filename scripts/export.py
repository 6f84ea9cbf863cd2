#!/usr/bin/env python3
"""Export a MosaicBERT to ONNX or GGUF, for engines that serve encoders.

SOURCE is a Hub id or a folder of any repository of the family (mosaic-bert-base, DNABERT-2, their fine-tuned
descendants, …). ONNX files serve the model's own task in ONNX Runtime, OpenVINO, transformers.js, sentence-transformers
and optimum. GGUF files give embeddings in llama.cpp and Ollama. TARGET gets one file for each type, the other files
that its engines read, and a card. Each file is compared with the source before TARGET appears, and the card says how
much their outputs differ.

    export.py mosaicml/mosaic-bert-base my-onnx --format onnx --tokenizer bert-base-uncased
    export.py ./my-classifier my-onnx --format onnx --types int8
    export.py . my-gguf --format gguf
"""

from pathlib import Path

from lib.cli import LICENSE, Parser, run, say_end
from lib.common import check_checkpoint
from lib.staging import staged_folder


def main() -> None:
    """Parse the command line and export."""
    parser = Parser(__doc__)
    parser.add_argument("source", help="Hub id, folder, or Composer .pt file")
    parser.add_argument("target", type=Path, help="folder to create")
    parser.option("--format", "format of the files", required=True, choices=("onnx", "gguf"))
    parser.option(
        "--types",
        "one file for each; int8 applies to weights only, and is Q8_0 in GGUF",
        default=["float32", "float16", "int8"],
        nargs="+",
        choices=("float32", "float16", "int8"),
    )
    parser.option("--features", "export the encoder without its head, for embeddings", action="store_true")
    parser.option(
        "--chunked",
        "ONNX: compute attention for a few queries at a time, so that memory does not grow with the squared length",
        action="store_true",
    )
    parser.option("--tokenizer", "Hub id or folder of a tokenizer, instead of the source's", metavar="ID")
    parser.option("--revision", "branch, tag or commit of a Hub id")
    parser.option("--license", **LICENSE)
    parser.option("--overwrite", "replace an existing target", action="store_true")
    args = parser.parse_args()
    if args.chunked and args.format != "onnx":
        parser.error("--chunked is for --format onnx: llama.cpp computes attention itself")
    inputs = {"source": args.source, "tokenizer": args.tokenizer}
    with staged_folder(args.target, args.overwrite, own=("onnx",), **inputs) as stage:
        check_checkpoint(args.source)
        from lib.exporting import export  # late, as it imports torch

        lines = export(args, stage)
    print("\n".join(lines))
    say_end(f"saved in {args.target}: the files above and README.md (its card), which shows how an engine reads them")


if __name__ == "__main__":
    run(main, "the comparison includes a text of 2,048 tokens, whose attention needs 200 MB per head")
