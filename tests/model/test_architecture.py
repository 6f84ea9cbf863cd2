"""The parts of the architecture one by one, on numbers small enough to check by hand."""

import numerics
import torch
from models import tiny_model

from mosaicbert.bert_attention import alibi_bias
from mosaicbert.bert_layers import BertModel, geglu

SAME = numerics.SAME[torch.float32]


def test_the_distance_penalty_is_the_same_in_both_directions():
    positions = torch.arange(3)
    bias = alibi_bias(torch.tensor([1.0, 0.5]), positions, positions)
    expected = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]])
    assert torch.equal(bias, torch.stack((-expected, -expected / 2)))


def test_the_gate_is_the_first_half_of_the_gated_layer_and_the_value_the_second():
    numerics.assert_same(geglu(torch.tensor([[1.0, 3.0]])), torch.tensor([[0.8413447 * 3]]), SAME)


def test_scores_are_divided_by_the_root_of_the_head_size():
    for heads, head_dim in ((12, 4), (3, 16)):
        model = tiny_model(BertModel, num_attention_heads=heads)
        assert {layer.attention.self.scale for layer in model.encoder.layer} == {head_dim**-0.5}


def test_each_block_adds_its_input_before_its_layernorm():
    layer = tiny_model(BertModel).encoder.layer[0]
    hidden = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    mlp, output = layer.mlp, layer.attention.output
    numerics.assert_same(mlp(hidden), mlp.layernorm(mlp.project(hidden) + hidden), SAME)
    context = hidden.flip(0)
    numerics.assert_same(output(context, hidden), output.LayerNorm(output.dense(context) + hidden), SAME)
