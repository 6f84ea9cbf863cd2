"""Models spread over devices: offloaded weights, device maps, layers on a second device."""

import re

import numerics
import pytest
import torch
import transformers
from devices import SecondDevice, place_on_second_device
from heads import HEADS, assert_equal_outputs, call_of, gradless, head, name_of, outputs
from models import holed_batch
from packaging.version import Version

from mosaicbert.bert_layers import BertForMaskedLM, BertModel


@pytest.mark.parametrize("model_class", HEADS, ids=name_of)
def test_offloaded_weights_come_back_for_each_layer(tmp_path, model_class):
    accelerate = pytest.importorskip("accelerate")
    call = call_of(model_class)
    expected = outputs(gradless(head(model_class)), **call)
    for offload, arguments in ((accelerate.cpu_offload, ()), (accelerate.disk_offload, (tmp_path,))):
        model = gradless(head(model_class))
        offload(model, *arguments, execution_device="cpu")
        assert all(p.is_meta for p in model.parameters())
        assert_equal_outputs(outputs(model, **call), expected, 0.0)


@pytest.mark.parametrize(
    "device_map",
    [{"bert": "disk", "cls": "disk"}, {"bert.embeddings": "cpu", "bert.encoder": "disk", "cls": "cpu"}],
    ids=["all", "encoder"],
)
def test_a_device_map_to_disk_loads_and_answers(tmp_path, device_map):
    """The tied pair, embedding and decoder, stays together, as accelerate requires of every model."""
    pytest.importorskip("accelerate")
    if device_map["cls"] == "disk" and Version(transformers.__version__) < Version("5.17"):
        pytest.skip("transformers up to 5.0 cannot serve a tied pair from disk, that of stock BERT included")
    model = head(BertForMaskedLM)
    model.save_pretrained(tmp_path / "model")
    options = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    loaded = BertForMaskedLM.from_pretrained(tmp_path / "model", **options).eval()
    call = call_of(BertForMaskedLM, labels=False)
    with torch.no_grad():
        numerics.assert_same(loaded(**call).logits, model(**call).logits, 0.0)


@pytest.mark.parametrize("megabytes", [0.12, 0.15, 0.2])
def test_an_automatic_device_map_splits_between_layers_and_never_inside_one(tmp_path, megabytes):
    """The CPU has too little memory here; several GPUs are filled by the same rule, `_no_split_modules`."""
    pytest.importorskip("accelerate")
    model = head(BertForMaskedLM, num_hidden_layers=4)
    model.save_pretrained(tmp_path / "model")
    options = {"max_memory": {"cpu": int(megabytes * 1e6)}, "offload_folder": tmp_path / "offload"}
    loaded = BertForMaskedLM.from_pretrained(tmp_path / "model", device_map="auto", **options).eval()
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert not [name for name in loaded.hf_device_map if re.search(r"layer\.\d+\.|embeddings\.", name)]
    call = call_of(BertForMaskedLM, labels=False)
    with torch.no_grad():
        numerics.assert_same(loaded(**call).logits, model(**call).logits, 0.0)


@pytest.mark.parametrize("placed", [["layer.1"], ["layer.0", "layer.1"], ["layer.0.mlp.wo"]], ids=str)
def test_layers_on_a_second_device_give_the_same_numbers(backend, placed):
    pytest.importorskip("accelerate")
    model = gradless(head(BertModel, attn_implementation=backend))
    ids, mask = holed_batch()
    mask[3, 0] = 1  # the emulation does not cover torch's attention of no query
    expected = model(ids, mask, output_hidden_states=True).hidden_states
    for name in placed:
        place_on_second_device(model.encoder.get_submodule(name))
    with torch.no_grad(), SecondDevice():
        got = model(ids, mask, output_hidden_states=True).hidden_states
    assert_equal_outputs(got, expected)
