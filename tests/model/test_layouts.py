"""Padded, packed and single texts give the same numbers, wherever padding and holes are."""

import numerics
import pytest
import torch
from heads import SAME, assert_equal_outputs, call_of, head, name_of, outputs
from models import packed_call, ragged_batch, tiny_model

from mosaicbert.bert_layers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)


def test_padded_packed_and_single_agree(backend):
    model = tiny_model(attn_implementation=backend)
    lengths = [11, 1, 30, 7]
    ids, mask = ragged_batch(lengths, length=34)
    padded = model(ids, mask).logits
    flat = torch.cat([row[:n] for row, n in zip(ids, lengths)])[None]
    bounds = torch.tensor([0, 11, 12, 42, 49], dtype=torch.int32)
    packed = model(flat, cu_seq_lens_q=bounds, max_length_q=30).logits[0]
    start = 0
    for row, length in enumerate(lengths):
        single = model(ids[row : row + 1, :length]).logits[0]
        numerics.assert_same(padded[row, :length], single, SAME, f"row {row} padded")
        numerics.assert_same(packed[start : start + length], single, SAME, f"row {row} packed")
        assert padded[row, length:].abs().sum() == 0
        start += length


def test_a_row_without_tokens_and_a_batch_without_any_are_zero(backend):
    model = tiny_model(BertModel, attn_implementation=backend)
    ids, mask = ragged_batch([0, 5], length=8)
    output = model(ids, mask)
    assert output.last_hidden_state[0].abs().sum() == 0
    assert torch.isfinite(output.pooler_output).all()
    numerics.assert_same(output.last_hidden_state[1, :5], model(ids[1:, :5]).last_hidden_state[0], SAME)
    nothing = model(ids, torch.zeros_like(mask))
    assert nothing.last_hidden_state.abs().sum() == 0 and nothing.last_hidden_state.shape == (2, 8, 48)


def test_flattening_collator_input_gives_the_padded_numbers(backend):
    """transformers' DataCollatorWithFlattening, with position ids alone and with its boundaries."""
    from transformers import DataCollatorWithFlattening

    model = tiny_model(attn_implementation=backend)
    ids, mask = ragged_batch([5, 1, 8])
    labels = ids.index_fill(1, torch.tensor(0), -100)  # the collator's separator
    expected = model(ids, mask, labels=labels)
    features = [{"input_ids": row[:n].tolist()} for row, n in zip(ids, [5, 1, 8])]
    for boundaries in (False, True):
        batch = DataCollatorWithFlattening(
            return_tensors="pt", return_position_ids=not boundaries, return_flash_attn_kwargs=boundaries
        )(features)
        output = model(**batch)
        numerics.assert_same(output.loss, expected.loss, SAME)
        numerics.assert_same(output.logits[0], expected.logits[mask.bool()], SAME)
    # Ordinary position ids are no boundaries.
    plain = model(ids, mask, labels=labels, position_ids=torch.arange(8)[None])
    numerics.assert_same(plain.logits, expected.logits, 0.0)


def test_flattened_sequences_are_pooled_one_by_one(backend):
    model = tiny_model(BertForSequenceClassification, num_labels=3, attn_implementation=backend)
    ids, mask = ragged_batch([5, 2, 8])
    expected = model(ids, mask).logits
    flat = ids[mask.bool()][None]
    numerics.assert_same(model(flat, cu_seq_lens_q=torch.tensor([0, 5, 7, 15])).logits, expected, SAME)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mask", [False, True], ids=["no_mask", "mask_of_ones"])
def test_several_rows_of_concatenated_texts_are_answered_correctly_or_refused(compiled, mask):
    torch._dynamo.reset()
    model = head(BertForMaskedLM, num_hidden_layers=1)
    call, (ids, keep) = packed_call((5, 1, 8))
    expected = model(ids, keep).logits[keep.bool()]
    rows = {name: tensor.repeat(2, 1) for name, tensor in call.items()}
    if mask:
        rows["attention_mask"] = torch.ones_like(rows["input_ids"])
    ask = torch.compile(model, backend="aot_eager") if compiled else model
    try:
        logits = ask(**rows).logits
    except ValueError as error:
        assert "position_ids" in str(error)
    else:
        for row in logits:
            numerics.assert_same(row, expected, SAME)


@pytest.mark.parametrize("boundaries", [False, True], ids=["position_ids", "cu_seq_lens_q"])
@pytest.mark.parametrize("model_class", [BertForQuestionAnswering, BertForMultipleChoice], ids=name_of)
def test_heads_that_need_one_text_per_row_refuse_packed_rows(model_class, boundaries):
    call, _ = packed_call(boundaries=boundaries)
    if model_class is BertForMultipleChoice:
        call |= {name: call[name][None] for name in ("input_ids", "position_ids") if name in call}
    spelling = "cu_seq_lens_q" if boundaries else "position_ids"
    message = f"^{spelling}.* cannot be served by {model_class.__name__}, which needs one text per row"
    with pytest.raises(ValueError, match=message):
        head(model_class)(**call)


@pytest.mark.parametrize("model_class", [BertForQuestionAnswering, BertForMultipleChoice], ids=name_of)
def test_heads_that_need_one_text_per_row_take_ordinary_position_ids(model_class):
    call = call_of(model_class, lengths=(7, 7), labels=False)
    positions = torch.arange(7).expand_as(call["input_ids"])
    expected = outputs(head(model_class), **call)
    assert_equal_outputs(outputs(head(model_class), **call, position_ids=positions), expected, 0.0)
