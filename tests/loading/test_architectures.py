"""No pipeline, server or library takes a class of transformers for ours, whatever fails."""

import json
import logging
import shutil

import pytest
import torch
import transformers
from conftest import ROOT
from folders import set_fields, write_complete_repository
from repositories import REMOTE, is_ours
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, pipeline
from transformers.pipelines import SUPPORTED_TASKS

from mosaicbert.bert_layers import BertForSequenceClassification, BertForTokenClassification
from mosaicbert.configuration_bert import AUTO_MAP, BertConfig

TASKS = ["fill-mask", "text-classification", "token-classification", "feature-extraction", "zero-shot-classification"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository whose config names a class of transformers, as published ones do; no test changes it."""
    folder = tmp_path_factory.mktemp("repository")
    write_complete_repository(folder)
    set_fields(folder / "config.json", architectures=["BertForMaskedLM"])
    return folder


def architectures(folder):
    return json.loads((folder / "config.json").read_text())["architectures"]


def remove_layer(folder):
    weights = load_file(folder / "model.safetensors")
    left = {name: tensor for name, tensor in weights.items() if ".layer.0." not in name}
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})


FAILURES = {
    "attn_implementation": (lambda folder: None, {"attn_implementation": "nonsense"}),
    "too large: 22 tensors of the encoder are missing from the weights, layers 2, 3 ": (
        lambda folder: set_fields(folder / "config.json", num_hidden_layers=4),
        {},
    ),
    "weights, layers 0 ": (remove_layer, {}),
    "num_labels must be a positive integer, got 0": (lambda folder: None, {"num_labels": 0}),
    "model.safetensors": (lambda folder: (folder / "model.safetensors").unlink(), {}),
}


@pytest.mark.parametrize("cause", FAILURES)
@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_ends_in_the_error_of_a_failing_load(repository, tmp_path, task, cause):
    """Pipelines once took the class that a published config names: stock BERT with a random encoder."""
    folder = shutil.copytree(repository, tmp_path / "model")
    break_it, options = FAILURES[cause]
    break_it(folder)
    with pytest.raises((ValueError, OSError)) as error:
        pipeline(task, str(folder), model_kwargs=options, **REMOTE)
    assert cause in str(error.value)


@pytest.mark.parametrize("task", sorted({*SUPPORTED_TASKS} - {*TASKS}))
def test_a_failing_load_gives_no_pipeline_of_any_other_task(repository, task):
    with pytest.raises((ValueError, OSError, ImportError)):  # most tasks need a package or another kind of model
        pipeline(task, str(repository), model_kwargs={"attn_implementation": "nonsense"}, **REMOTE)


def test_a_pipeline_of_a_head_that_is_missing_says_so(repository):
    with pytest.raises(ValueError, match="MosaicBERT has no model for AutoModelForCausalLM"):
        pipeline("text-generation", str(repository), **REMOTE)


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_that_works_logs_no_word_against_the_model(repository, task, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    labels = {"candidate_labels": ["cat", "tree"]} if task == "zero-shot-classification" else {}
    made = pipeline(task, str(repository), **REMOTE)
    assert is_ours(made.model)
    assert made("the cat [MASK] on the mat", **labels)
    assert "is not supported" not in caplog.text


def test_every_way_of_saving_names_what_no_library_has(repository, tmp_path):
    for auto, name in ((AutoModel, "BertModel"), (AutoModelForSequenceClassification, "BertForSequenceClassification")):
        auto.from_pretrained(repository, **REMOTE).save_pretrained(tmp_path / name)
        assert architectures(tmp_path / name) == [f"Mosaic{name}"]
    for loader in (AutoConfig, BertConfig, transformers.BertConfig):
        config = loader.from_pretrained(repository, **(REMOTE if loader is AutoConfig else {}))
        config.auto_map = {name: f"{repository}--{reference}" for name, reference in AUTO_MAP.items()}
        for model in (
            AutoModelForMaskedLM.from_config(config, **REMOTE),
            AutoModelForMaskedLM.from_pretrained(repository, config=config, **REMOTE),
        ):
            model.save_pretrained(tmp_path / "saved")
            assert architectures(tmp_path / "saved") == ["MosaicBertForMaskedLM"]
    AutoConfig.from_pretrained(repository, **REMOTE).save_pretrained(tmp_path / "alone")
    assert architectures(tmp_path / "alone") == ["MosaicBertForMaskedLM"]


STOCK_HEADS = ["Model", "ForPreTraining", "ForMaskedLM", "LMHeadModel", "ForNextSentencePrediction"]
STOCK_HEADS += ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"]


@pytest.fixture(scope="module")
def stock_configs(repository, tmp_path_factory):
    """Stock BERT's configs of folders that a model, with and without a config of its own, and a config have saved."""
    source = shutil.copytree(repository, tmp_path_factory.mktemp("saved") / "model")
    set_fields(source / "config.json", chunk_size_feed_forward=0)  # as in published configs
    given = AutoModel.from_pretrained(source, config=transformers.BertConfig.from_pretrained(source), **REMOTE)
    saved = (given, AutoModel.from_pretrained(source, **REMOTE), AutoConfig.from_pretrained(source, **REMOTE))
    configs = []
    for number, thing in enumerate(saved):
        thing.save_pretrained(source.with_name(f"{number}"))
        configs.append(transformers.BertConfig.from_pretrained(source.with_name(f"{number}")))
    return configs


@pytest.mark.parametrize("head", STOCK_HEADS)
def test_stock_bert_fails_on_whatever_is_saved_instead_of_answering_with_a_random_encoder(stock_configs, head):
    """Without `trust_remote_code`, and in MLflow, which takes `getattr(transformers, type(model).__name__)`."""
    ids, shipped = torch.tensor([[2, 5, 6, 3]]), transformers.BertConfig.from_pretrained(ROOT)
    for config in stock_configs:
        assert config.chunk_size_feed_forward == shipped.chunk_size_feed_forward
        stock = getattr(transformers, f"Bert{head}")(config).eval()
        with pytest.raises(ValueError, match="has to be a multiple of the chunk size 2147483647"):
            stock(ids[None] if head == "ForMultipleChoice" else ids)


def test_no_name_that_is_saved_is_one_of_transformers():
    for model_class in (BertForSequenceClassification, BertForTokenClassification):
        (name,) = BertConfig(architectures=[model_class.__name__]).architectures
        assert name.endswith(model_class.__name__) and not hasattr(transformers, name)
    assert BertConfig(architectures=["MyClassifier"]).architectures == ["MyClassifier"]
    assert BertConfig().architectures is None


def test_the_names_in_auto_map_stay_those_of_the_published_code():
    assert all(reference.split(".")[1].startswith(("Bert", "Unavailable")) for reference in AUTO_MAP.values())
