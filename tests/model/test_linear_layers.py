"""Linear layers as quantizers, hooks, pruning and per-sample gradients find them."""

import copy

import numerics
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from heads import HEADS, SAME, call_of, head, linear_layers, name_of
from torch import nn
from transformers import AutoTokenizer

from mosaicbert.bert_layers import BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertModel


@pytest.mark.parametrize("model_class", HEADS, ids=name_of)
def test_every_matrix_but_an_embedding_belongs_to_a_plain_linear_layer(model_class):
    model = head(model_class)
    owners = {type(module) for module in model.modules() for p in module.parameters(recurse=False) if p.dim() == 2}
    assert owners == {nn.Embedding, nn.Linear}


def test_quantize_dynamic_quantizes_every_linear_layer():
    model = head(BertForMaskedLM)
    call = call_of(BertForMaskedLM, labels=False)
    expected = model(**call).logits
    names = set(linear_layers(model))
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    found = {n for n, module in quantized.named_modules() if type(module) is torch.ao.nn.quantized.dynamic.Linear}
    assert found == names and len(names) == 2 * 4 + 2
    logits = quantized(**call).logits
    assert not torch.equal(logits, expected)
    numerics.assert_same(logits, expected, numerics.QUANTIZED)


def test_eight_bit_weights_of_the_shipped_checkpoint_keep_its_answers():
    """As weight-only quantizers round them (torchao, quanto, bitsandbytes): 127 steps a row of each linear layer."""
    model = BertForMaskedLM.from_pretrained(ROOT).eval()
    texts = ["Yesterday she [MASK] a letter.", "Tea, bread and butter."]
    batch = AutoTokenizer.from_pretrained(ROOT)(texts, padding=True, return_tensors="pt")
    keep = batch["attention_mask"].bool()

    def answers():
        with torch.inference_mode():
            return model.bert(**batch).last_hidden_state[keep], model(**batch).logits[keep]

    expected = answers()
    for layer in linear_layers(model.bert).values():
        step = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        layer.weight.data = (layer.weight / step).round().detach() * step
    for got, before in zip(answers(), expected):
        assert not torch.equal(got, before)
        assert F.cosine_similarity(got, before, dim=-1).mean() > 0.99


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("model_class", [BertModel, BertForMaskedLM], ids=name_of)
def test_hooks_on_linear_layers_are_called_once_with_the_result(model_class, grad):
    model = head(model_class)
    seen = []

    def check(name):
        def hook(module, arguments, output):
            seen.append(name)
            numerics.assert_same(output, F.linear(arguments[0], module.weight, module.bias), SAME)

        return hook

    for name, module in linear_layers(model).items():
        module.register_forward_hook(check(name))
    with torch.set_grad_enabled(grad):
        model(**call_of(model_class, lengths=(90, 70), labels=False))
    assert sorted(seen) == sorted(linear_layers(model))


def recorded(model):
    """Inputs and output gradients of the encoder's linear layers, by name, as hooks collect them in calls to come."""
    inputs, grads = {}, {}
    for name, module in linear_layers(model).items():
        if name.startswith("bert.encoder"):
            module.register_forward_hook(lambda m, arguments, output, name=name: inputs.update({name: arguments[0]}))
            module.register_full_backward_hook(lambda m, into, out, name=name: grads.update({name: out[0]}))
    return inputs, grads


@pytest.mark.parametrize("model_class", HEADS[1:], ids=name_of)
def test_per_sample_gradients_come_from_hooks_on_linear_layers(model_class, backend):
    """As Opacus collects them: input and output gradient of each linear layer, contracted a sample at a time."""
    model, single = (head(model_class, attn_implementation=backend) for _ in range(2))
    call = call_of(model_class, [7, 4, 9])
    inputs, grads = recorded(model)
    count = {BertForMaskedLM: 20, BertForTokenClassification: 20}.get(model_class, 3)
    model(**call, num_items_in_batch=count).loss.backward()
    rows = call["attention_mask"].flatten(1).sum(1).tolist()
    for sample, size in enumerate(rows):
        start = sum(rows[:sample])
        single.zero_grad()
        one = {name: tensor[sample : sample + 1] for name, tensor in call.items()}
        single(**one, num_items_in_batch=count).loss.backward()
        for name in inputs:
            part = slice(start, start + size)
            got = grads[name][part].T @ inputs[name][part]
            numerics.assert_same(got, single.get_parameter(f"{name}.weight").grad, SAME, name)


def test_layers_keep_the_batch_dimension_where_padding_is_kept(backend):
    """What Opacus and Captum need: `unpad_inputs=False` shows every layer [B, S, ...], and padding adds no gradient."""
    fields = {"attn_implementation": backend, "unpad_inputs": False}
    model, single = (head(BertForSequenceClassification, **fields) for _ in range(2))
    inputs, grads = recorded(model)
    call = call_of(BertForSequenceClassification)
    model(**call, num_items_in_batch=1).loss.backward()
    for sample in range(2):
        single.zero_grad()
        single(**{name: tensor[sample : sample + 1] for name, tensor in call.items()}).loss.backward()
        for name in inputs:
            assert inputs[name].shape[:2] == grads[name].shape[:2] == (2, 7)
            got = torch.einsum("so,si->oi", grads[name][sample], inputs[name][sample])
            numerics.assert_same(got, single.get_parameter(f"{name}.weight").grad, SAME, name)
