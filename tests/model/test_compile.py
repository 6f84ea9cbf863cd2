"""torch.compile: whole graphs, single layers, packed rows, and the same numbers as without it."""

import numerics
import pytest
import torch
from heads import HEADS, SAME, assert_equal_outputs, call_of, head, name_of, outputs
from models import holed_batch, packed_call, ragged_batch, random_labels, tiny_model

from mosaicbert.bert_layers import BertForMaskedLM, BertForSequenceClassification, BertModel

# "auto" compiles to SDPA.
COMPILED = [("auto", None), ("eager", True), ("sdpa", True)]


@pytest.mark.parametrize("backend, dynamic", COMPILED)
def test_compiled_without_a_graph_break_agrees(backend, dynamic):
    torch._dynamo.reset()
    ids, mask = holed_batch()
    mask[4, 0] = 1
    labels = random_labels(ids)
    model = tiny_model(attn_implementation=backend, num_hidden_layers=1)
    expected = model(ids, mask, labels=labels)
    expected.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    plain = model(ids[:5]).logits
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    output = compiled(ids, mask, labels=labels)
    numerics.assert_same(output.logits, expected.logits, SAME)
    numerics.assert_same(output.loss, expected.loss, SAME)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        numerics.assert_same(parameter.grad, gradients[name], SAME, name)
    with torch.no_grad():  # a second graph, which needs no backward
        numerics.assert_same(compiled(ids[:5]).logits, plain, SAME)


def test_layers_compiled_one_by_one_agree():
    torch._dynamo.reset()
    model = tiny_model(num_hidden_layers=1)
    ids, mask = ragged_batch([9, 24, 3])
    expected = model(ids, mask, labels=random_labels(ids))
    expected.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for layer in model.bert.encoder.layer:
        layer.compile(backend="aot_eager")
    output = model(ids, mask, labels=random_labels(ids))
    numerics.assert_same(output.logits, expected.logits, SAME)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        numerics.assert_same(parameter.grad, gradients[name], SAME, name)


def test_compiled_by_inductor_agrees():
    torch._dynamo.reset()
    ids, mask = ragged_batch([9, 24])
    model = tiny_model(num_hidden_layers=1)
    expected = model(ids, mask).logits
    numerics.assert_same(torch.compile(model)(ids, mask).logits, expected, SAME)


@pytest.mark.parametrize("model_class", HEADS[1:], ids=name_of)
def test_an_encoder_compiled_inside_its_head_is_what_the_head_runs(model_class):
    torch._dynamo.reset()
    graphs = []
    model, call = head(model_class, num_hidden_layers=1), call_of(model_class)
    expected = outputs(model, **call)
    model.bert = torch.compile(model.bert, backend=lambda graph, inputs: graphs.append(graph) or graph)
    assert_equal_outputs(outputs(model, **call), expected)
    assert graphs


def test_a_problem_type_guessed_under_compile_is_kept():
    torch._dynamo.reset()
    model = head(BertForSequenceClassification, num_labels=1, num_hidden_layers=1)
    torch.compile(model, backend="eager")(**call_of(BertModel), labels=torch.tensor([0.5, -2.0]))
    assert model.config.problem_type == "regression"


@pytest.mark.parametrize("boundaries", [False, True], ids=["position_ids", "cu_seq_lens_q"])
@pytest.mark.parametrize("backend, dynamic", COMPILED)
def test_packed_rows_under_compile_stay_apart(backend, boundaries, dynamic):
    torch._dynamo.reset()
    model = head(BertForMaskedLM, num_hidden_layers=1, attn_implementation=backend).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=dynamic)
    for lengths in ((5, 1, 8), (3, 11)):
        call, (ids, mask) = packed_call(lengths, boundaries)
        got, expected = compiled(**call, labels=call["input_ids"]), model(ids, mask, labels=ids)
        numerics.assert_same(got.logits[0], expected.logits[mask.bool()], SAME)
        numerics.assert_same(got.loss, expected.loss, SAME)


def test_packed_rows_under_compile_give_the_gradients_of_padded_ones():
    torch._dynamo.reset()
    call, (ids, mask) = packed_call()
    model, other = (head(BertForMaskedLM, num_hidden_layers=1) for _ in range(2))
    torch.compile(model, backend="aot_eager")(**call, labels=call["input_ids"]).loss.backward()
    other(ids, mask, labels=ids).loss.backward()
    for (name, parameter), expected in zip(model.named_parameters(), other.parameters()):
        numerics.assert_same(parameter.grad, expected.grad, SAME, name)
