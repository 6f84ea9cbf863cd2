"""Measure masked language models by sequence length: loss, accuracy, time and memory, as a table and a plot.

    python scripts/evaluate_mlm.py --data 'corpus/*.jsonl.gz'
    python scripts/evaluate_mlm.py --model . runs/learned-positions --data 'long/*.jsonl.gz' \\
        --max_length 128 512 2048 8192 --csv lengths.csv --png lengths.png

Each document is cut into windows of a length, [CLS] and [SEP] included. A seeded 15% of the tokens become [MASK], and
only those are scored. With several lengths only documents that fill the longest are used, so that all rows measure the
same text. A model with learned positions is measured only up to the length of its position table.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Optional

from lib import cli
from lib.common import REPOSITORY


def make_parser() -> cli.Parser:
    """Define the command line."""
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
    parser.option("--batch_tokens", "approximate number of tokens per batch", cli.positive_integer, 8192)
    parser.option("--dtype", "dtype of the model", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.option("--device", "such as cpu or cuda:1 (default: the GPU if there is one)")
    parser.option("--trust_remote_code", **cli.TRUST)
    parser.option("--csv", "write the table to this file", partial(cli.new_file, suffix=".csv"), metavar="FILE")
    parser.option("--png", "draw the table to this file", partial(cli.new_file, suffix=".png"), metavar="FILE")
    return parser


def parse(words: Optional[Sequence[str]] = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command line and read its data, so that mistakes are reported before torch is imported.

    Returns:
        The options, with a name for each model, and the documents.

    Raises:
        ValueError: options contradict each other, a folder holds no model, or see `read_texts`.
    """
    options = make_parser().parse_args(words)
    from lib.common import check_whole  # after the parser, so that --help stays fast
    from lib.records import check_texts, read_texts
    from lib.sources import check_lengths
    from lib.staging import check_apart

    for argument in ("csv", "png"):
        check_apart(getattr(options, argument), argument, data=options.data, model=options.model)
    for model in options.model:
        check_whole(model, options.trust_remote_code, "ForMaskedLM")
    options.name = options.name or [Path(model).resolve().name for model in options.model]
    if len(options.name) != len(options.model):
        raise ValueError(f"name: expected {len(options.model)} names, got {len(options.name)}")
    check_lengths(options.max_length)
    check_texts(options.data, options.text_field)
    return options, list(read_texts(options.data, options.text_field))


def main() -> None:
    """Parse the command line, measure, print the table, and write the requested files."""
    options, texts = parse()
    from lib import evaluation  # after the parser, so that --help stays fast

    evaluation.evaluate(options, texts)


if __name__ == "__main__":
    cli.run(main, "a smaller --batch_tokens needs less")
