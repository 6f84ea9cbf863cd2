"""scripts/finetune_classification.py: each kind of label in, metrics and a loadable repository out."""

import csv
import json

import finetune_classification as finetune
import numpy as np
import pytest
from corpora import WORDS
from folders import SPECIAL
from models import tiny_model
from repositories import write_repository
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizerFast, HfArgumentParser


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny repository with a tokenizer, to start from."""
    folder = write_repository(tmp_path_factory.mktemp("start") / "model", tiny_model(vocab_size=64))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 64}))
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def write_examples(path, label_of, count):
    """Texts of ten words from one of two halves of the vocabulary; `label_of(half)` is the label."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        half = number % 2
        words = generator.choice(WORDS[half * 20 : half * 20 + 20], 10)
        rows.append({"text": " ".join(words), "label": label_of(half)})
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(start, folder, **flags):
    settings = {
        "model": start,
        "num_train_epochs": 3,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": folder / "out",
        **flags,
    }
    line = [
        part
        for name, value in settings.items()
        for part in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]
    parser = HfArgumentParser((finetune.TaskArguments, finetune.FinetuningArguments))
    return finetune.finetune(*parser.parse_args_into_dataclasses(line))


@pytest.mark.parametrize(
    "suffix, label_of, flags, problem, metric",
    [
        (".csv", lambda half: ["left", "right"][half], {}, finetune.SINGLE, "accuracy"),
        (".jsonl", lambda half: [["a"], ["a", "b"]][half], {}, finetune.MULTI, "micro_f1"),
        (".csv", lambda half: ["a", "a+b"][half], {"label_separator": "+"}, finetune.MULTI, "micro_f1"),
        (".jsonl", lambda half: [-1.5, 1.5][half], {}, finetune.REGRESSION, "spearman"),
    ],
)
def test_each_kind_of_label_is_learned(start, tmp_path, suffix, label_of, flags, problem, metric):
    train = write_examples(tmp_path / f"train{suffix}", label_of, 80)
    valid = write_examples(tmp_path / f"valid{suffix}", label_of, 20)
    results = run(start, tmp_path, train_data=train, validation_data=valid, baseline=True, **flags)
    assert results["problem"] == problem
    assert results["mean"][metric] > 0.8 and results["baseline"][metric] > 0.8
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == results
    assert (tmp_path / "out/confusion.png").exists() == (problem == finetune.SINGLE)

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [" ".join(WORDS[:10]), " ".join(WORDS[20:30])]
    logits = model(**tokenizer(texts, return_tensors="pt")).logits
    assert model.config.problem_type == problem
    if problem == finetune.SINGLE:
        assert [model.config.id2label[i] for i in logits.argmax(-1).tolist()] == ["left", "right"]


def test_seeds_differ_and_are_averaged_and_the_best_is_saved(start, tmp_path):
    generator = np.random.default_rng(0)
    rows = [
        {
            "text": " ".join(generator.choice(WORDS, 5)),
            "label": int(generator.integers(2)),
            "other": " ".join(WORDS[:3]),
        }
        for _ in range(60)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = {"seeds": [0, 1, 2], "num_train_epochs": 1, "text_fields": ["text", "other"]}
    results = run(start, tmp_path, train_data=tmp_path / "train.jsonl", **flags)
    scores = [results["seeds"][str(seed)]["accuracy"] for seed in (0, 1, 2)]
    assert results["mean"]["accuracy"] == pytest.approx(sum(scores) / 3)
    assert results["standard_deviation"]["accuracy"] == pytest.approx(float(np.std(scores)))
    assert results["classes"] == ["0", "1"]


def test_training_stops_when_nothing_gets_better(start, tmp_path):
    train = write_examples(tmp_path / "train.csv", lambda half: ["left", "right"][half], 16)
    run(start, tmp_path, train_data=train, validation_data=train, num_train_epochs=30, learning_rate=1e-30, patience=2)
    (state,) = (tmp_path / "out/seed-0").glob("checkpoint-*/trainer_state.json")
    # The first epoch is the best and kept; two more bring nothing, and the other 27 are not run.
    assert len(list((tmp_path / "out/seed-0").glob("checkpoint-*"))) <= 2
    assert json.loads(state.read_text())["epoch"] <= 3


@pytest.mark.parametrize(
    "content, flags, message",
    [
        ('{"text": "ba"}', {}, "has no field 'label'"),
        ('{"text": "ba", "label": "x"}\n{"text": "be", "label": null}', {}, "has examples without 'label'"),
        ('{"text": "ba", "label": "x"}', {"text_fields": ["a", "b", "c"]}, "text_fields must name one or two fields"),
    ],
)
def test_bad_data_is_named(start, tmp_path, content, flags, message):
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        run(start, tmp_path, train_data=tmp_path / "train.jsonl", **flags)


def test_unknown_labels_and_files_are_named(start, tmp_path):
    with pytest.raises(ValueError, match=r"labels that the training data lacks: \['z'\]"):
        finetune.encode_labels(["x", "z"], finetune.SINGLE, ["x", "y"])
    (tmp_path / "train.parquet").write_text("")
    with pytest.raises(ValueError, match="data must be a .csv, .json or .jsonl file"):
        run(start, tmp_path, train_data=tmp_path / "train.parquet")
