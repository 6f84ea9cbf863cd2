"""Masked language model training on packed rows: the work behind pretrain_mlm.py."""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import time
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainingArguments, set_seed

from .cards import write_card
from .cli import command, say_end
from .common import (
    REPOSITORY,
    TOKENIZER_FILES,
    config_fields,
    empty_model,
    foreign_config,
    load_words,
    lower_unused_biases,
    own_config,
    own_model,
    read_json,
    repository_class,
    say_float32,
)
from .packing import (
    IGNORED,
    Masking,
    PackedRows,
    StreamedRows,
    flatten_rows,
    load_sequences,
    open_sources,
    stream_sequences,
    tokenize,
)
from .pictures import draw_losses
from .recipe import LinearSchedule, count_flops, measure_matmul_flops
from .records import is_file_name
from .references import without_references
from .runs import STAGE, Run, is_finite, open_run
from .sources import inputs
from .staging import staged_file, staged_folder
from .training import LOG_SECONDS, CarefulTrainer


class PretrainingTrainer(CarefulTrainer):
    """Trainer with the recipe's schedule, unshuffled rows, and speed in the log.

    Each logged loss comes with `tokens_per_second` and `mfu` (model FLOPs utilization: the FLOPs of forward and
    backward, without recomputation, relative to the device's peak) of the steps since the last one, and with `seconds`,
    the time spent in training so far, without evaluation and saving.

    Args:
        options: of the command line.
        peak_flops: peak FLOPs per second of one process's device.
        **kwargs: as Trainer takes them.
    """

    def __init__(self, options: argparse.Namespace, peak_flops: float, **kwargs):
        interval = LOG_SECONDS if options.logging_steps is None else None
        super().__init__(seconds_between_logs=interval, max_seconds=options.max_seconds, **kwargs)
        self.options, self.peak_flops = options, peak_flops * self.args.world_size
        self._mark = None
        self._clear_counts()
        if options.max_seconds:
            self.add_callback(StopOnTime(self))

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None and self.args.lr_scheduler_type == "linear":
            warmup = int(self.args.warmup_steps) or math.ceil(self.options.warmup_share * num_training_steps)
            self.lr_scheduler = LinearSchedule(
                optimizer or self.optimizer,
                warmup,
                num_training_steps,
                self.options.final_lr_share,
                self.options.max_seconds,
                agree=make_agreement(),
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._mark is None:
            self._start_clock()
            if self.options.max_seconds:
                self.lr_scheduler.start_clock()
        lengths = inputs["cu_seq_lens_q"].diff().long()
        self._tokens += inputs["input_ids"].numel()
        self._pairs = self._pairs + (lengths**2).sum()
        self._predicted = self._predicted + (inputs["labels"] != IGNORED).sum()
        return super().training_step(model, inputs, num_items_in_batch)

    def _clear_counts(self):
        self._tokens, self._pairs, self._predicted = 0, 0, 0  # of this process; the last two stay on the device

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # `store_flos` counts them; reading a number in each step would synchronize with the device

    def store_flos(self) -> None:
        config = self.accelerator.unwrap_model(self.model).config
        self.current_flos += float(count_flops(config, self._tokens, self._pairs, self._predicted))
        tokens = torch.tensor([self._tokens], device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(tokens).sum())
        self._clear_counts()
        super().store_flos()

    def _start_clock(self):
        self._mark = (time.perf_counter(), self.state.num_input_tokens_seen, self.state.total_flos)

    def log(self, logs: dict[str, float], start_time: Optional[float] = None) -> None:
        if "loss" in logs:
            began, tokens, flops = self._mark
            seconds = time.perf_counter() - began
            before = next((entry["seconds"] for entry in reversed(self.state.log_history) if "seconds" in entry), 0.0)
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
            logs["tokens_per_second"] = round((self.state.num_input_tokens_seen - tokens) / seconds)
            logs["mfu"] = round((self.state.total_flos - flops) / seconds / self.peak_flops, 3)
            logs["seconds"] = round(before + seconds, 1)
            if self.options.max_seconds:
                logs["progress"] = round(min(1.0, self.lr_scheduler.position / self.lr_scheduler.total), 3)
        super().log(logs)
        if self.is_world_process_zero():
            with staged_file(Path(self.args.output_dir, "log_history.json")) as new:
                new.write_text(json.dumps(self.state.log_history, indent=1), encoding="utf-8")

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        logs, began = self.control.should_log, time.perf_counter()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if logs:
            self._start_clock()
        else:
            self._mark = (self._mark[0] + time.perf_counter() - began, *self._mark[1:])


class StopOnTime(TrainerCallback):
    """Ends the training when the schedule has used up its time."""

    def __init__(self, trainer: PretrainingTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.lr_scheduler.is_over:
            control.should_log = control.should_training_stop = True


def make_agreement():
    """Make a function that broadcasts a number from process 0, on the CPU to avoid a synchronization of the GPU."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return lambda number: number
    group = torch.distributed.new_group(backend="gloo")

    def agree(number: float) -> float:
        shared = torch.tensor(number, dtype=torch.float64)
        torch.distributed.broadcast(shared, 0, group=group)
        return shared.item()

    return agree


def build_model(options: argparse.Namespace, vocabulary: int):
    """Make or load the model to train: a `BertForMaskedLM` of this repository's code in float32.

    Args:
        options: of the command line; `model` to start from, or `config` or nothing for random weights, and
            `config_fields` on top.
        vocabulary: entries of the tokenizer. Random weights get the next multiple of 64 as `vocab_size`.

    Raises:
        ValueError: a field is unknown or has an invalid value, the vocabulary does not fit, or the weights hold NaN or
            infinity.
    """
    argument = "config" if options.model is None else "model"
    source = options.config if options.model is None else options.model
    if source is None:
        config = foreign_config({})
    elif Path(source).is_file() and options.model is None:
        config = foreign_config(without_references(read_json(Path(source))), argument)
    else:
        config = own_config(config_fields(source, argument), source, argument)
    if options.model is None:
        config.vocab_size = math.ceil(vocabulary / 64) * 64
    fields = dict(options.config_fields)
    for name in fields:
        if not hasattr(config, name):
            raise ValueError(f"config_fields: the config has no field {name!r}")
    config = foreign_config({**config.to_dict(), **fields}, "config_fields" if fields else argument)
    if config.vocab_size < vocabulary:
        raise ValueError(f"vocab_size must be at least the tokenizer's {vocabulary} entries, got {config.vocab_size}")
    if options.model is None:
        empty_model("BertForMaskedLM", config)
        model = repository_class("BertForMaskedLM")(config)
    else:
        new_head: list[str] = []
        model = own_model("ForMaskedLM", options.model, config, new_head)
        if new_head:
            PartialState().print(f"{options.model} holds no head for masked language modeling: the head is new")
    if not is_finite(*model.parameters()):
        raise ValueError(f"model: the weights of {options.model!r} hold NaN or infinity")
    lower_unused_biases(model, vocabulary)
    return model.float()


def chosen_tokenizer(options: argparse.Namespace):
    """Load the tokenizer that the options name."""
    if options.tokenizer is not None:
        return load_words(options.tokenizer, "tokenizer", files=TOKENIZER_FILES)
    return load_words(str(REPOSITORY) if options.model is None else options.model)


def tokenize_only(options: argparse.Namespace) -> None:
    """Tokenize the training data into `output_dir`, which a later run takes as `--train_data`."""
    parts = open_sources(options.train_data, options.text_field, "train_data")
    tokenizer = chosen_tokenizer(options)
    with staged_folder(Path(options.output_dir), options.overwrite, "output_dir", **inputs(options)) as new:
        tokenize(parts, tokenizer, new)
    named = ((f"--{name}", getattr(options, name)) for name in ("model", "config", "tokenizer"))
    words = [word for option, value in named if value is not None for word in (option, value)]
    words += ["--train_data", options.output_dir, "--output_dir", f"{options.output_dir}-trained"]
    say_end(f"saved in {options.output_dir}: the tokenized text", command("pretrain_mlm.py", *words))


def train(options: argparse.Namespace, arguments: TrainingArguments) -> PretrainingTrainer:
    """Run the training that the options describe and write the final repository to `output_dir`.

    Args:
        options: the own options of pretrain_mlm.py.
        arguments: the options of transformers' Trainer.

    Returns:
        The trainer, after training.

    Raises:
        ValueError: options contradict each other or the data.
        FloatingPointError: the loss or the weights became NaN or infinite.
    """
    if arguments.n_gpu > 1:
        raise ValueError(f"one process drives one GPU, got {arguments.n_gpu}: start with torchrun --nproc-per-node")
    if options.max_seconds and arguments.lr_scheduler_type != "linear":
        raise ValueError(f"max_seconds needs lr_scheduler_type linear, got {arguments.lr_scheduler_type}")
    backends = torch.compiler.list_backends(exclude_tags=())
    if options.compile_backend and options.compile_backend not in backends:
        raise ValueError(f"torch_compile must be one of {', '.join(backends)}, got {options.compile_backend!r}")
    shares = options.length_shares or [1.0] * len(options.max_length)
    shares = [share / sum(shares) for share in shares]
    with contextlib.ExitStack() as stack:
        run = None
        if arguments.process_index == 0:  # this process holds the lock for all
            folder, resume = Path(arguments.output_dir), options.resume_from_checkpoint
            run = stack.enter_context(open_run(folder, options.overwrite, resume, resumable=True, **inputs(options)))
        (run,) = broadcast_object_list([run])
        arguments.output_dir, arguments.resume_from_checkpoint = str(run.work), run.checkpoint
        return _train(options, arguments, shares, run)


def _train(
    options: argparse.Namespace, arguments: TrainingArguments, shares: list[float], run: Run
) -> PretrainingTrainer:
    """Do the work of `train` in the folder of a run."""
    tokenizer = chosen_tokenizer(options)
    set_seed(arguments.seed)
    model = build_model(options, len(tokenizer))

    def rows(argument, lengths, shares, probability):
        load, kind = (stream_sequences, StreamedRows) if options.streaming else (load_sequences, PackedRows)
        settings = {} if options.streaming else {"cache_dir": options.cache_dir}
        sources = getattr(options, argument)
        try:
            with arguments.main_process_first():
                sequences = load(sources, tokenizer, lengths, shares, arguments.seed, options.text_field, **settings)
        except ValueError as error:
            raise ValueError(f"{argument}: {error}") from error
        masking = Masking(tokenizer, probability, options.mask_token_share)
        return kind(sequences, masking, options.tokens_per_row, arguments.seed)

    train_rows = rows("train_data", options.max_length, shares, options.mask_probability)
    eval_rows = {}
    for length in options.max_length if options.validation_data else ():
        eval_rows[str(length)] = rows("validation_data", [length], [1.0], options.eval_mask_probability)

    if arguments.gradient_accumulation_steps == 0:
        tokens_a_round = options.tokens_per_row * arguments.per_device_train_batch_size * arguments.world_size
        wanted = options.global_batch_size * options.max_length[0] / tokens_a_round
        arguments.gradient_accumulation_steps = max(1, round(wanted))
    rows_a_step = arguments.gradient_accumulation_steps * arguments.per_device_train_batch_size * arguments.world_size
    if isinstance(train_rows, PackedRows):
        if arguments.num_train_epochs:
            arguments.max_steps = math.ceil(arguments.num_train_epochs * train_rows.rows_per_pass / rows_a_step)
        train_rows.num_rows = arguments.max_steps * rows_a_step
    for dataset in eval_rows.values():
        dataset.num_rows = min(dataset.num_rows, math.ceil(options.eval_tokens / options.tokens_per_row))
    if not arguments.weight_decay:
        arguments.weight_decay = options.decoupled_weight_decay / arguments.learning_rate

    if options.compile_backend:
        for layer in model.bert.encoder.layer:
            layer.compile(backend=options.compile_backend)
    if options.peak_tflops:
        peak_flops = options.peak_tflops * 1e12
    else:
        peak_flops = measure_matmul_flops(arguments.device, torch.bfloat16 if arguments.bf16 else torch.float32)
    if arguments.process_index == 0:
        weights = sum(parameter.numel() for parameter in model.parameters())
        limit = f", or {options.max_seconds:g} s" if options.max_seconds else ""
        print(
            f"{weights:,} weights; {arguments.max_steps:,} steps{limit}; {rows_a_step} rows of "
            f"{options.tokens_per_row:,} tokens per step; one device can do {peak_flops / 1e12:.2f} TFLOP/s",
            flush=True,
        )
    if options.dataloader_num_workers is None and not arguments.use_cpu:
        arguments.dataloader_num_workers = 1 if options.streaming else 2
    # Otherwise accelerate reads a stream in one process and distributes slices of each tensor, boundaries included.
    arguments.accelerator_config.dispatch_batches = False
    sparse_prediction, model.config.sparse_prediction = model.config.sparse_prediction, True
    trainer = PretrainingTrainer(
        options=options,
        peak_flops=peak_flops,
        model=model,
        args=arguments,
        data_collator=flatten_rows,
        train_dataset=train_rows,
        eval_dataset=eval_rows or None,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=run.checkpoint)
    if eval_rows:
        trainer.evaluate()
    model.config.sparse_prediction = sparse_prediction
    save(trainer, run, options)
    # A process that ends early cuts its connections to those that still work, which could abort them.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return trainer


def save(trainer: PretrainingTrainer, run: Run, options: argparse.Namespace) -> None:
    """Write the trained model as a repository that loads by itself, and remove the checkpoints."""
    trainer.check_weights()
    trainer.model.to(getattr(torch, options.save_dtype))
    if trainer.is_fsdp_enabled:  # otherwise Trainer 5.0 writes no model at all, since each process holds a part
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    stage = run.work / STAGE
    trainer.save_model(str(stage))
    trainer.save_state()
    if trainer.is_world_process_zero():
        say_float32(stage)
        if importlib.util.find_spec("matplotlib"):  # a cluster's environment may lack it
            draw_losses({"": trainer.state.log_history}, stage / "loss.png")
        write_model_card(stage, run.folder.name, options.model, trainer.state)
        run.publish(stage, options.keep_checkpoints)
        has_picture = (run.folder / "loss.png").is_file()
        say_end(
            f"saved in {run.folder}: the model, README.md (its card), log_history.json"
            + (", loss.png" if has_picture else "; without loss.png, as matplotlib is missing"),
            command("fill_mask.py", f"One word is a {trainer.processing_class.mask_token}.", "--model", run.folder),
            command("evaluate_mlm.py", *evaluation_words(options, run.folder)),
            command("push_to_hub.py", run.folder, f"YOUR-NAME/{run.folder.name}", "--dry_run"),
        )


def evaluation_words(options: argparse.Namespace, folder: Path) -> list:
    """List the arguments of evaluate_mlm.py that compare a trained model with the one that it started from."""
    files = [name for name in options.validation_data if is_file_name(name) and not os.path.isdir(name)]
    words = ["--model", *filter(None, [options.model]), folder, "--data", *(files or ["FILE"])]
    return words if options.text_field == "text" else [*words, "--text_field", options.text_field]


def write_model_card(folder: Path, title: str, source: Optional[str], state) -> None:
    """Write the README.md of a pretrained model, with the tokens, the losses and the loss curve of its training."""
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    evaluated = {name: value for entry in state.log_history for name, value in entry.items()}
    notes = [
        f"| {name.split('_')[1]} | {value:.3f} |"
        for name, value in evaluated.items()
        if name.startswith("eval_") and name.endswith("_loss")
    ]
    if notes:
        notes = ["Loss on the validation data, in nats a predicted token:\n\n| length | loss |\n| --- | --- |", *notes]
    if (folder / "loss.png").is_file():
        notes.append("\n![loss by step](loss.png)")
    write_card(
        folder,
        f"Trained by `scripts/pretrain_mlm.py`: {state.global_step:,} steps, {state.num_input_tokens_seen:,} tokens"
        + (f", training loss {losses[-1]:.3f} at the end" if losses else ""),
        source=source,
        folder=Path(source) if source and Path(source).is_dir() else None,
        title=title,
        notes="## Training\n\n" + "\n".join(notes) if notes else "",
    )
