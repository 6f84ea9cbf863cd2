"""Old checkpoints convert: each published family, a fine-tuned descendant and Composer's file become repositories
of this package, which auto classes load and which give the numbers that they gave before."""

import json

import numerics
import pytest
import torch
from conftest import ROOT
from folders import write_tokenizer
from lib.checkpoint_conversion import convert
from lib.common import CODE_FILES
from models import ragged_batch, tiny_model
from repositories import AUTO_MAP, REMOTE, assert_loads, composer_file, small_config, write_repository
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from mosaicbert.bert_layers import BertForSequenceClassification

pytestmark = pytest.mark.card

PUBLISHED = ROOT / "tests" / "data" / "reference"


@pytest.mark.parametrize("case", ["mlm-12heads-dim16", "mlm-2heads-dim64", "seqcls-6heads-dim32"])
def test_published_weights_give_the_published_numbers(tmp_path, case):
    lines = convert(str(PUBLISHED / case), tmp_path, check=True)
    assert numerics.printed_difference(lines[-1]) <= numerics.SAME[torch.float32]
    expected = load_file(PUBLISHED / case / "expected.safetensors")
    model = AutoModel.from_pretrained(tmp_path, torch_dtype=torch.float64, **REMOTE)
    mask = expected["attention_mask"]
    hidden = model(expected["input_ids"], mask, expected.get("token_type_ids")).last_hidden_state
    layers = model.config.num_hidden_layers
    name = "last_hidden_at_attended" if "last_hidden_at_attended" in expected else f"hidden_{layers}_at_attended"
    numerics.assert_same(hidden[mask.bool()], expected[name], numerics.PUBLISHED[torch.float64])


@pytest.mark.parametrize("case", ["mlm-12heads-dim16", "mlm-2heads-dim64", "seqcls-6heads-dim32"])
def test_a_converted_file_holds_the_published_weights_under_their_names(tmp_path, case):
    """So the published code can load it; the decoder, which is tied, is stored once."""
    convert(str(PUBLISHED / case), tmp_path)
    before, after = torch.load(PUBLISHED / case / "pytorch_model.bin"), load_file(tmp_path / "model.safetensors")
    assert before.keys() - {"cls.predictions.decoder.weight"} == after.keys()
    assert all(torch.equal(before[name], weight) for name, weight in after.items())


@pytest.mark.parametrize("length", [512, 1024, 2048])
def test_mosaic_bert_base(tmp_path, length):
    """Its configs say 512 positions, whatever length it was trained for; others would cut a text there."""
    config = small_config(f"mosaic-bert-base-seqlen-{length}")
    assert (config["alibi_starting_size"], config["max_position_embeddings"]) == (length, 512)
    source, target = write_repository(tmp_path / "old", config=config, code=False), tmp_path / "new"
    write_tokenizer(source, [f"w{n}" for n in range(96)])
    convert(str(source), target)
    assert_loads(target)
    assert AutoConfig.from_pretrained(target, **REMOTE).alibi_starting_size == length
    assert json.loads((target / "config.json").read_text())["max_position_embeddings"] >= 8192
    assert AutoTokenizer.from_pretrained(target).model_max_length > 8192


def test_dnabert_2(tmp_path):
    """No model_type, no architectures, no pad_token_id, `auto_map` elsewhere, a tokenizer whose [PAD] is 3."""
    source = write_repository(tmp_path / "old", config=small_config("dnabert-2-117m"), code=False)
    words = "\n".join(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *(f"w{n}" for n in range(96))])
    (source / "vocab.txt").write_text(words)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 512}')
    target = tmp_path / "new"
    convert(str(source), target)
    config = json.loads((target / "config.json").read_text())
    assert config["architectures"] == ["MosaicBertForMaskedLM"]
    assert config["pad_token_id"] == 3
    assert config["auto_map"] == AUTO_MAP
    assert {*CODE_FILES} <= {path.name for path in target.iterdir()}
    assert AutoTokenizer.from_pretrained(target).model_max_length > 1e6
    assert_loads(target)


def test_a_finetuned_descendant_loses_its_references_to_another_repository(tmp_path):
    config = small_config("dnabert-2-finetuned")
    assert all("--" in reference for reference in config["auto_map"].values())
    model = tiny_model(BertForSequenceClassification)
    source, target = write_repository(tmp_path / "old", model=model, config=config, code=False), tmp_path / "new"
    convert(str(source), target, check=True)
    written = json.loads((target / "config.json").read_text())
    assert not any("--" in reference for reference in written["auto_map"].values())
    assert written["problem_type"] == "single_label_classification"
    reloaded = AutoModelForSequenceClassification.from_pretrained(target, **REMOTE)
    ids, mask = ragged_batch([9, 4])
    numerics.assert_same(reloaded(ids, mask).logits, model(ids, mask).logits, numerics.SAME[torch.float32])


def test_composer(tmp_path):
    target = tmp_path / "new"
    composer_file(tmp_path / "ep1-ba10-rank0.pt")
    convert(str(tmp_path / "ep1-ba10-rank0.pt"), target, check=True)
    assert_loads(target)
    assert len(AutoTokenizer.from_pretrained(target)) == 101
