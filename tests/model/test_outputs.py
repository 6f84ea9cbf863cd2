"""What a call takes and returns, and parts of the model that are called or replaced alone."""

import numerics
import pytest
import torch
from heads import SAME, head
from models import VOCAB, holed_batch, ragged_batch, tiny_model
from torch import nn

from mosaicbert.bert_layers import BertModel


def test_extra_outputs_come_on_request_only(backend):
    model = tiny_model(BertModel, attn_implementation=backend)
    ids, mask = holed_batch()
    plain = model(ids, mask)
    assert plain.hidden_states is None and plain.attentions is None
    full = model(ids, mask, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in full.hidden_states] == [(6, 24, 48)] * 3
    assert [tuple(weights.shape) for weights in full.attentions] == [(6, 12, 24, 24)] * 2
    numerics.assert_same(full.hidden_states[-1], plain.last_hidden_state, SAME)
    for weights in full.attentions:
        sums = weights.sum(-1)
        attended = mask.bool()[:, None, :].expand_as(sums)
        numerics.assert_same(sums[attended], torch.ones_like(sums[attended]), 1e-6)
        assert sums[~attended].abs().sum() == 0
        assert weights.transpose(-1, -2)[~attended].abs().sum() == 0
    for state in full.hidden_states:
        assert state[~mask.bool()].abs().sum() == 0
    model.config.output_hidden_states = True
    assert len(model(ids, mask).hidden_states) == 3


def test_return_dict_false_returns_what_is_there_as_a_tuple():
    model = tiny_model()
    ids, mask = ragged_batch([5, 3])
    (logits,) = model(ids, mask, return_dict=False)
    loss, again = model(ids, mask, labels=ids, return_dict=False)
    assert logits.shape == again.shape == (2, 5, VOCAB) and loss.dim() == 0
    model.config.return_dict = False
    assert isinstance(model(ids, mask), tuple)


def test_inputs_embeds_equal_input_ids_and_token_types_are_optional(backend):
    model = tiny_model(attn_implementation=backend)
    ids, mask = holed_batch()
    expected = model(ids, mask).logits
    numerics.assert_same(
        model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask).logits, expected, 0.0
    )
    numerics.assert_same(model(ids, mask, token_type_ids=torch.zeros_like(ids)).logits, expected, 0.0)
    assert numerics.relative_error(model(ids, mask, token_type_ids=torch.ones_like(ids)).logits, expected) > 1e-3


def test_embeddings_and_pooler_called_alone_take_what_stock_berts_take():
    model = head(BertModel)
    ids, mask = ragged_batch([7, 7])
    types = ids % 2
    output = model(ids, token_type_ids=types, output_hidden_states=True)
    numerics.assert_same(model.embeddings(ids, types), output.hidden_states[0], SAME)
    numerics.assert_same(model.embeddings(input_ids=ids), model(ids, output_hidden_states=True).hidden_states[0], SAME)
    numerics.assert_same(model.pooler(output.last_hidden_state), output.pooler_output, SAME)


@pytest.mark.parametrize("kind", ["word", "token_type"])
def test_larger_embeddings_that_replace_the_models_take_their_ids(kind):
    model = head(BertModel)
    old = getattr(model.embeddings, f"{kind}_embeddings")
    new = nn.Embedding(old.num_embeddings + 2, old.embedding_dim)
    new.weight.data[-1] = old.weight[1]
    setattr(model.embeddings, f"{kind}_embeddings", new)
    new.weight.data[: old.num_embeddings] = old.weight
    name, first, last = {"word": "input_ids", "token_type": "token_type_ids"}[kind], 1, old.num_embeddings + 1
    call = {"input_ids": torch.tensor([[1, 1, 1]])}
    known, added = ({**call, name: torch.full((1, 3), number)} for number in (first, last))
    numerics.assert_same(model(**added).last_hidden_state, model(**known).last_hidden_state, 0.0)
    with pytest.raises(ValueError, match=rf"{name} must lie in \[0, {last + 1}\), got {last + 1}"):
        model(**{**call, name: torch.full((1, 3), last + 1)})
