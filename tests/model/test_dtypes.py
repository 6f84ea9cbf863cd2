"""Weights in low precision, autocast, and the dtype of LayerNorm."""

import numerics
import pytest
import torch
from models import holed_batch, random_labels, tiny_model

from mosaicbert.bert_layers import BertModel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_weights_err_no_more_than_the_plain_formula(backend, dtype):
    ids, mask = holed_batch()
    truth = tiny_model(BertModel).double()(ids, mask).last_hidden_state
    plain = tiny_model(BertModel, attn_implementation="eager").to(dtype)(ids, mask).last_hidden_state
    model = tiny_model(BertModel, attn_implementation=backend).to(dtype)
    output = model(ids, mask).last_hidden_state
    assert output.dtype == dtype
    numerics.assert_no_worse(output, plain, truth, numerics.MODEL)
    loss = tiny_model(attn_implementation=backend).to(dtype)(ids, mask, labels=random_labels(ids)).loss
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)


@pytest.mark.parametrize("low_precision_layernorm", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains_in_every_backend(backend, dtype, low_precision_layernorm):
    ids, mask = holed_batch()
    model = tiny_model(attn_implementation=backend, low_precision_layernorm=low_precision_layernorm)
    exact = model(ids, mask, labels=random_labels(ids)).loss
    with torch.autocast("cpu", dtype=dtype):
        loss = model(ids, mask, labels=random_labels(ids)).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all(), name
    # Rounding of the dtype, through two layers, on a loss of about log(101): 4 ulp of it.
    assert abs(loss.item() - exact.item()) < 4 * torch.finfo(dtype).eps * exact.item()


def test_low_precision_layernorm_computes_in_the_autocast_dtype():
    for low, expected in ((True, torch.bfloat16), (False, torch.float32)):
        model = tiny_model(BertModel, low_precision_layernorm=low)
        seen = []
        model.embeddings.LayerNorm.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.ones(1, 4, dtype=torch.long))
        assert [output.dtype for output in seen] == [expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_layernorm_in_float64_stays_in_float64_under_autocast(dtype):
    """Autocast leaves float64 alone, and so does the LayerNorm."""
    ids, mask = holed_batch()
    model = tiny_model(low_precision_layernorm=True).double()
    expected = model(ids, mask).logits
    with torch.autocast("cpu", dtype=dtype):
        numerics.assert_same(model(ids, mask).logits, expected, 0.0)
