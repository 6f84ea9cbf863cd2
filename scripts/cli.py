"""The command line that all scripts share: help with defaults, the nearest flag for a typo, one line for an error.

Nothing heavy is imported here, and a script imports torch and transformers only after it has parsed its arguments, so
that `--help` answers at once.
"""

import argparse
import difflib
import importlib.metadata
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Optional

# The oldest transformers that the model code runs on; setup.cfg says the same.
OLDEST_TRANSFORMERS = "4.54.1"
# Packages that pip knows under another name than Python does, and that no extra of setup.cfg brings.
OTHER_PACKAGES = {"streaming": "mosaicml-streaming"}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a description, and ends the help of an option with its default where it has one."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        if not action.option_strings or action.default in (None, False, argparse.SUPPRESS) or action.default == []:
            return action.help
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations, and answers a wrong call with one line instead of its usage.

    Args:
        description: what the script does, the docstring of its module.
        **kwargs: other arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, description: Optional[str] = None, **kwargs):
        kwargs = {"formatter_class": HelpFormatter, "allow_abbrev": False, **kwargs}
        super().__init__(description=description, **kwargs)
        self.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")

    def parse_known_args(self, args=None, namespace=None):
        """Parse arguments, and keep them so that `error` can look for a misspelt flag."""
        self.words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:
        """End the program with exit status 2 and one line, about a misspelt flag if there is one."""
        flags = [word.partition("=")[0] for word in self.words if re.match(r"--?[A-Za-z]", word)]
        unknown = next((flag for flag in flags if flag not in self._option_string_actions), None)
        if unknown is not None:
            near = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
            message = f"there is no option {unknown}" + (f"; did you mean {near[0]}?" if near else "")
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def positive_integer(text: str) -> int:
    """Type of an option that takes a whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def run(main: Callable[[], None], memory_hint: str = "") -> None:
    """Run a script. What a user can cause ends it with exit status 1 and one line, `script.py: message`.

    With `--traceback` on the command line the exception itself is raised; a bug is always raised.

    Args:
        main: parses the arguments and does the work.
        memory_hint: what to change when memory runs out, such as "a smaller --tokens_per_row needs less".
    """
    if "--traceback" in sys.argv[1:]:
        check_transformers()
        return main()
    try:
        check_transformers()
        main()
    except (Exception, KeyboardInterrupt) as error:
        message = explain(error, memory_hint)
        if message is None:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def check_transformers() -> None:
    """Raise ImportError where the installed transformers is older than the model code allows."""
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return  # the script's own import says that it is missing
    if release(version) < release(OLDEST_TRANSFORMERS):
        raise ImportError(f"transformers {version} is too old, {OLDEST_TRANSFORMERS} or newer is needed")


def release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version, such as (4, 54, 1)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def explain(error: BaseException, memory_hint: str = "") -> Optional[str]:
    """Tell an error that a user can cause in one line.

    Args:
        error: what was raised.
        memory_hint: see `run`.

    Returns:
        The line, or None for a bug.
    """
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        wanted = OTHER_PACKAGES.get(package, '".[scripts]"')
        return f"the package {package} is missing: pip install {wanted}"
    # Only a package that was imported can have raised its errors.
    named = (("torch", "OutOfMemoryError"), ("safetensors", "SafetensorError"), ("httpx", "HTTPError"))
    memory, *others = (getattr(sys.modules.get(module), name, ()) for module, name in named)
    no_memory = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch on a CPU
    if no_memory or isinstance(error, (MemoryError, memory)):
        return "out of memory" + (f"; {memory_hint}" if memory_hint else "")
    if isinstance(error, (ValueError, OSError, ImportError, *others)):
        return one_line(error)
    return None


def one_line(error: BaseException) -> str:
    """An error's message on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
