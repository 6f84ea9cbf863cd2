"""The model against the independent float64 formula of `reference.py`; published values: tests/card/test_parity.py."""

import numerics
import pytest
import reference
import torch
from models import holed_batch, tiny_model

from mosaicbert.bert_attention import alibi_slopes
from mosaicbert.bert_layers import BertModel


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
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


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 16, 20, 25])
def test_slopes_match_the_reference(heads):
    assert alibi_slopes(heads) == pytest.approx(reference.alibi_slopes(heads), rel=1e-12)


def test_slopes_of_12_heads_are_the_published_list():
    expected = [2.0**-n for n in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    assert alibi_slopes(12) == pytest.approx(expected, rel=1e-12)
