"""Train a MosaicBERT masked language model: from random weights, from a checkpoint, or on from where a run stopped.

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
    "average_tokens_across_devices": True,  # every predicted token has the same weight, on whichever process it is
    "ddp_find_unused_parameters": False,
    "logging_nan_inf_filter": False,  # it synchronizes in each step and hides losses that must stop a run
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
    """The command line."""
    parser = cli.TrainingParser(__doc__, RECIPE, REFUSED, "%(prog)s --train_data DATA ... --output_dir DIR")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--train_data",
        nargs="+",
        required=True,
        metavar="DATA",
        help=".jsonl, .json or .txt files (also .gz; a paragraph of .txt is a document), quoted patterns, `datasets` "
        "ids (id or id:config), folders of MDS shards, or folders that --tokenize_only wrote",
    )
    data.add_argument("--validation_data", nargs="+", default=[], metavar="DATA", help="the same, for evaluation")
    data.add_argument("--text_field", default="text", metavar="NAME", help="field that holds the text")
    data.add_argument("--streaming", **cli.FLAG, default=False, help="tokenize while training instead of before")
    data.add_argument(
        "--tokenize_only", **cli.FLAG, default=False, help="write the tokenized --train_data to --output_dir and stop"
    )
    data.add_argument(
        "--cache_dir", metavar="DIR", help="where tokenized text is kept (default: in the cache of Hugging Face)"
    )
    data.add_argument(
        "--max_length",
        nargs="+",
        type=cli.positive_integer,
        default=[128],
        metavar="N",
        help="tokens per sequence, [CLS] and [SEP] included; several lengths are mixed",
    )
    data.add_argument(
        "--length_shares",
        nargs="+",
        type=cli.positive_number,
        default=[],
        metavar="X",
        help="share of the tokens that is cut to each --max_length (default: equal shares)",
    )
    data.add_argument(
        "--tokens_per_row",
        type=cli.positive_integer,
        default=16_384,
        metavar="N",
        help="maximum number of tokens in a packed row; decides memory use and speed",
    )
    data.add_argument(
        "--global_batch_size",
        type=cli.positive_integer,
        default=4096,
        metavar="N",
        help="sequences of the first --max_length per optimizer step over all processes, by gradient accumulation",
    )
    data.add_argument(
        "--mask_probability", type=cli.positive_share, default=0.3, metavar="X", help="share of tokens to predict"
    )
    data.add_argument(
        "--mask_token_share",
        type=cli.share,
        default=0.8,
        metavar="X",
        help="share of these replaced by [MASK]; half of the rest is replaced by a random token, half is kept",
    )
    data.add_argument(
        "--eval_mask_probability",
        type=cli.positive_share,
        default=0.15,
        metavar="X",
        help="share of tokens to predict in evaluation",
    )
    data.add_argument(
        "--eval_tokens", type=cli.positive_integer, default=262_144, metavar="N", help="evaluation tokens per length"
    )

    model = parser.add_argument_group("model")
    model.add_argument("--model", help="folder or Hub id of a checkpoint to start from (default: random weights)")
    model.add_argument("--config", help="folder or config.json for random weights (default: MosaicBERT-Base)")
    model.add_argument(
        "--config_fields",
        nargs="+",
        type=config_field,
        default=[],
        metavar="NAME=VALUE",
        help="config fields to set, for example num_hidden_layers=4 hidden_dropout_prob=0",
    )
    model.add_argument("--tokenizer", help="folder or Hub id (default: that of --model, or this repository's)")

    training = parser.add_argument_group("training")
    training.add_argument("--max_steps", type=cli.positive_integer, default=70_000, metavar="N", help="optimizer steps")
    training.add_argument(
        "--num_train_epochs",
        type=cli.not_negative,
        default=0.0,
        metavar="X",
        help="passes over the data, instead of --max_steps",
    )
    training.add_argument(
        "--max_seconds",
        type=cli.positive_number,
        metavar="S",
        help="end the training after this many seconds, checkpoints and evaluation included, schedule complete",
    )
    training.add_argument(
        "--learning_rate", type=cli.positive_number, default=5e-4, metavar="X", help="peak learning rate"
    )
    training.add_argument(
        "--warmup_share", type=cli.share, default=0.06, metavar="X", help="share of the steps used for warmup"
    )
    training.add_argument(
        "--final_lr_share", type=cli.share, default=0.02, metavar="X", help="final learning rate relative to the peak"
    )
    training.add_argument(
        "--decoupled_weight_decay",
        type=cli.not_negative,
        default=1e-5,
        metavar="X",
        help="weight decay per step at the peak, whatever --learning_rate is (AdamW's own is this divided by it)",
    )
    training.add_argument(
        "--max_grad_norm",
        type=cli.not_negative,
        default=0.0,
        metavar="X",
        help="clip gradients to this norm (default: no clipping)",
    )
    training.add_argument("--bf16", **cli.FLAG, default=True, help="autocast to bfloat16")
    training.add_argument(
        "--torch_compile",
        dest="compile_backend",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile each layer of the encoder with torch.compile",
    )
    training.add_argument("--use_cpu", **cli.FLAG, default=False, help="train on the CPU even where there is a GPU")
    training.add_argument(
        "--dataloader_num_workers",
        type=cli.whole_number,
        metavar="N",
        help="processes that prepare batches (default: 2 with a GPU, otherwise none)",
    )
    training.add_argument("--seed", type=cli.seed, default=42, metavar="N", help="of weights, order, masks and dropout")
    training.add_argument(
        "--logging_steps",
        type=cli.positive_number,
        metavar="N",
        help="steps between two lines of the log (default: 50 or a tenth of the training, and every ten seconds)",
    )
    training.add_argument(
        "--save_steps", type=cli.positive_number, default=1000, metavar="N", help="steps between two checkpoints"
    )
    training.add_argument(
        "--peak_tflops",
        type=cli.positive_number,
        metavar="X",
        help="TFLOP/s of one device, for the model FLOPs utilization in the log (default: measured at the start)",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--output_dir", required=True, metavar="DIR", help="folder of the run, and of the trained model at its end"
    )
    output.add_argument("--resume_from_checkpoint", metavar="DIR", help="`last`, or the folder of a checkpoint")
    output.add_argument("--overwrite", **cli.FLAG, default=False, help="replace the results of an earlier run")
    output.add_argument(
        "--keep_checkpoints", **cli.FLAG, default=False, help="keep the checkpoints when the run is over"
    )
    output.add_argument(
        "--save_dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of the weights in the final file",
    )
    return parser


def check(options: argparse.Namespace) -> None:
    """Refuse what can be seen in the options and the files that they name, before torch is imported.

    Raises:
        ValueError: options that contradict each other, or files and folders that cannot be used.
    """
    from lib.common import TOKENIZER_FILES, check_model  # after the parser, so that --help stays fast
    from lib.runs import check_output
    from lib.sources import SHORTEST, check_sources, holds_documents, inputs
    from lib.staging import check_target

    if options.model is not None and options.config is not None:
        raise ValueError("config must not be given with model, which brings its own")
    if options.length_shares and len(options.length_shares) != len(options.max_length):
        raise ValueError(f"length_shares must be one positive number for each max_length, got {options.length_shares}")
    if min(options.max_length) < SHORTEST + 2:
        raise ValueError(f"max_length must be at least {SHORTEST + 2}, got {min(options.max_length)}")
    if options.streaming and options.num_train_epochs:
        raise ValueError("num_train_epochs needs data of a known size, give max_steps for a stream")
    folder = Path(options.output_dir)
    if options.tokenize_only:
        folder = check_target(folder, "output_dir", **inputs(options))
        if folder.exists() and any(folder.iterdir()) and not (options.overwrite and holds_documents(folder)):
            raise ValueError(f"output_dir: {folder} is not empty; --overwrite replaces tokenized data")
    else:
        check_output(folder, options.overwrite, options.resume_from_checkpoint, True, **inputs(options))
    if options.model is not None:
        check_model(options.model)
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
