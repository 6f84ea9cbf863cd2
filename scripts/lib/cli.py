"""The command line that all scripts share: help with defaults, the nearest flag for a typo, one line for an error.

This module imports nothing heavy, and a script imports torch and transformers only after it has parsed its arguments,
so that `--help` answers at once.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import importlib.metadata
import importlib.util
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

# The oldest transformers that the model code supports; setup.cfg says the same.
OLDEST_TRANSFORMERS = "4.54.1"
# How to install the packages that the extra `scripts` leaves out.
OTHER_PACKAGES = {
    "streaming": "mosaicml-streaming",
    **dict.fromkeys(("gguf", "onnx", "onnxruntime", "onnxscript"), '".[export]"'),
}
LICENSE_NAME = re.compile(r"\w[\w.+-]*")
# What is a value and no option: argparse before Python 3.14 takes -1e-4 for an option.
NEGATIVE_NUMBER = re.compile(r"-\.?\d")
# The most characters of a message, which may quote a foreign value of a megabyte.
LONGEST_MESSAGE = 1000


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a description, and ends the help of an option with its default, if it has one."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        if not action.option_strings or action.default in (None, False, argparse.SUPPRESS) or action.default == []:
            return action.help
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts no abbreviations and answers a wrong command line with one line."""

    def __init__(self, description: str, **kwargs):
        kwargs = {"formatter_class": HelpFormatter, "allow_abbrev": False, **kwargs}
        super().__init__(description=description, **kwargs)
        self._negative_number_matcher = NEGATIVE_NUMBER
        self.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")

    def option(self, flag: str, help: str, kind=None, default=None, group=None, **more) -> None:
        """Add an option as `add_argument` does, to a `group` of the help if one is given.

        An option whose `kind` is `bool` takes true or false, or stands alone for true.
        """
        if kind is bool:
            more = {**FLAG, **more}
        elif kind is not None:
            more = {"type": kind, "metavar": METAVARS.get(kind), **more}
        if default is not None:
            more["default"] = default
        (group or self).add_argument(flag, help=help, **more)

    def section(self, title: str) -> Callable[..., None]:
        """Return a function like `option`, whose options `--help` lists under a title."""
        return functools.partial(self.option, group=self.add_argument_group(title))

    def parse_known_args(self, args=None, namespace=None):
        """Parse arguments, and keep them so that `error` can look for a misspelt flag."""
        self.words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:
        """Exit with status 2 and one line, about a misspelt option if there is one."""
        strange = [flag for flag in self._flags() if flag not in self._option_string_actions]
        known = self._known_flags() if strange else []
        unknown = next((flag for flag in strange if flag not in known), None)
        if unknown is not None:
            near = difflib.get_close_matches(unknown, known, n=1)
            message = f"there is no option {unknown}" + (f"; did you mean {near[0]}?" if near else "")
        self.exit(2, f"{self.prog}: {shortened(message)} (--help lists the options)\n")

    def _flags(self) -> list[str]:
        return [word.partition("=")[0] for word in self.words if re.match(r"--?[A-Za-z]", word)]

    def _known_flags(self) -> list[str]:
        return list(self._option_string_actions)


def _number(kind: type, accept: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """Make the type of an option that takes a number of a `kind`, int or float, that `accept` accepts."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            # int() would also take signs, spaces and underscores; no option needs more than 18 digits.
            if (kind is float or (text.isdecimal() and len(text) <= 18)) and accept(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


positive_integer = _number(int, lambda number: number > 0, "a positive integer")
whole_number = _number(int, lambda number: True, "0 or a positive integer")
seed = _number(int, lambda number: number < 2**32, "an integer from 0 to 4294967295")  # NumPy's generators take 32 bits
text_length = _number(int, lambda number: number > 2, "an integer of at least 3")  # [CLS], a token and [SEP]
positive_number = _number(float, lambda number: 0 < number < math.inf, "a positive number")
not_negative = _number(float, lambda number: 0 <= number < math.inf, "a number of at least 0")
share = _number(float, lambda number: 0 <= number <= 1, "a number from 0 to 1")
positive_share = _number(float, lambda number: 0 < number <= 1, "a number above 0 and up to 1")


def old_file(text: str) -> Path:
    """Type of an option that names a file to read."""
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"expected a file, got {text!r}")
    return Path(text)


def new_file(text: str, suffix: str = "") -> str:
    """Type of an option that names a file to write; its folder must exist, and its name end with `suffix`."""
    if not text.endswith(suffix):
        raise argparse.ArgumentTypeError(f"expected a name that ends with {suffix}, got {text!r}")
    if os.path.isdir(text) or not os.access(os.path.dirname(text) or ".", os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file in a writable folder, got {text!r}")
    return text


def license_name(text: str) -> str:
    """Type of an option that names a licence as the Hub does."""
    if not LICENSE_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"expected an identifier such as apache-2.0, got {text!r}")
    return text


def truth(text: str) -> bool:
    """Type of an option that takes true or false."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return words[text.lower()]


# Types of the numbers among the options of `TrainingArguments`, whose own would take any number, after seconds.
CHECKED = {
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor", "warmup_ratio"), share),
    **dict.fromkeys(("adam_epsilon", "eval_delay", "max_grad_norm", "neftune_noise_alpha"), not_negative),
    **dict.fromkeys(("warmup_steps", "weight_decay"), not_negative),
    **dict.fromkeys(("dataloader_num_workers", "gradient_accumulation_steps", "save_total_limit"), whole_number),
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout"), positive_integer),
    **dict.fromkeys(("eval_accumulation_steps", "torch_empty_cache_steps"), positive_integer),
    **dict.fromkeys(("per_device_eval_batch_size", "per_device_train_batch_size"), positive_integer),
    "data_seed": seed,
    "eval_steps": positive_number,
    "save_steps": positive_number,
}
# Arguments of `add_argument` for an option that takes true or false, and alone means true.
FLAG = {"type": truth, "nargs": "?", "const": True, "metavar": "BOOL"}

# How `--help` shows the value of an option.
METAVARS = {
    **dict.fromkeys((positive_integer, whole_number, seed, text_length), "N"),
    **dict.fromkeys((positive_number, not_negative, share, positive_share), "X"),
}

# Arguments of `option` for `--license` and `--trust_remote_code`.
LICENSE = {
    "type": license_name,
    "metavar": "NAME",
    "help": "licence for the card (default: what the source's card says)",
}
TRUST = {"action": "store_true", "help": "run the Python code of a model that is not a MosaicBERT"}


class TrainingParser(Parser):
    """A parser of a script's own options that also takes every option of transformers' `TrainingArguments`.

    An own option replaces the one of `TrainingArguments` with the same name. `use_cpu` is true where there is no GPU.
    `--help` shows the own options, and `--help_all` the others too.

    Args:
        description: what the script does.
        recipe: defaults for options of `TrainingArguments` that the script does not redefine.
        refused: options of `TrainingArguments` that the script cannot support, and why.
        usage: the shortest command line.
    """

    def __init__(self, description: str, recipe: dict[str, Any], refused: dict[str, str], usage: str):
        wide = functools.partial(HelpFormatter, max_help_position=32, width=118)
        super().__init__(description, formatter_class=wide, usage=f"{usage} [options]")
        self.recipe, self.refused = recipe, refused
        self.add_argument("--help_all", action="store_true", help="also show the options of transformers' Trainer")

    def parse_own(self, words: Optional[Sequence[str]] = None) -> tuple[argparse.Namespace, list[str]]:
        """Parse the own options of a command line, and check `CHECKED`, without importing torch or transformers.

        Returns:
            The own options, and the remaining words.
        """
        words = sys.argv[1:] if words is None else list(words)
        if "--help_all" in words:
            print(f"{self.format_help()}\noptions of transformers' Trainer:")
            print(self._others().format_help().partition(":\n")[2])
            self.exit()
        options, rest = self.parse_known_args(words)
        for flag in self._flags():
            if flag.lstrip("-") in self.refused:
                self.exit(2, f"{self.prog}: {flag}: {self.refused[flag.lstrip('-')]}\n")
            if flag not in self._option_string_actions and flag not in trainer_flags():  # transformers takes dashes too
                self.error("unrecognized")
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.error, early._negative_number_matcher = self.error, NEGATIVE_NUMBER
        for name, kind in CHECKED.items():
            early.add_argument(f"--{name}", type=kind)
        early.parse_known_args(rest)
        return options, rest

    def parse_others(self, options: argparse.Namespace, rest: list[str]):
        """Make the `TrainingArguments` of the words that `parse_own` left and of the own options with their names."""
        import torch

        if not torch.cuda.is_available():
            options.use_cpu = True
        others = self._others()
        names = {field.name for field in dataclasses.fields(others.dataclass_types[0]) if field.init}
        own = {name: value for name, value in vars(options).items() if value is not None}
        defaults = {"disable_tqdm": not sys.stderr.isatty(), **self.recipe, **own}
        others.set_defaults(**{name: value for name, value in defaults.items() if name in names})
        arguments, unknown = others.parse_args_into_dataclasses(rest, return_remaining_strings=True)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return arguments

    def _known_flags(self) -> list[str]:
        return [*self._option_string_actions, *trainer_flags()]

    def _others(self) -> argparse.ArgumentParser:
        import accelerate  # noqa: F401  (Trainer needs it; the import names the package if it is missing)
        from transformers import HfArgumentParser, TrainingArguments

        others = HfArgumentParser(TrainingArguments, add_help=False, allow_abbrev=False)
        others.error, others._negative_number_matcher = self.error, NEGATIVE_NUMBER
        for action in others._actions:
            if action.dest in self.refused or f"--{action.dest}" in self._option_string_actions:
                action.help = argparse.SUPPRESS
        return others


@functools.cache
def trainer_flags() -> list[str]:
    """List the options of `TrainingArguments`, read from its source code because importing it takes seconds."""
    package = importlib.util.find_spec("transformers")
    if package is None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
    tree = ast.parse(Path(package.origin).with_name("training_args.py").read_text(encoding="utf-8"))
    (body,) = (part.body for part in tree.body if isinstance(part, ast.ClassDef) and part.name == "TrainingArguments")
    fields = [part for part in body if isinstance(part, ast.AnnAssign) and not part.target.id.startswith("_")]
    # An option that is true by default also has an opposite.
    opposites = [f"--no_{part.target.id}" for part in fields if "bool" in ast.unparse(part.annotation)]
    return [f"--{part.target.id}" for part in fields] + opposites


def run(main: Callable[[], None], memory_hint: str = "") -> None:
    """Run a script; an error that a user can cause ends it with status 1 and one line, `script.py: message`.

    A bug keeps its traceback, and with `--traceback` on the command line so does every other error.

    Args:
        main: parses the arguments and does the work.
        memory_hint: advice for when memory runs out, such as "a smaller --tokens_per_row needs less".
    """
    if "--traceback" in sys.argv[1:]:
        check_transformers()
        return main()
    if not sys.stderr.isatty():  # progress bars of loading and saving clutter the log of a job
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        check_transformers()
        main()
    except BaseException as error:
        message = explain(error, memory_hint)
        if message is None:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def check_transformers() -> None:
    """Raise ImportError if the installed transformers is too old for the model code."""
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return  # the script's own import says that it is missing
    from packaging.version import Version  # which transformers requires

    if Version(version) < Version(OLDEST_TRANSFORMERS):
        raise ImportError(f"transformers {version} is too old, {OLDEST_TRANSFORMERS} or newer is needed")


def explain(error: BaseException, memory_hint: str) -> Optional[str]:
    """Explain in one line an error that a user can cause; None for a bug."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if type(error).__name__ == "PanicException":  # raised by a Rust library, and no Exception
        return f"a library failed: {one_line(error)}"
    # importlib.metadata puts a sentence into the name.
    if isinstance(error, ModuleNotFoundError) and re.fullmatch(r"[\w.]+", error.name or ""):
        package = error.name.partition(".")[0]
        wanted = OTHER_PACKAGES.get(package, '".[scripts]"')
        return f"the package {package} is missing: pip install {wanted}"
    # Only an imported package can have raised its errors; huggingface_hub passes on those of its HTTP library.
    named = (("torch", "OutOfMemoryError"), ("safetensors", "SafetensorError"))
    named += (("httpx", "HTTPError"), ("httpx2", "HTTPError"))
    memory, *others = (getattr(sys.modules.get(module), name, ()) for module, name in named)
    no_memory = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch on a CPU
    if no_memory or isinstance(error, (MemoryError, memory)):
        return "out of memory" + (f"; {memory_hint}" if memory_hint else "")
    if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError, *others)):
        return one_line(error)
    return None


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, shortened if it is endless, or the error's type if it has no message."""
    text = str(error)
    if re.match(r"Caught \w+ in DataLoader worker process", text):  # followed by the traceback of that process
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return shortened(" ".join(text.split())) or type(error).__name__


def shortened(text: str) -> str:
    """Cut the middle out of a text of more than `LONGEST_MESSAGE` characters."""
    half = LONGEST_MESSAGE // 2 - 2
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} … {text[-half:]}"


def listed(names: Sequence[str], most: int) -> str:
    """Join up to `most` names, and count the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def say_end(made: str, *commands: str) -> None:
    """Print the last words of a script: what it made and where, and the commands that may follow."""
    print("\n  ".join([made + ("; next:" if commands else ""), *commands]), flush=True)


def command(script: str, *words) -> str:
    """Write a command line that runs another script of this folder and can be pasted into a shell."""
    path = os.path.relpath(Path(__file__).resolve().parents[1] / script)
    return shlex.join(["python", path, *map(str, words)])
