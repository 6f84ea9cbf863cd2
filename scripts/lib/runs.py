"""The output folder of a training run: whole checkpoints, and never a mix of two runs.

torch is imported where it is used, so that a bad folder is refused at once.
"""

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from safetensors import SafetensorError, safe_open

from .cli import one_line

if TYPE_CHECKING:
    import torch

# What a run leaves in its output folder, and the next run must not mix with its own.
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
        resumable: whether the script can resume from a checkpoint.

    Returns:
        The checkpoint to resume from; None: start at step 0.

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
    """Raise ValueError if an output folder is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: {folder} is a file, expected a folder")


def clear_results(folder: Path) -> None:
    """Remove the results of an earlier run, and nothing else."""
    for pattern in RESULTS:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def newest_checkpoint(folder: Path) -> Optional[str]:
    """The newest whole checkpoint of a run, or None; prints which ones are skipped and why."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        fault = find_fault(path)
        if fault is None:
            return str(path)
        print(f"passing over {path}: {fault}", flush=True)
    return None


def find_fault(checkpoint: Path) -> Optional[str]:
    """Why a run cannot resume from a checkpoint: a missing or truncated file, or weights that are not finite.

    Returns:
        The reason, or None for a whole checkpoint.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:  # written last
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


def is_finite(*tensors: "torch.Tensor") -> bool:
    """Whether all values are finite; synchronizes with the device once."""
    import torch

    parts = [getattr(tensor, "_local_tensor", tensor).detach() for tensor in tensors]  # FSDP's parts are DTensors
    return bool(torch.stack([part.isfinite().all() for part in parts if part.numel()]).all())


def publish(stage: Path, folder: Path) -> None:
    """Move the files of a finished run to its folder, the weights last, so that they never meet older files."""
    for path in stage.iterdir():
        path.chmod(0o644)
    for path in sorted(stage.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        os.replace(path, folder / path.name)
    stage.rmdir()
