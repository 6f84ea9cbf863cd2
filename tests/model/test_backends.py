"""The attention backends inside the model: which one is chosen, and that all agree."""

import numerics
import pytest
import torch
from heads import SAME, assert_equal_outputs, call_of, head
from models import ragged_batch, random_labels, tiny_model

from mosaicbert.bert_layers import ATTENTION_BACKENDS, BertModel, choose_attention
from mosaicbert.bert_padding import pack_batch, pack_padded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_tensor_and_not_an_import_chooses_the_backend(dtype):
    """Triton is importable here, and may find a GPU; tensors on the CPU are served without it all the same."""
    pytest.importorskip("triton", reason="without Triton the reason is another one: tests/loading/test_loading.py")
    qkv = torch.randn(5, 3, 2, 16, dtype=dtype)
    packed = pack_batch(torch.ones(1, 5, dtype=torch.long))
    assert choose_attention("auto", qkv, packed, 0.0) is ATTENTION_BACKENDS["cpu"].function
    assert choose_attention("auto", qkv, packed, 0.1) is ATTENTION_BACKENDS["sdpa"].function
    ids, mask = ragged_batch([9, 4])
    model = tiny_model().to(dtype)
    assert model.config._attn_implementation == "auto"
    model(ids, mask, labels=random_labels(ids)).loss.backward()
    assert torch.isfinite(model.bert.encoder.layer[0].attention.self.Wqkv.weight.grad).all()


@pytest.mark.parametrize("size", [1e10, 1e16, 1e18], ids=str)
def test_backends_agree_on_scores_of_any_finite_size(size):
    """Bounds of distances in tokens must not overflow an integer; 1e18 squared is still finite in float32."""
    qkv = torch.randn(1100, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    qkv[:, :2] *= size
    packed = pack_padded(None, (1, 1100), torch.device("cpu"))
    slopes = torch.tensor([0.5, 0.004])
    serving = [row.function for row in ATTENTION_BACKENDS.values() if row.declines(qkv, packed) is None]
    *results, expected = (function(qkv, packed, slopes, 0.3, 0.0) for function in serving)
    assert len(results) == 2
    for result in results:
        numerics.assert_same(result, expected, SAME)


@pytest.mark.parametrize("when", ["before", "loaded", "after"])
def test_output_attentions_in_the_config_is_served_by_eager(tmp_path, when):
    call = call_of(BertModel)
    expected = head(BertModel)(**call, output_attentions=True)
    if when == "before":
        model = head(BertModel, output_attentions=True)
    elif when == "loaded":
        head(BertModel).save_pretrained(tmp_path)
        model = BertModel.from_pretrained(tmp_path, output_attentions=True).eval()
    else:
        model = head(BertModel)
        model.config.output_attentions = True
    output = model(**call)
    assert_equal_outputs(output.attentions, expected.attentions, 0.0)
    numerics.assert_same(output.last_hidden_state, expected.last_hidden_state, 0.0)
    model.config.output_attentions = False
    assert model(**call).attentions is None
    assert model.config._attn_implementation in ("auto", "eager")
