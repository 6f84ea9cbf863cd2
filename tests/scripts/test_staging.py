"""A folder is replaced whole or not at all, even if the process is killed."""

import importlib
import json
import os
import re
import shutil
import stat
import sys
import threading

import convert_checkpoint
import pytest
from folders import write_complete_repository
from lib import staging
from processes import run_python

# Replaces a target again and again, each time in a process of its own that is stopped one file operation later.
REPLACE = """
import json, sys
from pathlib import Path
from interruptions import stopped_ever_later
from lib import staging

home, stop, exchange = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
if not exchange:
    staging._exchange = lambda first, second: False
target = home / "target"

def state():
    if not target.exists():
        return "gone"
    return " ".join(sorted(path.name + path.read_text() for path in target.iterdir()))

def replace(content, fails=False):
    with staging.staged_folder(target, overwrite=True) as stage:
        for name in "ab":
            (stage / name).write_text(content)
        if fails:
            raise ValueError("later")

results = []
for _ in stopped_ever_later(lambda: replace("1"), lambda: replace("2"), stop):
    at_once = state()
    try:
        replace("3", fails=True)
    except ValueError:
        pass
    results.append([at_once, state(), sorted(path.name for path in home.iterdir())])
print(json.dumps(results))
"""


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("stop", ["kill", "interrupt", "error"])
def test_a_target_is_old_or_new_wherever_a_run_stops(tmp_path, stop, exchange):
    """Without an exchange in one step a killed run may leave no target, but the next one, even if it fails, puts it
    back; and it clears what the killed one left."""
    if exchange and sys.platform != "linux":
        pytest.skip("only Linux exchanges two folders in one step")
    states = json.loads(run_python(REPLACE, tmp_path, stop, exchange))
    assert len(states) > 15
    old, new = "a1 b1", "a2 b2"
    gaps = 0
    for at_once, later, names in states:
        gaps += at_once == "gone"
        assert at_once in (old, new, "gone")
        assert later == (old if at_once == "gone" else at_once)
        assert names == ["target"], "no litter"
    assert gaps == (1 if stop == "kill" and not exchange else 0)
    assert {old, new} <= {at_once for at_once, _, _ in states} and states[-1][0] == new


def test_an_old_target_that_cannot_be_put_back_is_kept_for_the_next_run(tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious.txt").write_text("kept")
    rename, calls = os.rename, []

    def fails_after_the_first(source, place):
        calls.append(source)
        if len(calls) > 1:
            raise OSError(30, "Read-only file system")
        rename(source, place)

    monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    monkeypatch.setattr(staging.os, "rename", fails_after_the_first)
    with pytest.raises(OSError, match="Read-only"), staging.staged_folder(target, overwrite=True):
        pass
    assert len(calls) == 3 and not target.exists()
    monkeypatch.setattr(staging.os, "rename", rename)
    with pytest.raises(ValueError, match="pass --overwrite"), staging.staged_folder(target):
        pass
    assert (target / "precious.txt").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_another_program_put_in_the_place_of_the_target_is_kept_beside_the_old(tmp_path, monkeypatch, capsys):
    """Without an exchange in one step the target is gone for a moment, in which another program may make it."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious.txt").write_text("kept")
    rename = os.rename

    def rename_slowly(source, place):
        rename(source, place)
        if source == target:
            target.mkdir()
            (target / "other.txt").write_text("kept too")

    monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    monkeypatch.setattr(staging.os, "rename", rename_slowly)
    with pytest.raises(ValueError, match="^target: another program created .*target in the meantime"):
        with staging.staged_folder(target, overwrite=True):
            pass
    assert (target / "other.txt").read_text() == "kept too"
    assert (tmp_path / "target.old-1" / "precious.txt").read_text() == "kept"
    assert "is kept in" in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda target: (target / "notes.txt").write_text("new"),
        lambda target: (target / "a").write_text("changed"),
        lambda target: (shutil.rmtree(target), target.mkdir()),
    ],
)
def test_a_target_that_another_program_changes_meanwhile_is_left_as_it_is(tmp_path, change):
    target = tmp_path / "target"
    target.mkdir()
    (target / "a").write_text("old")
    message = "^target: another program changed .*target in the meantime, so it is left as is"
    with pytest.raises(ValueError, match=message):
        with staging.staged_folder(target, overwrite=True) as stage:
            (stage / "a").write_text("new")
            change(target)
            state = {path.name: path.read_text() for path in target.iterdir()}
    assert {path.name: path.read_text() for path in target.iterdir()} == state
    assert list(tmp_path.iterdir()) == [target]


def test_the_children_of_a_process_hold_no_lock_for_it(tmp_path):
    (said, say), (ended, end) = os.pipe(), os.pipe()
    with staging.locked(tmp_path, "output_dir"):
        child = os.fork()
        if not child:
            os.close(end)
            os.write(say, b"here")
            os.read(ended, 1)  # until the parent closes its end
            os._exit(0)
        assert os.read(said, 4) == b"here"
    try:
        with staging.locked(tmp_path, "output_dir"):
            pass
    finally:
        os.close(end)
        os.waitpid(child, 0)


def test_a_link_keeps_pointing_to_the_target_that_is_replaced(tmp_path):
    real = tmp_path / "disk" / "model"
    real.mkdir(parents=True)
    (real / "stale.txt").write_text("stale")
    link = tmp_path / "model"
    link.symlink_to(real)
    with staging.staged_folder(link, overwrite=True) as stage:
        (stage / "new.txt").write_text("new")
    assert link.is_symlink() and [path.name for path in real.iterdir()] == ["new.txt"]
    assert [path.name for path in real.parent.iterdir()] == ["model"]


def test_a_file_is_never_replaced_by_a_folder(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="notes is a file, expected a folder"):
        with staging.staged_folder(tmp_path / "notes", overwrite=True):
            pass
    with pytest.raises(ValueError, match="target: .*notes cannot be made"):
        with staging.staged_folder(tmp_path / "notes" / "model"):
            pass
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_target_without_the_right_to_write_is_named(tmp_path, monkeypatch):
    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="target: .* cannot be written, .*denied"):
        patch.setattr(staging.Path, "mkdir", lambda path, *_, **options: None if options else denied(path))
        with staging.staged_folder(tmp_path / "model"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError), staging.staged_folder(tmp_path / "loop", overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


SPELLINGS = {
    "file": lambda home: home / "runs" / "corpus.jsonl",
    "pattern": lambda home: home / "runs" / "*.jsonl",
    "deep pattern": lambda home: home / "**" / "*.jsonl",
    "folder": lambda home: home / "runs",
    "inner folder": lambda home: home / "runs" / "inner",
    "dots": lambda home: home / "runs" / "inner" / ".." / "corpus.jsonl",
    "dataset and split": lambda home: f"{home / 'runs' / 'inner'}:default:train",
    "link to the file": lambda home: home / "link.jsonl",
    "link to the folder": lambda home: home / "linked" / "corpus.jsonl",
    "link in the folder": lambda home: home / "runs" / "outside.txt",
    "folder with a link": lambda home: home / "snapshot",
    "what a killed run left": lambda home: home / ".runs.stage" / "new",
}


@pytest.fixture
def home(tmp_path):
    for folder in ("runs/inner", "snapshot", ".runs.stage/new", "apart"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("runs/corpus.jsonl", "apart/corpus.json", "apart/text.txt"):
        (tmp_path / file).write_text("kept")
    (tmp_path / "link.jsonl").symlink_to("runs/corpus.jsonl")
    (tmp_path / "linked").symlink_to("runs")
    (tmp_path / "runs" / "outside.txt").symlink_to("../apart/text.txt")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../runs/corpus.jsonl")
    return tmp_path


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("target", ["runs", "linked"])
def test_a_target_that_holds_an_input_is_refused_however_that_is_spelt(home, target, spelling):
    source = str(spelling(home))
    message = f"^output: .*runs(.stage)? (is|holds) {re.escape(source)}, which data reads; choose another folder"
    with pytest.raises(ValueError, match=message):
        with staging.staged_folder(home / target, True, "output", model=None, data=["someone/model", source]):
            pass
    assert (home / "runs" / "corpus.jsonl").read_text() == "kept" and (home / ".runs.stage" / "new").exists()


def test_inputs_beside_and_around_an_output_are_allowed(home):
    (home / "apart" / "new").mkdir()
    inputs = {"data": [f"{home}/apart/*.json"], "model": home / "apart", "tokenizer": "bert-base-uncased"}
    for output in (home / "runs", home / "apart" / "new", home / "nothing" / "yet", None):
        staging.check_apart(output, "output", **inputs)


def test_a_file_that_is_written_is_no_input(home):
    staging.check_apart(home / "apart" / "table.csv", "csv", data=str(home / "apart"))
    with pytest.raises(ValueError, match="^csv: .*link.jsonl is .*corpus.jsonl, which data reads; choose another file"):
        staging.check_apart(home / "link.jsonl", "csv", data=home / "runs" / "corpus.jsonl")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    for name in ("table.csv", "link.csv"):
        (tmp_path / "table.csv").write_text("old")
        if name == "link.csv":
            (tmp_path / name).symlink_to("table.csv")
        with pytest.raises(OSError), staging.staged_file(tmp_path / name) as new:
            new.write_text("half")
            raise OSError(28, "No space left on device")
        assert (tmp_path / "table.csv").read_text() == "old"
        with staging.staged_file(tmp_path / name) as new:
            assert new.suffix == ".csv"
            new.write_text("new")
        assert (tmp_path / "table.csv").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.csv", "table.csv"]
    assert (tmp_path / "link.csv").is_symlink()


def test_a_device_is_written_to_and_not_replaced():
    with staging.staged_file(os.devnull) as new:
        assert os.path.samefile(new, os.devnull)
        new.write_text("gone")
    assert not os.path.isfile(os.devnull)


@pytest.mark.parametrize("inside", [".git", "photos"])
def test_overwrite_spares_a_folder_that_is_more_than_a_model(tmp_path, inside):
    target = tmp_path / "checkout"
    (target / inside).mkdir(parents=True)
    (target / inside / "precious").write_text("kept")
    (target / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"target: .*checkout holds the folder {inside}, and only a folder without"):
        with staging.staged_folder(target, overwrite=True):
            raise AssertionError("the block ran")
    assert (target / inside / "precious").read_text() == "kept" and (target / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkout"]


def test_runs_that_take_turns_never_meet_a_stage_that_is_gone(tmp_path):
    """The loser of a race for the lock must not go on in a folder that the winner has removed."""
    outcomes = []

    def replace(number):
        for _ in range(60):
            try:
                with staging.staged_folder(tmp_path / "target", overwrite=True) as stage:
                    (stage / "a").write_text(str(number))
                outcomes.append("written")
            except ValueError as error:
                outcomes.append("refused" if "another run" in str(error) else repr(error))
            except OSError as error:
                outcomes.append(repr(error))

    threads = [threading.Thread(target=replace, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes) <= {"written", "refused"} and "written" in outcomes
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


# Makes a folder of a cache again and again in processes that are stopped one file operation later each.
SHARE = """
import json, sys
from pathlib import Path
from interruptions import stopped_ever_later
from lib import staging

cache = Path(sys.argv[1]) / "cache"

def make(letter):
    with staging.shared_folder(cache / (letter * 32), "cache_dir") as stage:
        (stage / "a").write_text(letter)

results = []
for _ in stopped_ever_later(lambda: None, lambda: make("a"), "kill"):
    make("b")
    results.append(sorted("/".join(path.relative_to(cache).parts) for path in cache.rglob("*")))
print(json.dumps(results))
"""


def test_what_a_killed_process_left_in_a_cache_is_cleared_by_the_next_whatever_it_makes(tmp_path):
    """A folder stayed for each text whose tokenization was killed."""
    results = json.loads(run_python(SHARE, tmp_path))
    first, second = ([name * 32, f"{name * 32}/a"] for name in "ab")
    assert len(results) > 5 and results[-1] == first + second
    assert all(result in (second, first + second) for result in results)


def test_a_cache_spares_what_a_live_process_makes_and_what_is_not_its_own(tmp_path):
    mine = tmp_path / ".config.1"
    mine.mkdir()
    with staging.shared_folder(tmp_path / ("a" * 32), "cache_dir") as stage:
        (stage / "a").write_text("live")
        with staging.shared_folder(tmp_path / ("b" * 32), "cache_dir"):
            assert (stage / "a").exists() and mine.exists()
        with staging.shared_folder(tmp_path / ("a" * 32), "cache_dir") as faster:
            (faster / "a").write_text("faster")
    assert (tmp_path / ("a" * 32) / "a").read_text() == "faster"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".config.1", "a" * 32, "b" * 32]


def test_files_are_as_readable_as_new_files_are(tmp_path):
    old = os.umask(0o022)
    try:
        with staging.staged_folder(tmp_path / "target") as stage:
            (stage / "part").mkdir(mode=0o700)
            (stage / "part" / "model.safetensors").touch(mode=0o600)
    finally:
        os.umask(old)
    rights = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "target").rglob("*")}
    assert rights == {"part": 0o755, "model.safetensors": 0o644}
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == 0o755


COMMANDS = [
    "convert_checkpoint MODEL OUT --data OUT/text.jsonl --overwrite",
    "convert_checkpoint MODEL OUT --config OUT/config.json --overwrite",
    "convert_checkpoint MODEL OUT --tokenizer OUT --overwrite",
    "convert_checkpoint OUT OUT --overwrite",
    "convert_bert OUT OUT --data MODEL/text.jsonl --overwrite",
    "convert_bert MODEL OUT --data OUT/*.jsonl --overwrite",
    "export OUT OUT --format onnx --overwrite",
    "export MODEL OUT --format gguf --tokenizer OUT --overwrite",
    "predict MODEL OUT/text.jsonl OUT/table.csv",
    "predict OUT MODEL/text.jsonl OUT/text.jsonl",
    "evaluate_mlm --model MODEL --data OUT/text.jsonl --csv OUT/table.csv",
    "evaluate_mlm --model MODEL --data OUT/text.jsonl --png OUT/table.png",
]
BOTH = ["--train_data OUT/text.jsonl", "--validation_data OUT/*.jsonl", "--model OUT"]
TRAININGS = {
    "pretrain_mlm": ["--tokenize_only --train_data OUT/text.jsonl", "--config OUT/config.json", "--tokenizer OUT"],
    "finetune_classification": ["--test_data OUT/text.jsonl", "--predict OUT/text.jsonl"],
}
COMMANDS += [
    f"{script} --train_data MODEL/text.jsonl {option} --output_dir OUT --overwrite"
    for script, options in TRAININGS.items()
    for option in (*BOTH, *options)
]


@pytest.mark.parametrize("line", COMMANDS)
def test_no_script_writes_over_what_it_reads(tmp_path, run_script, line):
    """The tables are links to the text, so that their names are those of tables."""
    for name in ("model", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "documents.json").write_text("{}")
        (tmp_path / name / "text.jsonl").write_text('{"text": "kept"}\n')
        for table in ("table.csv", "table.png"):
            (tmp_path / name / table).symlink_to("text.jsonl")
    before = {path: path.read_text() for path in tmp_path.rglob("*.*")}
    script, *words = line.replace("MODEL", str(tmp_path / "model")).replace("OUT", str(tmp_path / "out")).split()
    with pytest.raises(SystemExit, match=r"^\w+.py: (target|output(_dir)?|csv|png): .*(is|holds) .*, which \w+ reads"):
        run_script(importlib.import_module(script), *words)
    assert {path: path.read_text() for path in tmp_path.rglob("*.*")} == before


def test_a_target_that_exists_is_only_replaced_on_request(tmp_path, run_script):
    write_complete_repository(tmp_path / "old")
    target = tmp_path / "new"
    target.mkdir()
    (target / "stale.txt").write_text("stale")
    with pytest.raises(SystemExit, match="exists and is not an empty folder; pass --overwrite"):
        run_script(convert_checkpoint, tmp_path / "old", target)
    run_script(convert_checkpoint, tmp_path / "old", target, "--overwrite")
    assert not (target / "stale.txt").exists()
    assert (target / "config.json").is_file()
