#!/usr/bin/env python3
"""Turn any Hugging Face BERT into a warm start: a MosaicBERT for further training.

Attention: query, key and value merge into `Wqkv`. Positions: ALiBi replaces the position embedding, whose
mean is added to the token types. Feed-forward: MosaicBERT multiplies gelu(gate) by a value and has no bias, BERT has a
bias and no value. For every LayerNorm there is a vector v with v·x close to 1 for each output x, so that with

    gate rows = W1 + b1 vᵀ        value rows = v

the new block computes gelu(W1 x + b1 (v·x)) · (v·x), almost what the old one did. v is fitted by least squares, layer
by layer, to the new model's own activations on the text given with --data. The report is on a held-out fifth of it.

The MLM head is the source's. If the source has none, the decoder is tied to the embeddings, its bias is the log of each
token's frequency in the text, and the transform is the identity with a LayerNorm scale of 0.3: on MiniLM, predictions
then start near the frequencies and leave them sooner than with a scale of 1 or a random transform.

    convert_bert.py bert-base-uncased my-warm-start --data "corpus/*.jsonl.gz"
    convert_bert.py ./MiniLM my-warm-start --data "corpus/*.jsonl.gz" --layers 0 1 2 3 --pad_vocab 64
"""

from pathlib import Path

from lib.cards import write_card
from lib.cli import LICENSE, Parser, command, not_negative, positive_integer, run, say_end, text_length, whole_number
from lib.common import find_checkpoint, weight_files
from lib.records import check_texts
from lib.staging import staged_folder

# Options for a first training on a CPU, as in the README.
TEN_MINUTES = "--max_seconds 600 --tokens_per_row 2048 --global_batch_size 32 --learning_rate 3e-4".split()


def main() -> None:
    """Parse the command line and convert."""
    parser = Parser(__doc__)
    parser.add_argument("source", help="folder or Hub id of a BERT")
    parser.add_argument("target", type=Path, help="folder to create")
    parser.option(
        "--data", ".txt, .json or .jsonl files (also .gz), or quoted patterns", nargs="+", required=True, metavar="FILE"
    )
    parser.option("--layers", "encoder layers to keep (default: all)", whole_number, nargs="+", metavar="N")
    parser.option("--pad_vocab", "make the vocabulary a multiple of N", positive_integer, 64)
    parser.option("--max_length", "tokens in a window of text", text_length, 128)
    parser.option("--tokens", "tokens to fit and report on", positive_integer, 25_000)
    parser.option("--ridge", "keep v short; 0 is exact, but v may be long", not_negative, 1e-6)
    parser.option("--revision", "branch, tag or commit of a Hub id")
    parser.option("--license", **LICENSE)
    parser.option("--overwrite", "replace an existing target", action="store_true")
    args = parser.parse_args()
    files = check_texts(args.data)
    with staged_folder(args.target, args.overwrite, source=args.source, data=args.data) as stage:
        folder, commit = find_checkpoint(args.source, args.revision)
        weight_files(folder)
        from lib.bert_conversion import convert  # late, as it imports torch

        reports = convert(folder, stage, files, args.layers, args.pad_vocab, args.max_length, args.tokens, args.ridge)
        report = "\n".join(map(str, reports))
        made = "`scripts/convert_bert.py`: a warm start, not trained since"
        notes = f"## Fit\n\n```\n{report}\n```"
        write_card(stage, made, args.source, folder, commit, args.license, notes=notes)
    print(report)
    worst = max(reports, key=lambda row: row.block_error)
    print(
        "v·x would be 1.0000 ± 0.0000 in an exact copy; the relative error after residual and LayerNorm is what the "
        f"next layer sees, largest in layer {worst.layer} ({worst.block_error:.1%}). Replacing positions with "
        "ALiBi adds to this, so continue training before you use the model."
    )
    words = ["--model", args.target, "--train_data", *args.data, *TEN_MINUTES, "--output_dir", f"{args.target}-trained"]
    say_end(f"saved in {args.target}: a warm start with its card", command("pretrain_mlm.py", *words))


if __name__ == "__main__":
    run(main)
