"""scripts/evaluate_mlm.py: what it masks, how it scores, what it writes, and what it refuses."""

import csv
import math

import evaluate_mlm
import pytest
import torch
from conftest import ROOT
from folders import write_complete_repository
from lib import evaluation, pictures


class Guess(torch.nn.Module):
    """A model that gives every wordpiece the same odds, or knows the answer."""

    def __init__(self, vocab, answer=None):
        super().__init__()
        self.vocab, self.answer, self.device = vocab, answer, torch.device("cpu")
        self.config = type("Config", (), {"max_position_embeddings": 16})()

    def forward(self, input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, self.vocab)
        if self.answer is not None:
            logits[..., self.answer] = 50.0
        return type("Output", (), {"logits": logits})()


@pytest.fixture
def plain_tokenizer():
    return type("Tokenizer", (), {"cls_token_id": 1, "sep_token_id": 2, "mask_token_id": 3, "pad_token_id": 0})()


def test_the_loss_of_a_guess_and_of_a_perfect_model_is_known(plain_tokenizer):
    documents = [[7] * 300, [7] * 41]
    guess = evaluation.measure(Guess(50), plain_tokenizer, documents, 32, 64)
    assert guess["loss"] == pytest.approx(math.log(50), abs=1e-4) and guess["top1"] == 0.0
    knows = evaluation.measure(Guess(50, answer=7), plain_tokenizer, documents, 32, 64)
    assert knows["top1"] == 1.0 and knows["loss"] == pytest.approx(0.0, abs=1e-4)
    # 341 wordpieces of which 15% are masked, seeded; 10 + 2 windows, the last one of 11 wordpieces
    assert knows["windows"] == 12 and knows["masked"] == guess["masked"] and 30 < knows["masked"] < 75


def test_windows_hold_the_whole_text_between_cls_and_sep(plain_tokenizer):
    (batch,) = evaluation.masked_batches([list(range(10, 50))], plain_tokenizer, 32, 1000)
    whole = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    assert whole[0].tolist() == [1, *range(10, 40), 2] and whole[1].tolist() == [1, *range(40, 50), 2] + [0] * 20
    assert batch["attention_mask"].sum(1).tolist() == [32, 12]


def test_the_same_wordpieces_are_masked_at_every_length(plain_tokenizer):
    documents = [list(range(10, 410)), list(range(500, 572))]
    masked = []
    for length in (10, 32, 65):
        batches = evaluation.masked_batches(documents, plain_tokenizer, length, 64)
        labels = torch.cat([batch["labels"].flatten() for batch in batches])
        masked.append({label for label in labels.tolist() if label != -100})
    assert masked[0] == masked[1] == masked[2] and len(masked[0]) > 30


def test_the_command_writes_table_and_picture(tmp_path, run_script):
    table, picture = tmp_path / "t.csv", tmp_path / "t.png"
    data = ("--data", ROOT / "examples" / "state_of_the_union_1961.txt", "--max_length", 32, 64, "--tokens", 500)
    model = ("--name", "shipped", "--dtype", "bfloat16")
    run_script(evaluate_mlm, *data, *model, "--csv", table, "--png", picture)
    rows = list(csv.DictReader(table.open()))
    assert [(row["model"], row["length"]) for row in rows] == [("shipped", "32"), ("shipped", "64")]
    assert all(2 < float(row["loss"]) < 7 and int(row["tokens_per_second"]) > 0 for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_a_panel_for_each_column_that_was_measured(tmp_path):
    whole = {"model": "a", "length": 32, "loss": 3.0, "top1": 0.4, "tokens_per_second": 900, "peak_mib": 700}
    widths = []
    for row in (whole, {**whole, "peak_mib": ""}):
        pictures.draw_lengths([row], tmp_path / "t.png")
        widths.append(int.from_bytes((tmp_path / "t.png").read_bytes()[16:20], "big"))
    assert widths == [1600, 1200]


def test_a_system_that_states_no_peak_of_memory_is_measured_without_it(tmp_path, monkeypatch):
    """A status without the peak, as sandboxes may have it, once ended the measurement."""
    (tmp_path / "status").write_text("VmRSS:\t  1000 kB\n")
    monkeypatch.setattr(evaluation, "Path", lambda name: tmp_path / name.rpartition("/")[2])
    for peak in (math.nan, 2.0):
        with evaluation.peak_memory(torch.device("cpu")) as memory:
            pass
        assert memory["mib"] == pytest.approx(peak, nan_ok=True)
        (tmp_path / "status").write_text("VmRSS:\t  1000 kB\nVmHWM:\t  2048 kB\n")


def test_the_models_are_compared_in_words(tmp_path, run_script, capsys):
    """A table of a model that had become worse left that to its reader; 99 stood beside windows of 40 tokens."""
    write_complete_repository(tmp_path / "first")
    for name, fields in (("second", {}), ("third", {"seed": 1})):
        write_complete_repository(tmp_path / name, **fields)
    other = write_complete_repository(tmp_path / "other", vocab_size=27)
    with open(tmp_path / "other" / "vocab.txt", "a") as file:
        file.write("new\n")
    assert other.config.vocab_size == 27
    (tmp_path / "text.txt").write_text("the cat sat on the big red mat and " * 4 + "ran\n")
    models = [tmp_path / name for name in ("first", "second", "third", "other")]
    run_script(evaluate_mlm, "--model", *models, "--data", tmp_path / "text.txt", "--max_length", 99, "--device", "cpu")
    header, *lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split(",")[4]) for line in lines[:4]]
    difference = losses[2] - losses[0]
    assert difference and lines[4:] == [
        "the longest text read has 39 tokens, fewer than --max_length 99",
        "second: against the first model the loss is equal at length 99",
        f"third: against the first model the loss is {abs(difference):.4f} "
        f"{'higher, so worse' if difference > 0 else 'lower, so better'} at length 99",
        "other: another tokenizer: losses cannot be compared",
    ]


def test_losses_are_compared_at_the_lengths_of_both_models():
    first = {32: 3.0, 64: 2.5}
    assert evaluation.compare({32: 3.25, 64: 2.0, 128: 1.0}, first) == (
        "against the first model the loss is 0.2500 higher, so worse at length 32; 0.5000 lower, so better at length 64"
    )
    assert evaluation.compare({128: 1.0}, first) == "no length of the first model"


def test_documents_without_a_masked_token_are_named(plain_tokenizer):
    with pytest.raises(ValueError, match="^tokens: too few were read to mask one at length 32"):
        evaluation.measure(Guess(50), plain_tokenizer, [[7] * 4], 32, 64)


def test_too_short_documents_are_named():
    class Words:
        def __call__(self, text, **_):
            return {"input_ids": text.split()}

    with pytest.raises(ValueError, match="data holds no document of at least 1024 tokens"):
        evaluation.sample_documents(["a b c"] * 3, Words(), 1024, True, 100)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--name", "a", "b"], "name: expected 1 names, got 2"),
        (["--device", "quantum"], "device: 'quantum' cannot be used, Expected one of cpu"),
        (["--max_length", "9"], "max_length must be at least 10, got 9"),
    ],
)
def test_bad_arguments_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate(*evaluate_mlm.parse(["--data", "short.txt", *flags]))
