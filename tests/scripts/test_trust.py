"""No script runs Python code that a model brings, unless --trust_remote_code is given."""

import json
import re

import evaluate_mlm
import fill_mask
import finetune_classification
import predict
import pretrain_mlm
import pytest
import torch
from folders import add_classifier, change_weights, set_fields, stock_bert, write_complete_repository
from lib import common
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, BertForMaskedLM

CODE = """
from pathlib import Path
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification
Path({mark!r}).write_text("ran")
class OtherConfig(BertConfig):
    model_type = "other"
class OtherForMaskedLM(BertForMaskedLM):
    config_class = OtherConfig
class OtherForSequenceClassification(BertForSequenceClassification):
    config_class = OtherConfig
"""
OTHER = {
    "AutoConfig": "modeling_other.OtherConfig",
    "AutoModelForMaskedLM": "modeling_other.OtherForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_other.OtherForSequenceClassification",
}
OURS = {name: value.replace("modeling_other.Other", "bert_layers.Bert") for name, value in OTHER.items()}
COMMANDS = {
    "fill_mask": (fill_mask, ["the cat [MASK] on the mat", "--model", "MODEL"]),
    "evaluate_mlm": (evaluate_mlm, "--model MODEL --data TEXT --tokens 200 --device cpu".split()),
    "finetune_classification": (
        finetune_classification,
        "--model MODEL --train_data LABELS --output_dir OUT --num_train_epochs 1 --use_cpu".split(),
    ),
    "predict": (predict, ["MODEL", "LABELS", "TABLE", "--device", "cpu"]),
}


@pytest.fixture(autouse=True)
def no_questions(monkeypatch):
    def asked(*_):
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)


@pytest.fixture
def run(tmp_path, text, run_script):
    """Runs a command of `COMMANDS` with a model."""
    labels = "".join(json.dumps({"text": "the cat sat", "label": label}) + "\n" for label in "abababab")
    (tmp_path / "labels.jsonl").write_text(labels)

    def run(command, model, *flags, whole=True):
        script, words = COMMANDS[command]
        if command == "predict" and whole:
            add_classifier(model)
        places = {"MODEL": model, "TEXT": text, "LABELS": tmp_path / "labels.jsonl", "OUT": tmp_path / "out"}
        places["TABLE"] = tmp_path / "table.csv"
        run_script(script, *(places.get(word, word) for word in words), *flags)

    return run


def refer(folder, auto_map, code="modeling_other.py", **fields):
    """Let a model's config and tokenizer name code, which leaves a mark where it runs; returns the mark's path."""
    mark = folder.parent / "ran"
    (folder / code).write_text(CODE.format(mark=str(mark)))
    set_fields(folder / "config.json", auto_map=auto_map, **fields)
    set_fields(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_other.Slow", None]})
    return mark


@pytest.mark.parametrize("fields", [{}, {"model_type": "other"}, {"model_type": None}], ids=["bert", "other", "none"])
@pytest.mark.parametrize("command", COMMANDS)
def test_another_models_code_runs_only_with_the_flag(tmp_path, run, command, fields):
    stock_bert(tmp_path / "model")
    mark = refer(tmp_path / "model", OTHER, **fields)
    message = r"is not a MosaicBERT and refers to code .*auto_map.*pass --trust_remote_code$"
    with pytest.raises(SystemExit, match=message):
        run(command, tmp_path / "model")
    assert not mark.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mosaicbert_needs_no_code_of_its_own(tmp_path, run, command, capsys):
    write_complete_repository(tmp_path / "model")
    mark = refer(tmp_path / "model", OURS, "bert_layers.py", architectures=["BertForMaskedLM"])
    run(command, tmp_path / "model")
    assert not mark.exists()
    if command == "finetune_classification":
        for name in ("config.json", "tokenizer_config.json"):
            assert "modeling_other" not in (tmp_path / "out" / name).read_text()
        assert "OtherConfig" not in (tmp_path / "out" / "bert_layers.py").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stock_bert_is_loaded_by_transformers(tmp_path, run, command, capsys):
    stock_bert(tmp_path / "model")
    run(command, tmp_path / "model")
    said = (tmp_path / "table.csv").read_text() if command == "predict" else capsys.readouterr().out
    assert re.search(r"\d\.\d", said)  # probabilities, or scores
    if command == "finetune_classification":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["architectures"] == ["BertForSequenceClassification"] and "auto_map" not in config


def test_pretraining_takes_no_reference_from_a_config(tmp_path, text, run_script):
    write_complete_repository(tmp_path / "model")
    AutoTokenizer.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "model")  # with its added tokens
    mark = refer(tmp_path / "model", OURS, "bert_layers.py", attn_implementation="someone/kernels")
    config = tmp_path / "config.json"
    config.write_text((tmp_path / "model" / "config.json").read_text())
    flags = f"--train_data {text} --max_steps 1 --use_cpu --tokens_per_row 64 --max_length 32 --peak_tflops 1"
    words = ["--tokenizer", tmp_path / "model"]
    sources = (["--model", tmp_path / "model"], [*words, "--config", tmp_path / "model"], [*words, "--config", config])
    for number, source in enumerate(sources):
        out = tmp_path / f"out{number}"
        run_script(pretrain_mlm, *source, "--output_dir", out, "--gradient_accumulation_steps", 1, *flags.split())
        assert "someone" not in (out / "config.json").read_text()
        assert "modeling_other" not in (out / "tokenizer_config.json").read_text()
        assert "OtherConfig" not in (out / "bert_layers.py").read_text()
    assert not mark.exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("make", [write_complete_repository, stock_bert])
def test_a_tokenizer_that_does_not_fit_the_model_is_named(tmp_path, run, command, make):
    """Its ids once went beyond the embedding, where the library raised an IndexError."""
    make(tmp_path / "model")
    with open(tmp_path / "model" / "vocab.txt", "a", encoding="utf-8") as file:
        file.writelines(f"word{number}\n" for number in range(500))
    with pytest.raises(SystemExit, match="model: its tokenizer has 526 entries, more than the .* of the model's vocab"):
        run(command, tmp_path / "model")


@pytest.mark.parametrize("command", ["fill_mask", "evaluate_mlm"])
def test_a_tokenizer_without_a_mask_is_named(tmp_path, run, command):
    write_complete_repository(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]")).save(str(tmp_path / "model" / "tokenizer.json"))
    with pytest.raises(SystemExit, match="tokenizer must have a (cls|mask)_token, .* has none"):
        run(command, tmp_path / "model")


@pytest.mark.parametrize("command", ["fill_mask", "evaluate_mlm", "predict"])
@pytest.mark.parametrize("make", [write_complete_repository, stock_bert])
def test_a_model_without_the_head_is_refused(tmp_path, run, command, make):
    """Its answers came from a head of random weights."""
    folder, head = tmp_path / "model", "cls.predictions.transform.LayerNorm, cls.predictions.transform.dense"
    make(folder)
    added = {f"cls__predictions__transform__{name}": None for name in ("LayerNorm__weight", "dense__weight")}
    if command == "predict":
        add_classifier(folder)
        added, head = {"classifier__weight": None}, "classifier"
    change_weights(folder, **added)
    task = "classification" if command == "predict" else "masked language modeling"
    with pytest.raises(SystemExit, match=rf"model: '.*model' holds no head for {task} \(no weights of {head}\)$"):
        run(command, folder, whole=False)
    change_weights(folder, bert__encoder__layer__1__attention__output__dense__weight=None)
    with pytest.raises(
        SystemExit, match="model: .*(encoder are missing from the weights|lacks weights of the encoder that)"
    ):
        run(command, folder, whole=False)


@pytest.mark.parametrize("make", [write_complete_repository, stock_bert])
def test_only_a_head_may_be_new_or_of_another_shape(tmp_path, make):
    folder = tmp_path / "model"
    size = make(folder).config.hidden_size
    add_classifier(folder)
    for classes, new in ((2, []), (3, ["classifier.bias", "classifier.weight"])):
        found = []
        model = common.load_model("ForSequenceClassification", str(folder), new_head=found, num_labels=classes)
        assert found == new and model.classifier.weight.shape == (classes, size)
    change_weights(folder, bert__embeddings__token_type_embeddings__weight=torch.zeros(3, size))
    with pytest.raises(ValueError, match=r"encoder that its config describes \(bert.embeddings.token_type_embeddings"):
        common.load_model("ForSequenceClassification", str(folder), new_head=[])


def test_the_flag_runs_the_code(tmp_path):
    stock_bert(tmp_path / "model")
    mark = refer(tmp_path / "model", OTHER)
    model = common.load_model("ForMaskedLM", str(tmp_path / "model"), trust_remote_code=True)
    with pytest.raises(ValueError, match="holds no head for classification"):
        common.load_model("ForSequenceClassification", str(tmp_path / "model"), trust_remote_code=True)
    assert mark.exists() and type(model).__name__ == "OtherForMaskedLM" and isinstance(model, BertForMaskedLM)


def test_models_load_alike_with_and_without_the_flag(tmp_path):
    """As a MosaicBERT of this repository does, with the fields that a task changes."""
    write_complete_repository(tmp_path / "model")
    changes = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}, "problem_type": "single_label_classification"}
    configs = [
        common.load_model("ForSequenceClassification", str(tmp_path / "model"), flag, [], **changes).config.to_dict()
        for flag in (False, True)
    ]
    for config in configs:  # where it came from; saving sets the other
        config.pop("_name_or_path", None), config.pop("auto_map", None)
    assert configs[0] == configs[1] and configs[0]["id2label"] == changes["id2label"]
