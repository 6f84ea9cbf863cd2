"""Fine-tune a classifier or regressor on text, with several seeds and a bag-of-words baseline.

    python scripts/finetune_classification.py --train_data topics.train.jsonl --validation_data topics.valid.jsonl \\
        --seeds 0 1 2 --baseline --output_dir runs/topics
    python scripts/finetune_classification.py --train_data nyu-mll/glue:mrpc --validation_data nyu-mll/glue:mrpc \\
        --text_fields sentence1 sentence2 --output_dir runs/mrpc

The labels decide the kind of problem, unless --problem names it: lists of names are multi-label; numbers with a
fraction are a regression, and so are many different numbers that are written with a decimal point; all others are
single-label. --output_dir gets the model of the best seed as a repository that loads by itself, with its card,
`metrics.json`, `loss.png`, `confusion.png` (single-label), `errors.csv` (the texts with a wrong prediction, the most
confident first; for a regression all texts, the largest error first), and `predictions.csv` if --predict is given.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from lib import cli

# Defaults of TrainingArguments that --help does not show.
RECIPE = {
    "weight_decay": 0.01,
    "logging_steps": 50,  # at most, see --logging_steps
    "report_to": "none",
    "logging_nan_inf_filter": False,  # it would hide a loss that must stop a run
    "save_only_model": True,
    "save_total_limit": 1,
}
REFUSED = {
    "resume_from_checkpoint": "fine-tuning keeps no optimizer states, so it starts again; pass --overwrite to do that",
    "max_steps": "give --num_train_epochs, as models are compared after each epoch",
    "seed": "give --seeds",
    "eval_strategy": "models are compared after each epoch",
    "save_strategy": "models are compared after each epoch",
    "load_best_model_at_end": "the best epoch is kept if --patience is given or there are 100 validation texts",
    "metric_for_best_model": "the kind of problem decides it",
}


def make_parser() -> cli.TrainingParser:
    """Define the command line."""
    parser = cli.TrainingParser(__doc__, RECIPE, REFUSED, "%(prog)s --train_data DATA --output_dir DIR")
    data = parser.section("data")
    data(
        "--train_data",
        ".jsonl, .json or .csv files (also .gz), quoted patterns, or a `datasets` id as id[:config[:split]]",
        nargs="+",
        required=True,
        metavar="DATA",
    )
    data(
        "--validation_data",
        "the same, with the default split `validation` (default: a tenth of the training data, or up to a fifth of "
        "fewer than 1,000 texts)",
        default=[],
        nargs="+",
        metavar="DATA",
    )
    data(
        "--test_data",
        "the same, with the default split `test`: held-out data that the best model is scored on",
        default=[],
        nargs="+",
        metavar="DATA",
    )
    data(
        "--predict",
        "texts without labels, also lines of a .txt file; their predictions are written to predictions.csv",
        metavar="FILE",
    )
    data(
        "--text_fields",
        "field that holds the text, or two fields for pairs of texts",
        default=["text"],
        nargs="+",
        metavar="NAME",
    )
    data("--label_field", "field that holds the label, or the list of labels", default="label", metavar="NAME")
    data("--label_separator", "split strings of labels at this text, for files without lists", metavar="TEXT")
    data("--problem", "kind of the labels", choices=["classification", "multi_label", "regression"])
    data(
        "--max_length",
        "truncate longer texts to this many tokens (default: the length of the longest text, unless a batch of the "
        "longest texts exceeds --tokens_per_batch)",
        cli.text_length,
    )
    data(
        "--tokens_per_batch",
        "maximum number of tokens in a batch; decides memory use unless --max_length is given",
        cli.positive_integer,
        16_384,
    )

    training = parser.section("training")
    training(
        "--model",
        "folder or Hub id to start from; a classifier keeps its head if its labels are the same, in the same order, or "
        "have no names (default: this repository)",
    )
    training("--trust_remote_code", **cli.TRUST)
    training("--seeds", "train once per seed and keep the best model", cli.seed, [0], nargs="+")
    training(
        "--learning_rate",
        "peak learning rate (default: 3e-4 below 50 million weights, otherwise 5e-5)",
        cli.positive_number,
    )
    training(
        "--num_train_epochs",
        "maximum number of passes over the training data (default: 4 below 50 million weights, otherwise 3; for few "
        "texts up to 20, to reach 100 steps)",
        cli.positive_number,
    )
    training(
        "--patience",
        "stop after this many epochs without a better score, and keep the best (default: 2; with fewer than 100 "
        "validation texts the last epoch is kept)",
        cli.positive_integer,
    )
    training(
        "--per_device_train_batch_size",
        "texts per step (default: 32, or a fiftieth of fewer than 1,600 texts, but at least 8)",
        cli.positive_integer,
    )
    training("--per_device_eval_batch_size", "texts per batch in evaluation", cli.positive_integer, 64)
    training(
        "--logging_steps",
        "steps between two lines of the log (default: 50 or a tenth of the training, and every ten seconds)",
        cli.positive_number,
        metavar="N",
    )
    training(
        "--classifier_pooling",
        "input of the head: the first token through a pooler, or the mean over all tokens (default: the mean for a "
        "masked language model, whose pooler would be new)",
        choices=["cls", "mean"],
    )
    training("--use_cpu", "train on the CPU even if there is a GPU", bool, False)
    training("--baseline", "also fit and score TF-IDF with a linear model", bool, False)

    output = parser.section("output")
    output("--output_dir", "folder of the results and the best model", required=True, metavar="DIR")
    output("--overwrite", "replace the results of an earlier run", bool, False)
    output("--keep_checkpoints", "keep the model of each seed's best epoch", bool, False)
    return parser


def parse(words: Optional[Sequence[str]] = None) -> tuple[argparse.Namespace, "TrainingArguments", "Task"]:  # noqa: F821
    """Parse a command line and read its data, so that mistakes are reported before torch is imported.

    Returns:
        The own options, transformers' `TrainingArguments`, and the task.
    """
    parser = make_parser()
    options, rest = parser.parse_own(words)
    from lib.common import check_whole  # after the parser, so that --help stays fast
    from lib.examples import read_task
    from lib.runs import check_output
    from lib.sources import inputs

    check_output(Path(options.output_dir), options.overwrite, **inputs(options))
    if options.model is not None:
        check_whole(options.model, options.trust_remote_code)
    task = read_task(options)
    return options, parser.parse_others(options, rest), task


def main() -> None:
    """Parse the command line, fine-tune and print the results."""
    options, arguments, task = parse()
    from lib import finetuning  # after the parser, so that --help stays fast

    finetuning.finetune(options, arguments, task)


if __name__ == "__main__":
    cli.run(main, "a smaller --tokens_per_batch, --per_device_train_batch_size or --max_length needs less")
