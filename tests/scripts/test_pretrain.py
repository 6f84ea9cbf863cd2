"""scripts/pretrain_mlm.py: the published recipe, and runs that survive what happens to them."""

import functools
import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pretrain_mlm
import push_to_hub
import pytest
import torch
from conftest import ROOT
from corpora import WORDS
from folders import SPECIAL, change_weights, write_complete_repository
from lib import packing, pretraining, recipe, runs, training
from models import tiny_model
from numerics import SAME, assert_same
from processes import run_python, start_python
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForMaskedLM, AutoTokenizer

SIZES = "hidden_size=24 num_hidden_layers=2 num_attention_heads=3 intermediate_size=20".split()


def command_line(corpus, tokenizer, output_dir, **flags):
    settings = {
        "train_data": corpus,
        "tokenizer": tokenizer.name_or_path,
        "output_dir": output_dir,
        "max_length": 32,
        "tokens_per_row": 128,
        "max_steps": 8,
        "logging_steps": 1,
        "save_steps": 3,
        "peak_tflops": 1e-3,
        "use_cpu": True,
        "gradient_accumulation_steps": 2,
        **flags,
    }
    flat = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        flat += [f"--{name}", *map(str, values)]
    return [*flat, "--config_fields", *SIZES]


def run(arguments):
    return pretraining.train(*pretrain_mlm.parse(arguments))


def losses(folder):
    history = json.loads((folder / "log_history.json").read_text())
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_defaults_are_the_published_recipe(corpus, tokenizer, tmp_path, monkeypatch):
    flags = ["--train_data", str(corpus), "--output_dir", str(tmp_path)]
    options, arguments = pretrain_mlm.parse(flags)
    assert (options.mask_probability, options.eval_mask_probability, options.global_batch_size) == (0.3, 0.15, 4096)
    assert (arguments.learning_rate, arguments.adam_beta1, arguments.adam_beta2) == (5e-4, 0.9, 0.98)
    assert (arguments.adam_epsilon, options.warmup_share, options.final_lr_share) == (1e-6, 0.06, 0.02)
    assert arguments.bf16 and options.decoupled_weight_decay == 1e-5
    monkeypatch.setattr(pretraining.PretrainingTrainer, "train", lambda self, **_: self.create_optimizer())
    monkeypatch.setattr(pretraining, "save", lambda *_: None)
    trainer = run(command_line(corpus, tokenizer, tmp_path, gradient_accumulation_steps=0, tokens_per_row=8192))
    # 4,096 sequences of 32 tokens in rows of 8,192
    assert trainer.args.gradient_accumulation_steps == 16
    assert trainer.optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.02)
    config = trainer.model.config
    assert (config.vocab_size, config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (64, 0.1, 0.0)


def test_the_learning_rate_warms_up_and_falls_in_lines():
    rates = [recipe.linear_schedule(step, warmup=6, total=100, final=0.02) for step in range(101)]
    assert rates[:7] == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert rates[53] == pytest.approx(0.51) and rates[100] == pytest.approx(0.02)


def test_flops_are_those_that_torch_counts(tokenizer):
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model(vocab_size=64, sparse_prediction=True, attn_implementation="eager")
    generator = np.random.default_rng(0)
    row = packing.Masking(tokenizer, 0.3)(np.arange(5, 45), np.array([40]), generator)
    batch = packing.flatten_rows([row])
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    predicted = int((batch["labels"] != packing.IGNORED).sum())
    assert recipe.count_flops(model.config, 40, 40**2, predicted) == counter.get_total_flops()


class ReadNumbers(TorchDispatchMode):
    """Counts the numbers that are read from tensors outside the model, each of which would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            files = {Path(frame.f_code.co_filename).name for frame, _ in traceback.walk_stack(None)}
            self.count += not any(name.startswith("bert_") for name in files)
        return function(*args, **(kwargs or {}))


def test_a_step_of_the_trainer_reads_no_number_from_the_device(corpus, tokenizer, tmp_path):
    counts = []
    for steps in (2, 6):
        flags = {"max_steps": steps, "logging_steps": 100, "save_steps": 100, "max_grad_norm": 1.0}
        with ReadNumbers() as read:
            run(command_line(corpus, tokenizer, tmp_path / str(steps), **flags))
        counts.append(read.count)
    assert counts[0] == counts[1] > 0  # those of the start and the end


def test_a_run_ends_in_a_repository_that_loads_by_itself(corpus, tokenizer, tmp_path):
    run(command_line(corpus, tokenizer, tmp_path, validation_data=corpus, save_dtype="bfloat16"))
    assert "8 steps, " in (tmp_path / "README.md").read_text()
    assert {"model.safetensors", "loss.png"} <= set(push_to_hub.files_to_push(tmp_path))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: fill-mask" in card and re.search(r"^\| 32 \| \d\.\d{3} \|$", card, re.MULTILINE)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    history = json.loads((tmp_path / "log_history.json").read_text())
    assert {"loss", "tokens_per_second", "mfu", "seconds"} <= history[0].keys()
    assert history[0]["tokens_per_second"] > 0 and history[0]["mfu"] > 0
    assert any("eval_32_loss" in entry for entry in history)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    model = AutoModelForMaskedLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert model.dtype == torch.float32 and not model.config.sparse_prediction
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    encoded = AutoTokenizer.from_pretrained(tmp_path)("ba [MASK] bi", return_tensors="pt")
    logits = model(**encoded).logits
    assert list(tmp_path.glob("checkpoint-*")) == [] and {
        path.stat().st_mode & 0o777 for path in tmp_path.glob("*.*")
    } == {0o644}
    assert logits.shape == (1, 5, 64) and (logits.softmax(-1)[..., len(SPECIAL + WORDS) :] < 1e-12).all()


def test_a_run_starts_from_the_weights_it_is_given(corpus, tokenizer, tmp_path):
    run(command_line(corpus, tokenizer, tmp_path / "first", max_steps=1))
    flags = command_line(corpus, tokenizer, tmp_path / "second", max_steps=1, learning_rate=1e-30)
    flags = flags[: flags.index("--config_fields")]
    trainer = run([*flags, "--model", str(tmp_path / "first"), "--config_fields", "hidden_dropout_prob=0.0"])
    first = AutoModelForMaskedLM.from_pretrained(tmp_path / "first", trust_remote_code=True)
    for name, value in first.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])
    assert trainer.model.config.hidden_dropout_prob == 0.0


def test_a_head_that_the_weights_lack_is_new_and_said_to_be(corpus, tokenizer, tmp_path, capsys):
    """The training began with a random head without a word."""
    folder = tmp_path / "model"
    write_complete_repository(folder)
    flags = command_line(corpus, tokenizer, tmp_path / "out")
    options, _ = pretrain_mlm.parse([*flags[: flags.index("--config_fields")], "--model", str(folder)])
    said = f"{folder} holds no head for masked language modeling: the head is new\n"
    for weights, printed in (({}, ""), ({"cls__predictions__transform__dense__weight": None}, said)):
        change_weights(folder, **weights)
        pretraining.build_model(options, 26)
        assert capsys.readouterr().out == printed
    change_weights(folder, bert__encoder__layer__1__mlp__wo__weight=None)
    with pytest.raises(ValueError, match="1 tensors of the encoder are missing from the weights, layers 1 among them"):
        pretraining.build_model(options, 26)


def test_loss_falls(corpus, tokenizer, tmp_path):
    flags = {"bf16": False, "max_steps": 30, "learning_rate": 1e-2, "save_steps": 100}
    run(command_line(corpus, tokenizer, tmp_path, **flags))
    curve = losses(tmp_path)
    # Of 64 rows 45 are tokens: 3.81 nats for a guess; 3.69 at best, as words are drawn from 40 with equal odds.
    assert curve[1] > 3.79 and sum(curve[step] for step in range(26, 31)) / 5 < 3.72


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
def test_a_killed_run_resumes_to_the_same_loss_curve(corpus, tokenizer, tmp_path, streaming):
    run(command_line(corpus, tokenizer, tmp_path / "whole", streaming=streaming))
    killer = """
        import os, signal, pretrain_mlm
        from lib import pretraining
        log = pretraining.PretrainingTrainer.log
        def log_or_die(self, *args, **kwargs):
            log(self, *args, **kwargs)
            if self.state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        pretraining.PretrainingTrainer.log = log_or_die
        pretrain_mlm.main()
    """
    flags = command_line(corpus, tokenizer, tmp_path / "killed", streaming=streaming)
    died = start_python(killer, *flags)
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    assert max(losses(tmp_path / "killed")) == 5
    (tmp_path / "killed" / "checkpoint-4").mkdir()  # what a kill leaves while a checkpoint is written
    run([*flags, "--resume_from_checkpoint", "last"])
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 8


def test_two_processes_train_like_one(corpus, tokenizer, tmp_path):
    """On a stream; the sharded run below takes stored data."""
    plain = {"bf16": False, "max_steps": 4, "save_steps": 100, "streaming": True}
    no_dropout = ["hidden_dropout_prob=0.0"]
    run([*command_line(corpus, tokenizer, tmp_path / "one", **plain), *no_dropout])
    flags = command_line(corpus, tokenizer, tmp_path / "two", **{**plain, "gradient_accumulation_steps": 1})
    torchrun = ["--standalone", "--nproc-per-node", "2", ROOT / "scripts/pretrain_mlm.py", *flags, *no_dropout]
    run_python("from torch.distributed.run import main; main()", *torchrun)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() == {1, 2, 3, 4}
    # Gradients are summed in another order; the log keeps float32 losses.
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)


def test_sharded_training_by_trainer_equals_one_process_resumes_and_saves_a_whole_repository(
    corpus, tokenizer, tmp_path
):
    """FSDP through Trainer. Files of a sharded model once held torch's code for ours and each tied weight twice."""
    plain, first = {"bf16": False, "max_steps": 4, "save_steps": 2}, tmp_path / "first"
    no_dropout = ["hidden_dropout_prob=0.0"]
    run([*command_line(corpus, tokenizer, tmp_path / "one", **plain), *no_dropout, "--keep_checkpoints"])
    flags = command_line(corpus, tokenizer, tmp_path / "two", **{**plain, "gradient_accumulation_steps": 1})
    flags += [*no_dropout, "--keep_checkpoints", "--fsdp", "full_shard auto_wrap", "--fsdp_config", '{"version": 2}']
    printed = run_python("import runpy; runpy.run_module('sharded_pretraining', run_name='__main__')", first, *flags)
    assert {line for line in printed.splitlines() if line.startswith("parts")} == {"parts 31"}
    one, two = losses(tmp_path / "one"), losses(first)
    assert one.keys() == two.keys() == {1, 2, 3, 4}
    # Gradients are summed in another order; the log keeps float32 losses.
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
    saved = json.loads((first / "config.json").read_text())
    assert saved["architectures"] == ["MosaicBertForMaskedLM"]
    written = {path.name for path in first.iterdir()}
    assert {path.name for path in (tmp_path / "one").iterdir()} == written >= {"bert_layers.py", "model.safetensors"}
    whole, sharded, again = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "first", "two"))
    assert whole.keys() == sharded.keys()
    for name in whole:
        assert_same(sharded[name], whole[name], SAME[torch.float32], name)
    model = AutoModelForMaskedLM.from_pretrained(first, trust_remote_code=True)
    assert "Wqkv" in str(model)
    # The run that resumed.
    assert losses(tmp_path / "two") == two
    assert all(torch.equal(again[name], sharded[name]) for name in sharded)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"text_field": "body"}, "line 1: text_field must be one of .*'text'.*, got 'body'"),
        ({"max_length": 9}, "max_length must be at least 10, got 9"),
        ({"length_shares": [0.5, 0.5]}, "length_shares must be one positive number for each max_length"),
        ({"tokens_per_row": 20}, "tokens_per_row must be at least the longest sequence, 32, got 20"),
        ({"config": "here", "model": "there"}, "config must not be given with model"),
        ({"streaming": True, "num_train_epochs": 1}, "num_train_epochs needs data of a known size"),
        ({"model": "./there"}, "model: there is no folder './there'"),
        ({"torch_compile": "fast"}, "torch_compile must be one of .*inductor.*, got 'fast'"),
        ({"max_seconds": 9, "lr_scheduler_type": "cosine"}, "max_seconds needs lr_scheduler_type linear"),
        ({"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint: nowhere: there is no such folder"),
        ({"resume_from_checkpoint": "last", "overwrite": True}, "overwrite starts a run again, so it must not be"),
    ],
)
def test_arguments_that_cannot_work_together_are_named(corpus, tokenizer, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(command_line(corpus, tokenizer, tmp_path, **flags))


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            {"config": "x", "config_fields": "hidden_size"},
            "argument --config_fields: expected NAME=VALUE, got 'hidden_s",
        ),
        ({"learning_rate": 0}, "argument --learning_rate: expected a positive number, got '0'"),
        ({"mask_probability": 30}, "argument --mask_probability: expected a number above 0 and up to 1, got '30'"),
        ({"mask_token_share": -0.1}, "argument --mask_token_share: expected a number from 0 to 1, got '-0.1'"),
        ({"max_seconds": "nan"}, "argument --max_seconds: expected a positive number, got 'nan'"),
        ({"bf16": "maybe"}, "argument --bf16: expected true or false, got 'maybe'"),
        ({"save_dtype": "bf16"}, "argument --save_dtype: invalid choice: 'bf16'"),
        ({"adam_beta1": "x"}, "argument --adam_beta1.*: expected a number from 0 to 1, got 'x'"),
        ({"ddp_timeout": "x"}, "argument --ddp_timeout: expected a positive integer, got 'x'"),
        ({"seed": -1}, "argument --seed: expected an integer from 0 to 4294967295, got '-1'"),
        (
            {"gradient_accumulation_steps": -1},
            "argument --gradient_accumulation_steps.*: expected 0 or a positive integer",
        ),
        ({"per_device_train_batch_size": 0}, "argument --per_device_train_batch_size.*: expected a positive integer"),
        ({"weight_decay": -1}, "argument --weight_decay.*: expected a number of at least 0, got '-1'"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor: label smoothing would give weight to"),
        ({"mask_probabilty": 0.3}, "there is no option --mask_probabilty; did you mean --mask_probability?"),
        ({"adam_beta3": 0.3}, "there is no option --adam_beta3; did you mean --adam_beta"),
        ({"weight-decay": 0.3}, "there is no option --weight-decay; did you mean --weight_decay?"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line(corpus, tokenizer, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        pretrain_mlm.parse(command_line(corpus, tokenizer, tmp_path, **flags))
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and re.search(message.replace("?", "[?]"), line)


def test_help_all_shows_the_options_of_the_trainer_too(capsys):
    texts = []
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            pretrain_mlm.parse([flag])
        texts.append(capsys.readouterr().out)
    own, everything = texts
    assert "--mask_probability X" in own and "(default: 0.3)" in own and "--adam_beta2" not in own
    assert everything.startswith(own) and "--adam_beta2" in everything
    assert everything.count("--learning_rate X") == 1 and "--label_smoothing_factor" not in everything


@pytest.mark.parametrize(
    "fields, message",
    [
        (["size=1"], "the config has no field 'size'"),
        (["vocab_size=40"], "vocab_size must be at least the tokenizer's 45 entries, got 40"),
        (["hidden_size=100"], "hidden_size"),
        (["dtype=a"], "^config_fields: "),
    ],
)
def test_config_fields_that_cannot_be_are_named(corpus, tokenizer, tmp_path, fields, message):
    flags = command_line(corpus, tokenizer, tmp_path)
    with pytest.raises(ValueError, match=message):
        run([*flags[: flags.index("--config_fields") + 1], *fields])


def write_checkpoint(folder, value=1.0):
    """The files of a whole checkpoint, with one weight."""
    folder.mkdir()
    save_file({"weight": torch.full((4,), value)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda folder: (folder / "trainer_state.json").write_text(""), "trainer_state.json is cut off"),
        (lambda folder: cut(folder / "trainer_state.json"), "trainer_state.json is cut off"),
        (
            lambda folder: (folder / "trainer_state.json").write_text("[]"),
            "trainer_state.json is not a trainer's state",
        ),
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors is cut off"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file \\*model\\*"),
        (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt is cut off"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "no file optimizer\\*"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "no file scheduler\\*"),
        (
            lambda folder: (shutil.rmtree(folder), write_checkpoint(folder, float("nan"))),
            "holds NaN or infinity in weight",
        ),
    ],
)
def test_the_newest_whole_checkpoint_is_found_and_skipped_ones_are_reported(tmp_path, capsys, damage, reason):
    assert runs.newest_checkpoint(tmp_path) is None
    for number in (900, 1000):
        write_checkpoint(tmp_path / f"checkpoint-{number}")
    (tmp_path / "checkpoint-best").mkdir()
    assert runs.newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1000")
    assert capsys.readouterr().out == ""
    damage(tmp_path / "checkpoint-1000")
    assert runs.newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-900")
    assert re.search(rf"skipping .*checkpoint-1000: .*{reason}\n", capsys.readouterr().out)
    with pytest.raises(ValueError, match=rf"resume_from_checkpoint: .*checkpoint-1000: .*{reason}"):
        with runs.open_run(tmp_path, overwrite=False, resume=str(tmp_path / "checkpoint-1000")):
            pass


def test_results_of_another_run_are_kept_unless_overwrite_is_given(corpus, tokenizer, tmp_path):
    flags = command_line(corpus, tokenizer, tmp_path, max_steps=2, save_steps=1)
    run([*flags, "--keep_checkpoints"])
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    with pytest.raises(ValueError, match="holds checkpoint-1 of an earlier run; continue with --resume_from"):
        run(flags)
    (tmp_path / "notes.txt").write_text("mine")
    run([*flags, "--overwrite", "--seed", "1"])
    assert list(tmp_path.glob("checkpoint-*")) == [] and (tmp_path / "notes.txt").exists()
    assert len(losses(tmp_path)) == 2
    with pytest.raises(ValueError, match="holds model.safetensors and no checkpoint, so the run is over"):
        run([*flags, "--resume_from_checkpoint", "last"])


def test_an_output_folder_that_cannot_be_written_is_found_at_the_start(corpus, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, reason in (("file", "is a file, expected a folder"), ("file/below", "cannot be written")):
        with pytest.raises(ValueError, match=f"output_dir: .*{folder} {reason}"):
            run(command_line(corpus, tokenizer, tmp_path / folder))


def test_data_that_is_not_there_is_found_before_anything_is_written(corpus, tokenizer, tmp_path):
    flags = command_line(corpus, tokenizer, tmp_path / "out")
    for argument, name, message in (
        ("validation_data", "gone.txt", "no file matches 'gone.txt'"),
        ("validation_data", __file__, "expected .jsonl, .json, .txt files"),
        ("validation_data", str(tmp_path), "'.*' is a folder, and holds no .jsonl, .json, .txt files"),
    ):
        with pytest.raises(ValueError, match=f"{argument}: {message}"):
            run([*flags, f"--{argument}", name])
    assert not (tmp_path / "out").exists()
    (tmp_path / "short.txt").write_text("hi")
    with pytest.raises(ValueError, match="validation_data: the data holds no document of at least 8 tokens"):
        run([*flags, "--validation_data", str(tmp_path / "short.txt")])


def test_a_run_that_turns_nan_stops_and_keeps_the_last_good_checkpoint(corpus, tokenizer, tmp_path, monkeypatch):
    step = pretraining.PretrainingTrainer.training_step

    def poison(self, model, inputs, *rest):
        if self.state.global_step == 4:  # the gradients of the fifth step
            next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(pretraining.PretrainingTrainer, "training_step", poison)
    flags = command_line(corpus, tokenizer, tmp_path, save_steps=2, logging_steps=10)
    with pytest.raises(
        FloatingPointError, match="the loss became NaN or infinite in step 6; .*checkpoint-4 is the last"
    ):
        run(flags)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(FloatingPointError, match="a weight became NaN or infinite in step 5; no checkpoint was saved"):
        run(command_line(corpus, tokenizer, tmp_path / "early", save_steps=5, logging_steps=10))
    weights = load_file(tmp_path / "checkpoint-4/model.safetensors")
    first = next(iter(weights))
    save_file(
        {**weights, first: weights[first] * float("nan")}, tmp_path / "checkpoint-4/model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="model: the weights of .*checkpoint-4' hold NaN or infinity"):
        run(command_line(corpus, tokenizer, tmp_path / "other", model=tmp_path / "checkpoint-4"))


class Clock:
    """Seconds that pass with each look."""

    def __init__(self, *passing):
        self.now, self.passing = 0.0, iter(passing)

    def __call__(self):
        self.now += next(self.passing)
        return self.now


def schedule_with(clock, total=1000, seconds=100.0):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return recipe.LinearSchedule(optimizer, 60, total, 0.02, seconds, clock=clock)


def test_the_learning_rate_follows_the_clock_to_its_end():
    schedule = schedule_with(Clock(7.0, 20.0, *[8.0] * 10))  # the first step compiles for 20 seconds, others take 8
    schedule.start_clock()
    rates = []
    while not schedule.is_over:
        schedule.optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    # 80 seconds are left after the first step: ten steps, each worth 100 of the schedule's 1,000; warmup ends at 60.
    expected = [recipe.linear_schedule(step, 60, 1000, 0.02) for step in (1, *range(100, 1001, 100))]
    assert rates == pytest.approx(expected) and rates[-1] == pytest.approx(0.02)
    steps_first = schedule_with(Clock(0.0, *[1.0] * 10), total=5)
    steps_first.start_clock()
    for _ in range(5):
        steps_first.optimizer.step()
        steps_first.step()
    assert steps_first.is_over


def test_a_resumed_schedule_goes_on_with_the_time_that_is_left():
    whole, parted = schedule_with(Clock(0.0, *[10.0] * 9)), schedule_with(Clock(0.0, *[10.0] * 4))
    rates = []
    for schedule, steps in ((whole, 9), (parted, 4)):
        schedule.start_clock()
        for _ in range(steps):
            schedule.optimizer.step()
            schedule.step()
            rates.append(schedule.get_last_lr()[0])
    resumed = schedule_with(Clock(5000.0, *[10.0] * 5))
    resumed.load_state_dict(torch.load(io.BytesIO(pickled(parted.state_dict())), weights_only=True))
    resumed.start_clock()
    for _ in range(5):
        resumed.optimizer.step()
        resumed.step()
        rates.append(resumed.get_last_lr()[0])
    assert rates[9:] == pytest.approx(rates[:9])


def pickled(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_a_run_with_max_seconds_ends_in_time_and_its_checkpoints_keep_the_time(
    corpus, tokenizer, tmp_path, monkeypatch
):
    clock = Clock(*[1.0] * 100)
    monkeypatch.setattr(pretraining, "LinearSchedule", functools.partial(recipe.LinearSchedule, clock=clock))
    flags = command_line(corpus, tokenizer, tmp_path, max_steps=1000, max_seconds=6.5, save_steps=4)
    trainer = run([*flags, "--keep_checkpoints"])
    assert trainer.state.global_step == 7 and max(losses(tmp_path)) == 7
    progress = [entry["progress"] for entry in trainer.state.log_history if "progress" in entry]
    assert progress[1] == pytest.approx(1 / 5.5, abs=1e-3) and progress[-1] == 1
    state = torch.load(tmp_path / "checkpoint-4/scheduler.pt", weights_only=True)
    assert (state["elapsed"], state["first_step"]) == (4.0, 1.0)
    trainer = run([*flags, "--resume_from_checkpoint", str(tmp_path / "checkpoint-4")])
    assert trainer.state.global_step == 7


def test_each_layer_is_compiled_by_itself(corpus, tokenizer, tmp_path):
    trainer = run(command_line(corpus, tokenizer, tmp_path, max_steps=2, torch_compile="eager", bf16=False))
    layers = trainer.model.bert.encoder.layer
    assert all(layer._compiled_call_impl is not None for layer in layers) and trainer.model._compiled_call_impl is None
    run(command_line(corpus, tokenizer, tmp_path / "plain", max_steps=2, bf16=False))
    assert list(losses(tmp_path).values()) == pytest.approx(list(losses(tmp_path / "plain").values()), rel=1e-5)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(tmp_path / "plain/model.safetensors").keys()


def test_tokenizing_names_the_option_that_is_wrong(corpus, tokenizer, tmp_path):
    def tokenize(output_dir=tmp_path / "tokens", **flags):
        pretraining.tokenize_only(pretrain_mlm.parse(command_line(corpus, tokenizer, output_dir, **flags))[0])

    with pytest.raises(ValueError, match=f"output_dir: {corpus} is a file, expected a folder"):
        tokenize(output_dir=corpus)
    with pytest.raises(ValueError, match="train_data: no file matches 'gone.txt'"):
        tokenize(train_data="gone.txt")
    tokenize()
    with pytest.raises(ValueError, match="train_data: expected texts, got the folder of tokenized texts '.*tokens'"):
        tokenize(train_data=tmp_path / "tokens", output_dir=tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens"]


def test_data_that_was_tokenized_elsewhere_trains_the_same(corpus, tokenizer, tmp_path, monkeypatch):
    flags = ["--train_data", str(corpus), "--tokenizer", tokenizer.name_or_path, "--tokenize_only"]
    monkeypatch.setattr(sys, "argv", ["pretrain_mlm.py", *flags, "--output_dir", str(tmp_path / "tokens")])
    pretrain_mlm.main()
    with pytest.raises(ValueError, match="output_dir: .*tokens is not empty; --overwrite replaces tokenized data"):
        pretrain_mlm.main()
    before = (tmp_path / "tokens/tokens.bin").read_bytes()
    short = tmp_path / "short.txt"
    short.write_text("ba be bi")
    flags[1] = str(short)
    again = ["pretrain_mlm.py", *flags, "--output_dir", str(tmp_path / "tokens"), "--overwrite"]
    monkeypatch.setattr(sys, "argv", again)
    with pytest.raises(ValueError, match="the data holds no document"):
        pretrain_mlm.main()
    assert (tmp_path / "tokens/tokens.bin").read_bytes() == before
    run(command_line(corpus, tokenizer, tmp_path / "text", max_steps=2))
    run(command_line(tmp_path / "tokens", tokenizer, tmp_path / "prepared", max_steps=2))
    assert losses(tmp_path / "text") == losses(tmp_path / "prepared")


def test_the_script_of_the_checkpoint_tokenizes_once_and_trains(corpus, tokenizer, tmp_path, run_script):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("wiki_vital", "gensim_wiki", "sotu", "other"):
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    run(command_line(corpus, tokenizer, tmp_path / "start", max_steps=1))
    small = {"tokens_per_row": 2048, "global_batch_size": 4, "max_steps": 2, "logging_steps": 1, "peak_tflops": 1e-3}
    options = [part for name, value in small.items() for part in (f"--{name}", str(value))]
    # Stands in for Python and notes what it is called with, which is then run here.
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$(mktemp -p "$CALLS")"\n')
    python.chmod(0o755)

    def call(seconds):
        calls = tmp_path / f"calls for {seconds} seconds"
        calls.mkdir()
        command = [ROOT / "scripts/train_checkpoint.sh", folder, tmp_path / "out", seconds, *options]
        command += ["--model", tmp_path / "start"]
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": calls}
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=60)
        return done, [path.read_text().splitlines() for path in calls.iterdir()]

    done, calls = call("soon")
    assert done.returncode == 2 and calls == []
    done, [(script, *words)] = call(1)
    assert done.returncode == 1 and "1 seconds are used up after tokenizing" in done.stderr
    run_script(pretrain_mlm, *words)
    bounds = np.load(tmp_path / "out/tokens/bounds.npy")
    assert len(bounds) == 60 * (4 + 4 + 3 + 1) and len(np.unique(bounds, axis=0)) == 60 * 4
    done, [(again, *words)] = call(100_000)
    assert done.returncode == 0 and Path(script).resolve() == Path(again).resolve() == Path(pretrain_mlm.__file__)
    run_script(pretrain_mlm, *words)
    assert len(losses(tmp_path / "out/run")) == 2


@pytest.mark.parametrize(
    "logs, line",
    [
        (
            {"loss": 3.4142, "learning_rate": 4.9e-4, "tokens_per_second": 142_345, "mfu": 0.314, "grad_norm": 1.0},
            "step 120/3000  loss 3.414  lr 4.9e-04  142k tok/s  mfu 31%",
        ),
        ({"eval_128_loss": 3.25, "eval_128_runtime": 3.0, "epoch": 1.0}, "step 120/3000  eval_128_loss 3.25"),
        ({"train_runtime": 3.0}, None),
    ],
)
def test_the_log_is_readable_as_lines(logs, line):
    assert training.format_log(120, 3000, logs) == line
    assert training.format_log(120, None, {"loss": 3.4142, "progress": 0.314}) == "step 120  31%  loss 3.414"
    assert [training.shorten(number) for number in (0, 7, 999, 1500, 2_500_000)] == ["0", "7", "999", "1.5k", "2.5M"]
