"""The model is the published model: its stored values, and the independent float64 formula of `reference.py`."""

import json

import numerics
import pytest
import reference
import torch
from conftest import ROOT
from models import VOCAB, holed_batch, tiny_model
from safetensors.torch import load_file

from mosaicbert.bert_attention import alibi_slopes
from mosaicbert.bert_layers import BertModel

DATA = ROOT / "tests" / "data" / "reference"
DTYPES = (torch.float32, torch.float64)


def test_reference_formula_gives_published_values():
    folder = DATA / "mlm-12heads-dim16"
    expected = load_file(folder / "expected.safetensors")
    judge = reference.Model(
        torch.load(folder / "pytorch_model.bin", weights_only=True), json.loads((folder / "config.json").read_text())
    )
    states = judge.hidden_states(expected["input_ids"], expected["attention_mask"], expected["token_type_ids"])
    attended = expected["attention_mask"].bool()
    tolerance = numerics.PUBLISHED[torch.float64]
    numerics.assert_same(states[2][attended], expected["hidden_2_at_attended"], tolerance)
    numerics.assert_same(judge.mlm_logits(states[2][attended]), expected["logits_at_attended"], tolerance)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_holes_left_padding_and_an_empty_row_match_the_reference(dtype, backend):
    model = tiny_model(BertModel, attn_implementation=backend).to(dtype)
    ids, mask = holed_batch()
    types = torch.randint(0, 2, ids.shape, generator=torch.Generator().manual_seed(1))
    judge = reference.Model(model.state_dict(), model.config.to_dict())
    expected = judge.hidden_states(ids, mask, types)

    output = model(ids, mask, types, output_hidden_states=True)
    assert len(output.hidden_states) == len(expected)
    for number, (state, truth) in enumerate(zip(output.hidden_states, expected)):
        numerics.assert_same(state, truth, numerics.SAME[dtype], f"state {number}")
    filled = mask.bool().any(dim=1)
    pooled = judge.pooled(expected[-1], mask)
    numerics.assert_same(output.pooler_output[filled], pooled[filled], numerics.SAME[dtype], "pooled")


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_gradients_with_holes_match_the_reference(backend):
    model = tiny_model(attn_implementation=backend).double()
    ids, mask = holed_batch()
    labels = torch.randint(0, VOCAB, ids.shape, generator=torch.Generator().manual_seed(2))
    labels[torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.5] = -100
    model(ids, mask, labels=labels).loss.backward()

    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    judge = reference.Model(state, model.config.to_dict())
    counted = mask.bool() & (labels != -100)
    logits = judge.mlm_logits(judge.hidden_states(ids, mask)[-1][counted])
    torch.nn.functional.cross_entropy(logits, labels[counted]).backward()
    for name, parameter in model.named_parameters():
        # The loss is a float32 mean, so its gradient carries float32 rounding.
        numerics.assert_same(parameter.grad, state[name].grad, 1e-6, name)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 16, 20, 25])
def test_slopes_match_the_reference(heads):
    assert alibi_slopes(heads) == pytest.approx(reference.alibi_slopes(heads), rel=1e-12)


def test_slopes_of_12_heads_are_the_published_list():
    expected = [2.0**-n for n in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    assert alibi_slopes(12) == pytest.approx(expected, rel=1e-12)
