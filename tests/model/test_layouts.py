"""Padded, packed and single texts give the same numbers, wherever padding and holes are."""

import numerics
import pytest
import torch
from heads import SAME, assert_equal_outputs, call_of, head, name_of, outputs
from models import holed_batch, packed_call, ragged_batch, tiny_model

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


def test_batch_permutation_permutes_the_result(backend):
    model = tiny_model(BertModel, attn_implementation=backend)
    ids, mask = holed_batch()
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    numerics.assert_same(
        model(ids[order], mask[order]).last_hidden_state, model(ids, mask).last_hidden_state[order], SAME
    )


def test_left_padding_equals_right_padding(backend):
    model = tiny_model(BertModel, attn_implementation=backend)
    ids, mask = ragged_batch([9, 14], length=20)
    right = model(ids, mask).last_hidden_state
    left_ids = torch.stack([row.roll(20 - n) for row, n in zip(ids, [9, 14])])
    left_mask = torch.stack([row.roll(20 - n) for row, n in zip(mask, [9, 14])])
    left = model(left_ids, left_mask).last_hidden_state
    for row, length in enumerate([9, 14]):
        numerics.assert_same(left[row, 20 - length :], right[row, :length], SAME)


def test_a_hole_keeps_its_distance(backend):
    model = tiny_model(BertModel, attn_implementation=backend)
    ids, _ = ragged_batch([12])
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 5] = 0
    with_hole = model(ids, mask).last_hidden_state
    numerics.assert_same(with_hole, model(ids.index_fill(1, torch.tensor([5]), 3), mask).last_hidden_state, 0.0)
    closed = torch.cat((ids[:, :5], ids[:, 6:]), dim=1)
    difference = numerics.relative_error(with_hole[:, mask[0].bool()], model(closed).last_hidden_state)
    assert difference > 1e-3, "closing the hole must change distances, hence numbers"


def test_a_row_without_tokens_and_a_batch_without_any_are_zero(backend):
    model = tiny_model(BertModel, attn_implementation=backend)
    ids, mask = ragged_batch([0, 5], length=8)
    output = model(ids, mask)
    assert output.last_hidden_state[0].abs().sum() == 0
    assert torch.isfinite(output.pooler_output).all()
    numerics.assert_same(output.last_hidden_state[1, :5], model(ids[1:, :5]).last_hidden_state[0], SAME)
    nothing = model(ids, torch.zeros_like(mask))
    assert nothing.last_hidden_state.abs().sum() == 0 and nothing.last_hidden_state.shape == (2, 8, 48)


def test_length_far_over_alibi_starting_size_and_max_position_embeddings(backend):
    model = tiny_model(alibi_starting_size=4, max_position_embeddings=8, attn_implementation=backend)
    ids, _ = ragged_batch([700])
    long = model(ids).logits
    other = tiny_model(alibi_starting_size=2048, attn_implementation=backend)
    numerics.assert_same(long, other(ids).logits, 0.0)
    assert torch.isfinite(long).all()


def test_flattening_collator_input_gives_the_padded_numbers(backend):
    """transformers' DataCollatorWithFlattening, with position ids alone and with its boundaries."""
    from transformers import DataCollatorWithFlattening

    model = tiny_model(attn_implementation=backend)
    ids, mask = ragged_batch([5, 1, 8])
    expected = model(ids, mask).logits[mask.bool()]
    features = [{"input_ids": row[:n].tolist()} for row, n in zip(ids, [5, 1, 8])]
    for boundaries in (False, True):
        batch = DataCollatorWithFlattening(
            return_tensors="pt", return_position_ids=not boundaries, return_flash_attn_kwargs=boundaries
        )(features)
        batch.pop("labels")
        numerics.assert_same(model(**batch).logits[0], expected, SAME)
    # Ordinary position ids are no boundaries.
    plain = model(ids, mask, position_ids=torch.arange(8)[None]).logits
    numerics.assert_same(plain[mask.bool()], expected, 0.0)


def test_flattened_sequences_are_pooled_one_by_one(backend):
    model = tiny_model(BertForSequenceClassification, num_labels=3, attn_implementation=backend)
    ids, mask = ragged_batch([5, 2, 8])
    expected = model(ids, mask).logits
    flat = ids[mask.bool()][None]
    numerics.assert_same(model(flat, cu_seq_lens_q=torch.tensor([0, 5, 7, 15])).logits, expected, SAME)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mask", [False, True], ids=["no_mask", "mask_of_ones"])
def test_several_rows_of_concatenated_texts_are_answered_rightly_or_refused(compiled, mask):
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
def test_heads_that_need_one_text_per_row_refuse_both_spellings_of_packed_rows(model_class, boundaries):
    call, _ = packed_call(boundaries=boundaries)
    if model_class is BertForMultipleChoice:
        call = {
            name: x[None] if x is not None and name != "cu_seq_lens_q" else x
            for name, x in call.items()
            if "max" not in name
        }
    spelling = "cu_seq_lens_q" if boundaries else "position_ids"
    with pytest.raises(ValueError, match=f"{spelling} .*{model_class.__name__}.* one text per row"):
        head(model_class)(**call)


@pytest.mark.parametrize("model_class", [BertForQuestionAnswering, BertForMultipleChoice], ids=name_of)
def test_heads_that_need_one_text_per_row_take_ordinary_position_ids(model_class):
    call = call_of(model_class, lengths=(7, 7), labels=False)
    positions = torch.arange(7).expand_as(call["input_ids"])
    expected = outputs(head(model_class), **call)
    assert_equal_outputs(outputs(head(model_class), **call, position_ids=positions), expected, 0.0)
