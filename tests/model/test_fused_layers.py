"""Which layers run as one kernel, and that the model computes the same with and without."""

from dataclasses import replace

import pytest
import torch
from models import ragged_batch, tiny_model
from torch import nn

from mosaicbert import bert_layers


@pytest.fixture
def calls(monkeypatch):
    """Rows of the table that record their arguments and compute by torch, on the CPU."""
    recorded = []

    def geglu(gated):
        recorded.append("geglu")
        gate, value = gated.chunk(2, dim=-1)
        return nn.functional.gelu(gate) * value

    def add_norm(x, residual, weight, bias, eps, dropout_p, dtype):
        recorded.append(("add_norm", dropout_p, dtype))
        x = nn.functional.dropout(x, dropout_p) + residual
        return nn.functional.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(dtype)

    for name, function in (("geglu", geglu), ("add_norm", add_norm)):
        row = replace(bert_layers.FUSED_LAYERS[name], function=function, devices=("cpu",))
        monkeypatch.setitem(bert_layers.FUSED_LAYERS, name, row)
    monkeypatch.setattr(bert_layers, "triton_declines", lambda device: None)
    monkeypatch.setattr(bert_layers, "is_observed", lambda tensor: False)
    return recorded


def test_each_layer_calls_two_fused_norms_and_one_geglu(calls):
    ids, mask = ragged_batch([9, 5])
    model = tiny_model()
    model.bert(ids, attention_mask=mask)
    norm = ("add_norm", 0.0, torch.float32)
    assert calls == [norm, "geglu", norm] * 2
    calls.clear()
    model.train().bert(ids, attention_mask=mask)
    assert calls == [("add_norm", 0.1, torch.float32), "geglu", norm] * 2, "dropout comes before the first norm alone"


@pytest.mark.parametrize("low_precision", [True, False])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_norms_keep_the_dtype_that_torch_gives_them(calls, low_precision, residual_dtype):
    x, residual = torch.randn(3, 16).bfloat16(), torch.randn(3, 16, dtype=residual_dtype)
    norm = bert_layers.BertLayerNorm(16, 1e-12, low_precision).to(residual_dtype)
    assert bert_layers.add_norm(norm, x, residual).dtype == norm(x + residual).dtype == residual_dtype
    with torch.autocast("cpu", torch.bfloat16):
        dtype = bert_layers.add_norm(norm, x, residual).dtype
        # CUDA's autocast computes LayerNorm in float32, unlike that of the CPU.
        assert dtype == (norm(x + residual).dtype if low_precision else torch.float32)
    assert len(calls) == 2


def test_hooked_or_replaced_norms_are_called_as_modules(calls):
    norm = bert_layers.BertLayerNorm(16, 1e-12, False)
    x = torch.randn(3, 16)
    seen = []
    handle = norm.register_forward_hook(lambda *arguments: seen.append(arguments))
    bert_layers.add_norm(norm, x, x)
    handle.remove()
    bert_layers.add_norm(nn.LayerNorm(16), x, x)
    assert len(seen) == 1 and not calls
    bert_layers.add_norm(norm, x, x)
    assert len(calls) == 1


def test_a_row_declines_with_a_reason_what_it_cannot_compute(calls, monkeypatch):
    row, x = bert_layers.FUSED_LAYERS["add_norm"], torch.zeros(1, 16)
    assert row.declines(torch.zeros(1, 8192)) is None
    assert row.declines(torch.zeros(1, 8193)) == "it supports up to 8192 channels, got 8193"
    assert "got torch.float64" in row.declines(x.double())
    assert row.declines(x.to("meta")) == "it supports devices cpu, got meta"
    assert replace(row, function=None).declines(x) == "its package is not installed"
    monkeypatch.setattr(bert_layers, "triton_declines", lambda device: "no compiler")
    assert row.declines(x) == "no compiler"
    monkeypatch.setattr(bert_layers, "triton_declines", lambda device: None)
    monkeypatch.setattr(bert_layers, "is_observed", lambda tensor: True)
    assert row.declines(x) == "something needs to see torch's operators"
