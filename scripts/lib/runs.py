"""What training scripts share: an output folder that is never mixed, checkpoints that are whole, a log of lines."""

import json
import math
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Optional

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .cli import one_line

# What a run leaves in its output folder and another one would mix up with its own.
RESULTS = (
    "checkpoint-*",
    "seed-*",
    "model*.safetensors*",
    "pytorch_model*.bin*",
    "log_history.json",
    "trainer_state.json",
    "metrics.json",
    "confusion.png",
)

# Where a finished model is written before its files are moved.
STAGE = ".final"


def start_folder(folder: Path, overwrite: bool, resume: Optional[str] = None, resumable: bool = False) -> Optional[str]:
    """Check an output folder before a run, and make it.

    Args:
        folder: of the run.
        overwrite: whether results of an earlier run may be replaced, see `clear_results`.
        resume: None, `last`, or a checkpoint's folder.
        resumable: whether the script can go on from a checkpoint.

    Returns:
        The checkpoint to go on from; None: start at step 0.

    Raises:
        ValueError: the folder is none, cannot be written, or holds results and neither is given; both are given, the
            run is over already, or the checkpoint is not whole.
    """
    if overwrite and resume:
        raise ValueError("overwrite: starts a run again, so it must not be given with resume_from_checkpoint")
    check_is_folder(folder)
    found = [path for pattern in RESULTS for path in sorted(folder.glob(pattern))]
    # A run that failed before its first checkpoint leaves an empty folder.
    results = [path.name for path in found if not path.is_dir() or any(path.iterdir())]
    if results and not overwrite and not resume:
        choice = "go on with --resume_from_checkpoint last, or " if resumable else ""
        raise ValueError(
            f"output_dir: {folder} holds {results[0]} of an earlier run; {choice}replace it with --overwrite"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir: {folder} cannot be written, {one_line(error)}") from error
    shutil.rmtree(folder / STAGE, ignore_errors=True)  # of a run that was killed while it wrote its model
    if resume != "last":
        fault = resume and find_fault(Path(resume))
        if fault:
            raise ValueError(f"resume_from_checkpoint: {resume}: {fault}")
        return resume
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        finished = [name for name in results if name.startswith("model")]
        if finished:
            raise ValueError(
                f"resume_from_checkpoint: {folder} holds {finished[0]} and no checkpoint, so the run is over; start "
                "again with --overwrite, or start from its weights with --model"
            )
        print(f"{folder} holds no whole checkpoint: starting at step 0", flush=True)
    return checkpoint


def check_is_folder(folder: Path) -> None:
    """Raise ValueError where an output folder is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: {folder} is a file, expected a folder")


def clear_results(folder: Path) -> None:
    """Remove what an earlier run left, and only that."""
    for pattern in RESULTS:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def newest_checkpoint(folder: Path) -> Optional[str]:
    """The newest whole checkpoint of a run, or None; prints what is passed over, and why."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        fault = find_fault(path)
        if fault is None:
            return str(path)
        print(f"passing over {path}: {fault}", flush=True)
    return None


def find_fault(checkpoint: Path) -> Optional[str]:
    """What keeps a run from going on from a checkpoint: a file that is missing or cut, or weights that are not finite.

    Returns:
        The reason, or None for a whole checkpoint.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:  # what a checkpoint writes last
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except ValueError:
        return "trainer_state.json is cut off"
    if not isinstance(state, dict) or "global_step" not in state:
        return "trainer_state.json is not a trainer's state"
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    for kind in ("scheduler*", "optimizer*", "*model*"):
        if not any(checkpoint.glob(kind)):
            return f"no file {kind}"
    for path in files:
        if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut off"
        if path.suffix in (".distcp", ".metadata") and not path.stat().st_size:
            return f"{path.name} is empty"
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt") as weights:
                    names = [name for name in weights.keys() if not is_finite(weights.get_tensor(name))]
            except SafetensorError:
                return f"{path.name} is cut off"
            if names:
                return f"{path.name} holds NaN or infinity in {names[0]}"
    return None


def is_finite(*tensors: torch.Tensor) -> bool:
    """Whether no tensor holds NaN or infinity; one answer is read from the device."""
    parts = [getattr(tensor, "_local_tensor", tensor).detach() for tensor in tensors]  # FSDP's parts are DTensors
    return bool(torch.stack([part.isfinite().all() for part in parts if part.numel()]).all())


class CarefulTrainer(Trainer):
    """A Trainer that logs in lines, and stops where the loss or the weights are no numbers any more.

    No step waits for the device: the first loss that is not finite is noted there, and looked up when the log reads a
    loss anyway. A checkpoint is saved only after its weights have been looked at. Needs `logging_nan_inf_filter` off.
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
    """The loss or the weights of a run are no numbers any more.

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
    """The progress bars of transformers without its printing of the log."""

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
        The line; None for what is neither a training loss nor an evaluation.
    """
    # A run that the clock ends does not know how many steps it will take.
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


def publish(stage: Path, folder: Path) -> None:
    """Move the files of a finished run to its folder, the weights last, so that they never lie beside older files."""
    for path in stage.iterdir():
        path.chmod(0o644)
    for path in sorted(stage.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        os.replace(path, folder / path.name)
    stage.rmdir()
