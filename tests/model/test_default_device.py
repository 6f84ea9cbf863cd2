"""A model on the CPU computes the same while torch's default device is another one."""

import numerics
import pytest
import torch
from heads import HEADS, assert_equal_outputs, call_of, head, loss_and_gradients, name_of, outputs
from models import ragged_batch, tiny_model

from mosaicbert.bert_layers import ATTENTION_BACKENDS, AUTOMATIC

SAME = numerics.SAME[torch.float32]
# Triton's row and the fused layers: tests/kernels/test_triton_torch.py.
NAMES = [AUTOMATIC, *(name for name in ATTENTION_BACKENDS if name != "triton")]


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_implementation_ignores_the_default_device(name):
    model = tiny_model(attn_implementation=name)
    longest = 450 if name in (AUTOMATIC, "cpu") else 90  # beyond bert_attention_cpu.CUT_FROM, which others have not
    ids, mask = ragged_batch([longest, 20])
    texts = torch.cat((torch.arange(longest - 50), torch.arange(50))).expand(2, -1)
    for layout in ({"attention_mask": mask}, {"position_ids": texts}, {}):
        with torch.no_grad():
            expected = model(ids, **layout).logits
            with torch.device("meta"):
                found = model(ids, **layout).logits
        numerics.assert_same(found, expected, SAME)
        expected = loss_and_gradients(model, ids, labels=ids, **layout)
        with torch.device("meta"):
            found = loss_and_gradients(model, ids, labels=ids, **layout)
        assert_equal_outputs(found, expected)


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("model_class", HEADS, ids=name_of)
def test_every_head_ignores_the_default_device(model_class, unpad):
    model, call = head(model_class, unpad_inputs=unpad), call_of(model_class)
    expected = outputs(model, **call)
    with torch.device("meta"):
        assert_equal_outputs(outputs(model, **call), expected)
