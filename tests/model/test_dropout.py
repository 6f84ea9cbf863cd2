"""Dropout, and gradient checkpointing, which must repeat its masks."""

import numerics
import pytest
import torch
from heads import HEADS, SAME, call_of, head, name_of
from models import holed_batch, random_labels, tiny_model

from mosaicbert.bert_layers import ATTENTION_BACKENDS
from mosaicbert.bert_padding import pack_padded


def test_eval_ignores_dropout_rates_and_train_obeys_them(backend):
    """In several encoder packages attention dropout stays on in eval, or never turns on."""
    ids, mask = holed_batch()
    rates = [{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": p} for p in (0.0, 0.5)]
    rates.append({"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.0})
    models = [tiny_model(attn_implementation=backend, **fields) for fields in rates]
    expected = models[0](ids, mask).logits
    for model in models:
        numerics.assert_same(model(ids, mask).logits, expected, 0.0)
        model.train()
    numerics.assert_same(models[0](ids, mask).logits, expected, 0.0)
    for model in models[1:]:
        assert numerics.relative_error(model(ids, mask).logits, expected) > 1e-2
        torch.manual_seed(3)
        first = model(ids, mask).logits
        torch.manual_seed(3)
        numerics.assert_same(model(ids, mask).logits, first, 0.0)


@pytest.mark.parametrize("model_class", HEADS, ids=name_of)
def test_every_dropout_layer_drops_its_share_once_in_a_training_call(model_class):
    shares = {}

    def record(name):
        def hook(module, arguments, output):
            shares.setdefault(name, []).append((output == 0).float().mean().item())

        return hook

    model = head(model_class, hidden_dropout_prob=0.5).train()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Dropout)}
    for name, layer in layers.items():
        layer.register_forward_hook(record(name))
    model(**call_of(model_class, lengths=[60] * 8))
    assert shares.keys() == layers.keys() and len(layers) >= 1 + 2 * 2  # of the embedding, and two in each layer
    assert all(len(found) == 1 and 0.3 < found[0] < 0.7 for found in shares.values()), shares


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("rows", [False, True], ids=["packed", "holes"])
def test_attention_dropout_keeps_the_expectation(backend, rows):
    """Dropout works in every backend: the mean over many draws is the result without it."""
    torch.manual_seed(0)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, 9:], mask[2] = 0, 0
    if rows:
        mask[1, 4] = 0
    packed = pack_padded(mask, (3, 12), mask.device)
    total = int(mask.sum())
    qkv = torch.randn(total, 3, 2, 8)
    slopes = torch.tensor([0.5, 0.1])
    attend = ATTENTION_BACKENDS[backend].function
    exact = attend(qkv, packed, slopes, 0.3, 0.0)
    draws = torch.stack([attend(qkv, packed, slopes, 0.3, 0.4) for _ in range(500)])
    spread = draws.std(0) / 500**0.5
    # Over 300 comparisons of a mean: five standard errors happen by chance once in two thousand runs.
    assert ((draws.mean(0) - exact).abs() < 5 * spread + 1e-6).all()
    assert (draws.std(0) > 0).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_each_layer_twice_and_gives_equal_gradients(backend, reentrant):
    ids, mask = holed_batch()
    gradients, runs = [], []
    for checkpointing in (False, True):
        model = tiny_model(attn_implementation=backend, attention_probs_dropout_prob=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.bert.encoder.layer[0].attention.register_forward_pre_hook(lambda *_: runs.append(1))
        torch.manual_seed(1)
        model(ids, mask, labels=random_labels(ids)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(runs) == 2, "each layer runs again in the backward pass"
    for name, gradient in gradients[0].items():
        numerics.assert_same(gradients[1][name], gradient, SAME, name)
