"""Measure masked language models by sequence length: loss, accuracy, time and memory, as a table and a plot.

    python scripts/evaluate_mlm.py --data 'corpus/*.jsonl.gz'
    python scripts/evaluate_mlm.py --model . runs/learned-positions --data 'long/*.jsonl.gz' \\
        --max_length 128 512 2048 8192 --csv lengths.csv --png lengths.png

Each document is cut into windows of a length, [CLS] and [SEP] included. A seeded 15% of the tokens become [MASK], and
only those are scored. With several lengths only documents that fill the longest are used, so that all rows are about
the same text. A model with learned positions is only measured up to the length that it has positions for.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from lib import cli
from lib.common import REPOSITORY


def file_of_kind(suffix: str):
    """Type of an option that names a file to write, with the only suffix that it may have."""

    def new_file(text: str) -> str:
        if not text.endswith(suffix):
            raise argparse.ArgumentTypeError(f"expected a name that ends with {suffix}, got {text!r}")
        return cli.new_file(text)

    return new_file


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(__doc__)
    parser.option("--model", "folders or Hub ids", default=[str(REPOSITORY)], nargs="+", metavar="MODEL")
    parser.option("--name", "name of each model in the table (default: the folder's name)", nargs="+", metavar="NAME")
    parser.option(
        "--data", ".jsonl, .json or .txt files (also .gz), or quoted patterns", nargs="+", required=True, metavar="FILE"
    )
    parser.option("--text_field", "field that holds the text", default="text", metavar="NAME")
    parser.option(
        "--max_length",
        "tokens per window, [CLS] and [SEP] included; each length is a row of the table",
        cli.positive_integer,
        [128],
        nargs="+",
    )
    parser.option("--tokens", "approximate number of tokens to read", cli.positive_integer, 65_536)
    parser.option("--batch_tokens", "approximate tokens per batch", cli.positive_integer, 8192)
    parser.option("--dtype", "of the model", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.option("--device", "such as cpu or cuda:1 (default: the GPU if there is one)")
    parser.option("--trust_remote_code", **cli.TRUST)
    parser.option("--csv", "write the table to this file", file_of_kind(".csv"), metavar="FILE")
    parser.option("--png", "draw the table to this file", file_of_kind(".png"), metavar="FILE")
    return parser


def parse(words: Optional[Sequence[str]] = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command line and read the data that it names; mistakes there are reported before torch is imported.

    Returns:
        The options, with a name for each model, and the documents.

    Raises:
        ValueError: options that contradict each other, a folder without a model, or see `read_texts`.
    """
    options = make_parser().parse_args(words)
    from lib.common import check_model  # after the parser, so that --help stays fast
    from lib.records import read_texts
    from lib.sources import SHORTEST
    from lib.staging import check_apart

    for argument in ("csv", "png"):
        check_apart(getattr(options, argument), argument, data=options.data, model=options.model)
    for model in options.model:
        check_model(model)
    options.name = options.name or [Path(model).resolve().name for model in options.model]
    if len(options.name) != len(options.model):
        raise ValueError(f"name: expected {len(options.model)} names, got {len(options.name)}")
    if min(options.max_length) < SHORTEST + 2:
        raise ValueError(f"max_length must be at least {SHORTEST + 2}, got {min(options.max_length)}")
    return options, list(read_texts(options.data, options.text_field))


def main() -> None:
    """Parse the command line, measure, print the table, and write the files requested."""
    options, texts = parse()
    from lib import evaluation  # after the parser, so that --help stays fast

    evaluation.evaluate(options, texts)


if __name__ == "__main__":
    cli.run(main, "a smaller --batch_tokens needs less")
