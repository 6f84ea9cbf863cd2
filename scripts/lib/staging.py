"""Write a folder whole or not at all, even if the process is killed."""

import contextlib
import ctypes
import glob
import itertools
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Optional, Union

from .cli import one_line

try:
    import fcntl
except ImportError:  # Windows: two runs that write the same target at once are not noticed
    fcntl = None

RENAME_EXCHANGE = 2
AT_FDCWD = -100
# Inside a stage: the content that is to replace the target, and the content that it replaces.
NEW, OLD = "new", "old"

# What a script reads: a name, a pattern, a Hub id, several of these, or nothing.
Input = Union[None, str, Path, Sequence[str]]


def check_apart(output: Optional[Path], argument: str, **inputs: Input) -> None:
    """Refuse an output that is, or holds, something that the same script reads. Every script asks this first.

    Links, patterns and other spellings of a path are followed on both sides.

    Args:
        output: the file or folder that is written; None: nothing is.
        argument: what the user calls the output.
        **inputs: what the user calls each input, and its names; those that are nothing here, such as Hub ids, pass.

    Raises:
        ValueError: an input would be lost; names both.
    """
    if output is None:
        return
    try:
        there = os.stat(output)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name, value in inputs.items():
        for source in [value] if isinstance(value, (str, Path)) else value or ():
            for path in _places(str(source)):
                if any(os.path.samestat(os.stat(place), there) for place in (path, *path.parents)):
                    holds = "is" if os.path.samefile(path, output) else "holds"
                    what = "a file" if os.path.isfile(output) else "a folder"
                    raise ValueError(f"{argument}: {output} {holds} {source}, which {name} reads; name {what} apart")


def _places(source: str) -> Iterator[Path]:
    """The paths of an input: its files, what they link to, and what links inside a folder point to."""
    # A local `datasets` folder may be followed by a config and a split.
    for name in {source, source.partition(":")[0]} - {""}:
        name = os.path.expanduser(name)
        for found in [name] if os.path.exists(name) else glob.iglob(name, recursive=True):
            inside = os.scandir(found) if os.path.isdir(found) else ()
            for path in (found, *(entry.path for entry in inside if entry.is_symlink() and entry.is_file())):
                if os.path.exists(path):
                    yield Path(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))
                    yield Path(os.path.realpath(path))


def check_target(target: Path, argument: str, **inputs: Input) -> Path:
    """Refuse an output folder that is a file, or that holds an input, as what a killed run left beside it may.

    Args:
        target, argument, **inputs: as `staged_folder` takes them.

    Returns:
        The folder, links followed.

    Raises:
        ValueError: see above; names both.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_dir():
        raise ValueError(f"{argument}: {target} is a file, expected a folder")
    for place in (target, stage_of(target)):
        check_apart(place, argument, **inputs)
    return target


@contextlib.contextmanager
def staged_folder(
    target: Path, overwrite: bool = False, argument: str = "target", own: Collection[str] = (), **inputs: Input
) -> Iterator[Path]:
    """Yield an empty folder beside the target, which replaces the target if the block succeeds.

    The stage is a hidden folder with a name that follows from the target's. What a killed run left in it is cleared by
    the next run of the same target, and an old target that was on its way out is put back first.

    Args:
        target: the folder to make; of a symbolic link, the folder that it points to.
        overwrite: replace a target that exists and holds files.
        argument: what the user calls the target.
        own: names of the folders that a target of this kind holds.
        **inputs: as `check_apart` takes them; `source=args.source, data=args.data`.

    Yields:
        The folder to write to. It is removed when the block raises; the target is then as it was.

    Raises:
        ValueError: the target exists and `overwrite` is not set, it is a file or cannot be made, it holds
            other folders or an input, or another run is writing it.
    """
    target = check_target(target, argument, **inputs)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{argument}: {target.parent} cannot be made, {one_line(error)}") from error
    with open_stage(target, argument) as stage, contextlib.ExitStack() as locks:
        if target.exists():  # a training may be writing there
            locks.enter_context(locked(target, argument))
        content = sorted(target.iterdir()) if target.exists() else []
        if content and not overwrite:
            raise ValueError(f"{argument}: {target} exists and is not an empty folder; pass --overwrite to replace it")
        folders = [path.name for path in content if path.is_dir() and path.name not in own]
        if folders:  # a home, a checkout, a run: nothing that a script here has written whole
            raise ValueError(
                f"{argument}: {target} holds the folder {folders[0]}, and only a folder without subfolders is replaced"
            )
        before = _signature(target)
        (stage / NEW).mkdir()
        yield stage / NEW
        make_readable(stage / NEW)
        if _signature(target) != before:
            raise ValueError(f"{argument}: another program changed {target} in the meantime, so it is left as is")
        replace(target, stage, argument)


@contextlib.contextmanager
def staged_file(target: Union[str, Path]) -> Iterator[Path]:
    """Yield a name beside a file, for another one that replaces it if the block succeeds; of a device, its own."""
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_file():
        yield target
        return
    new = target.with_name(f".new-{target.name}")  # libraries read the kind of a picture from its end
    try:
        yield new
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)


def stage_of(target: Path) -> Path:
    """The hidden folder beside a target in which its replacement is written, so that both are on one disk."""
    return target.parent / f".{target.name}.stage"


@contextlib.contextmanager
def open_stage(target: Path, argument: str) -> Iterator[Path]:
    """Make a target's stage and hold a lock on it.

    What is `NEW` or `OLD` there, left by a killed run or by this one, is put back or cleared at both ends, and a stage
    that is then empty is removed.

    Raises:
        ValueError: another run holds the lock, or the stage cannot be made.
    """
    stage = stage_of(target)
    while True:
        try:
            stage.mkdir()
        except FileExistsError:  # exist_ok would raise where another run that ends removes it
            pass
        except PermissionError as error:
            raise ValueError(f"{argument}: {target.parent} cannot be written, {one_line(error)}") from error
        with contextlib.ExitStack() as lock:
            try:
                descriptor = lock.enter_context(locked(stage, argument, target))
                if descriptor is not None and not os.path.samestat(os.fstat(descriptor), os.stat(stage)):
                    continue
            except FileNotFoundError:
                continue  # a run that has just ended removed it
            try:
                put_back(target, stage)
                yield stage
            finally:
                put_back(target, stage)
                with contextlib.suppress(OSError):
                    stage.rmdir()
            return


def put_back(target: Path, stage: Path) -> None:
    """Put an old target back that no new one has replaced, and clear what has no use any more."""
    old, new = stage / OLD, stage / NEW
    if old.exists() and not target.exists():
        os.rename(old, target)
    elif old.exists() and new.exists():  # another program made the target after the old one had gone
        numbers = (target.with_name(f"{target.name}.old-{number}") for number in itertools.count(1))
        kept = next(path for path in numbers if not os.path.lexists(path))
        os.rename(old, kept)
        print(f"the old content of {target}, which another program has created again, is kept in {kept}", flush=True)
    for litter in (old, new):
        if litter.exists():
            shutil.rmtree(litter)


def replace(target: Path, stage: Path, argument: str) -> None:
    """Replace the target with `NEW` from the stage, which then holds the old content.

    Raises:
        ValueError: another program created the target where the two could not be exchanged in one step.
    """
    new = stage / NEW
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        # Killed between these two, the next run finds the old target without a new one, and puts it back.
        os.rename(target, stage / OLD)
        try:
            os.rename(new, target)
        except OSError as error:
            if not target.exists():
                raise
            raise ValueError(f"{argument}: another program created {target} in the meantime") from error


@contextlib.contextmanager
def locked(folder: Path, argument: str, target: Optional[Path] = None) -> Iterator[Optional[int]]:
    """Hold a lock on a folder, which ends with this process.

    Args:
        folder: to lock.
        argument: what the user calls the target.
        target: what is written; None: the folder itself.

    Yields:
        The descriptor that holds the lock, None on Windows.

    Raises:
        ValueError: another run holds it.
    """
    if fcntl is None:
        yield None
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _descriptors.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{argument}: another run is writing {target or folder}") from error
        except OSError:
            pass  # a network file system that locks no folders
        yield descriptor
    finally:
        _descriptors.discard(descriptor)
        os.close(descriptor)


_descriptors = set()


def _unlock_child() -> None:
    while _descriptors:
        os.close(_descriptors.pop())


if fcntl is not None:  # a process that prepares batches would keep the lock for as long as it outlives a killed run
    os.register_at_fork(after_in_child=_unlock_child)


def _signature(folder: Path) -> Optional[list[tuple]]:
    """A value that changes when a folder or something in it changes; None where there is no folder."""
    if not folder.exists():
        return None
    paths = [folder, *sorted(folder.iterdir())]
    return [
        (path.name, status.st_ino, status.st_size, status.st_mtime_ns) for path in paths for status in [path.lstat()]
    ]


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths atomically; returns False if the system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc has it since 2.28
    if rename is None:
        return False
    return rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0


def make_readable(folder: Path) -> None:
    """Give all files and folders default permissions; some libraries write files that only the owner can read."""
    rights = folder.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        path.chmod(rights if path.is_dir() else rights & 0o666)
