"""The output folder of a training run: whole checkpoints, and never a mix of two runs.

Functions import torch where they use it, so that a bad folder is refused at once.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from safetensors import SafetensorError, safe_open

from .common import TOKENIZER_FILES
from .staging import NEW, OLD, Input, check_target, locked, open_stage, replace, stage_of

if TYPE_CHECKING:
    import torch

# Results of a run in its output folder, which the next run must not mix with its own.
RESULTS = (
    "model*.safetensors*",
    "pytorch_model*.bin*",
    "log_history.json",
    "trainer_state.json",
    "metrics.json",
    "confusion.png",
    "loss.png",
    "errors.csv",
    "predictions.csv",
)
# The folder in which a finished model is written before its files are moved.
STAGE = ".final"
# Files that the next run replaces even without results beside them, since they would pass for its own.
REPLACED = (*RESULTS, *TOKENIZER_FILES, STAGE)
NUMBERED = re.compile(r"(checkpoint|seed)-[0-9]+")

# The folder, in an output folder's stage, of a run that will replace the results there.
RUN = "run"


@dataclasses.dataclass
class Run:
    """A run with its output folder.

    Attributes:
        folder: the output folder.
        work: the folder to write to: the output folder, or a stage beside it while that keeps an earlier run's results.
        checkpoint: to resume from; None: start at step 0.
    """

    folder: Path
    work: Path
    checkpoint: Optional[str]

    def publish(self, model: Path, keep_checkpoints: bool) -> None:
        """Move the model into the output folder, replacing earlier results in one step.

        Files in the folder that are not results of a run stay there.

        Args:
            model: a folder in `work` with the files of the model.
            keep_checkpoints: do not remove the numbered checkpoints of the run.
        """
        for path in model.iterdir():
            path.chmod(0o644)
        # The weights are moved last, so that they are never beside older files.
        for path in sorted(model.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            os.replace(path, self.work / path.name)
        model.rmdir()
        if self.work != self.folder:
            stage = stage_of(self.folder)
            copy_others(self.folder, self.work)
            os.rename(self.work, stage / NEW)
            replace(self.folder, stage, "output_dir")
            for held in (NEW, OLD):  # the old content, and what has appeared there since
                copy_others(stage / held, self.folder)
            self.work = self.folder
        if not keep_checkpoints:
            for path in numbered(self.folder):
                shutil.rmtree(path)


@contextlib.contextmanager
def open_run(
    folder: Path, overwrite: bool, resume: Optional[str] = None, resumable: bool = False, **inputs: Input
) -> Iterator[Run]:
    """Check an output folder, make it, and keep other runs out of it until the block ends.

    Results of an earlier run stay until `Run.publish`. A killed run that was to replace them can be resumed.

    Args:
        folder: of the run.
        overwrite: whether results of an earlier run may be replaced.
        resume: None, `last`, or a checkpoint's folder.
        resumable: whether the script can resume from a checkpoint.
        **inputs: as `check_apart` takes them.

    Yields:
        The run. If the block raises, a folder that was made for it is removed if it is empty.

    Raises:
        ValueError: the folder is a file, cannot be written, or holds an input, another run, or results that neither
            `overwrite` nor `resume` allows; both are given, the run is over, or the checkpoint is not whole.
    """
    folder = _check_folder(folder, overwrite, resume, inputs)
    beside = stage_of(folder) / RUN
    with contextlib.ExitStack() as stack:
        if stage_of(folder).exists():  # this puts back the results that a killed run had moved away
            with open_stage(folder, "output_dir"):
                pass
        stack.enter_context(_made(folder))
        stack.enter_context(locked(folder, "output_dir"))
        results = results_of(folder)
        finished = [path.name for path in results if "model" in path.name]
        if not overwrite and not resume:
            _refuse_results(folder, resumable)
        unfinished = numbered(beside)
        goes_on = unfinished if resume == "last" else resume and beside in Path(os.path.realpath(resume)).parents
        checkpoint = _checkpoint_of(beside if goes_on else folder, [] if goes_on else finished, resume)
        work, held = folder, set()
        if goes_on or (resume and finished) or (overwrite and results):
            if os.path.ismount(folder):
                raise ValueError(
                    f"output_dir: {folder} is a mount point, so its results cannot be replaced in one step; name a "
                    "folder in it, or empty it"
                )
            stack.enter_context(open_stage(folder, "output_dir"))
            work = beside
        if not resume:
            shutil.rmtree(beside, ignore_errors=True)
        elif work == beside and not goes_on:
            if unfinished:
                raise ValueError(
                    f"resume_from_checkpoint: {beside} holds an unfinished run; continue it with `last`, or remove it"
                )
            checkpoint, held = _link_checkpoints(folder, checkpoint, beside)
        work.mkdir(exist_ok=True)
        shutil.rmtree(work / STAGE, ignore_errors=True)  # left by a run that was killed while it wrote its model
        if work == beside:
            stack.callback(_clear_unless, resumable, work, held)
            print(
                f"{folder} keeps its results until new ones replace them; until then the run writes to {work}",
                flush=True,
            )
        yield Run(folder, work, checkpoint)


def check_output(
    folder: Path, overwrite: bool, resume: Optional[str] = None, resumable: bool = False, **inputs: Input
) -> None:
    """Refuse early what `open_run` would refuse, as far as possible without a lock or a change to any folder."""
    folder = _check_folder(folder, overwrite, resume, inputs)
    if not overwrite and not resume:
        _refuse_results(folder, resumable)
    if resume not in (None, "last") and not os.path.isdir(resume):
        raise ValueError(f"resume_from_checkpoint: {resume}: there is no such folder")
    _try_to_write(folder, next(path for path in (folder, *folder.parents) if path.exists()))


def _check_folder(folder: Path, overwrite: bool, resume: Optional[str], inputs: dict[str, Input]) -> Path:
    if overwrite and resume:
        raise ValueError("overwrite starts a run again, so it must not be given with resume_from_checkpoint")
    return check_target(folder, "output_dir", **inputs)


def _refuse_results(folder: Path, resumable: bool) -> None:
    results, beside = results_of(folder), stage_of(folder) / RUN
    if not results and not numbered(beside):
        return
    holds = f"{folder} holds {results[0].name} of an earlier run" if results else f"{beside} holds an unfinished run"
    choice = "continue with --resume_from_checkpoint last, or " if resumable else ""
    raise ValueError(f"output_dir: {holds}; {choice}replace it with --overwrite")


def _clear_unless(resumable: bool, work: Path, held: set[str]) -> None:
    """Clear an unfinished run that cannot be resumed, or has no checkpoint besides those that it started with."""
    if not resumable or {path.name for path in numbered(work)} <= held:
        shutil.rmtree(work, ignore_errors=True)


def _link_checkpoints(folder: Path, checkpoint: str, beside: Path) -> tuple[str, set[str]]:
    """Start a run beside a finished one that it continues, with links to that run's checkpoints up to this one.

    The new run would write a later checkpoint again, through a link into the old results.

    Returns:
        The checkpoint to resume from, in the new folder if it was in the old one, and the names of the linked folders.
    """
    start, new = Path(os.path.realpath(checkpoint)), stage_of(folder) / NEW
    kept = [path for path in numbered(folder, "checkpoint") if number_of(path) <= number_of(start)]
    new.mkdir()
    for path in kept:
        shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)
    shutil.rmtree(beside, ignore_errors=True)
    os.rename(new, beside)
    return str(beside / start.name) if start in kept else checkpoint, {path.name for path in kept}


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; if the block raises, remove those that were made and are empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        _try_to_write(folder, folder)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def _try_to_write(folder: Path, place: Path) -> None:
    """Raise ValueError if no file can be made in a place, the output folder, which is then made, or a parent of it."""
    try:
        if place == folder:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"output_dir: {folder} cannot be written, {error.strerror}: {place}") from error


def _checkpoint_of(work: Path, finished: list[str], resume: Optional[str]) -> Optional[str]:
    """Find the checkpoint to resume from, see `open_run`."""
    if resume != "last":
        fault = resume and find_fault(Path(resume))
        if fault:
            raise ValueError(f"resume_from_checkpoint: {resume}: {fault}")
        return resume
    checkpoint = newest_checkpoint(work)
    if checkpoint is None:
        if finished:
            raise ValueError(
                f"resume_from_checkpoint: {work} holds {finished[0]} and no checkpoint, so the run is over; start "
                "again with --overwrite, or start from its weights with --model"
            )
        print(f"{work} holds no whole checkpoint: starting at step 0", flush=True)
    return checkpoint


def numbered(folder: Path, kind: str = "") -> list[Path]:
    """List the folders `checkpoint-N` and `seed-N` in a folder that are not empty, sorted by kind and number."""
    paths = [path for path in folder.glob(f"{kind}*-*") if NUMBERED.fullmatch(path.name) and not path.is_symlink()]
    paths = [path for path in paths if path.is_dir() and any(path.iterdir())]
    return sorted(paths, key=lambda path: (path.name.partition("-")[0], number_of(path)))


def number_of(path: Path) -> int:
    """Return the number of a folder that `numbered` finds; -1 for any other."""
    return int(path.name.partition("-")[2]) if NUMBERED.fullmatch(path.name) else -1


def results_of(folder: Path, patterns: Sequence[str] = RESULTS) -> list[Path]:
    """List the numbered folders and the results of earlier runs in a folder."""
    return numbered(folder) + [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def copy_others(source: Path, target: Path) -> None:
    """Link everything but the results of a run into another folder on the same disk, unless its name is taken there."""
    results = results_of(source, REPLACED)
    for path in source.iterdir() if source.exists() else ():
        if path in results or os.path.lexists(target / path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, target / path.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(source, target, follow_symlinks=False)


def newest_checkpoint(folder: Path) -> Optional[str]:
    """Find the newest whole checkpoint of a run, or None; print which ones are skipped and why."""
    for path in reversed(numbered(folder, "checkpoint")):
        fault = find_fault(path)
        if fault is None:
            return str(path)
        print(f"skipping {path}: {fault}", flush=True)
    return None


def find_fault(checkpoint: Path) -> Optional[str]:
    """Say why a run cannot resume from a checkpoint, or None: a missing or damaged file, or weights not finite."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:  # the last file of a checkpoint to be written
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except (ValueError, RecursionError):
        return "trainer_state.json is cut off"
    if not is_state(state):
        return "trainer_state.json is not a trainer's state"
    for kind in ("scheduler*", "optimizer*", "*model*"):
        if not any(checkpoint.glob(kind)):
            return f"no file {kind}"
    for path in checkpoint.rglob("*"):
        if path.is_dir():
            continue
        if not path.is_file():
            return f"{path.name} is not a file"
        if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut off"
        if path.suffix in (".distcp", ".metadata") and not path.stat().st_size:
            return f"{path.name} is empty"
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt") as weights:
                    dtypes = {weights.get_tensor(name).is_floating_point() for name in weights.keys()}
                    names = [name for name in weights.keys() if not is_finite(weights.get_tensor(name))]
            except SafetensorError:
                return f"{path.name} is cut off"
            if dtypes != {True}:
                return f"{path.name} holds weights that are not floating-point"
            if names:
                return f"{path.name} holds NaN or infinity in {names[0]}"
    return None


def is_state(content) -> bool:
    """Check whether the content of a JSON file is a trainer's state, as far as a run reads it."""
    from transformers import TrainerState

    known = {field.name for field in dataclasses.fields(TrainerState)}
    if not isinstance(content, dict) or not content.keys() <= known:
        return False
    history = content.get("log_history", [])
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        return False
    numbers = [entry.get(name, 0) for entry in history for name in ("loss", "seconds", "step")]
    numbers += [content.get(name, 0) for name in ("num_input_tokens_seen", "total_flos")]
    numbers += [content.get(name) or 0 for name in ("epoch", "logging_steps", "eval_steps", "save_steps", "max_steps")]
    step = content.get("global_step")
    return (
        isinstance(step, int)
        and 0 <= step < 2**63
        and all(isinstance(number, (int, float)) and abs(number) < 1e300 for number in numbers)
        and isinstance(content.get("stateful_callbacks") or {}, dict)
    )


def is_finite(*tensors: "torch.Tensor") -> bool:
    """Check whether all values are finite, with one synchronization of the device."""
    import torch

    parts = [getattr(tensor, "_local_tensor", tensor).detach() for tensor in tensors]  # FSDP's parts are DTensors
    return bool(torch.stack([part.isfinite().all() for part in parts if part.numel()]).all())
