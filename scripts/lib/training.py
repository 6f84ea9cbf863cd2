"""The Trainer of the training scripts, which logs in lines and stops when numbers are no longer finite."""

import contextlib
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging

from .cli import one_line
from .common import unpickling_problem
from .runs import is_finite, numbered

# Seconds between two lines of the log, unless --logging_steps is given.
LOG_SECONDS = 10.0


class CarefulTrainer(Trainer):
    """A Trainer that logs in lines and stops when the loss or the weights are no longer finite.

    No step synchronizes with the device: it keeps the number of the first step whose loss is not finite, which is read
    when the log reads a loss anyway. A checkpoint is saved only after a check of its weights. `logging_nan_inf_filter`
    must be off.

    Args:
        seconds_between_logs: the loss is logged after so much time too, and at least ten times in a training. None:
            only every `logging_steps`.
        max_seconds: the duration of the training, if the clock ends it.
        **kwargs: as Trainer takes them.
    """

    def __init__(self, seconds_between_logs: Optional[float] = None, max_seconds: Optional[float] = None, **kwargs):
        try:
            super().__init__(**kwargs)
        except RuntimeError as error:
            if "to be installed" not in str(error):
                raise
            raise ImportError(f"report_to: {error}") from error
        # transformers 5.3 and 5.4 let accelerate divide by these as well, so that they count twice.
        self.accelerator.gradient_accumulation_steps = 1
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        logging.disable_progress_bar()  # each checkpoint would show one for its files
        if not self.args.disable_tqdm:
            self.add_callback(Bars(self, max_seconds))
        self.add_callback(LogLines(seconds_between_logs, max_seconds))
        self.tokens_trained = 0  # by this process; int64 [] on the device if batches are padded
        self._bad_step = None  # int64 [] on the device, 0 while every loss is finite
        self._last_saved = None

    def training_step(self, model, inputs, *args, **kwargs):
        is_real = inputs.get("attention_mask")
        self.tokens_trained = self.tokens_trained + (inputs["input_ids"].numel() if is_real is None else is_real.sum())
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._bad_step is None:
            self._bad_step = torch.zeros((), dtype=torch.int64, device=loss.device)
        is_first = (self._bad_step == 0) & ~loss.isfinite()
        self._bad_step = torch.where(is_first, self.state.global_step + 1, self._bad_step)
        return loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            self._stop_diverged("the loss")
        super().log(logs, *args, **kwargs)

    def check_weights(self) -> None:
        """Raise Divergence if the loss of an earlier step, or a weight now, is not finite."""
        if self._bad_step is not None and self._bad_step.item():
            self._stop_diverged("the loss")
        if not is_finite(*self.model.parameters()):
            self._stop_diverged("a weight")

    def _save_checkpoint(self, *args, **kwargs):
        self.check_weights()
        # Trainer would delete old checkpoints by their age, and a user's `checkpoint-best` with them.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        path = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        try:
            super()._save_checkpoint(*args, **kwargs)
        except RuntimeError as error:
            if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
                raise
            raise OSError(f"{path} cannot be written, {one_line(error)}") from error
        finally:
            self.args.save_total_limit = limit
        self._last_saved = str(path)
        if limit and self.args.should_save:
            others = [other for other in numbered(path.parent, "checkpoint") if other != path]
            best = self.state.best_model_checkpoint
            others = [other for other in others if best is None or other != Path(best)]
            kept = 1 + (best is not None and Path(best) != path)
            others.sort(key=lambda other: other.stat().st_mtime)  # after a step back, higher numbers are older
            for other in others[: max(0, len(others) - max(0, limit - kept))]:
                shutil.rmtree(other, ignore_errors=True)

    def _save(self, output_dir: Optional[str] = None, *args, **kwargs):
        try:
            super()._save(output_dir, *args, **kwargs)
        except SafetensorError as error:  # which names no file
            raise OSError(f"{output_dir or self.args.output_dir} cannot be written, {one_line(error)}") from error

    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs):
        with _resuming(resume_from_checkpoint):
            return super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with _resuming(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            if checkpoint is None or self.is_fsdp_enabled or not isinstance(optimizer, torch.optim.AdamW):
                return  # other optimizers may keep any state
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                held = [kept for kept in optimizer.state[parameter].values() if torch.is_tensor(kept) and kept.dim()]
                if not held or any(kept.shape != parameter.shape for kept in held):
                    raise ValueError("optimizer.pt does not fit the weights")

    def _load_rng_state(self, checkpoint):
        with _resuming(checkpoint):
            return super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result):
        tied = set(self.model._tied_weights_keys or ())
        for what, names in (("lacks", load_result.missing_keys), ("holds", load_result.unexpected_keys)):
            odd = sorted(set(names) - tied)
            if odd:
                raise ValueError(f"it {what} {odd[0]}, unlike the model")
        super()._issue_warnings_after_load(load_result)

    def _stop_diverged(self, what: str):
        step = (int(self._bad_step) if self._bad_step is not None else 0) or self.state.global_step
        raise Divergence(step, what, self._last_saved or self.args.resume_from_checkpoint)


@contextlib.contextmanager
def _resuming(checkpoint: Optional[str]) -> Iterator[None]:
    """Name the checkpoint in any error that its files cause."""
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if checkpoint is None:
            raise
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} cannot be loaded, {unpickling_problem(error)}"
        ) from error


class Divergence(FloatingPointError):
    """The loss or the weights of a run are no longer finite.

    Args:
        step: the first such step.
        what: the loss or a weight.
        kept: the last checkpoint, or None.
    """

    def __init__(self, step: int, what: str, kept: Optional[str]):
        kept = f"{kept} is the last good checkpoint" if kept else "no checkpoint was saved before"
        self.step = step
        super().__init__(
            f"{what} became NaN or infinite in step {step:,}; {kept}; a lower --learning_rate or --max_grad_norm 1 "
            "may help"
        )


class Bars(ProgressCallback):
    """Progress bars of training and evaluation, with tokens per second and without the log."""

    def __init__(self, trainer: CarefulTrainer, max_seconds: Optional[float] = None):
        super().__init__()
        self.trainer, self.max_seconds = trainer, max_seconds

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.began = self.refreshed = time.perf_counter()
        self.current_step = state.global_step
        if self.training_bar is None:
            return
        if self.max_seconds:  # the bar shows time, as the number of steps is unknown
            self.training_bar.total = self.max_seconds
            self.training_bar.bar_format = "{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]"
        else:
            self.training_bar.unit = "step"
            self.training_bar.initial = self.training_bar.n = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is None:
            return
        now = time.perf_counter()
        if self.refreshed == self.began or now - self.refreshed > 1:  # reading the tokens may synchronize the device
            self.refreshed = now
            speed = int(self.trainer.tokens_trained) * args.world_size / (now - self.began)
            self.training_bar.set_postfix_str(f"{shorten(speed)} tok/s", refresh=False)
        if self.max_seconds:  # beyond its end the bar would lose its length
            done = min(now - self.began, self.max_seconds) - self.training_bar.n
        else:
            done = state.global_step - self.current_step
        self.training_bar.update(done)
        self.current_step = state.global_step

    def on_log(self, args, state, control, **kwargs):
        pass


class LogLines(TrainerCallback):
    """Prints the log as lines, asks for it often enough, and says early how long the training will take."""

    def __init__(self, seconds_between_logs: Optional[float] = None, max_seconds: Optional[float] = None):
        self.interval, self.max_seconds = seconds_between_logs, max_seconds
        if self.interval and max_seconds:
            self.interval = min(self.interval, max_seconds / 20)

    def on_train_begin(self, args, state, control, **kwargs):
        self.logged, self.warm = time.perf_counter(), None
        self.told = bool(self.max_seconds)
        if self.interval:
            state.logging_steps = max(1, min(state.logging_steps, state.max_steps // 10))

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        # Processes must log in the same step, and their clocks differ.
        if self.interval and args.world_size == 1 and now - self.logged > self.interval:
            control.should_log = True
        if self.warm is None:  # the first step takes longer than the others
            self.warm = (now, state.global_step)
        elif not self.told and now - self.warm[0] > 2:
            self.told = True
            seconds = (now - self.warm[0]) / (state.global_step - self.warm[1])
            left = tell_time(seconds * (state.max_steps - state.global_step))
            _write_line(state, f"about {left} to go: {state.max_steps:,} steps of {seconds:.2g} s, and evaluation")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged = time.perf_counter()
        # A run limited by time does not know its number of steps.
        line = format_log(state.global_step, None if self.max_seconds else state.max_steps, logs or {})
        if line is not None:
            _write_line(state, line)


def _write_line(state, line: str) -> None:
    if state.is_world_process_zero:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def tell_time(seconds: float) -> str:
    """Write a time in its two largest units, such as `4 min 20 s`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_log(step: int, max_steps: Optional[int], logs: dict[str, float]) -> Optional[str]:
    """Write a training loss or an evaluation as a line, such as `step 120/3000  loss 3.41  lr 4.9e-04  142k tok/s`.

    Returns:
        The line; None for any other entry of the log.
    """
    parts = [f"step {step}" if max_steps is None else f"step {step}/{max_steps}"]
    parts += [f"{logs['progress']:.0%}"] if "progress" in logs else []
    if "loss" in logs:
        parts.append(f"loss {logs['loss']:.3f}")
        if "learning_rate" in logs:
            parts.append(f"lr {logs['learning_rate']:.1e}")
        if "tokens_per_second" in logs:
            parts.append(f"{shorten(logs['tokens_per_second'])} tok/s")
        if "mfu" in logs:
            parts.append(f"mfu {logs['mfu']:.0%}")
    else:
        speed = ("runtime", "per_second", "preparation_time")
        scores = {k: v for k, v in logs.items() if k.startswith("eval_") and not k.endswith(speed)}
        if not scores:
            return None
        parts += [f"{name} {value:.4g}" for name, value in scores.items()]
    return "  ".join(parts)


def shorten(number: float) -> str:
    """Write a number with three digits and k, M or G, such as 142k."""
    power = min(3, int(math.log10(max(number, 1)) // 3))
    return f"{number / 1000**power:.3g}{' kMG'[power].strip()}"
