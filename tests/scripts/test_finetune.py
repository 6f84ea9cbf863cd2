"""scripts/finetune_classification.py learns every kind of label, and writes scores and a repository that loads."""

import csv
import json
import re
import sys

import finetune_classification
import numpy as np
import push_to_hub
import pytest
import torch
import yaml
from corpora import WORDS, make_tokenizer
from folders import add_classifier, set_fields, stock_bert, write_complete_repository
from lib import examples, finetuning, runs, scores, training
from models import tiny_model
from repositories import write_repository
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments


@pytest.fixture(autouse=True)
def quick_results(monkeypatch):
    """Pictures without content and intervals of few samples, as these take longer than a tiny training."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: path.touch())
    monkeypatch.setattr(scores, "RESAMPLES", 99)


def stop(*arguments):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny repository with a tokenizer, to start from."""
    folder = write_repository(tmp_path_factory.mktemp("start") / "model", tiny_model(vocab_size=64))
    set_fields(folder / "config.json", vocab_size=64)
    make_tokenizer(folder)
    return folder


def write_examples(path, label_of, count):
    """Texts of ten words from one of two halves of the vocabulary; `label_of(half)` is the label."""
    generator = np.random.default_rng(0)
    halves = [number % 2 for number in range(count)]
    texts = [" ".join(generator.choice(WORDS[half * 20 : half * 20 + 20], 10)) for half in halves]
    rows = [{"text": text, "label": label_of(half)} for text, half in zip(texts, halves)]
    with open(path, "w", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture
def train(tmp_path):
    """Sixteen examples of two classes."""
    return write_examples(tmp_path / "train.csv", lambda half: ["left", "right"][half], 16)


def run(start, folder, **flags):
    settings = {"model": start, "num_train_epochs": 3, "learning_rate": 5e-3, "per_device_train_batch_size": 8}
    line = []
    for name, value in {**settings, "output_dir": folder / "out", **flags}.items():
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return finetuning.finetune(*finetune_classification.parse(line))


@pytest.mark.parametrize(
    "suffix, label_of, flags, problem, metric",
    [
        (".csv", lambda half: ["left", "right"][half], {}, examples.SINGLE, "accuracy"),
        (".jsonl", lambda half: [["a"], ["a", "b"]][half], {}, examples.MULTI, "micro_f1"),
        (".csv", lambda half: ["a", "a+b"][half], {"label_separator": "+"}, examples.MULTI, "micro_f1"),
        (".jsonl", lambda half: [-1.5, 1.5][half], {}, examples.REGRESSION, "spearman"),
    ],
)
def test_each_kind_of_label_is_learned(start, tmp_path, suffix, label_of, flags, problem, metric):
    train = write_examples(tmp_path / f"train{suffix}", label_of, 80)
    valid = write_examples(tmp_path / f"valid{suffix}", label_of, 20)
    texts = [" ".join(WORDS[:10]), " ".join(WORDS[20:30])]
    results = run(start, tmp_path, train_data=train, validation_data=valid, baseline=True, **flags)
    assert results["problem"] == problem
    assert results["mean"][metric] > 0.8 and results["baseline"][metric] > 0.8
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == results
    low, high = results["judged"]["interval"]
    assert low <= results["judged"]["scores"][metric] <= high
    check_card(tmp_path / "out", results, texts)
    assert (tmp_path / "out/confusion.png").exists() == (problem == examples.SINGLE)

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    logits = model(**tokenizer(texts, return_tensors="pt")).logits
    assert model.config.problem_type == problem
    if problem == examples.SINGLE:
        assert [model.config.id2label[i] for i in logits.argmax(-1).tolist()] == ["left", "right"]


def check_card(folder, results, texts):
    """The card's block predicts, its head holds scores with their size and interval, and a push sends what it names."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head["pipeline_tag"] == "text-classification"
    (entry,) = head["model-index"][0]["results"]
    measured = {metric["name"].partition(",")[0]: metric for metric in entry["metrics"]}
    rounded = {name: round(value, 4) for name, value in results["judged"]["scores"].items()}
    assert {name: metric["value"] for name, metric in measured.items()} == rounded
    deciding = measured[scores.DECIDING[results["problem"]]]["name"]
    assert re.fullmatch(r"\w+, 20 texts, 95% interval -?[\d.]+ to [\d.]+", deciding)
    sent = push_to_hub.files_to_push(folder)
    assert {"metrics.json", "loss.png"} <= set(sent) and "errors.csv" not in sent
    for name in results["classes"]:
        assert f"| {name} | " in card
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    block = block.replace("REPOSITORY", str(folder)).replace("print(", "answers = (")
    found = {}
    exec(block.replace('"A text.", "Another text."', repr(texts)[1:-1]), found)
    answers = [answer if isinstance(answer, list) else [answer] for answer in found["answers"]]
    predicted = [max(answer, key=lambda one: one["score"]) for answer in answers]
    if results["problem"] == examples.REGRESSION:
        assert predicted[0]["score"] < -0.5 and predicted[1]["score"] > 0.5
    else:
        assert {answer["label"] for answer in predicted} <= set(results["classes"])


def test_seeds_differ_and_are_averaged_and_the_best_is_saved(start, tmp_path):
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, 5)) for _ in range(60)]
    rows = [{"text": text, "label": int(generator.integers(2)), "other": " ".join(WORDS[:3])} for text in texts]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = {"seeds": [0, 1], "num_train_epochs": 1, "text_fields": ["text", "other"]}
    results = run(start, tmp_path, train_data=tmp_path / "train.jsonl", **flags)
    reached = [results["seeds"][str(seed)]["accuracy"] for seed in (0, 1)]
    assert results["mean"]["accuracy"] == pytest.approx(sum(reached) / 2)
    assert results["standard_deviation"]["accuracy"] == pytest.approx(float(np.std(reached)))
    assert results["classes"] == ["0", "1"]


def test_training_stops_when_nothing_gets_better(start, train, tmp_path):
    flags = {"num_train_epochs": 30, "learning_rate": 1e-30, "patience": 2, "keep_checkpoints": True}
    run(start, tmp_path, train_data=train, validation_data=train, **flags)
    (state,) = (tmp_path / "out/seed-0").glob("checkpoint-*/trainer_state.json")
    # The first epoch is the best and kept; two more bring nothing, and the other 27 are not run.
    assert len(list((tmp_path / "out/seed-0").glob("checkpoint-*"))) <= 2
    assert json.loads(state.read_text())["epoch"] <= 3


RECORDS = [
    (['{"text": "ba"}'], r"a.jsonl, line 1: label_field must be among \['text'\], got 'label'"),
    (['{"body": "ba", "label": 1}'], "line 1: text_fields must be among .*'body'.*, got 'text'"),
    (['{"text": "ba", "label": "x"}', '{"text": "be", "label": null}'], "line 2: 'label' is empty"),
    (['{"text": null, "label": "y"}'], "line 1: expected a string in 'text', got null"),
    (['{"text": "ba", "label": {"a": 1}}'], "a list of these in 'label', got {'a': 1}"),
    (['{"text": "ba", "label": [["a"]]}'], r"a list of these in 'label', got \[\['a'\]\]"),
    (['{"text": "ba", "label": 1e999}'], "line 1: .* float32 holds in 'label', got inf"),
    (['{"text": "ba", "label": 1e39}'], "line 1: .* float32 holds in 'label', got 1e.39"),
    (['{"text": "ba", "label": "x"}'] * 20, "every training example has the label 'x'"),
    (['{"text": "ba", "label": []}'] * 20, "no example has a label"),
    (['{"text": "ba", "label": ["x"]}', '{"text": "ba", "label": "x"}'] * 9, "some labels are lists"),
    (['{"text": "ba", "label": "x"}'], "a single example cannot be split"),
    ([], "train_data: there is no example in .*a.jsonl"),
    (['{"text": " ", "label": "x"}', '{"text": "", "label": "y"}'], "train_data: all 2 texts are empty"),
]


@pytest.mark.parametrize(
    "name, content, flags, message",
    [
        *(("a.jsonl", content, {}, message) for content, message in RECORDS),
        ("a.csv", ["text,label", "ba,1.5", "be,nan"], {}, "line 3: .* float32 holds in 'label', got nan"),
        ("a.csv", ["text,label", "ba,x", "be,"], {}, "a.csv, line 3: 'label' is empty"),
        ("a.jsonl", ['{"text": "ba", "label": 1}'], {"label_separator": "+"}, "label_separator needs a string in"),
        ("a.jsonl", [], {"text_fields": ["a", "b", "c"]}, "text_fields must name one or two fields"),
        (
            "a.csv",
            ["label,b", "a,b"],
            {"text_fields": ["b", "label"]},
            "label_field must not be among text_fields .'b', ",
        ),
        ("a.txt", ["ba"], {}, "train_data: expected .jsonl, .json, .csv files"),
        ("a.csv", ["text,label", "a,x", "b,y"], {"validation_data": "gone.csv"}, "validation_data: no file matches"),
    ],
)
def test_bad_data_is_named(start, tmp_path, name, content, flags, message):
    (tmp_path / name).write_text("\n".join(content))
    with pytest.raises(ValueError, match=message):
        run(start, tmp_path, train_data=tmp_path / name, **flags)


def test_white_space_around_labels_is_no_part_of_them(tmp_path):
    """Four classes were made of two."""
    rows = ["text,label,labels", "ba,a,a + b", "be,a ,b+", "bi, b, +a", "bo,b,b"]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    (tmp_path / "a.jsonl").write_text('{"text": "ba", "label": [" a", "b "]}')
    for name, flags, expected in (
        ("a.csv", [], ["a", "a", "b", "b"]),
        ("a.csv", ["--label_field", "labels", "--label_separator", "+"], [["a", "b"], ["b"], ["a"], ["b"]]),
        ("a.jsonl", [], [["a", "b"]]),
    ):
        options, _ = finetune_classification.make_parser().parse_own(["--train_data", "", "--output_dir", "", *flags])
        assert examples.load_examples([str(tmp_path / name)], options, "train").labels == expected


def test_texts_that_were_trained_on_are_counted_where_they_are_judged(tmp_path, capsys):
    train = write_examples(tmp_path / "train.csv", lambda half: "ab"[half], 20)
    other = write_examples(tmp_path / "other.csv", lambda half: "ba"[half], 12)
    (tmp_path / "new.csv").write_text("text,label\nba,a\n")
    line = ["--train_data", str(train), "--output_dir", "", "--validation_data", str(other), "--test_data"]
    parser = finetune_classification.make_parser()
    examples.read_task(parser.parse_own([*line, str(tmp_path / "new.csv")])[0])
    assert "\n12 of 12 validation texts are also in the training data\n" in (shown := capsys.readouterr().out)
    assert "test texts" not in shown
    (tmp_path / "twice.csv").write_text("text,label\n" + "ba,a\nbe,b\n" * 20)
    examples.read_task(parser.parse_own(["--train_data", str(tmp_path / "twice.csv"), "--output_dir", ""])[0])
    assert "\n8 of 8 validation texts are also in the training data\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "labels, flags, message",
    [
        (
            ["a"] * 40 + ["b"] * 2,
            [],
            "the split that makes validation data took all 2 examples of 'b'; give --validation",
        ),
        (
            ["a"] * 41 + ["b"],
            [],
            "validation data took the only example of 'b'; give --validation_data, or more examples",
        ),
        (["a"] * 1 + ["b"], [], "validation data took the only example of '.'"),
        (
            [f"c{n}" for n in range(40)],
            [],
            "32 of 32 labels have a single training example, such as 'c.*'; is 'label' ",
        ),
        ([n / 7 for n in range(40)], ["--problem", "classification"], "For numbers pass --problem regression"),
        ([["a"]] * 41 + [["b", "a"]], [], "validation data took the only example of 'b'"),
    ],
)
def test_a_label_that_the_split_took_from_training_is_explained(labels, flags, message):
    """The message said that every training example had one label, or that the training data had none of another."""
    options, _ = finetune_classification.make_parser().parse_own(["--train_data", "", "--output_dir", "", *flags])
    rows = labelled(labels)
    numbers = [int(text[0]) for text in examples.split_examples(rows)[1].texts]
    taken = [label for label in range(len(labels)) if labels[label] != labels[0]]
    if len(taken) <= 2:  # give the rare labels to texts that are held out
        for number, place in zip(taken, [number for number in numbers if number not in taken]):
            labels[number], labels[place] = labels[place], labels[number]
    parts = examples.split_examples(labelled(labels))
    with pytest.raises(ValueError, match=f"^label_field: .*{message}"):
        examples.check_names(*parts, options, True)
    if "split" not in message and "validation" not in message:
        with pytest.raises(ValueError, match=f"^label_field: .*{message}"):
            examples.check_names(*parts, options, False)
    else:
        examples.check_names(*parts, options, False)


def labelled(labels):
    """Examples with these labels, whose text is their number."""
    numbers = range(len(labels))
    return examples.Examples([(str(number),) for number in numbers], labels, [f"line {number}" for number in numbers])


@pytest.mark.parametrize(
    "labels, problem, message",
    [
        (["x", "z"], examples.SINGLE, "line 1: label_field: the training data has no example of 'z', only of x, y"),
        ([1.5, "high"], examples.REGRESSION, "line 1: label_field: expected a number that float32 holds, got 'high'"),
        ([1e39, 1.0], examples.REGRESSION, r"line 0: label_field: expected a number that float32 holds, got '1e\+39'"),
        ([["x"], "xy"], examples.MULTI, "line 1: label_field: expected a list, got 'xy'"),
        (["x", ["x"]], examples.SINGLE, r"line 1: label_field: expected no list, got \"\['x'\]\""),
    ],
)
def test_labels_that_training_lacks_are_named(labels, problem, message):
    with pytest.raises(ValueError, match=message):
        examples.encode_labels(labelled(labels), problem, ["x", "y"])


@pytest.mark.parametrize(
    "labels, problem, names",
    [
        ([10, 2, 1], examples.SINGLE, ["1", "2", "10"]),
        ([1, 2.5], examples.REGRESSION, []),
        ([True, False], examples.SINGLE, ["False", "True"]),
        (["b", 1], examples.SINGLE, ["1", "b"]),
        ([["b"], []], examples.MULTI, ["b"]),
        # pandas writes a column of whole numbers so, as soon as it once had a hole
        ([0.0, 2.0, 1.0, 2.0], examples.SINGLE, ["0", "1", "2"]),
        ([float(number) for number in range(21)] * 2, examples.REGRESSION, []),
        ([float(number) for number in range(21)] * 10, examples.SINGLE, [str(number) for number in range(21)]),
    ],
)
def test_the_problem_is_inferred_from_the_labels(labels, problem, names):
    assert examples.infer_problem(labelled(labels)) == (problem, names)
    assert examples.numbers_of(["1", "2"]) == [1, 2] and examples.numbers_of(["1", "x"]) == ["1", "x"]
    assert examples.numbers_of(["1", "2.5"]) == [1.0, 2.5]


def test_a_problem_that_is_given_overrides_the_labels():
    assert examples.infer_problem(labelled([0.0, 1.0]), "regression") == (examples.REGRESSION, [])
    assert examples.infer_problem(labelled([1.5, 2.0]), "classification") == (examples.SINGLE, ["1.5", "2"])
    assert examples.infer_problem(labelled([["b"], ["a"]]), "multi_label") == (examples.MULTI, ["a", "b"])
    with pytest.raises(ValueError, match="line 0: label_field: expected a number that float32 holds, got 'x'"):
        examples.infer_problem(labelled(["x", "y"]), "regression")
    encoded = examples.encode_labels(labelled(["1", 1.0, 0]), examples.SINGLE, ["0", "1"])
    assert encoded.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    "labels, problem, wanted, hint",
    [
        (["a|b", "c", "a", "b|c"], examples.SINGLE, None, "2 of 4 labels hold '|', such as 'a|b'"),
        (["a;b", "c", "a", "b"], examples.SINGLE, None, "pass --label_separator ';'"),
        (["a|b", "c", "a", "b|c"], examples.SINGLE, "classification", None),
        (["Tom, Dick", *"abcdefgh"], examples.SINGLE, None, None),
        (list(range(30)), examples.SINGLE, None, "30 different whole numbers were taken for classes; see --problem r"),
        ([float(n) for n in range(30)], examples.REGRESSION, None, "taken for amounts; see --problem classification"),
        ([0.0, 1.0, 1.0], examples.SINGLE, None, None),
        ([0.5, 1.0, 1.0], examples.REGRESSION, None, None),
    ],
)
def test_labels_that_may_mean_something_else_get_a_hint(labels, problem, wanted, hint):
    found = list(examples.hints(labels, problem, wanted))
    assert (hint in found[0]) if hint else (found == [])


@pytest.mark.parametrize(("count", "expected"), [(2, 1), (9, 1), (50, 10), (120, 24), (700, 100), (5000, 500)])
def test_some_texts_are_held_out_where_no_validation_data_is_given(count, expected):
    train, held_out = examples.split_examples(labelled(list(range(count))))
    assert len(held_out.labels) == expected and sorted(train.labels + held_out.labels) == list(range(count))
    assert all(text == (str(label),) for text, label in zip(train.texts, train.labels))


def test_rates_follow_the_size_of_the_model_unless_they_are_given(start, train, tmp_path, monkeypatch, capsys):
    for texts, batch in ((10, 8), (400, 8), (800, 16), (1600, 32), (10**6, 32)):
        assert finetuning.default_batch_size(texts) == batch
    assert finetuning.default_rates(21_000_000, 60) == (3e-4, 4.0)
    assert finetuning.default_rates(137_000_000, 5000) == (5e-5, 3.0)
    assert finetuning.default_rates(137_000_000, 14) == (5e-5, 8.0)
    assert finetuning.default_rates(21_000_000, 1) == (3e-4, 20.0)
    flags = ["--train_data", str(train), "--model", str(start), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(training.CarefulTrainer, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        finetuning.finetune(*finetune_classification.parse(flags))
    shown = capsys.readouterr().out
    assert "single_label_classification with 2 classes (left, right); 13 train and 3 validation examples" in shown
    line = "weights, learning rate 0.0003, 20 epochs of 2 steps of 8 texts, mean pooling, a new head\n"
    assert line in shown


def test_few_validation_texts_keep_the_last_epoch(start, train, tmp_path, monkeypatch, capsys):
    for judges, flags, found in ((3, {}, "the seed"), (3, {"patience": 1}, "the epoch and the seed")):
        results = run(start, tmp_path / found, train_data=train, num_train_epochs=2, keep_checkpoints=True, **flags)
        assert results["examples"]["validation"] == judges
        assert f"which also chose {found}: " in (tmp_path / found / "out/README.md").read_text(encoding="utf-8")
        states = [
            json.loads(path.read_text())
            for path in (tmp_path / found / "out/seed-0").glob("checkpoint-*/trainer_state.json")
        ]
        assert {state["best_model_checkpoint"] is None for state in states} == {found == "the seed"}
        assert max(state["global_step"] for state in states) == 4 or found != "the seed"
    assert "learning rate 0.005, 2 epochs of 2 steps" in (shown := capsys.readouterr().out)
    assert "learning rate 0.005, at most 2 epochs of 2 steps" in shown
    monkeypatch.setattr(finetuning, "FEWEST_JUDGES", 3)
    monkeypatch.setattr(training.CarefulTrainer, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        run(start, tmp_path / "enough", train_data=train, num_train_epochs=2)
    assert "at most 2 epochs" in capsys.readouterr().out


def test_the_head_of_a_masked_language_model_reads_the_mean_unless_it_is_told_otherwise(start, train, tmp_path):
    for name, model, flags, pooling in (
        ("mean", start, {}, "mean"),
        ("cls", start, {"classifier_pooling": "cls"}, "cls"),
        ("again", tmp_path / "cls/out", {}, "cls"),  # which has a trained pooler
    ):
        run(model, tmp_path / name, train_data=train, num_train_epochs=1, **flags)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "out", trust_remote_code=True)
        assert model.config.classifier_pooling == pooling and (model.bert.pooler is None) == (pooling == "mean")


def test_a_classifier_of_other_labels_gets_a_new_head(tmp_path, monkeypatch, capsys):
    """The library refused it and named an option that no script has."""
    write_complete_repository(tmp_path / "model", classifier_pooling="mean")
    add_classifier(tmp_path / "model")
    monkeypatch.setattr(training.CarefulTrainer, "train", stop)
    for labels, end in (("ab", "mean pooling, the old head"), ("abc", "mean pooling, a new head")):
        data = write_examples(tmp_path / f"{labels}.csv", labels.__getitem__, 20)
        data.write_text(data.read_text() + f"ba,{labels[-1]}\n" * 9)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "model", tmp_path / labels, train_data=data)
        shown = capsys.readouterr()
        assert shown.out.endswith(f" of 8 texts, {end}\n") and "MISSING" not in shown.err + shown.out


@pytest.mark.parametrize("make", [write_complete_repository, stock_bert])
def test_a_classifier_keeps_its_head_for_the_same_labels_only(tmp_path, monkeypatch, capsys, make):
    """A head for as many other labels was trained on, and so was one for the same labels in another order."""
    make(tmp_path / "model")
    add_classifier(tmp_path / "model")
    data = write_examples(tmp_path / "train.csv", "ab".__getitem__, 20)
    old = load_file(tmp_path / "model/model.safetensors")["classifier.weight"]
    models = []
    monkeypatch.setattr(training.CarefulTrainer, "train", lambda self: models.append(self.model) or stop())
    for labels, end in (
        (["a", "b"], "the old head"),
        (["LABEL_0", "LABEL_1"], "the old head"),
        (["b", "a"], "a new head (the old labels are b, a)"),
        (["x", "y"], "a new head (the old labels are x, y)"),
        (["x", "y", "z"], "a new head (the old labels are x, y, z)"),
    ):
        fields = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        architecture = "BertForSequenceClassification"
        set_fields(tmp_path / "model/config.json", architectures=[architecture], **fields)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "model", tmp_path / "new", train_data=data)
        assert capsys.readouterr().out.endswith(f", {end}\n")
        assert torch.equal(models[-1].classifier.weight, old) == (end == "the old head")
        assert models[-1].config.id2label == {0: "a", 1: "b"}


def test_a_stock_bert_keeps_its_pooling(start, train, tmp_path):
    stock_bert(tmp_path / "bert")
    with pytest.raises(ValueError, match="classifier_pooling: '.*bert' is not a MosaicBERT and has its own pooling"):
        run(tmp_path / "bert", tmp_path, train_data=train, classifier_pooling="mean")
    assert not (tmp_path / "out").exists()


def test_results_of_another_run_are_kept_until_new_ones_replace_them(start, train, tmp_path, monkeypatch):
    run(start, tmp_path, train_data=train, num_train_epochs=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "metrics.json", "confusion.png", "model.safetensors", "bert_layers.py"} <= before.keys()
    assert not [name for name in before if name.startswith(("seed-", "."))]
    assert "model.safetensors" in push_to_hub.files_to_push(tmp_path / "out")
    assert json.loads(before["config.json"])["dtype"] == "float32"
    with pytest.raises(ValueError, match="holds model.safetensors of an earlier run; replace it with --overwrite"):
        run(start, tmp_path, train_data=train)
    with pytest.raises(SystemExit):
        run(start, tmp_path, train_data=train, resume_from_checkpoint="last")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetuning, "draw_confusion", stop)
        run(start, tmp_path, train_data=train, num_train_epochs=1, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / "notes.txt").write_text("mine")
    run(start, tmp_path, train_data=train, num_train_epochs=1, overwrite=True, seeds=1)
    assert list(json.loads((tmp_path / "out/metrics.json").read_text())["seeds"]) == ["1"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*before, "notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "train.csv"}


def test_a_seed_that_diverges_does_not_stay_the_best(start, train, tmp_path, monkeypatch, capsys):
    step = training.CarefulTrainer.training_step

    def poison(self, model, *rest):
        if self.args.seed in bad:
            next(model.parameters()).data.fill_(float("nan"))
        return step(self, model, *rest)

    monkeypatch.setattr(training.CarefulTrainer, "training_step", poison)
    bad = [0]
    results = run(start, tmp_path, train_data=train, seeds=[0, 1], num_train_epochs=1)
    assert results["diverged"] == {"0": 1} and list(results["seeds"]) == ["1"]
    assert results["mean"] == results["seeds"]["1"]
    assert "seed 0: the loss became NaN or infinite in step 1" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert runs.is_finite(*model.parameters())
    bad = [0, 1]
    with pytest.raises(FloatingPointError, match="the loss became NaN or infinite in step 1; no checkpoint was saved"):
        run(start, tmp_path / "all", train_data=train, seeds=[0, 1], num_train_epochs=1)


@pytest.mark.parametrize("package", ["sklearn", "matplotlib"])
def test_a_missing_package_is_found_before_the_training(start, train, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=package):
        run(start, tmp_path, train_data=train)
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(start, train, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="fine-tuning runs in one process, got 2: start it without torchrun"):
        run(start, tmp_path, train_data=train)


@pytest.mark.parametrize(
    "problem, predicted, truth, expected",
    [
        (examples.SINGLE, [1, 1, 1], [1, 1, 1], {"accuracy": 1.0, "macro_f1": 1.0, "matthews": 0.0}),
        (examples.REGRESSION, [1.0, 1.0, 1.0], [0.0, 1.0, 2.0], {"mse": 2 / 3, "pearson": 0.0, "spearman": 0.0}),
    ],
)
def test_constant_predictions_have_no_correlation(problem, predicted, truth, expected, recwarn):
    assert scores.score(problem, np.array(predicted), np.array(truth)) == pytest.approx(expected)
    assert not recwarn.list
