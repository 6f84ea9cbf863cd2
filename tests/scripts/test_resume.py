"""Resuming from a damaged checkpoint ends in one line that names it; a run removes only its own checkpoints."""

import os
import shutil
import types

import pretrain_mlm
import pytest
import torch
from folders import set_fields
from lib import pretraining, recipe, training
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer

NORM = "bert.embeddings.LayerNorm.weight"
SIZES = "hidden_size=24 num_hidden_layers=1 num_attention_heads=3 intermediate_size=20".split()


def run(data, out, *more):
    flags = "--train_data {} --tokenizer {} ".format(*data) + f"--output_dir {out} --max_length 32 --use_cpu "
    flags += "--tokens_per_row 128 --max_steps 3 --logging_steps 1 --save_steps 2 --peak_tflops 1e-3 "
    flags += "--gradient_accumulation_steps 1"
    return pretraining.train(*pretrain_mlm.parse([*flags.split(), *map(str, more), "--config_fields", *SIZES]))


@pytest.fixture(scope="module")
def data(corpus, tokenizer):
    return corpus, tokenizer.name_or_path


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(data, folder / "out", "--keep_checkpoints")
    return folder / "out" / "checkpoint-2"


@pytest.fixture
def checkpoint(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out" / "checkpoint-2")


def fails(data, checkpoint, message):
    with pytest.raises(ValueError, match=rf"^resume_from_checkpoint: .*checkpoint-2( cannot be loaded,|:) {message}"):
        run(data, checkpoint.parent, "--resume_from_checkpoint", checkpoint)


def rewrite(checkpoint, name, change):
    torch.save(change(torch.load(checkpoint / name, weights_only=False)), checkpoint / name)


def first_rows(content):
    """The state of an optimizer with its moments cut to one row."""
    cut = {number: {k: x[:1] if x.dim() else x for k, x in state.items()} for number, state in content["state"].items()}
    return {**content, "state": cut}


PICKLES = {
    "optimizer list": ("optimizer.pt", lambda content: [1], ""),
    "optimizer empty": ("optimizer.pt", lambda content: {}, ""),
    "optimizer groups": ("optimizer.pt", lambda content: {**content, "param_groups": content["param_groups"][:1]}, ""),
    "optimizer stateless": ("optimizer.pt", lambda content: {**content, "state": {}}, "optimizer.pt does not fit"),
    "optimizer shapes": ("optimizer.pt", first_rows, "optimizer.pt does not fit the weights"),
    "optimizer code": ("optimizer.pt", lambda content: {"state": os.system}, "it holds .*system, which is not a"),
    "schedule list": ("scheduler.pt", lambda content: [1], "the state belongs to another kind of schedule"),
    "schedule empty": ("scheduler.pt", lambda content: {}, "the state belongs to another kind of schedule"),
    "schedule text": ("scheduler.pt", lambda content: dict.fromkeys(content, "x"), "the state belongs"),
    "random state": ("rng_state.pth", lambda content: {}, ""),
}


@pytest.mark.parametrize(("name", "change", "message"), PICKLES.values(), ids=PICKLES)
def test_a_damaged_pickle_of_a_checkpoint_is_named(data, checkpoint, name, change, message):
    """A schedule or an optimizer of another kind was once ignored silently."""
    rewrite(checkpoint, name, change)
    fails(data, checkpoint, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: {**weights, NORM: weights[NORM][:3].clone()}, ".*size mismatch"),
        (lambda weights: {**weights, "more": torch.ones(1)}, "it holds more, unlike the model"),
        (lambda weights: {k: v for k, v in weights.items() if k != NORM}, f"it lacks {NORM}, unlike the model"),
        (lambda weights: {**weights, NORM: weights[NORM].int()}, "model.safetensors holds weights that are not float"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_named(data, checkpoint, change, message):
    """Weights that a checkpoint lacked once stayed random."""
    path = checkpoint / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    fails(data, checkpoint, message)


@pytest.mark.parametrize(
    "fields",
    [
        *({"global_step": step} for step in ("2", -2, 10**30)),
        *({"log_history": history} for history in ({"a": 1}, ["a"], [{"loss": "a"}])),
        {"nonsense": 1},
        {"stateful_callbacks": [1]},
        {"num_input_tokens_seen": "a"},
        {"total_flos": None},
        {"save_steps": "a"},
    ],
)
def test_a_damaged_state_of_a_checkpoint_is_named(data, checkpoint, fields):
    set_fields(checkpoint / "trainer_state.json", **fields)
    fails(data, checkpoint, "trainer_state.json is not a trainer's state")


def test_a_deeply_nested_state_and_a_pipe_are_named(data, checkpoint):
    (checkpoint / "trainer_state.json").write_text("[" * 100_000)
    fails(data, checkpoint, "trainer_state.json is cut off")
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2}')
    (checkpoint / "optimizer.pt").unlink()
    os.mkfifo(checkpoint / "optimizer.pt")
    fails(data, checkpoint, "optimizer.pt is not a file")


def test_a_schedule_goes_on_from_its_own_state_alone():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = recipe.LinearSchedule(optimizer, 1, 10, 0.0)
    state = schedule.state_dict()
    schedule.load_state_dict(state)
    for odd in ([], {}, {**state, "base_lrs": [1.0, 1.0]}, {**state, "last_epoch": "3"}):
        with pytest.raises(ValueError, match="the state belongs to another kind of schedule"):
            schedule.load_state_dict(odd)


def test_old_checkpoints_of_the_run_are_removed_and_no_others(data, tmp_path, monkeypatch):
    """Trainer takes every folder `checkpoint-*` for its own, and once removed a user's `checkpoint-best`."""
    seen = []
    save = training.CarefulTrainer._save_checkpoint

    def save_and_look(self, *arguments, **options):
        save(self, *arguments, **options)
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))

    monkeypatch.setattr(training.CarefulTrainer, "_save_checkpoint", save_and_look)
    for name in ("checkpoint-best", "checkpoint-1-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("mine")
    trainer = run(data, tmp_path, "--max_steps", 4, "--save_steps", 1, "--save_total_limit", 2)
    mine = ["checkpoint-1-best", "checkpoint-best"]
    numbers = [[1], [1, 2], [2, 3], [3, 4]]
    assert seen == [sorted([*mine, *(f"checkpoint-{n}" for n in kept)]) for kept in numbers]
    assert trainer.args.save_total_limit == 2
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == mine


@pytest.mark.parametrize(
    "method, error, kind, message",
    [
        ("_save", SafetensorError("File too large (os error 27)"), OSError, "out cannot be written, File too large"),
        (
            "_save_checkpoint",
            RuntimeError("[inline_container.cc:672]"),
            OSError,
            "checkpoint-7 cannot be written, ",
        ),
        ("_save_checkpoint", RuntimeError("a bug"), RuntimeError, "^a bug$"),
    ],
)
def test_a_full_disk_is_named_and_a_bug_is_raised(tmp_path, monkeypatch, method, error, kind, message):
    """safetensors and torch raise errors that name no file."""

    def full(*_, **__):
        raise error

    monkeypatch.setattr(Trainer, method, full)
    trainer = training.CarefulTrainer.__new__(training.CarefulTrainer)
    trainer.args = types.SimpleNamespace(save_total_limit=2, output_dir=str(tmp_path))
    trainer.state = types.SimpleNamespace(global_step=7)
    trainer.check_weights = lambda: None
    with pytest.raises(kind, match=message):
        getattr(trainer, method)("out")
    assert trainer.args.save_total_limit == 2
