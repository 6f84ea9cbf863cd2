"""A script refuses bad input before it imports torch, and the commands that it names at its end run."""

import csv
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import convert_bert
import convert_checkpoint
import export
import finetune_classification
import pretrain_mlm
import push_to_hub
import pytest
import torch
from conftest import ROOT
from folders import stock_bert, write_complete_repository
from lib import pretraining, sources
from models import tiny_model
from safetensors.torch import load_file

from mosaicbert.bert_layers import BertForSequenceClassification

TRAINED = "--max_length 16 --tokens_per_row 64 --max_steps 2 --global_batch_size 4 --use_cpu --peak_tflops 1e-3".split()


@pytest.fixture
def folder(tmp_path, text, monkeypatch):
    """A folder to work in, with a model, a BERT, documents and two tables with labels, one of them with a fault."""
    monkeypatch.chdir(tmp_path)
    write_complete_repository(tmp_path / "model")
    stock_bert(tmp_path / "bert")
    os.rename(text, tmp_path / "documents.jsonl")
    rows = [[f"the {animal} sat on the mat", animal] for animal in ("cat", "dog") * 12]
    for name, table in (("topics.csv", [["body", "label"], *rows]), ("hole.csv", [["text", "label"], ["the", ""]])):
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(table)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{}")
    shutil.copytree(tmp_path / "bert", tmp_path / "shards")
    names = list(load_file(tmp_path / "bert/model.safetensors"))
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (tmp_path / "shards/model.safetensors.index.json").write_text(json.dumps(index))
    os.rename(tmp_path / "shards/model.safetensors", tmp_path / "shards/model-00001-of-00001.safetensors")
    tiny_model(BertForSequenceClassification).save_pretrained(tmp_path / "classifier")
    shutil.copytree(tmp_path / "bert", tmp_path / "pickle", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(tmp_path / "bert/model.safetensors"), tmp_path / "pickle/pytorch_model.bin")
    (tmp_path / "damaged").mkdir()
    shutil.copy("model/config.json", "damaged")
    (tmp_path / "damaged/model.safetensors").write_bytes(b"\0" * 9)
    return tmp_path


NO_MLM = r"holds no head for masked language modeling \(no weights of cls.predictions\)$"
NO_CLASSIFIER = r"holds no head for classification \(no weights of classifier\)$"
TOPICS = "--train_data topics.csv --text_fields body --output_dir new"
REFUSALS = [
    ("predict", "model topics.csv new.csv", f"model: 'model' {NO_CLASSIFIER}"),
    ("predict", "shards topics.csv new.csv", f"model: 'shards' {NO_CLASSIFIER}"),
    ("predict", "pickle topics.csv new.csv", f"model: 'pickle' {NO_CLASSIFIER}"),
    ("predict", "damaged topics.csv new.csv", "model: 'damaged' cannot be loaded, Error"),
    ("predict", "classifier topics.csv new.csv --text_fields a b c", "text_fields must name one or two fields"),
    ("predict", "classifier topics.csv new.csv --max_length 2", "--max_length: expected an integer of at least 3"),
    ("evaluate_mlm", "--model model classifier --data documents.jsonl", f"model: 'classifier' {NO_MLM}"),
    ("fill_mask", "[MASK] --model classifier", f"model: 'classifier' {NO_MLM}"),
    ("finetune_classification", f"--model broken {TOPICS}", "broken: expected model.safetensors or pytorch_model.bin"),
    ("finetune_classification", f"{TOPICS} --weight_decay -1e-4", "--weight_decay: .* at least 0, got '-1e-4'"),
    ("finetune_classification", f"{TOPICS} --data_seed -1", "--data_seed: expected an integer from 0 to .* got '-1'"),
    ("pretrain_mlm", "--train_data documents.jsonl --output_dir new --adam_beta1 2", "from 0 to 1, got '2'"),
    ("pretrain_mlm", "--train_data documents.jsonl --output_dir new --model bert", "'bert' is not a MosaicBERT; conv"),
    ("convert_bert", "bert new --data documents.jsonl --layers 0 -1", "--layers: expected 0 or a positive .* got '-1'"),
    ("convert_bert", "bert new --data gone.txt", "data: no file matches 'gone.txt'"),
    ("convert_bert", "broken new --data documents.jsonl", "broken: expected model.safetensors or pytorch_model.bin"),
    ("convert_bert", "bert new --data topics.csv", "data: expected .jsonl, .json, .txt files, .* got 'topics.csv'"),
    ("convert_bert", "bert model --data documents.jsonl", "target: .*model exists and is not an empty folder"),
    ("convert_checkpoint", "./gone new", "source: there is no folder './gone'"),
    ("convert_checkpoint", "topics.csv new", "source: 'topics.csv' is neither a checkpoint folder nor a file of weigh"),
    ("convert_checkpoint", "broken new", "broken: expected model.safetensors or pytorch_model.bin"),
    ("convert_checkpoint", "model new --license a|b", "--license: expected an identifier such as apache"),
    ("convert_checkpoint", "model model", "target: .*model is model, which source reads; choose another folder"),
    ("evaluate_mlm", "--model model --data gone.txt", "data: no file matches 'gone.txt'"),
    ("evaluate_mlm", "--model model --data empty.txt", "data: there is no text in empty.txt"),
    ("evaluate_mlm", "--model model/gone --data documents.jsonl", "model: there is no folder 'model/gone'$"),
    ("evaluate_mlm", "--model . --data documents.jsonl", "model: the folder '.' holds no config.json"),
    ("evaluate_mlm", "--model model --data documents.jsonl --text_field body", "text_field must be one of .*'text'"),
    ("export", "broken new --format gguf", "broken: expected model.safetensors or pytorch_model.bin"),
    ("fill_mask", "no_mask", r"text must contain \[MASK\] once, got 'no_mask'"),
    ("fill_mask", "[MASK] --model ./gone", "model: there is no folder './gone'"),
    (
        "fill_mask",
        "[MASK] --model topics.csv",
        r"model: expected a folder or a Hub id \(owner/name\), got 'topics.csv'",
    ),
    ("finetune_classification", "--train_data topics.csv --output_dir new", "text_fields must be among .*'body'"),
    ("finetune_classification", "--train_data hole.csv --output_dir new", "hole.csv, line 2: 'label' is empty"),
    (
        "finetune_classification",
        "--train_data topics.csv --text_fields body --model nosuchmodel --output_dir new",
        "model: 'nosuchmodel' is not a local folder, and the Hub could not provide it",
    ),
    (
        "finetune_classification",
        "--train_data topics.csv --output_dir /proc/new",
        "/proc/new cannot be written, No such",
    ),
    ("finetune_classification", "--train_data a.csv --output_dir new --learning_rate -1e-4", "positive .* got '-1e-4'"),
    ("finetune_classification", "--model . --train_data hole.csv --output_dir new", "the folder '.' holds no config"),
    ("finetune_classification", "--train_data a.csv --output_dir new --epochs 3", "there is no option --epochs"),
    ("predict", "classifier gone.csv new.csv", "data: no file matches 'gone.csv'"),
    ("predict", ". hole.csv new.csv", "model: the folder '.' holds no config.json"),
    ("pretrain_mlm", "--train_data gone.txt --output_dir new", "train_data: no file matches 'gone.txt'"),
    ("pretrain_mlm", "--train_data empty.txt --output_dir new", "train_data: there is no text in empty.txt"),
    ("pretrain_mlm", "--train_data documents.jsonl --output_dir /proc/new", "/proc/new cannot be written, No such"),
    ("pretrain_mlm", "--train_data documents.jsonl --output_dir new --text_field x", "text_field must be one of"),
    ("pretrain_mlm", "--train_data documents.jsonl --output_dir model", "output_dir: .*model holds model.safetensors"),
    ("pretrain_mlm", "--train_data documents.jsonl --output_dir new --model .", "the folder '.' holds no config"),
    ("pretrain_mlm", "--train_data documents.jsonl --output_dir new --learningrate 1", "did you mean --learning_rate"),
    ("push_to_hub", "bert me/bert --dry_run", "folder: missing .*bert_layers.py"),
    ("push_to_hub", "model me/a/b --dry_run", "repo_id: expected owner/name in letters, digits, .* got 'me/a/b'"),
    ("push_to_hub", "model me", "repo_id: expected owner/name .* got 'me'"),
    ("push_to_hub", "model me/model", "not logged in to the Hub; run `hf auth login` or set HF_TOKEN"),
]


# Runs a script, and prints which slow packages it has imported.
START = """
import os, runpy, sys
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported", *{"torch", "transformers", "datasets", "numpy"} & set(sys.modules))
"""


def start(script, *words, **options):
    """Run a script in a process of its own; returns its result, and the slow packages that it has imported."""
    command = [sys.executable, "-c", START, ROOT / "scripts" / script, *words]
    result = subprocess.run(command, capture_output=True, text=True, **options)
    return result, result.stdout.split("\n")[-2].split()[1:]


@pytest.mark.parametrize("script", [path.name for path in (ROOT / "scripts").glob("*.py")])
def test_help_waits_for_no_slow_import(script):
    result, imported = start(script, "--help")
    assert result.returncode == 0 and "--traceback" in result.stdout and imported == []


@pytest.mark.parametrize(("script", "line", "message"), REFUSALS, ids=lambda part: part if " " not in part else "")
def test_a_refusal_waits_for_no_torch_and_leaves_nothing(script, line, message, folder):
    before = sorted(folder.rglob("*"))
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    result, imported = start(f"{script}.py", *line.split(), env=environment)
    assert result.returncode in (1, 2) and result.stderr.count("\n") == 1, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert not {"torch", "transformers"} & {*imported}
    assert sorted(folder.rglob("*")) == before


def final_lines(capsys):
    """What a script printed last: what it made, and the commands that it names."""
    made, *commands = re.split(r"\n  (?=python )", capsys.readouterr().out.rstrip("\n").rpartition("saved in ")[2])
    return made, commands


def follow(commands, run_script, **words):
    """Run commands that a script has printed, with some words replaced; returns the names of their scripts."""
    names = []
    for line in commands:
        python, script, *rest = shlex.split(line)
        assert python == "python" and Path(script).resolve() == ROOT / "scripts" / Path(script).name
        run_script(importlib.import_module(Path(script).stem), *(words.get(word, word) for word in rest))
        names.append(Path(script).stem)
    return names


def test_a_pretrained_model_is_filled_compared_and_pushed_next(folder, run_script, capsys):
    data = ["--train_data", "documents.jsonl", "--validation_data", "documents.jsonl", "--output_dir", "runs/adapted"]
    run_script(pretrain_mlm, "--model", "model", *data, *TRAINED, "--streaming")
    made, commands = final_lines(capsys)
    assert made == f"{folder}/runs/adapted: the model, README.md (its card), log_history.json, loss.png; next:"
    assert all((folder / "runs/adapted" / name).is_file() for name in re.findall(r"\w+\.\w+", made))
    assert follow(commands, run_script) == ["fill_mask", "evaluate_mlm", "push_to_hub"]
    shown = capsys.readouterr().out
    assert len(re.findall(r"^ *\d\.\d{3}  ", shown, re.MULTILINE)) == 5
    assert {line.split(",")[0] for line in shown.splitlines() if ",128," in line} == {"model", "adapted"}
    assert "nothing was pushed; next:" in shown


def test_tokenized_text_is_trained_on_next(folder, run_script, capsys):
    words = ["--train_data", "documents.jsonl", "--tokenizer", "bert", "--tokenize_only"]
    run_script(pretrain_mlm, *words, "--output_dir", "a b")
    made, (line,) = final_lines(capsys)
    assert made == "a b: the tokenized text; next:"
    options, _ = pretrain_mlm.parse(shlex.split(line)[2:])
    assert (options.train_data, options.tokenizer, options.output_dir) == (["a b"], "bert", "a b-trained")


def test_the_commands_after_pretraining_fit_what_was_trained(capsys, folder):
    words = ["--train_data", "documents.jsonl", "--output_dir", "new", "--text_field", "text"]
    options = pretrain_mlm.make_parser().parse_own(words)[0]
    assert pretraining.evaluation_words(options, Path("new")) == ["--model", Path("new"), "--data", "FILE"]
    options.validation_data, options.text_field, options.model = ["bert", "documents.jsonl"], "body", "model"
    expected = ["--model", "model", Path("new"), "--data", "documents.jsonl", "--text_field", "body"]
    assert pretraining.evaluation_words(options, Path("new")) == expected


def test_a_classifier_predicts_and_is_pushed_next(folder, run_script, capsys):
    flags = ["--text_fields", "body", "--num_train_epochs", 1, "--use_cpu", "--output_dir", "runs/topics"]
    run_script(finetune_classification, "--model", "model", "--train_data", "topics.csv", *flags)
    made, commands = final_lines(capsys)
    files = "the model, README.md (its card), metrics.json, loss.png, errors.csv (1 wrong), confusion.png"
    assert re.sub(r"\(\d", "(1", made) == f"{folder}/runs/topics: {files}; next:"
    assert all((folder / "runs/topics" / name).is_file() for name in re.findall(r"\w+\.\w+", made))
    assert follow(commands, run_script, **{"new.csv": "topics.csv"}) == ["predict", "push_to_hub"]
    assert "saved in predictions.csv: 24 predictions (single_label_classification)\n" in capsys.readouterr().out


def test_a_warm_start_is_trained_next(folder, run_script, capsys):
    run_script(convert_bert, "bert", "start", "--data", "documents.jsonl", "--tokens", 800)
    made, commands = final_lines(capsys)
    assert made == "start: a warm start with its card; next:"
    assert follow(commands, run_script, **{"600": "0.5"}) == ["pretrain_mlm"]
    assert (folder / "start-trained/model.safetensors").is_file()


def test_a_converted_model_is_pushed_next(folder, run_script, capsys):
    run_script(convert_checkpoint, "model", "new")
    made, commands = final_lines(capsys)
    assert made == "new: the model with its code, tokenizer and card; next:"
    assert follow(commands, run_script) == ["push_to_hub"]


def test_an_export_says_where_its_use_is_shown(folder, run_script, capsys):
    run_script(export, "model", "new", "--format", "gguf", "--types", "float32")
    made, commands = final_lines(capsys)
    assert made.startswith("new: the files above and README.md (its card)") and commands == []
    assert (folder / "new/README.md").is_file()


def test_a_dry_run_ends_with_the_push(folder, run_script, capsys):
    run_script(push_to_hub, "model", "me/model", "--dry_run", "--branch", "long texts")
    line = capsys.readouterr().out.rpartition("nothing was pushed; next:\n  ")[2]
    script = os.path.relpath(push_to_hub.__file__)
    assert line == f"python {script} model me/model --branch 'long texts'\n"


def test_what_a_training_reads_is_named_as_its_options_are(folder):
    parser = finetune_classification.make_parser()
    options = parser.parse_own(["--train_data", "topics.csv", "--output_dir", "new", "--predict", "hole.csv"])[0]
    found = {name: value for name, value in sources.inputs(options).items() if value}
    assert found == {"train_data": ["topics.csv"], "predict": "hole.csv", "model": ROOT}
