"""torch.func: gradients, per-sample gradients, directional derivatives, calls with other parameters."""

import numerics
import pytest
import torch
from heads import HEADS, SAME, call_of, head, name_of
from torch.func import functional_call, grad, jvp, vmap

from mosaicbert.bert_layers import BertForMaskedLM, BertForSequenceClassification


def flat(gradients):
    """All gradients as one vector, as some are zero by symmetry and have rounding errors only."""
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def loss_of(model, **extra):
    """The loss of a call as a function of the parameters."""

    def loss(parameters, call):
        return functional_call(model, parameters, (), {**call, **extra}).loss

    return loss


@pytest.mark.parametrize("model_class", HEADS[1:], ids=name_of)
def test_torch_func_grad_equals_backward(model_class, backend):
    call = call_of(model_class, lengths=(90, 70))
    model = head(model_class, attn_implementation=backend)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = grad(loss_of(model))(parameters, call)
    model(**call).loss.backward()
    numerics.assert_same(*(flat(g) for g in (gradients, {n: p.grad for n, p in model.named_parameters()})), SAME)


def test_functional_call_uses_the_parameters_given(backend):
    model, other = (head(BertForMaskedLM, seed=seed, attn_implementation=backend) for seed in (0, 1))
    call = call_of(BertForMaskedLM)
    got = functional_call(model, dict(other.named_parameters()), (), call)
    numerics.assert_same(got.loss, other(**call).loss, 0.0)


@pytest.mark.parametrize("mask", [False, True], ids=["no_mask", "mask"])
@pytest.mark.parametrize("model_class", [BertForSequenceClassification, BertForMaskedLM], ids=name_of)
def test_vmap_of_grad_gives_per_sample_gradients(model_class, mask):
    lengths = (7, 4, 5) if mask else (7, 7, 7)
    call = call_of(model_class, lengths)
    if not mask:
        del call["attention_mask"]
    model = head(model_class, attn_implementation="eager")
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    rows = {name: tensor[:, None] for name, tensor in call.items()}
    gradients = vmap(grad(loss_of(model)), in_dims=(None, 0))(parameters, rows)
    for sample in range(3):
        model.zero_grad()
        model(**{name: tensor[sample] for name, tensor in rows.items()}).loss.backward()
        one = {name: gradient[sample] for name, gradient in gradients.items()}
        numerics.assert_same(flat(one), flat({n: p.grad for n, p in model.named_parameters()}), SAME)


def test_jvp_of_the_logits_equals_the_product_with_the_gradient():
    model = head(BertForSequenceClassification, attn_implementation="eager")
    call = call_of(BertForSequenceClassification, labels=False)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tangents = {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}

    def logits(parameters):
        return functional_call(model, parameters, (), call).logits

    _, direction = jvp(logits, (parameters,), (tangents,))
    gradients = grad(lambda p: logits(p).sum())(parameters)
    expected = sum((gradients[name] * tangents[name]).sum() for name in parameters)
    numerics.assert_same(direction.sum(), expected, 1e-4)
