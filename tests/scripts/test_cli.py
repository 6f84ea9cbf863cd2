"""The command line of the scripts: misspelt flags, help, and errors in one line."""

import argparse
import configparser
import dataclasses
import functools
import re
import sys

import pytest
import torch
from conftest import ROOT
from huggingface_hub.errors import HfHubHTTPError
from lib import cli
from processes import start_python
from safetensors import SafetensorError
from transformers import HfArgumentParser, TrainingArguments


def parser():
    made = cli.Parser("What it does.", prog="script.py")
    made.add_argument("source", help="a folder")
    made.add_argument("--pad_vocab", type=cli.positive_integer, default=64, help="a multiple")
    made.add_argument("--license", help="for the card")
    for flag, kind in (("seed", cli.seed), ("workers", cli.whole_number), ("config", cli.old_file)):
        made.add_argument(f"--{flag}", type=kind)
    made.add_argument("--csv", type=functools.partial(cli.new_file, suffix=".csv"))
    made.add_argument("--out", type=cli.new_file)
    return made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--pad-vocab", "64"], "there is no option --pad-vocab; did you mean --pad_vocab?"),
        (["--licence=mit"], "there is no option --licence; did you mean --license?"),
        (["x", "--zzz"], "there is no option --zzz "),
        (["x", "--pad", "64"], "there is no option --pad"),
        ([], "the following arguments are required: source"),
        (["x", "--pad_vocab", "0"], "argument --pad_vocab: expected a positive integer, got '0'"),
        (["x", "--pad_vocab", "-3"], "argument --pad_vocab: expected a positive integer, got '-3'"),
        (["x", "--pad_vocab", "-.5e-4"], "argument --pad_vocab: expected a positive integer, got '-.5e-4'"),
        (["x", "--seed", "-1"], "argument --seed: expected an integer from 0 to 4294967295, got '-1'"),
        (["x", "--seed", "4294967296"], "argument --seed: expected an integer from 0 to 4294967295, got"),
        (["x", "--workers", "-1"], "argument --workers: expected 0 or a positive integer, got '-1'"),
        (["x", "--config", "gone.json"], "argument --config: expected a file, got 'gone.json'"),
        (["x", "--csv", "gone/x.csv"], "argument --csv: expected a file in a writable folder, got 'gone/x"),
        (["x", "--csv", "x.txt"], "argument --csv: expected a name that ends with .csv, got 'x.txt'"),
        (["x", "--out", "."], "argument --out: expected a file in a writable folder, got '.'"),
    ],
)
def test_a_wrong_call_ends_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(arguments)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(f"script.py: {message}") and line.count("\n") == 1


def test_help_shows_the_default_of_an_option_that_has_one(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert "a multiple (default: 64)" in text
    assert "for the card\n" in text and "--traceback" in text


class NoMemory(torch.OutOfMemoryError):
    """What a GPU without memory raises."""


class Refused(HfHubHTTPError):
    """What the Hub answers."""

    def __init__(self):
        OSError.__init__(self, "Invalid\n\ntoken")

    def __str__(self):
        return "Invalid\n\ntoken"


class PanicException(BaseException):
    """What a Rust library raises where it panics."""


# What huggingface_hub passes on: requests raises OSErrors, its successors do not.
HTTP_LIBRARY = next((sys.modules[name] for name in ("httpx2", "httpx") if name in sys.modules), None)
NO_NETWORK = HTTP_LIBRARY.ConnectError("no such host") if HTTP_LIBRARY else OSError("no such host")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b"), "a b"),
        (ValueError(), "ValueError"),
        (ValueError("Caught ValueError in DataLoader worker process 0.\nOriginal Trace\nValueError: a: b\n"), "a: b"),
        (FileNotFoundError(2, "No such file or directory", "x.json"), "[Errno 2] No such file or directory: 'x.json'"),
        (Refused(), "Invalid token"),
        (SafetensorError("no space left"), "no space left"),
        (NO_NETWORK, "no such host"),
        (ModuleNotFoundError("No module named 'datasets.x'", name="datasets.x"), "datasets is missing.*scripts"),
        (ModuleNotFoundError("No module named 'streaming'", name="streaming"), "pip install mosaicml-streaming"),
        (ModuleNotFoundError("a is too old", name="a>=1 but found a==0"), "a is too old"),
        (ImportError("cannot import name 'x'"), "cannot import name 'x'"),
        (MemoryError(), "out of memory; take less"),
        (NoMemory("CUDA out of memory"), "out of memory; take less"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory; take less"),
        (KeyboardInterrupt(), "interrupted"),
        (PanicException("index out of bounds"), "a library failed: index out of bounds"),
        (ValueError("a" * 10**6 + "b"), "a" * 498 + " … " + "a" * 497 + "b"),
    ],
)
def test_an_error_that_a_user_can_cause_is_one_line(error, line, monkeypatch):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/script.py"])
    with pytest.raises(SystemExit) as stop:
        cli.run(main, "take less")
    assert re.match(
        rf"script\.py: .*{line}" if "missing" in line else rf"script\.py: .*{re.escape(line)}", stop.value.code
    )
    assert "\n" not in stop.value.code
    monkeypatch.setattr(sys, "argv", ["/somewhere/script.py", "--traceback"])
    with pytest.raises(type(error)):
        cli.run(main)


def test_a_bug_keeps_its_traceback(monkeypatch):
    def main():
        raise KeyError("x")

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(KeyError):
        cli.run(main)


@pytest.mark.parametrize(
    ("version", "old"),
    [("4.54.0", True), ("4.54.1", False), ("4.9.2", True), ("5.0.0rc1", False), ("4.55.0.dev0", False)],
)
def test_a_release_of_transformers_below_the_oldest_is_named(version, old, monkeypatch):
    monkeypatch.setattr(cli.importlib.metadata, "version", lambda package: version)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    if not old:
        return cli.run(lambda: None)
    with pytest.raises(SystemExit, match=f"transformers {version} is too old, 4.54.1 or newer is needed"):
        cli.run(lambda: None)


def test_the_oldest_transformers_is_the_one_of_setup_cfg():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert f"transformers>={cli.OLDEST_TRANSFORMERS}," in settings["options"]["install_requires"]


def test_the_log_of_a_job_holds_no_progress_bars():
    program = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    result = start_python(program, ROOT / "scripts" / "fill_mask.py", "She [MASK] a letter.")
    assert len(result.stdout.splitlines()) == 5 and result.stderr == ""


def test_the_options_of_the_trainer_are_those_of_its_dataclass():
    fields = {f"--{field.name}" for field in dataclasses.fields(TrainingArguments) if field.init}
    found = set(cli.trainer_flags())
    assert fields == {flag for flag in found if not flag.startswith("--no_")}
    taken = HfArgumentParser(TrainingArguments)._option_string_actions
    assert {flag for flag in taken if flag.startswith("--") and "-" not in flag[2:]} - {"--help"} <= found


def test_the_options_of_the_trainer_need_transformers(monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="transformers"):
        cli.trainer_flags.__wrapped__()


@pytest.mark.parametrize("kind", [cli.positive_integer, cli.whole_number, cli.seed])
@pytest.mark.parametrize("text", ["9" * 5000, "9" * 19, "-1", "1.5", ""])
def test_a_number_that_is_malformed_or_too_long_is_refused(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected .*integer"):
        kind(text)


def test_a_message_about_a_huge_value_is_shortened(capsys):
    parser = cli.Parser("")
    parser.add_argument("--number", type=cli.positive_integer)
    with pytest.raises(SystemExit):
        parser.parse_args(["--number", "9" * 10**6])
    assert len(capsys.readouterr().err) < 1200
