"""Further ways to load the repository, on every supported release of transformers."""

import copy
import json
from fractions import Fraction

import numerics
import numpy as np
import pytest
import safetensors
import torch
import transformers
from conftest import ROOT
from models import VOCAB, tiny_config, tiny_model
from packaging.version import Version
from repositories import (
    AUTO_MAP,
    IDS,
    MASK,
    REMOTE,
    assert_loads,
    expected_logits,
    is_ours,
    published_config,
    write_repository,
)
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from mosaicbert.configuration_bert import BertConfig

SAME = numerics.SAME[torch.float32]
DECODER = "cls.predictions.decoder.weight"
EMBEDDING = "bert.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return write_repository(tmp_path_factory.mktemp("hub") / "mosaic-bert-tiny")


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("without", [(), (DECODER,), (EMBEDDING,)], ids=["both", "no-decoder", "no-embedding"])
def test_loads_and_ties_with_either_key_missing(tmp_path, weights, without):
    assert_loads(write_repository(tmp_path / "repo", weights=weights, without=without))


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="transformers 4 ties before it looks at the file"
)
def test_a_decoder_that_was_trained_apart_keeps_its_numbers(tmp_path):
    apart = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        apart.cls.predictions.decoder.weight.add_(0.1)
    folder = write_repository(tmp_path / "repo", model=apart)
    model = AutoModelForMaskedLM.from_pretrained(folder, **REMOTE).eval()
    numerics.assert_same(model(IDS, MASK).logits, apart(IDS, MASK).logits, 0.0)


def test_a_folder_with_a_dot_in_its_name_loads(tmp_path):
    folder = write_repository(tmp_path / "mosaicbert-1.2")
    old = Version(transformers.__version__) < Version("4.57")  # takes what is before the dot for a package
    if old:
        with pytest.raises(ModuleNotFoundError, match="mosaicbert-1"):
            assert_loads(folder)
    assert_loads(f"{folder}/" if old else folder)


def test_loads_with_every_config_people_pass(repository):
    assert_loads(repository, config=AutoConfig.from_pretrained(repository, **REMOTE))
    assert_loads(repository, config=transformers.BertConfig.from_pretrained(repository))
    bare = transformers.BertConfig.from_pretrained(repository)
    del bare.alibi_starting_size
    assert_loads(repository, config=bare)


def test_from_config_makes_the_same_class(repository):
    for config in (
        AutoConfig.from_pretrained(repository, **REMOTE),
        transformers.BertConfig.from_pretrained(repository),
    ):
        config.auto_map = {name: f"{repository}--{value}" for name, value in AUTO_MAP.items()}
        model = AutoModelForMaskedLM.from_config(config, **REMOTE)
        assert is_ours(model)
        model.load_state_dict(tiny_model().state_dict())
        numerics.assert_same(model.eval()(IDS, MASK).logits, expected_logits(), 0.0)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attn_implementation_chooses_the_attention_everywhere(repository, name):
    for model in (
        AutoModelForMaskedLM.from_pretrained(repository, attn_implementation=name, **REMOTE),
        AutoModelForMaskedLM.from_pretrained(
            repository, config=transformers.BertConfig.from_pretrained(repository), attn_implementation=name, **REMOTE
        ),
    ):
        assert model.config._attn_implementation == model.bert.config._attn_implementation == name
        numerics.assert_same(model.eval()(IDS, MASK).logits, expected_logits(), SAME)
        other = {"eager": "sdpa", "sdpa": "eager"}[name]
        model.set_attn_implementation(other)
        assert model.bert.config._attn_implementation == other
        model.set_attn_implementation("auto")
        numerics.assert_same(model(IDS, MASK).logits, expected_logits(), 0.0)
    assert AutoModelForMaskedLM.from_pretrained(repository, **REMOTE).config._attn_implementation == "auto"


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "nonsense"])
def test_unknown_attention_implementations_are_refused(repository, name):
    message = f"attn_implementation must be one of auto, triton, cpu, sdpa, eager, got '{name}'"
    with pytest.raises(ValueError, match=message):
        AutoModelForMaskedLM.from_pretrained(repository, attn_implementation=name, **REMOTE)
    with pytest.raises(ValueError, match=message):
        tiny_model().set_attn_implementation(name)


def test_stock_bert_stays_itself_before_and_after(repository):
    config = {"num_hidden_layers": 1, "hidden_size": 48, "intermediate_size": 8, "vocab_size": VOCAB}
    stock = transformers.models.bert.modeling_bert.BertForMaskedLM
    before = AutoModelForMaskedLM.from_config(transformers.BertConfig(**config))
    assert_loads(repository)
    assert_loads(repository, config=transformers.BertConfig.from_pretrained(repository))
    after = AutoModelForMaskedLM.from_config(transformers.BertConfig(**config))
    assert type(before) is type(after) is stock
    after.load_state_dict(before.state_dict())
    numerics.assert_same(after.eval()(IDS, MASK).logits, before.eval()(IDS, MASK).logits, 0.0)
    assert after.config._attn_implementation == "sdpa"


def test_dtype_is_obeyed_in_loading(repository):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = AutoModelForMaskedLM.from_pretrained(repository, torch_dtype=dtype, **REMOTE).eval()
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model(IDS, MASK).logits.dtype == dtype


def test_the_shipped_checkpoint_stores_bfloat16_and_loads_in_float32():
    with safetensors.safe_open(ROOT / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
    model = AutoModelForMaskedLM.from_pretrained(ROOT, torch_dtype="auto", **REMOTE)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_numbers_of_numpy_are_taken_and_saved_as_plain_numbers(tmp_path):
    sizes = {"num_labels": np.int64(3), "hidden_size": np.int32(48), "pad_token_id": np.uint8(0)}
    rates = {"hidden_dropout_prob": np.float32(0.25), "layer_norm_eps": np.float64(1e-6), "classifier_dropout": None}
    config = tiny_config(**sizes, **rates)
    config.num_attention_heads = np.int16(6)
    config.classifier_dropout = Fraction(1, 4)
    config.save_pretrained(tmp_path)
    again = BertConfig.from_pretrained(tmp_path)
    for found in (config, again):
        assert (found.num_labels, found.hidden_size, found.pad_token_id, found.num_attention_heads) == (3, 48, 0, 6)
        assert (found.hidden_dropout_prob, found.layer_norm_eps, found.classifier_dropout) == (0.25, 1e-6, 0.25)
        assert {type(getattr(found, name)) for name in (*sizes, "num_attention_heads")} == {int}
        assert {type(getattr(found, name)) for name in rates} == {float}
    for value in (np.int64(0), np.bool_(True), np.float64(3)):
        with pytest.raises(ValueError, match="num_labels must be a positive integer"):
            tiny_config(num_labels=value)


def test_a_config_survives_a_round_trip(tmp_path):
    config = BertConfig(alibi_starting_size=77, sparse_prediction=True, low_precision_layernorm=True, num_labels=5)
    config.save_pretrained(tmp_path)
    again = BertConfig.from_pretrained(tmp_path)
    assert (again.alibi_starting_size, again.sparse_prediction, again.low_precision_layernorm) == (77, True, True)
    assert again.num_labels == 5 and again.model_type == "bert"
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_a_checkpoint_that_is_truncated_or_foreign_fails_with_the_names_of_the_keys(tmp_path):
    lost = "bert.encoder.layer.1.mlp.wo.weight"
    fields = published_config()
    del fields["auto_map"], fields["architectures"]
    stock = transformers.BertForMaskedLM(transformers.BertConfig(**fields))
    cases = {"truncated": ({"without": (lost,)}, f"1 tensors of the encoder.*{lost}")}
    cases["stock"] = ({"model": stock}, r"14 tensors.*Wqkv.*unknown ones.*attention\.self\.key")
    for name, (content, message) in cases.items():
        with pytest.raises(ValueError, match=message):
            AutoModelForMaskedLM.from_pretrained(write_repository(tmp_path / name, **content), **REMOTE)


def test_loaders_read_no_short_limit_from_the_shipped_config_and_from_the_defaults():
    shipped = json.loads((ROOT / "config.json").read_text())
    assert shipped["max_position_embeddings"] >= 8192 and BertConfig().max_position_embeddings >= 8192
    assert AutoTokenizer.from_pretrained(ROOT).model_max_length >= 8192
