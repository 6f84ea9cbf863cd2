"""The Trainer of the training scripts, which logs in lines and stops when numbers are no longer finite."""

import math
import os
import sys
from typing import Optional

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .runs import is_finite


class CarefulTrainer(Trainer):
    """A Trainer that logs in lines and stops when the loss or the weights are no longer finite.

    No step synchronizes with the device: the first loss that is not finite is noted there, and read when the log reads
    a loss anyway. A checkpoint is saved only after its weights have been checked. Needs `logging_nan_inf_filter` off.
    """

    def __init__(self, **kwargs):
        try:
            super().__init__(**kwargs)
        except RuntimeError as error:
            if "to be installed" not in str(error):
                raise
            raise ImportError(f"report_to: {error}") from error
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if not self.args.disable_tqdm:
            self.add_callback(Bars)
        self.add_callback(LogLines)
        self._bad_step = None  # int64 [] on the device, 0 while every loss was finite
        self._last_saved = None

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
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
        """Raise Divergence where the loss of a step, or a weight now, is not finite."""
        if self._bad_step is not None and self._bad_step.item():
            self._stop_diverged("the loss")
        if not is_finite(*self.model.parameters()):
            self._stop_diverged("a weight")

    def _save_checkpoint(self, *args, **kwargs):
        self.check_weights()
        super()._save_checkpoint(*args, **kwargs)
        self._last_saved = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")

    def _stop_diverged(self, what: str):
        step = (int(self._bad_step) if self._bad_step is not None else 0) or self.state.global_step
        raise Divergence(step, what, self._last_saved or self.args.resume_from_checkpoint)


class Divergence(FloatingPointError):
    """The loss or the weights of a run are no longer finite.

    Args:
        step: the first one where that was so.
        what: the loss or a weight.
        kept: the last checkpoint, None where there is none.
    """

    def __init__(self, step: int, what: str, kept: Optional[str]):
        kept = f"{kept} is the last good checkpoint" if kept else "no checkpoint was saved before"
        self.step = step
        super().__init__(
            f"{what} became NaN or infinite in step {step:,}; {kept}; a lower --learning_rate or --max_grad_norm 1 "
            "may help"
        )


class Bars(ProgressCallback):
    """transformers' progress bars, without its printing of the log."""

    def on_log(self, args, state, control, **kwargs):
        pass


class LogLines(TrainerCallback):
    """Prints the log as lines."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = format_log(state.global_step, state.max_steps, logs or {})
        if state.is_world_process_zero and line is not None:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()


def format_log(step: int, max_steps: int, logs: dict[str, float]) -> Optional[str]:
    """One entry of the log as a line, such as `step 120/3000  loss 3.41  lr 4.9e-04  142k tok/s`.

    Returns:
        The line; None unless it is a training loss or an evaluation.
    """
    # A run limited by time does not know its number of steps.
    parts = [f"step {step}  {logs['progress']:.0%}" if "progress" in logs else f"step {step}/{max_steps}"]
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
    """A number with three digits and k, M or G, such as 142k."""
    power = min(3, int(math.log10(max(number, 1)) // 3))
    return f"{number / 1000**power:.3g}{' kMG'[power].strip()}"
