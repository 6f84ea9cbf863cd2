"""Texts become tokens without a silent loss, and predict.py answers as the model that was trained."""

import csv
import json

import numpy as np
import predict
import pytest
from corpora import WORDS
from lib import prediction, scores
from lib.examples import MULTI, REGRESSION, Examples, Task
from models import tiny_model
from repositories import write_repository

from mosaicbert.bert_layers import BertForSequenceClassification


@pytest.fixture
def classifier(tmp_path, tokenizer):
    """A repository with an untrained classifier of three named classes."""
    model = tiny_model(BertForSequenceClassification, vocab_size=64, num_labels=3)
    model.config.id2label = {0: "left", 1: "middle", 2: "right"}
    folder = write_repository(tmp_path / "model", model, {})
    fields = {**model.config.to_dict(), "problem_type": "single_label_classification"}
    (folder / "config.json").write_text(json.dumps(fields))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("lengths", "batch_size", "tokens", "longest"),
    [
        ([5, 300, 20], 2, 1000, 300),  # the two longest fit
        ([100, 400, 400, 3], 3, 500, 200),  # 100 + 200 + 200
        ([400, 400, 400, 400], 2, 500, 250),
        ([900], 32, 500, 500),
        ([3, 4], 32, 16_384, prediction.SHORTEST),
        ([900] * 99, 99, 100, prediction.SHORTEST),
    ],
)
def test_texts_stay_as_long_as_the_worst_batch_allows(lengths, batch_size, tokens, longest):
    limit = prediction.fitting_length(lengths, batch_size, tokens)
    assert limit == longest
    worst = sum(sorted(min(length, limit) for length in lengths)[-batch_size:])
    assert worst <= tokens or limit == prediction.SHORTEST


def test_cut_empty_and_unknown_texts_are_reported_in_one_line(tokenizer, capsys):
    texts = [(" ".join(WORDS[:30]),), (WORDS[0],), ("  ",), (f"{WORDS[1]} \U0001f600 {WORDS[2]}☃",)]
    parts = {"train": Examples(texts[:2], [], []), "test": Examples(texts[2:], [], [])}
    rows, limit = prediction.tokenize(parts, tokenizer, 16, 32, 1000)
    assert capsys.readouterr().out == (
        "4 texts of up to 32 tokens; 1 cut at 16 (see --max_length); 1 empty; 1 with text that becomes [UNK] "
        "(☃ \U0001f600)\n"
    )
    assert limit == 16 and [len(row["input_ids"]) for row in rows["train"]] == [16, 3]
    rows, limit = prediction.tokenize(parts, tokenizer, None, 32, 1000)
    assert limit == 32 and len(rows["train"][0]["input_ids"]) == 32
    assert "none cut" in capsys.readouterr().out


def test_texts_that_are_the_word_for_a_hole_are_counted(tokenizer, capsys):
    texts = [(WORDS[0], " nan"), ("None", "NaN"), ("nan", WORDS[1]), (f"{WORDS[0]} nan", WORDS[1]), ("", "")]
    prediction.tokenize({"train": Examples(texts, [], [])}, tokenizer, None, 1, 1000)
    assert "none cut; 1 empty; 3 with NaN or None or nan in place of a text; " in capsys.readouterr().out


def test_words_that_no_tokenizer_splits_are_reported(tokenizer, capsys):
    prediction.tokenize({"test": Examples([(WORDS[0] * 200,)], [], [])}, tokenizer, None, 1, 1000)
    assert "1 with text that becomes [UNK] (words too long for the tokenizer)" in capsys.readouterr().out


def test_each_line_of_a_plain_file_is_a_text(classifier, tmp_path, run_script):
    (tmp_path / "new.txt").write_text(f"{WORDS[0]}, {WORDS[1]}\n\n{WORDS[2]} \n", encoding="utf-8")
    run_script(predict, classifier, tmp_path / "new.txt", tmp_path / "table.csv", "--text_fields", "body")
    with open(tmp_path / "table.csv", newline="") as file:
        assert [row["body"] for row in csv.DictReader(file)] == [f"{WORDS[0]}, {WORDS[1]}", WORDS[2]]
    with pytest.raises(SystemExit, match="new.txt, line 1: text_fields must be among .'a'., got 'b'"):
        run_script(predict, classifier, tmp_path / "new.txt", tmp_path / "two.csv", "--text_fields", "a", "b")


def test_each_text_gets_its_own_prediction_whatever_its_batch(classifier, tokenizer, tmp_path, run_script, capsys):
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, size)) for size in (3, 40, 1, 12, 25, 7)]
    with open(tmp_path / "new.csv", "w", newline="") as file:
        csv.writer(file).writerows([["body"], *([text] for text in texts)])
    output = tmp_path / "predictions.csv"
    flags = ["--text_fields", "body", "--tokens_per_batch", "40"]
    run_script(predict, classifier, tmp_path / "new.csv", output, *flags)
    assert f"saved in {output}: 6 predictions (single_label_classification)\n" in capsys.readouterr().out
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    model = BertForSequenceClassification.from_pretrained(classifier).eval()
    for text, row in zip(texts, rows):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=40)
        chances = model(**ids).logits.softmax(-1)[0].tolist()
        assert row["body"] == text and row["predicted"] == ["left", "middle", "right"][int(np.argmax(chances))]
        found = [float(row[f"p({name})"]) for name in ("left", "middle", "right")]
        assert found == pytest.approx(chances, abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "texts", "names", "header"),
    [
        (["label", "predicted"], 2, ["a"], ["label (text)", "predicted (text)", "label", "predicted", "p(a)"]),
        (["p(a)", "p(a) (text)"], 2, ["a"], ["p(a) (text)", "p(a) (text) (text)", "label", "predicted", "p(a)"]),
        (["text", "text"], 2, ["a"], ["text", "text (text)", "label", "predicted", "p(a)"]),
        (["origin"], 1, [], ["origin (text)", "label", "predicted"]),
    ],
)
def test_no_column_of_texts_hides_another(tmp_path, fields, texts, names, header):
    """A text field `predicted` got the predictions, and its texts were lost."""
    rows = Examples([tuple(f"text {number}" for number in range(texts))], [], ["a.csv, line 2"])
    task, logits = Task(MULTI if names else REGRESSION, names, {}, {}), np.ones((1, 1), np.float32)
    truth = np.zeros((1, 1) if names else 1, np.float32)
    scores.write_errors(tmp_path / "errors.csv", fields, rows, task, logits, truth)
    scores.write_predictions(tmp_path / "predictions.csv", fields, rows, task, logits)
    found = {}
    for name in ("errors", "predictions"):
        with open(tmp_path / f"{name}.csv", newline="") as file:
            found[name], row = csv.reader(file)
            start = row.index("text 0")
        assert len(set(found[name])) == len(row) and tuple(row[start : start + texts]) == rows.texts[0]
    assert found["errors"] == ["origin", *header]
    assert found["predictions"][texts:] == header[texts + 1 :]
