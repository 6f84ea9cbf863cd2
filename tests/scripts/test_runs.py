"""The output folder of a training run: old results stay until new ones replace them, and two runs never meet."""

import json
import os
import sys

import pytest
from lib import runs, staging
from processes import run_python

# Replaces results again and again, each time in a process of its own that is killed one file operation later.
REPLACE = """
import json, shutil, sys
from pathlib import Path
from interruptions import stopped_ever_later
from lib import runs, staging

home, exchange, links, resumes = Path(sys.argv[1]), *(word == "True" for word in sys.argv[2:])
if not exchange:
    staging._exchange = lambda first, second: False
if not links:
    runs._link = lambda source, target: shutil.copy2(source, target, follow_symlinks=False)
runs.find_fault = lambda checkpoint: None
folder = home / "out"

def state():
    if not folder.exists():
        return "gone"
    names = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "optimizer.pt"]
    return " ".join(path.name.partition(".")[0] + path.read_text() for path in names)

def train(content, resume=None):
    with runs.open_run(folder, resume is None, resume, resumable=True) as run:
        for path in (run.work / f"checkpoint-2{content}" / "optimizer.pt", run.work / "final" / "model.safetensors",
                     run.work / "final" / "config.json", run.work / "log_history.json"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
        run.publish(run.work / "final", resumes)

train("0")
(folder / "notes.txt").write_text("mine")
(folder / "checkpoint-best").mkdir()
(folder / "checkpoint-best" / "weights").write_text("mine")
results = []
for _ in stopped_ever_later(lambda: train("1"), lambda: train("2", "last" if resumes else None)):
    at_once = state()
    train("3")
    results.append([at_once, state(), sorted(path.name for path in home.iterdir())])
print(json.dumps(results))
"""


WAYS = [(True, True, False), (True, False, False), (False, True, False), (True, True, True), (False, False, True)]


@pytest.mark.parametrize(("exchange", "links", "resumes"), WAYS)
def test_results_are_old_or_new_wherever_a_run_that_replaces_them_is_killed(tmp_path, exchange, links, resumes):
    """The user's own files stay, with their text, and nothing else is left. A finished run that is
    resumed once replaced its files one by one."""
    if exchange and sys.platform != "linux":
        pytest.skip("only Linux exchanges two folders in one step")
    states = json.loads(run_python(REPLACE, tmp_path, exchange, links, resumes).splitlines()[-1])
    assert len(states) > 40
    old, new, later = (f"weightsmine config{n} log_history{n} model{n} notesmine" for n in (1, 2, 3))
    at_once = [state for state, _, _ in states]
    assert at_once.count("gone") == (0 if exchange else 1)
    assert set(at_once) - {"gone"} == {old, new} and at_once[-1] == new
    assert {(state, *names) for _, state, names in states} == {(later, "out")}


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("kept")


def whole_checkpoint(folder, monkeypatch):
    fill(folder, "trainer_state.json")
    monkeypatch.setattr(runs, "find_fault", lambda path: None)


def test_a_run_that_overwrites_and_was_killed_is_resumed_beside_the_old_results(tmp_path, monkeypatch):
    folder, beside = tmp_path / "out", tmp_path / ".out.stage" / "run"
    fill(folder, "model.safetensors", "checkpoint-9/weights")
    whole_checkpoint(beside / "checkpoint-5", monkeypatch)
    with pytest.raises(ValueError, match="holds .* of an earlier run; continue with --resume_from_checkpoint last, "):
        with runs.open_run(folder, overwrite=False, resumable=True):
            pass
    for resume in ("last", str(beside / "checkpoint-5")):
        with runs.open_run(folder, False, resume, resumable=True) as run:
            assert (run.work, run.checkpoint) == (beside, str(beside / "checkpoint-5"))
        assert (beside / "checkpoint-5").exists() and (folder / "model.safetensors").exists()
    with runs.open_run(folder, False, "last", resumable=True) as run:
        fill(run.work / ".final", "model.safetensors")
        run.publish(run.work / ".final", keep_checkpoints=True)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-5", "model.safetensors"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_finished_run_that_is_resumed_keeps_its_results_until_new_ones_are_whole(tmp_path, monkeypatch):
    folder, beside = tmp_path / "out", tmp_path / ".out.stage" / "run"
    fill(folder, "model.safetensors", "checkpoint-9/weights", "checkpoint-30/weights", "seed-1/weights")
    whole_checkpoint(folder / "checkpoint-10", monkeypatch)
    for resume, start in ((str(folder / "checkpoint-10"), "10"), ("last", "30")):
        with runs.open_run(folder, False, resume, resumable=True) as run:
            assert (run.work, run.checkpoint) == (beside, str(beside / f"checkpoint-{start}"))
            later = ["checkpoint-30"] if start == "30" else []  # is written again, and not through a link
            assert sorted(path.name for path in beside.iterdir()) == ["checkpoint-10", *later, "checkpoint-9"]
            assert os.path.samefile(beside / "checkpoint-9" / "weights", folder / "checkpoint-9" / "weights")
        assert list(tmp_path.iterdir()) == [folder]  # it has saved nothing
    with runs.open_run(folder, False, str(folder / "checkpoint-10"), resumable=True) as run:
        fill(run.work, "checkpoint-20/weights")
    with pytest.raises(ValueError, match="^resume_from_checkpoint: .*run holds an unfinished run; continue it with"):
        with runs.open_run(folder, False, str(folder / "checkpoint-10"), resumable=True):
            pass
    with runs.open_run(folder, False, "last", resumable=True) as run:
        assert (run.work, run.checkpoint) == (beside, str(beside / "checkpoint-20"))
        fill(run.work, ".final/model.safetensors")
        run.publish(run.work / ".final", keep_checkpoints=True)
    left = ["checkpoint-10", "checkpoint-20", "checkpoint-9", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == left
    assert list(tmp_path.iterdir()) == [folder]


def test_a_finished_run_is_resumed_from_a_checkpoint_elsewhere(tmp_path, monkeypatch):
    fill(tmp_path / "out", "model.safetensors", "checkpoint-9/weights")
    for name in ("checkpoint-5", "best"):
        whole_checkpoint(tmp_path / name, monkeypatch)
        with runs.open_run(tmp_path / "out", False, str(tmp_path / name), resumable=True) as run:
            assert run.checkpoint == str(tmp_path / name) and list(run.work.iterdir()) == []


def test_a_run_that_overwrites_is_forgotten_by_the_next_one_that_does(tmp_path, monkeypatch):
    folder, beside = tmp_path / "out", tmp_path / ".out.stage" / "run"
    fill(folder, "model.safetensors")
    whole_checkpoint(beside / "checkpoint-5", monkeypatch)
    with runs.open_run(folder, True, resumable=True) as run:
        assert run.work == beside and run.checkpoint is None and list(beside.iterdir()) == []
    assert list(tmp_path.iterdir()) == [folder]


def test_an_unfinished_run_whose_folder_is_gone_is_not_mixed_with_the_next(tmp_path, monkeypatch):
    beside = tmp_path / ".out.stage" / "run"
    whole_checkpoint(beside / "checkpoint-5", monkeypatch)
    message = "out.stage/run holds an unfinished run; continue with .* or replace it with --over"
    with pytest.raises(ValueError, match=message):
        with runs.open_run(tmp_path / "out", False, resumable=True):
            pass
    assert (beside / "checkpoint-5").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [True, False])
def test_only_numbered_folders_are_removed_as_checkpoints(tmp_path, keep):
    """A user's copy of a checkpoint was once deleted, and a file of such a name stopped the end of a run."""
    mine = [
        "checkpoint-best/weights",
        "checkpoint-5-best/weights",
        "checkpoint-notes.txt",
        "seeds/text",
        "checkpoint-7",
    ]
    numbered = {"checkpoint-5/weights", "checkpoint-10/weights"}
    with runs.open_run(tmp_path, False) as run:
        fill(tmp_path, *mine, *numbered, "elsewhere/weights", ".final/config.json")
        (tmp_path / "checkpoint-8").symlink_to("elsewhere")
        run.publish(tmp_path / ".final", keep)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*mine, "elsewhere/weights", "config.json", *(numbered if keep else ())}
    assert (tmp_path / "checkpoint-8").is_symlink()


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_works(tmp_path):
    for overwrite in (False, True):
        with runs.open_run(tmp_path / "out", overwrite):
            for second in (False, True):
                with pytest.raises(ValueError, match="^output_dir: another run is writing .*out"):
                    with runs.open_run(tmp_path / "out", second):
                        pass
            with pytest.raises(ValueError, match="^target: another run is writing .*out"):
                with staging.staged_folder(tmp_path / "out"):
                    pass
        fill(tmp_path / "out", "model.safetensors")


def test_a_failed_run_leaves_no_empty_folder_and_removes_no_other(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in ("mine/runs/topics", "mine"):
        with pytest.raises(KeyError), runs.open_run(tmp_path / folder, False):
            raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    with pytest.raises(KeyError), runs.open_run(tmp_path / "mine" / "runs", False) as run:
        fill(run.work, "checkpoint-1/weights")
        raise KeyError
    assert (tmp_path / "mine" / "runs" / "checkpoint-1" / "weights").exists()


def test_a_mount_point_is_refused_before_the_work_rather_than_after(tmp_path, monkeypatch):
    fill(tmp_path, "model.safetensors")
    monkeypatch.setattr(runs.os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(ValueError, match="is a mount point, so its results cannot be replaced in one step"):
        with runs.open_run(tmp_path, True):
            pass
    (tmp_path / "model.safetensors").unlink()
    with runs.open_run(tmp_path, True) as run:
        assert run.work == tmp_path


def test_a_file_without_links_is_copied(tmp_path, monkeypatch):
    def none(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(runs.os, "link", none)
    fill(tmp_path, "old/notes/text", "old/notes.txt", "old/model.safetensors", "new/config.json")
    (tmp_path / "old" / "link").symlink_to("notes.txt")
    runs.copy_others(tmp_path / "old", tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", "link", "notes", "notes.txt"]
    assert (tmp_path / "new" / "notes" / "text").read_text() == "kept"
    assert os.readlink(tmp_path / "new" / "link") == "notes.txt"
