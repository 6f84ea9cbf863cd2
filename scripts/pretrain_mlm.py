"""Train a MosaicBERT masked language model: from scratch, from a warm start, or on from where a run stopped.

Batches hold no padding. Documents are cut into sequences of at most --max_length wordpieces, and sequences are
concatenated into rows of about --tokens_per_row wordpieces; `cu_seq_lens_q` and `max_length_q` say where each one
starts. The defaults are MosaicBERT's published recipe; every flag of transformers' TrainingArguments works too.

    # MosaicBERT-Base from scratch on eight GPUs
    torchrun --nproc-per-node 8 scripts/pretrain_mlm.py --train_data allenai/c4:en --streaming --max_steps 70000 \\
        --tokenizer bert-base-uncased --output_dir runs/base

    # a small model, warm-started, on two CPU cores
    python scripts/pretrain_mlm.py --model warm-start-folder --train_data corpus/*.jsonl.gz --use_cpu \\
        --tokens_per_row 4096 --global_batch_size 64 --max_steps 5000 --output_dir runs/small

    # after a crash: the same command with --resume_from_checkpoint last
"""

import argparse
import json
import math
import os
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

import datasets
import torch
from common import REPOSITORY, repository_class
from packing import IGNORED, SHORTEST, PackedRows, StreamedRows, flatten_rows, load_sequences, load_texts
from recipe import count_flops, linear_schedule, measure_matmul_flops
from transformers import AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed


@dataclass
class ModelArguments:
    """Which model is trained."""

    model: Optional[str] = field(
        default=None, metadata={"help": "Folder or Hub id to start from. Default: random weights."}
    )
    config: Optional[str] = field(
        default=None,
        metadata={"help": "Folder or config.json with the shape of a model with random weights (default: base size)."},
    )
    config_fields: list[str] = field(
        default_factory=list,
        metadata={"help": "Config fields as NAME=VALUE, for instance num_hidden_layers=4 hidden_dropout_prob=0."},
    )
    tokenizer: Optional[str] = field(
        default=None, metadata={"help": "Folder or Hub id. Default: --model, else this repository's."}
    )
    save_dtype: str = field(
        default="float32", metadata={"help": "dtype of the final file's weights: float32, bfloat16 or float16."}
    )


@dataclass
class DataArguments:
    """What it is trained on, and how text becomes rows."""

    train_data: list[str] = field(
        metadata={
            "help": "Files (.txt: a document is a paragraph; .jsonl or .json with a `text` field; both also .gz), glob "
            "patterns, `datasets` ids (id or id:config), or folders of MDS shards."
        }
    )
    validation_data: list[str] = field(default_factory=list, metadata={"help": "The same, for evaluation."})
    text_field: str = field(default="text", metadata={"help": "Name of the field that holds the text."})
    streaming: bool = field(default=False, metadata={"help": "Read while training instead of tokenising first."})
    max_length: list[int] = field(
        default_factory=lambda: [128],
        metadata={"help": "Wordpieces of a sequence with [CLS] and [SEP]; several lengths are mixed."},
    )
    length_shares: list[float] = field(
        default_factory=list, metadata={"help": "Share of the wordpieces cut to each --max_length (default: equal)."}
    )
    tokens_per_row: int = field(
        default=16_384, metadata={"help": "Wordpieces of one packed row, at most: sets memory and speed."}
    )
    global_batch_size: int = field(
        default=4096,
        metadata={
            "help": "Sequences (of the first --max_length) in one optimizer step of all processes together, reached "
            "by accumulation unless --gradient_accumulation_steps is given."
        },
    )
    mask_probability: float = field(default=0.3, metadata={"help": "Share of the wordpieces predicted in training."})
    mask_token_share: float = field(
        default=0.8,
        metadata={"help": "Share of these that becomes [MASK]; half of the others a random wordpiece, half stay."},
    )
    eval_mask_probability: float = field(default=0.15, metadata={"help": "The same in evaluation."})
    eval_tokens: int = field(default=262_144, metadata={"help": "Wordpieces to evaluate on at each length, at most."})
    cache_dir: Optional[str] = field(default=None, metadata={"help": "Where `datasets` keeps tokenised text."})
    num_proc: Optional[int] = field(default=None, metadata={"help": "Processes that tokenise."})


@dataclass
class PretrainingArguments(TrainingArguments):
    """TrainingArguments with MosaicBERT's published recipe as defaults."""

    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate."})
    decoupled_weight_decay: float = field(
        default=1e-5,
        metadata={
            "help": "Weight decay a step at the peak, independent of --learning_rate, as the recipe states it. "
            "torch.optim.AdamW multiplies by the learning rate, so it is handed this divided by the peak: 0.02."
        },
    )
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's second beta."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "AdamW's epsilon."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients to this norm; 0 does not clip."})
    warmup_share: float = field(default=0.06, metadata={"help": "Share of the steps that warm up."})
    final_lr_share: float = field(default=0.02, metadata={"help": "Learning rate at the end over its peak."})
    gradient_accumulation_steps: int = field(
        default=0, metadata={"help": "Rows a process adds up before a step; 0 follows --global_batch_size."}
    )
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Packed rows in one forward."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Packed rows in one forward."})
    max_steps: int = field(default=70_000, metadata={"help": "Optimizer steps."})
    num_train_epochs: float = field(default=0.0, metadata={"help": "Passes over the data, instead of --max_steps."})
    bf16: bool = field(default=True, metadata={"help": "Autocast to bfloat16."})
    use_cpu: bool = field(default=not torch.cuda.is_available(), metadata={"help": "Train on the CPU."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two lines of the log."})
    save_steps: float = field(default=1000, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: Optional[int] = field(default=2, metadata={"help": "Checkpoints kept."})
    report_to: str = field(default="none", metadata={"help": "tensorboard, wandb, …"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: rows have their own keys."})
    average_tokens_across_devices: bool = field(
        default=True, metadata={"help": "Weigh every predicted wordpiece alike, on whichever process it is."}
    )
    ddp_find_unused_parameters: Optional[bool] = field(
        default=False, metadata={"help": "Every weight takes part in every step, so nothing is searched."}
    )
    include_num_input_tokens_seen: bool = field(default=True, metadata={"help": "Count the wordpieces seen."})
    peak_tflops: Optional[float] = field(
        default=None,
        metadata={
            "help": "What the device can do, for model FLOP utilisation. Default: the speed of one large matrix "
            "product in the training dtype, measured at the start."
        },
    )


class PretrainingTrainer(Trainer):
    """Trainer with the recipe's schedule, rows in their own order, and speed in the log.

    Each logged loss comes with `tokens_per_second` and `mfu` (model FLOP utilisation: the FLOPs of forward and
    backward, without recomputation, over what the device can do) of the steps since the last one, and with `seconds`,
    the time spent training so far, evaluation and saving left out.

    Args:
        peak_flops: FLOPs a second that one process's device can do.
        **kwargs: as Trainer takes them.
    """

    def __init__(self, peak_flops: float, **kwargs):
        super().__init__(**kwargs)
        self.peak_flops = peak_flops * self.args.world_size
        self._mark = None

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None and self.args.lr_scheduler_type == "linear":
            warmup = int(self.args.warmup_steps) or math.ceil(self.args.warmup_share * num_training_steps)
            share = partial(linear_schedule, warmup=warmup, total=num_training_steps, final=self.args.final_lr_share)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        lengths = inputs["cu_seq_lens_q"].diff().long()
        tokens, pairs, predicted = lengths.sum(), (lengths**2).sum(), (inputs["labels"] != IGNORED).sum()
        config = self.accelerator.unwrap_model(self.model).config
        return int(count_flops(config, tokens, pairs, predicted))

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._mark is None:
            self._start_clock()
        return super().training_step(model, inputs, num_items_in_batch)

    def _start_clock(self):
        self._mark = (time.perf_counter(), self.state.num_input_tokens_seen, self.state.total_flos)

    def log(self, logs: dict[str, float], start_time: Optional[float] = None) -> None:
        if "loss" in logs:
            began, tokens, flops = self._mark
            seconds = time.perf_counter() - began
            before = next((entry["seconds"] for entry in reversed(self.state.log_history) if "seconds" in entry), 0.0)
            logs["tokens_per_second"] = round((self.state.num_input_tokens_seen - tokens) / seconds)
            logs["mfu"] = round((self.state.total_flos - flops) / seconds / self.peak_flops, 3)
            logs["seconds"] = round(before + seconds, 1)
        super().log(logs)
        if self.is_world_process_zero():
            replace_json(os.path.join(self.args.output_dir, "log_history.json"), self.state.log_history)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        logs, began = self.control.should_log, time.perf_counter()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if logs:
            self._start_clock()
        else:
            self._mark = (self._mark[0] + time.perf_counter() - began, *self._mark[1:])


def replace_json(path: str, content) -> None:
    """Write a JSON file beside `path` and rename it, so that a reader never sees half of it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    os.replace(path + ".new", path)


def parse_fields(pairs: list[str]) -> dict[str, Any]:
    """Read NAME=VALUE pairs; a value is JSON, or else a string.

    Raises:
        ValueError: a pair has no name or no equals sign.
    """
    fields = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise ValueError(f"config_fields must be NAME=VALUE, got {pair!r}")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def build_model(arguments: ModelArguments, vocabulary: int):
    """Make or load the model that is to be trained, in float32.

    Args:
        arguments: `model` to start from, or `config` or nothing for random weights; `config_fields` on top.
        vocabulary: entries of the tokenizer. Random weights get the next multiple of 64 as `vocab_size`.

    Returns:
        A `BertForMaskedLM` of this repository's code, whatever code its source brings.

    Raises:
        ValueError: both `model` and `config` are given, a field is malformed, or the vocabulary does not fit.
    """
    fields = parse_fields(arguments.config_fields)
    if arguments.model and arguments.config:
        raise ValueError("config must not be given with model, which brings its own")
    config_class, model_class = repository_class("BertConfig"), repository_class("BertForMaskedLM")
    source = arguments.model or arguments.config
    config = config_class.from_pretrained(source) if source else config_class()
    if not arguments.model:
        config.vocab_size = math.ceil(vocabulary / 64) * 64
    for name, value in fields.items():
        if not hasattr(config, name):
            raise ValueError(f"config_fields: the config has no field {name!r}")
        setattr(config, name, value)
    if config.vocab_size < vocabulary:
        raise ValueError(f"vocab_size must be at least the tokenizer's {vocabulary} entries, got {config.vocab_size}")
    model = model_class.from_pretrained(arguments.model, config=config) if arguments.model else model_class(config)
    model.silence_dead_slots(vocabulary)
    return model.float()


def last_checkpoint(folder: str) -> Optional[str]:
    """The newest complete checkpoint of a run, or None. The trainer's state is what a checkpoint writes last."""
    states = Path(folder).glob("checkpoint-*/trainer_state.json")
    return max((str(s.parent) for s in states), key=lambda name: int(name.rpartition("-")[2]), default=None)


def train(model_arguments: ModelArguments, data: DataArguments, arguments: PretrainingArguments) -> PretrainingTrainer:
    """Run the training that the arguments describe and write the final repository to `output_dir`.

    Returns:
        The trainer, done.

    Raises:
        ValueError: arguments that contradict each other or the data; each names what was wrong.
    """
    if arguments.n_gpu > 1:
        raise ValueError(f"one process drives one GPU, got {arguments.n_gpu}: start with torchrun --nproc-per-node")
    shares = data.length_shares or [1.0] * len(data.max_length)
    if len(shares) != len(data.max_length) or min(shares) <= 0:
        raise ValueError(f"length_shares must be one positive number a max_length, got {shares}")
    if min(data.max_length) < SHORTEST + 2:
        raise ValueError(f"max_length must be at least {SHORTEST + 2}, got {min(data.max_length)}")
    shares = [share / sum(shares) for share in shares]
    tokenizer = AutoTokenizer.from_pretrained(model_arguments.tokenizer or model_arguments.model or str(REPOSITORY))

    def rows(sources, lengths, shares, probability):
        with arguments.main_process_first():
            texts = load_texts(sources, data.text_field, data.streaming, data.cache_dir)
            sequences = load_sequences(texts, tokenizer, lengths, shares, arguments.seed, data.num_proc)
        kind = PackedRows if isinstance(sequences, datasets.Dataset) else StreamedRows
        return kind(sequences, tokenizer, data.tokens_per_row, probability, arguments.seed, data.mask_token_share)

    train_rows = rows(data.train_data, data.max_length, shares, data.mask_probability)
    eval_rows = {}
    for length in data.max_length if data.validation_data else ():
        eval_rows[str(length)] = rows(data.validation_data, [length], [1.0], data.eval_mask_probability)

    if arguments.gradient_accumulation_steps == 0:
        tokens_a_round = data.tokens_per_row * arguments.per_device_train_batch_size * arguments.world_size
        wanted = data.global_batch_size * data.max_length[0] / tokens_a_round
        arguments.gradient_accumulation_steps = max(1, round(wanted))
    rows_a_step = arguments.gradient_accumulation_steps * arguments.per_device_train_batch_size * arguments.world_size
    if isinstance(train_rows, PackedRows):
        if arguments.num_train_epochs:
            arguments.max_steps = math.ceil(arguments.num_train_epochs * train_rows.rows_per_pass / rows_a_step)
        train_rows.num_rows = arguments.max_steps * rows_a_step
    elif arguments.num_train_epochs:
        raise ValueError("num_train_epochs needs data of a known size, give max_steps for a stream")
    for dataset in eval_rows.values():
        dataset.num_rows = min(dataset.num_rows, math.ceil(data.eval_tokens / data.tokens_per_row))
    if not arguments.weight_decay:
        arguments.weight_decay = arguments.decoupled_weight_decay / arguments.learning_rate

    set_seed(arguments.seed)
    model = build_model(model_arguments, len(tokenizer))
    if arguments.peak_tflops:
        peak_flops = arguments.peak_tflops * 1e12
    else:
        peak_flops = measure_matmul_flops(arguments.device, torch.bfloat16 if arguments.bf16 else torch.float32)
    if arguments.process_index == 0:
        weights = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{weights:,} weights; {arguments.max_steps:,} steps of {rows_a_step} rows of {data.tokens_per_row:,} "
            f"wordpieces; one device can do {peak_flops / 1e12:.2f} TFLOP/s",
            flush=True,
        )
    # Else accelerate reads a stream in one process and hands out slices of each tensor, boundaries included.
    arguments.accelerator_config.dispatch_batches = False
    sparse_prediction, model.config.sparse_prediction = model.config.sparse_prediction, True
    trainer = PretrainingTrainer(
        peak_flops=peak_flops,
        model=model,
        args=arguments,
        data_collator=flatten_rows,
        train_dataset=train_rows,
        eval_dataset=eval_rows or None,
        processing_class=tokenizer,
    )
    checkpoint = arguments.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=last_checkpoint(arguments.output_dir) if checkpoint == "last" else checkpoint)
    if eval_rows:
        trainer.evaluate()
    model.config.sparse_prediction = sparse_prediction
    model.to(getattr(torch, model_arguments.save_dtype))
    if trainer.is_fsdp_enabled:  # else Trainer 5.0 writes no model at all, since each process holds a part
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    trainer.save_state()
    return trainer


def main() -> None:
    """Parse the command line and train."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, PretrainingArguments),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train(*parser.parse_args_into_dataclasses())


if __name__ == "__main__":
    main()
