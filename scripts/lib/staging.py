"""Write a folder whole or not at all, even if the process is killed."""

import contextlib
import ctypes
import glob
import itertools
import os
import re
import shutil
import sys
import uuid
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
# Folders in a stage: the new content of the target, and the old content that it replaces.
NEW, OLD = "new", "old"
# Names of the folders that `shared_folder` yields.
SHARED = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f]+")

# An input of a script: a name, a pattern, a Hub id, several of these, or nothing.
Input = Union[None, str, Path, Sequence[str]]


def check_apart(output: Optional[Path], argument: str, **inputs: Input) -> None:
    """Refuse an output that is or holds an input of the same script, whatever links, patterns or spellings name it.

    Args:
        output: the file or folder to write; None: nothing is written.
        argument: the name of the output on the command line.
        **inputs: the inputs by their names on the command line; those that do not exist here, such as Hub ids, pass.

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
                    other = "another file" if os.path.isfile(output) else "another folder"
                    raise ValueError(f"{argument}: {output} {holds} {source}, which {name} reads; choose {other}")


def _places(source: str) -> Iterator[Path]:
    """List the paths of an input: its files, and the targets of links to them and in its folders."""
    # The name of a local `datasets` folder may be followed by a config and a split.
    for name in {source, source.partition(":")[0]} - {""}:
        name = os.path.expanduser(name)
        for found in [name] if os.path.exists(name) else glob.iglob(name, recursive=True):
            inside = os.scandir(found) if os.path.isdir(found) else ()
            for path in (found, *(entry.path for entry in inside if entry.is_symlink() and entry.is_file())):
                if os.path.exists(path):
                    yield Path(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))
                    yield Path(os.path.realpath(path))


def check_target(target: Path, argument: str, **inputs: Input) -> Path:
    """Refuse an output folder that is a file, or that holds an input, itself or in what a killed run left beside it.

    Args:
        target, argument, **inputs: see `staged_folder`.

    Returns:
        The folder, links followed.
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

    The stage is a hidden folder whose name follows from the target's. The next run of the same target clears what a
    killed run left there, and first puts back an old target that the killed run had moved there.

    Args:
        target: the folder to make; for a symbolic link, the folder that it points to.
        overwrite: replace a target that holds files.
        argument: the name of the target on the command line.
        own: names of the folders that a target of this kind holds.
        **inputs: as `check_apart` takes them; `source=args.source, data=args.data`.

    Yields:
        The folder to write to. If the block raises, it is removed, and the target stays as it was.

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
        if folders:  # the target is a home, a checkout or a run, which no staged folder of ours made
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
def shared_folder(target: Path, argument: str) -> Iterator[Path]:
    """Yield an empty folder of this process beside a target in a cache, which several processes may make at once.

    It becomes the target if the block succeeds, unless another process was faster. What killed processes left in the
    cache, for any target, is cleared where folders can be locked.

    Args:
        target: the folder to make; its name is a hash.
        argument: the name of the cache on the command line.

    Raises:
        ValueError: the folder cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for path in filter(SHARED.fullmatch, os.listdir(target.parent)):
                with contextlib.suppress(ValueError, OSError), locked(target.parent / path, argument) as descriptor:
                    if descriptor is not None:
                        shutil.rmtree(target.parent / path)
            while True:
                stage = target.with_name(f".{target.name}.{uuid.uuid4().hex}")  # containers share process ids
                stack.callback(shutil.rmtree, stage, ignore_errors=True)
                stage.mkdir()
                with contextlib.suppress(ValueError, FileNotFoundError):  # another process has just cleared it
                    descriptor = stack.enter_context(locked(stage, argument))
                    if descriptor is None or os.path.samestat(os.fstat(descriptor), os.stat(stage)):
                        break
        except OSError as error:
            raise ValueError(f"{argument}: {target.parent} cannot be written, {one_line(error)}") from error
        yield stage
        try:
            os.rename(stage, target)
        except OSError:
            if not target.is_dir():
                raise


@contextlib.contextmanager
def staged_file(target: Union[str, Path]) -> Iterator[Path]:
    """Yield a name beside a file for its new content, which replaces it if the block succeeds."""
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_file():  # a device, such as /dev/stdout
        yield target
        return
    new = target.with_name(f".new-{target.name}")  # libraries choose a picture's format by its suffix
    try:
        yield new
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)


def stage_of(target: Path) -> Path:
    """Return the hidden folder beside a target, and so on its disk, in which its replacement is written."""
    return target.parent / f".{target.name}.stage"


@contextlib.contextmanager
def open_stage(target: Path, argument: str) -> Iterator[Path]:
    """Make a target's stage and hold a lock on it; call `put_back` at both ends, and remove the stage if it is empty.

    Raises:
        ValueError: another run holds the lock, or the stage cannot be made.
    """
    stage = stage_of(target)
    while True:
        try:
            stage.mkdir()
        except FileExistsError:  # exist_ok would raise if another run that ends removes it
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
    """Put back an old target that no new one has replaced, and clear the rest of what a run left in its stage."""
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
        ValueError: another program created the target while the two could not be exchanged in one step.
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
    """Hold a lock on a folder until the block or this process ends.

    Args:
        folder: to lock.
        argument: the name of the target on the command line.
        target: for the message; None: the folder itself.

    Yields:
        The descriptor that holds the lock; None on Windows and on a network file system that locks no folders.

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
            yield None
            return
        yield descriptor
    finally:
        _descriptors.discard(descriptor)
        os.close(descriptor)


_descriptors = set()


def _unlock_child() -> None:
    while _descriptors:
        os.close(_descriptors.pop())


if fcntl is not None:  # a process that prepares batches may outlive a killed run, and would keep the lock
    os.register_at_fork(after_in_child=_unlock_child)


def _signature(folder: Path) -> Optional[list[tuple]]:
    """Return a value that changes when a folder or something in it changes; None for a missing folder."""
    if not folder.exists():
        return None
    paths = [folder, *sorted(folder.iterdir())]
    return [
        (path.name, status.st_ino, status.st_size, status.st_mtime_ns) for path in paths for status in [path.lstat()]
    ]


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths atomically; return False if the system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc has it since 2.28
    if rename is None:
        return False
    return rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0


def make_readable(folder: Path) -> None:
    """Give all files and folders the default permissions; some libraries write files that only the owner can read."""
    rights = folder.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        path.chmod(rights if path.is_dir() else rights & 0o666)
