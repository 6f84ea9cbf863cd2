"""Hooks on parts of the model: what they see, and that what they change has its effect."""

import numerics
import pytest
import torch
from heads import HEADS, assert_equal_outputs, call_of, gradless, head, name_of
from models import ragged_batch

from mosaicbert.bert_layers import BertForSequenceClassification, BertModel


def test_a_hook_on_a_layer_finds_the_padded_states_through_the_batch_in_its_arguments():
    """Inner layers see packed tokens [T, E]; the batch that travels with them puts them back."""
    model = head(BertModel)
    seen = []

    def hook(module, arguments, output):
        packed = next(x for x in arguments if hasattr(x, "unpack"))
        seen.append(packed.unpack(output[0]))

    for layer in model.encoder.layer:
        layer.register_forward_hook(hook)
    ids, mask = ragged_batch([7, 4])
    states = model(ids, mask, output_hidden_states=True).hidden_states
    assert_equal_outputs(seen, list(states[1:]), 0.0)


def test_integrated_gradients_over_inputs_embeds_sum_to_the_difference():
    """As Captum computes them: a batch of steps between a baseline and the input, which keeps its [B, S, E] shape."""
    model = gradless(head(BertForSequenceClassification)).double()
    ids, mask = ragged_batch([7, 4])
    words = model.get_input_embeddings()
    end, start = words(ids), words(torch.zeros_like(ids))
    steps = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    total = torch.zeros_like(end)
    for step in steps.split(50):
        point = (start + step[:, None, None, None] * (end - start)).flatten(0, 1).requires_grad_()
        score = model(inputs_embeds=point, attention_mask=mask.repeat(len(step), 1)).logits[:, 1].sum()
        total += torch.autograd.grad(score, point)[0].view(len(step), *end.shape).sum(0)
    attributions = ((end - start) * total / 400).sum((1, 2))
    difference = [model(inputs_embeds=x, attention_mask=mask).logits[:, 1] for x in (end, start)]
    numerics.assert_same(attributions, difference[0] - difference[1], 1e-4)


@pytest.mark.parametrize("inner", ["embeddings.word_embeddings", "encoder.layer.1.mlp.wo"])
def test_hooks_that_replace_an_output_reach_the_answer(inner):
    model = head(BertModel)
    call = call_of(BertModel)
    before = model(**call).last_hidden_state
    seen = []
    handle = model.get_submodule(inner).register_forward_hook(lambda m, a, out: seen.append(out) or out * 2)
    after = model(**call).last_hidden_state
    # Input embeddings are seen in the caller's layout, inner layers packed.
    assert seen[0].shape == ((2, 7, 48) if "embeddings" in inner else (11, 48))
    assert numerics.relative_error(after, before) > 1e-3
    handle.remove()
    numerics.assert_same(model(**call).last_hidden_state, before, 0.0)


@pytest.mark.parametrize("model_class", HEADS, ids=name_of)
def test_inner_modules_return_tensors_only(model_class):
    """Captum clones every output of the layer that it attributes to."""
    model = head(model_class)
    seen = []
    for name, module in model.named_modules():
        if name.split(".")[-1] not in ("", "bert", "encoder"):
            module.register_forward_hook(lambda m, a, out: seen.extend(out if isinstance(out, tuple) else (out,)))
    for weights in (False, True):
        model(**call_of(model_class), output_attentions=weights)
    assert seen and all(torch.is_tensor(x) for x in seen)


def test_noise_on_the_input_embeddings_sees_their_padded_shape():
    """As NEFTune adds it: a hook whose scale is the square root of S * E."""
    model = head(BertModel)
    ids, mask = ragged_batch([7, 4])
    noise = torch.linspace(-1, 1, 7 * 48).view(7, 48)
    words = model.get_input_embeddings()
    expected = model(inputs_embeds=words(ids) + noise / (7 * 48) ** 0.5, attention_mask=mask).last_hidden_state
    words.register_forward_hook(lambda m, a, out: out + noise / (out.size(1) * out.size(2)) ** 0.5)
    numerics.assert_same(model(ids, mask).last_hidden_state, expected, 0.0)
