"""The baseline of the benchmarks computes what the published code computed."""

import json

import numerics
import pytest
import torch
from conftest import ROOT
from published import PublishedModel
from safetensors.torch import load_file

from mosaicbert.bert_attention import alibi_slopes

FOLDER = ROOT / "tests" / "data" / "reference" / "mlm-12heads-dim16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_baseline_gives_published_states_logits_loss_and_gradients(dtype):
    config = json.loads((FOLDER / "config.json").read_text())
    state = torch.load(FOLDER / "pytorch_model.bin", map_location="cpu", weights_only=True)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    expected = load_file(FOLDER / "expected.safetensors")
    ids, mask, types = (expected[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
    model = PublishedModel(state, alibi_slopes(config["num_attention_heads"]), config["layer_norm_eps"])
    tolerance = numerics.PUBLISHED[dtype]

    hidden, _ = model.encode(ids, mask, types)
    numerics.assert_same(hidden, expected["hidden_2_at_attended"], tolerance, "hidden")
    _, logits = model.masked_lm(ids, mask, token_type_ids=types)
    numerics.assert_same(logits[mask.bool()], expected["logits_at_attended"], tolerance, "logits")
    loss, logits = model.masked_lm(ids, mask, expected["labels"], types)
    assert logits.shape == (*ids.shape, config["vocab_size"])
    numerics.assert_same(loss, expected["loss"], numerics.PUBLISHED[torch.float32], "loss")
    loss.backward()
    gradients = {key[len("grad.") :]: value for key, value in expected.items() if key.startswith("grad.")}
    assert len(gradients) > 20
    for name, value in gradients.items():
        gradient = model.get_parameter(name.removeprefix("bert.")).grad
        numerics.assert_same(gradient, value, numerics.PUBLISHED[torch.float32], name)
