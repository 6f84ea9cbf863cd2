"""Loads, runs, ties, saves and reloads the shipped checkpoint with the transformers at hand; needs torch beside it.

One line a check; exits with 1 when one fails. `releases.py` runs it on every minor release.
"""

import json
import logging
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, pipeline

ROOT = Path(__file__).resolve().parents[2]
REMOTE = {"trust_remote_code": True}
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
DECODER, EMBEDDING = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
TASKS = ["fill-mask", "text-classification", "token-classification", "feature-extraction", "zero-shot-classification"]
SENTENCE = "I [MASK] to the store yesterday."
CHECKS = []


def check(function):
    """Add a function to the checks."""
    CHECKS.append(function)
    return function


class Messages(logging.Handler):
    """Keeps what transformers logs."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


MESSAGES = Messages()


def repository(folder, weights=None, **fields):
    """A copy of the shipped repository with other `weights` (a function of the shipped ones) and config fields."""
    folder.mkdir()
    for file in (*ROOT.glob("*.py"), *(ROOT / name for name in FILES)):
        shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    if weights is not None:
        held = weights(load_file(folder / "model.safetensors"))
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits(model):
    """What the model says about the sentence."""
    batch = AutoTokenizer.from_pretrained(ROOT)([SENTENCE, "No."], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


def assert_same_model(folder, expected, **kwargs):
    """Load a folder and return the model, which is ours, tied, off the meta device, and has the expected scores."""
    model = AutoModelForMaskedLM.from_pretrained(folder, **REMOTE, **kwargs)
    assert type(model).__module__.startswith("transformers_modules")
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert not any(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-3)
    return model


@check
def fills_the_mask(tmp):
    found = pipeline("fill-mask", str(ROOT), **REMOTE)(SENTENCE)[0]
    assert found["token_str"] == "returned", found


@check
def loads_and_ties(tmp):
    assert_same_model(ROOT, logits(AutoModelForMaskedLM.from_pretrained(ROOT, **REMOTE)))
    assert not any("tie" in text for text in MESSAGES.texts), MESSAGES.texts


@check
def loads_both_keys_of_a_tie(tmp):
    expected = logits(AutoModelForMaskedLM.from_pretrained(ROOT, **REMOTE))
    both = repository(tmp / "both", lambda held: {**held, DECODER: held[EMBEDDING].clone()})
    assert_same_model(both, expected)


@check
def loads_the_decoder_alone(tmp):
    expected = logits(AutoModelForMaskedLM.from_pretrained(ROOT, **REMOTE))
    assert_same_model(repository(tmp / "decoder", lambda held: {DECODER: held.pop(EMBEDDING), **held}), expected)


@check
def serves_every_auto_class(tmp):
    for name, reference in AutoConfig.from_pretrained(ROOT, **REMOTE).auto_map.items():
        if name == "AutoConfig" or not hasattr(transformers, name):
            continue
        auto = getattr(transformers, name)
        if reference.endswith("UnavailableHead"):
            assert "MosaicBERT has no model" in error_of(auto.from_pretrained, ROOT, **REMOTE)
            continue
        model = auto.from_pretrained(ROOT, **REMOTE)
        assert type(model).__name__ == reference.split(".")[-1]
        assert type(model).__module__.startswith("transformers_modules")


@check
def takes_a_config_of_transformers(tmp):
    expected = logits(AutoModelForMaskedLM.from_pretrained(ROOT, **REMOTE))
    model = assert_same_model(ROOT, expected, config=transformers.BertConfig.from_pretrained(ROOT))
    model.save_pretrained(tmp / "saved")
    assert json.loads((tmp / "saved/config.json").read_text())["architectures"] == ["MosaicBertForMaskedLM"]
    assert_same_model(tmp / "saved", expected)


@check
def takes_attention_by_name(tmp):
    expected = logits(AutoModelForMaskedLM.from_pretrained(ROOT, **REMOTE))
    for name in ("eager", "sdpa", "cpu"):
        assert_same_model(ROOT, expected, attn_implementation=name)


@check
def saves_and_reloads(tmp):
    model = AutoModelForMaskedLM.from_pretrained(ROOT, **REMOTE)
    model.save_pretrained(tmp / "saved")
    config = json.loads((tmp / "saved/config.json").read_text())
    assert config["architectures"] == ["MosaicBertForMaskedLM"], config
    assert not any("gamma" in name for name in load_file(tmp / "saved/model.safetensors"))
    assert_same_model(tmp / "saved", logits(model))


@check
def saves_a_config_alone(tmp):
    AutoConfig.from_pretrained(ROOT, **REMOTE).save_pretrained(tmp / "saved")
    config = AutoConfig.from_pretrained(tmp / "saved", **REMOTE)
    assert config.architectures == ["MosaicBertForMaskedLM"]
    model = AutoModelForMaskedLM.from_config(config, **REMOTE)
    model.load_state_dict(AutoModelForMaskedLM.from_pretrained(ROOT, **REMOTE).state_dict())
    model.save_pretrained(tmp / "again")
    assert_same_model(tmp / "again", logits(model))


@check
def runs_every_pipeline_without_a_false_message(tmp):
    for task in TASKS:
        labels = {"candidate_labels": ["shopping", "sport"]} if task == "zero-shot-classification" else {}
        found = pipeline(task, str(ROOT), **REMOTE)
        assert type(found.model).__module__.startswith("transformers_modules")
        found(SENTENCE, **labels)
    assert not any("not supported" in text for text in MESSAGES.texts), MESSAGES.texts


def error_of(function, *args, **kwargs):
    """The words of the error that a call ends in."""
    try:
        made = function(*args, **kwargs)
    except Exception as error:  # of any kind: what matters is that there is one
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"no error, but {type(getattr(made, 'model', made))}")


@check
def never_falls_back_to_stock_bert(tmp):
    """Every task, every kind of failure, also where config.json names the models of transformers."""
    cases = {
        "attn_implementation": (repository(tmp / "attention"), {"model_kwargs": {"attn_implementation": "nonsense"}}),
        "layers 4, 5": (repository(tmp / "more", num_hidden_layers=6), {}),
        "layers 2": (repository(tmp / "cut", lambda held: {k: v for k, v in held.items() if ".layer.2." not in k}), {}),
        "num_labels": (
            repository(tmp / "stock", architectures=["BertForMaskedLM"]),
            {"model_kwargs": {"num_labels": 0}},
        ),
    }
    for task in (*TASKS, "text-generation"):
        for words, (folder, options) in cases.items():
            error = error_of(pipeline, task, str(folder), **REMOTE, **options)
            assert words in error or (task == "text-generation" and "MosaicBERT has no model" in error), (task, error)


def main():
    """Run the checks and say how many pass."""
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.add_handler(MESSAGES)
    transformers.utils.logging.disable_progress_bar()
    failed = 0
    for function in CHECKS:
        MESSAGES.texts.clear()
        with tempfile.TemporaryDirectory() as tmp:
            try:
                function(Path(tmp))
            except Exception:
                failed += 1
                print(f"FAILED {function.__name__}")
                traceback.print_exc()
            else:
                print(f"ok {function.__name__}")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"{len(CHECKS) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
