"""What a training prints and draws: progress bars, an estimate of its time, and loss curves."""

import types

import pytest
from lib import cli, pictures, training


class Clock:
    """Stands in for `time`; it advances only on request."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(training, "time", made)
    return made


def state_of(max_steps):
    return types.SimpleNamespace(max_steps=max_steps, logging_steps=50, global_step=0, is_world_process_zero=True)


def steps_logged(lines, clock, max_steps, seconds, processes=1):
    """Steps for which the log is asked for when each step takes some seconds, Trainer's own included."""
    args, state = types.SimpleNamespace(world_size=processes), state_of(max_steps)
    lines.on_train_begin(args, state, None)
    logged = []
    for _ in range(max_steps):
        clock.now += seconds
        state.global_step += 1
        control = types.SimpleNamespace(should_log=state.global_step % state.logging_steps == 0)
        lines.on_step_end(args, state, control)
        if control.should_log:
            logged.append(state.global_step)
            lines.on_log(args, state, control, {"loss": 1.0})
    return logged


@pytest.mark.parametrize(
    ("max_steps", "seconds", "expected"),
    [
        (100, 0.1, list(range(10, 101, 10))),  # a tenth of the training
        (7, 0.1, list(range(1, 8))),
        (1000, 0.01, list(range(50, 1001, 50))),  # 50 steps
        (1000, 6.0, list(range(2, 1001, 2))),  # ten seconds
    ],
)
def test_a_log_has_ten_points_and_no_long_pause(clock, max_steps, seconds, expected):
    assert steps_logged(training.LogLines(10.0), clock, max_steps, seconds) == expected


def test_a_log_keeps_the_steps_that_were_asked_for_and_those_that_processes_share(clock):
    assert steps_logged(training.LogLines(), clock, 100, 6.0) == [50, 100]
    assert steps_logged(training.LogLines(10.0), clock, 1000, 6.0, processes=2) == list(range(50, 1001, 50))


def test_a_training_that_the_clock_ends_has_a_point_in_each_twentieth_of_it(clock):
    logged = steps_logged(training.LogLines(10.0, max_seconds=60.0), clock, 60, 1.0)
    assert 10 <= len(logged) <= 20


def test_a_training_says_early_how_long_it_will_take(clock, capsys):
    steps_logged(training.LogLines(10.0), clock, 100, 3.0)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "about 4 min 54 s to go: 100 steps of 3 s, and evaluation"
    assert not any("to go" in line for line in shown[1:])
    steps_logged(training.LogLines(10.0, max_seconds=60.0), clock, 60, 3.0)
    assert "to go" not in capsys.readouterr().out


@pytest.mark.parametrize("max_seconds", [None, 60.0])
def test_a_bar_shows_tokens_a_second_from_the_first_step(clock, max_seconds, capsys):
    bars = training.Bars(types.SimpleNamespace(tokens_trained=0), max_seconds)
    args, state = types.SimpleNamespace(world_size=2), state_of(40)
    bars.on_train_begin(args, state, None)
    for step in range(1, 4):
        clock.now += 2.0
        state.global_step = step
        bars.trainer.tokens_trained += 3000
        bars.on_step_end(args, state, None)
        assert bars.training_bar.postfix == "3k tok/s"
        assert bars.training_bar.n == pytest.approx(2.0 * step if max_seconds else step)
    clock.now += 1000.0
    bars.on_step_end(args, state, None)
    assert bars.training_bar.total == (max_seconds or 40) and bars.training_bar.n == (max_seconds or 3)
    bars.training_bar.close()
    assert "17.9 tok/s" in capsys.readouterr().err  # of the last step


def test_a_resumed_bar_goes_on_where_the_run_stopped(clock):
    bars = training.Bars(types.SimpleNamespace(tokens_trained=0))
    state = state_of(40)
    state.global_step = 30
    bars.on_train_begin(None, state, None)
    assert bars.training_bar.n == bars.training_bar.initial == 30
    bars.training_bar.close()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.4, "59 s"), (260, "4 min 20 s"), (3600, "1 h 0 min"), (9000, "2 h 30 min")]
)
def test_times_are_shown_in_their_largest_units(seconds, words):
    assert training.tell_time(seconds) == words


def test_the_loss_curve_is_drawn_for_each_seed(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(pictures, "_save", lambda figure, path: drawn.update({path: figure}))
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_128_loss": 2.5}]
    pictures.draw_losses({"seed 0": history, "seed 1": [*history, {"step": 2, "train_loss": 2.4}]}, tmp_path)
    (axes,) = drawn[tmp_path].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {
        name: points
        for seed in ("seed 0", "seed 1")
        for name, points in ((seed, [[1, 3.0], [2, 2.0]]), (f"{seed} eval 128", [[2, 2.5]]))
    }
    pictures.draw_losses({"": []}, tmp_path)  # nothing was logged


def test_last_words_hold_commands_that_can_be_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(training.__file__.rpartition("/scripts/")[0])
    cli.say_end("saved in x", cli.command("predict.py", tmp_path / "a b", "new.csv"))
    assert capsys.readouterr().out == f"saved in x; next:\n  python scripts/predict.py '{tmp_path}/a b' new.csv\n"
    cli.say_end("saved in x")
    assert capsys.readouterr().out == "saved in x\n"
