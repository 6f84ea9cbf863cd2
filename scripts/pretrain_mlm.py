"""Train a MosaicBERT masked language model: from random weights, from a checkpoint, or from where a run stopped.

Batches hold no padding: documents are cut into sequences, and sequences are concatenated into rows. The defaults are
MosaicBERT's published recipe; every option of transformers' TrainingArguments works too (--help_all).

    # MosaicBERT-Base from scratch on eight GPUs
    torchrun --nproc-per-node 8 scripts/pretrain_mlm.py --train_data allenai/c4:en --streaming --max_steps 70000 \\
        --tokenizer bert-base-uncased --output_dir runs/base

    # a small model, from a warm start, on two CPU cores
    python scripts/pretrain_mlm.py --model warm-start-folder --train_data 'corpus/*.jsonl.gz' --use_cpu \\
        --tokens_per_row 4096 --global_batch_size 64 --max_steps 5000 --output_dir runs/small

    # after a crash: the same command with --resume_from_checkpoint last
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from lib import cli

# Defaults of TrainingArguments that --help does not show.
RECIPE = {
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "logging_steps": 50,  # at most, see --logging_steps
    "gradient_accumulation_steps": 0,  # follows --global_batch_size
    "per_device_train_batch_size": 1,  # packed rows in one forward
    "per_device_eval_batch_size": 1,
    "save_total_limit": 2,
    "report_to": "none",
    "remove_unused_columns": False,  # rows have their own keys
    "average_tokens_across_devices": True,  # every predicted token has the same weight, whatever its process
    "ddp_find_unused_parameters": False,
    "logging_nan_inf_filter": False,  # it synchronizes in each step, and hides a loss that must stop a run
}
REFUSED = {
    "label_smoothing_factor": "label smoothing would give weight to the padded entries of the vocabulary",
    "load_best_model_at_end": "the model of the last step is saved",
    "torch_compile_backend": "name the backend with --torch_compile BACKEND",
    "torch_compile_mode": "--torch_compile compiles in the default mode",
    "include_num_input_tokens_seen": "tokens are always counted",
}


def config_field(text: str) -> tuple[str, Any]:
    """Type of an option that takes NAME=VALUE; the value is JSON, or else a string."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def make_parser() -> cli.TrainingParser:
    """Define the command line."""
    parser = cli.TrainingParser(__doc__, RECIPE, REFUSED, "%(prog)s --train_data DATA ... --output_dir DIR")
    data = parser.section("data")
    data(
        "--train_data",
        ".jsonl, .json or .txt files (also .gz; a paragraph of .txt is a document), quoted patterns, `datasets` "
        "ids (id or id:config), folders of MDS shards, or folders that --tokenize_only wrote",
        nargs="+",
        required=True,
        metavar="DATA",
    )
    data("--validation_data", "the same, for evaluation", default=[], nargs="+", metavar="DATA")
    data("--text_field", "field that holds the text", default="text", metavar="NAME")
    data("--streaming", "tokenize while training instead of before", bool, False)
    data("--tokenize_only", "write the tokenized --train_data to --output_dir and stop", bool, False)
    data("--cache_dir", "folder for tokenized text (default: in the cache of Hugging Face)", metavar="DIR")
    data(
        "--max_length",
        "tokens per sequence, [CLS] and [SEP] included; several lengths are mixed",
        cli.positive_integer,
        [128],
        nargs="+",
    )
    data(
        "--length_shares",
        "share of the tokens for each --max_length (default: equal shares)",
        cli.positive_number,
        [],
        nargs="+",
    )
    data(
        "--tokens_per_row",
        "maximum number of tokens in a packed row; decides memory use and speed",
        cli.positive_integer,
        16_384,
    )
    data(
        "--global_batch_size",
        "sequences of the first --max_length per optimizer step over all processes, by gradient accumulation",
        cli.positive_integer,
        4096,
    )
    data("--mask_probability", "share of tokens to predict", cli.positive_share, 0.3)
    data(
        "--mask_token_share",
        "share of these replaced by [MASK]; half of the rest is replaced by a random token, half is kept",
        cli.share,
        0.8,
    )
    data("--eval_mask_probability", "share of tokens to predict in evaluation", cli.positive_share, 0.15)
    data("--eval_tokens", "evaluation tokens per length", cli.positive_integer, 262_144)

    model = parser.section("model")
    model("--model", "folder or Hub id of a checkpoint to start from (default: random weights)")
    model("--config", "folder or config.json for random weights (default: MosaicBERT-Base)")
    model(
        "--config_fields",
        "config fields to set, for example num_hidden_layers=4 hidden_dropout_prob=0",
        config_field,
        [],
        nargs="+",
        metavar="NAME=VALUE",
    )
    model("--tokenizer", "folder or Hub id (default: that of --model, or this repository's)")

    training = parser.section("training")
    training("--max_steps", "optimizer steps", cli.positive_integer, 70_000)
    training("--num_train_epochs", "passes over the data, instead of --max_steps", cli.not_negative, 0.0)
    training(
        "--max_seconds",
        "end the training after this many seconds, checkpoints and evaluation included, schedule complete",
        cli.positive_number,
        metavar="S",
    )
    training("--learning_rate", "peak learning rate", cli.positive_number, 5e-4)
    training("--warmup_share", "share of the steps used for warmup", cli.share, 0.06)
    training("--final_lr_share", "final learning rate relative to the peak", cli.share, 0.02)
    training(
        "--decoupled_weight_decay",
        "weight decay per step at the peak, independent of --learning_rate (AdamW's own is this divided by it)",
        cli.not_negative,
        1e-5,
    )
    training("--max_grad_norm", "clip gradients to this norm (default: no clipping)", cli.not_negative, 0.0)
    training("--bf16", "autocast to bfloat16", bool, True)
    training(
        "--torch_compile",
        "compile each layer of the encoder with torch.compile",
        dest="compile_backend",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
    )
    training("--use_cpu", "train on the CPU even if there is a GPU", bool, False)
    training(
        "--dataloader_num_workers",
        "processes that prepare batches (default: 2 with a GPU, otherwise none)",
        cli.whole_number,
    )
    training("--seed", "seed of weights, order, masks and dropout", cli.seed, 42)
    training(
        "--logging_steps",
        "steps between two lines of the log (default: 50 or a tenth of the training, and every ten seconds)",
        cli.positive_number,
        metavar="N",
    )
    training("--save_steps", "steps between two checkpoints", cli.positive_number, 1000, metavar="N")
    training(
        "--peak_tflops",
        "TFLOP/s of one device, for the model FLOPs utilization in the log (default: measured at the start)",
        cli.positive_number,
    )

    output = parser.section("output")
    output("--output_dir", "folder of the run, and at its end of the trained model", required=True, metavar="DIR")
    output("--resume_from_checkpoint", "`last`, or the folder of a checkpoint", metavar="DIR")
    output("--overwrite", "replace the results of an earlier run", bool, False)
    output("--keep_checkpoints", "keep the checkpoints when the run is over", bool, False)
    output(
        "--save_dtype",
        "dtype of the weights in the final file",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
    )
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for options that contradict each other or name unusable files, before torch is imported."""
    from lib.common import TOKENIZER_FILES, check_model, check_whole, is_family  # late, so that --help stays fast
    from lib.runs import check_output
    from lib.sources import check_lengths, check_sources, holds_documents, inputs
    from lib.staging import check_target

    if options.model is not None and options.config is not None:
        raise ValueError("config must not be given with model, which brings its own")
    if options.length_shares and len(options.length_shares) != len(options.max_length):
        raise ValueError(f"length_shares must be one positive number for each max_length, got {options.length_shares}")
    check_lengths(options.max_length)
    if options.streaming and options.num_train_epochs:
        raise ValueError("num_train_epochs needs data of a known size, give max_steps for a stream")
    folder = Path(options.output_dir)
    if options.tokenize_only:
        folder = check_target(folder, "output_dir", **inputs(options))
        if folder.exists() and any(folder.iterdir()) and not (options.overwrite and holds_documents(folder)):
            raise ValueError(f"output_dir: {folder} is not empty; --overwrite replaces tokenized data")
    else:
        check_output(folder, options.overwrite, options.resume_from_checkpoint, True, **inputs(options))
    if options.model is not None and not is_family(check_whole(options.model, False)):
        raise ValueError(f"model: {options.model!r} is not a MosaicBERT; convert_bert.py makes one of a BERT")
    if options.tokenizer is not None:
        check_model(options.tokenizer, "tokenizer", TOKENIZER_FILES)
    for argument in ("train_data", "validation_data"):
        check_sources(getattr(options, argument), options.text_field, argument)


def parse(words: Optional[Sequence[str]] = None) -> tuple[argparse.Namespace, "TrainingArguments"]:  # noqa: F821
    """Parse a command line into the own options and transformers' `TrainingArguments`."""
    parser = make_parser()
    options, rest = parser.parse_own(words)
    check(options)
    return options, parser.parse_others(options, rest)


def main() -> None:
    """Parse the command line, then tokenize or train."""
    options, arguments = parse()
    from lib import pretraining  # after the parser, so that --help stays fast

    if options.tokenize_only:
        pretraining.tokenize_only(options)
    else:
        pretraining.train(options, arguments)


if __name__ == "__main__":
    cli.run(main, "a smaller --tokens_per_row needs less")
