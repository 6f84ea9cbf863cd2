"""The repository loads: by every auto class, through `auto_map`, from a folder and from a Hub cache, with each row of
the attention table; and what it saves loads again."""

import json

import numerics
import pytest
from conftest import ROOT
from lib.common import CODE_FILES
from models import tiny_model
from processes import run_python
from repositories import (
    AUTO_MAP,
    IDS,
    MASK,
    REMOTE,
    assert_loads,
    cache_repository,
    is_ours,
    small_config,
    write_repository,
)
from rows import DEVICE, ROWS
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

from mosaicbert.bert_layers import BertForSequenceClassification

pytestmark = pytest.mark.card

HEADS = {
    AutoModel: "BertModel",
    AutoModelForMaskedLM: "BertForMaskedLM",
    AutoModelForSequenceClassification: "BertForSequenceClassification",
    AutoModelForTokenClassification: "BertForTokenClassification",
    AutoModelForQuestionAnswering: "BertForQuestionAnswering",
    AutoModelForMultipleChoice: "BertForMultipleChoice",
}


# The repository that you have cloned


@pytest.mark.parametrize("row", [None, *ROWS])
def test_the_shipped_checkpoint_fills_a_mask(row):
    """By default and with each row of the attention table that this machine can run."""
    options = {"model_kwargs": {"attn_implementation": row}} if row else {}
    fill = pipeline("fill-mask", model=str(ROOT), device=ROWS.get(row, DEVICE), **options, **REMOTE)
    assert is_ours(fill.model) and type(fill.model).__name__ == "BertForMaskedLM"
    assert {file.split("--")[-1] for file in fill.model.config.auto_map.values()} == {*AUTO_MAP.values()}
    best, *others = fill("Yesterday she [MASK] a letter to her brother.")
    assert best["token_str"] == "wrote" and 0.55 < best["score"] < 0.62
    assert all(0 < answer["score"] < 0.1 for answer in others)


# Small models with the code of this repository; their answers are those of a model that was never saved


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return write_repository(tmp_path_factory.mktemp("hub") / "mosaic-bert-tiny")


@pytest.mark.parametrize("auto_class", HEADS, ids=lambda auto_class: auto_class.__name__)
def test_auto_map_serves_every_auto_class(repository, auto_class):
    model = auto_class.from_pretrained(repository, **REMOTE).eval()
    assert type(model).__name__ == HEADS[auto_class]
    assert type(model).__module__.startswith("transformers_modules")
    encoder = model if auto_class is AutoModel else model.bert
    numerics.assert_same(encoder(IDS, MASK).last_hidden_state, tiny_model().bert(IDS, MASK).last_hidden_state, 0.0)


def test_loads_offline_from_a_hub_cache_of_symlinks_by_name(tmp_path, repository):
    cache_repository(tmp_path, "someone/mosaic", [repository])
    assert_loads("someone/mosaic", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize(
    "name",
    ["mosaic-bert-base-seqlen-512", "mosaic-bert-base-seqlen-1024", "mosaic-bert-base-seqlen-2048", "dnabert-2-117m"],
)
def test_published_configs_load_as_they_are(tmp_path, name):
    """DNABERT-2's names neither its type nor its padding token."""
    config = small_config(name)
    assert ("model_type" in config) == ("pad_token_id" in config) == name.startswith("mosaic")
    assert_loads(write_repository(tmp_path / "repo", config=config))


def test_a_descendant_whose_auto_map_points_to_another_repository_loads(tmp_path):
    config = small_config("dnabert-2-finetuned")
    assert "--" in config["auto_map"]["AutoModelForSequenceClassification"]
    classifier = tiny_model(BertForSequenceClassification)
    expected = classifier(IDS, MASK).logits
    folder = write_repository(tmp_path / "tuned", model=classifier, config=config, code=False)
    direct = BertForSequenceClassification.from_pretrained(folder).eval()
    numerics.assert_same(direct(IDS, MASK).logits, expected, 0.0)
    cache = tmp_path / "cache"
    cache_repository(cache, "zhihan1996/DNABERT-2-117M", [write_repository(tmp_path / "base")])
    remote = AutoModelForSequenceClassification.from_pretrained(
        folder, cache_dir=cache, local_files_only=True, **REMOTE
    ).eval()
    numerics.assert_same(remote(IDS, MASK).logits, expected, 0.0)


def test_saves_a_complete_repository_and_reloads_it(tmp_path, repository):
    saved = tmp_path / "saved"
    assert_loads(repository).save_pretrained(saved)
    names = {file.name for file in saved.iterdir()}
    assert {*CODE_FILES, "config.json", "model.safetensors"} <= names
    assert json.loads((saved / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert "_attn_implementation" not in (saved / "config.json").read_text()
    assert_loads(saved)
    # A model of the importable package, built and not loaded, saves the same.
    tiny_model().save_pretrained(tmp_path / "built")
    assert {*CODE_FILES} <= {file.name for file in (tmp_path / "built").iterdir()}
    assert_loads(tmp_path / "built")
    # A classifier made from it, saved, and loaded under another head.
    AutoModelForTokenClassification.from_pretrained(saved, num_labels=5, **REMOTE).save_pretrained(tmp_path / "tokens")
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "tokens", **REMOTE)
    assert again.config.num_labels == 5
    assert AutoModel.from_pretrained(tmp_path / "tokens", **REMOTE).pooler is not None


def test_torch_and_transformers_are_enough(repository):
    """Loads and answers in a process where Triton and einops cannot be imported."""
    script = f"""
        import sys
        for name in ("triton", "einops", "flash_attn"):
            sys.modules[name] = None
        import torch
        from transformers import AutoModelForMaskedLM
        model = AutoModelForMaskedLM.from_pretrained({str(repository)!r}, trust_remote_code=True).eval()
        assert torch.isfinite(model(torch.ones(1, 5, dtype=torch.long)).logits).all()
        try:
            model.set_attn_implementation("triton")
            model(torch.ones(1, 5, dtype=torch.long))
        except ValueError as error:
            print(error)
    """
    assert "'triton' cannot serve this call: it supports devices cuda, got cpu" in run_python(script)
