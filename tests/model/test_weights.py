"""Parameters: ties, initialisation and LayerNorm epsilons; a model holds nothing else."""

import copy

import numerics
import pytest
import torch
from heads import SAME
from models import VOCAB, ragged_batch, tiny_model

from mosaicbert.bert_layers import BertForMaskedLM


def test_tie_holds_by_identity_after_resize():
    model = tiny_model()
    ids, mask = ragged_batch([6, 9])
    before = model(ids, mask).logits
    model.resize_token_embeddings(VOCAB + 11)
    decoder = model.cls.predictions.decoder
    assert decoder.weight is model.get_input_embeddings().weight
    assert decoder.weight.shape[0] == decoder.bias.shape[0] == model.config.vocab_size == VOCAB + 11
    numerics.assert_same(model(ids, mask).logits[..., :VOCAB], before, SAME)


def test_layer_norm_eps_is_that_of_every_layernorm_but_the_mlm_heads():
    model = tiny_model(layer_norm_eps=1e-5)
    norms = {name: module.eps for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    assert norms.pop("cls.predictions.transform.LayerNorm") == 1e-12
    assert len(norms) == 5 and set(norms.values()) == {1e-5}


def test_initialisation_follows_the_published_rule():
    torch.manual_seed(0)
    model = BertForMaskedLM._from_config(tiny_model().config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().sum() == 0, name
        elif "norm" in name.lower():
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.1, rel=0.2), name
            # Five standard errors of a mean of N(0, 0.1).
            assert abs(parameter.mean().item()) < 5 * 0.1 / parameter.numel() ** 0.5, name
    assert model.get_input_embeddings().weight[0].abs().sum() == 0


def test_nothing_is_stored_but_parameters():
    """State built in __init__ is garbage after a load on the meta device."""
    model = tiny_model()
    assert list(model.buffers()) == []
    with torch.device("meta"):
        BertForMaskedLM(copy.deepcopy(model.config))
