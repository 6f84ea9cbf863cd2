"""PackedBatch: the positions of tokens, and that unpacking inverts packing."""

import pytest
import torch
from heads import assert_equal_outputs, name_of, outputs
from models import ragged_batch, tiny_model

from mosaicbert.bert_layers import BertForMaskedLM, BertForQuestionAnswering, BertForSequenceClassification, BertModel
from mosaicbert.bert_padding import pack_batch, pack_flattened, pack_padded, pack_rows

CPU = torch.device("cpu")


def test_a_batch_of_two_by_four_written_out_by_hand():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    packed = pack_padded(mask, (2, 4), CPU)
    assert packed.indices.tolist() == [0, 1, 4, 5, 6]
    assert packed.cu_seqlens.tolist() == [0, 2, 5] and packed.cu_seqlens.dtype == torch.int32
    assert packed.positions.tolist() == [0, 1, 0, 1, 2]
    assert packed.lengths == [2, 3] and packed.max_seqlen == 3 and packed.num_sequences == 2
    assert not packed.has_holes and not packed.keeps_padding
    tokens = torch.tensor([[10, 11, 98, 99], [20, 21, 22, 99]])
    assert packed.pack(tokens).tolist() == [10, 11, 20, 21, 22]
    assert packed.unpack(packed.pack(tokens)).tolist() == [[10, 11, 0, 0], [20, 21, 22, 0]]
    assert packed.token_mask().tolist() == mask.bool().tolist()


def test_holes_left_padding_and_empty_rows_keep_their_columns():
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    packed = pack_padded(mask, (4, 4), CPU)
    assert packed.positions.tolist() == [2, 3, 0, 2, 3, 1]
    assert packed.lengths == [2, 3, 0, 1]
    assert packed.has_holes
    tokens = torch.arange(1, 17).view(4, 4, 1)
    for batch in (packed, pack_rows(mask, (4, 4), CPU)):
        assert batch.first_tokens(batch.pack(tokens)).flatten().tolist() == [3, 5, 0, 14]
    assert packed.token_mask().tolist() == mask.bool().tolist()
    assert packed.from_rows(packed.to_rows(packed.positions)).tolist() == packed.positions.tolist()
    left_only = pack_padded(mask[:1], (1, 4), CPU)
    assert not left_only.has_holes


def test_masks_of_every_dtype_mean_the_same():
    for dtype in (torch.bool, torch.int64, torch.float32):
        mask = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=dtype)
        assert pack_padded(mask, (2, 3), CPU).indices.tolist() == [0, 1, 3, 4, 5]


def test_full_batch_needs_no_indices():
    for mask in (None, torch.ones(2, 3)):
        packed = pack_padded(mask, (2, 3), CPU)
        assert packed.indices is None
        assert packed.cu_seqlens.tolist() == [0, 3, 6]
        assert packed.lengths == [3, 3]
        assert packed.positions.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_batch_that_keeps_padding_marks_it():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    packed = pack_rows(mask, (2, 3), CPU)
    assert packed.keeps_padding and packed.indices is None and packed.lengths == [3, 3]
    tokens = torch.arange(1, 7).view(2, 3)
    assert packed.pack(tokens) is tokens
    assert packed.unpack(tokens).tolist() == [[1, 2, 0], [0, 0, 0]]
    assert packed.first_tokens(tokens[..., None]).tolist() == [[1], [0]]
    assert packed.attended(0, 3).tolist() == [[[True, True, False]], [[False] * 3]]
    assert pack_rows(None, (2, 3), CPU).attended(0, 3) is None


def test_sequences_in_one_row_attend_to_themselves_where_padding_is_kept():
    expected = [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    bounds = pack_flattened(torch.tensor([0, 2, 3]), None, (1, 3), keep_padding=True)
    restarts = pack_rows(None, (1, 3), CPU, restarts=torch.tensor([[False, True]]))
    for packed in (bounds, restarts):
        assert packed.attended(0, 3).long().tolist() == [expected]
        assert packed.attended(1, 2).long().tolist() == [expected[1:2]]
    tokens = torch.tensor([[[1.0], [2.0], [3.0]]])
    assert bounds.first_tokens(tokens).tolist() == [[1.0], [3.0]]
    with pytest.raises(RuntimeError, match="compiled code needs cu_seq_lens_q to pool texts"):
        restarts.first_tokens(tokens)


def test_position_ids_that_start_again_split_every_row():
    ids = torch.ones(2, 4, dtype=torch.long)
    packed = pack_batch(ids, position_ids=torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]]))
    assert packed.shape == (2, 4) and packed.lengths == [2, 2, 3, 1]
    assert packed.positions.tolist() == [0, 1, 0, 1, 0, 1, 2, 0]
    assert pack_batch(ids, position_ids=torch.arange(4)[None]).lengths == [4, 4]
    assert pack_batch(ids, position_ids=torch.tensor([[0, 1, 0, 1]])).lengths == [2, 2, 2, 2]


def test_the_mean_over_tokens_leaves_padding_out():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1], [0, 1, 0]])
    tokens = torch.arange(12.0).view(4, 3, 1).bfloat16()
    for packed in (pack_padded(mask, (4, 3), CPU), pack_rows(mask, (4, 3), CPU)):
        mean = packed.mean_tokens(packed.pack(tokens))
        assert mean.dtype == torch.bfloat16 and mean.flatten().tolist() == [0.5, 0.0, 7.5, 10.0]


def test_a_batch_moves_to_another_device_whole():
    packed = pack_rows(torch.ones(2, 3), (2, 3), CPU, restarts=torch.zeros(1, 2, dtype=torch.bool)).to("meta")
    for name in ("cu_seqlens", "positions", "key_mask", "documents", "restarts"):
        assert getattr(packed, name).device.type == "meta", name
    assert packed.shape == (2, 3)


def test_flattened_sequences_count_positions_from_their_start():
    packed = pack_flattened(torch.tensor([0, 2, 2, 5]), None, (1, 5))
    assert packed.shape == (1, 5)
    assert packed.positions.tolist() == [0, 1, 0, 1, 2]
    assert packed.max_seqlen == 3 and packed.lengths == [2, 0, 3]
    assert packed.to_rows(torch.tensor([1, 2, 3, 4, 5])).tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]
    assert packed.first_tokens(torch.tensor([1, 2, 3, 4, 5])[:, None]).flatten().tolist() == [1, 0, 3]


def test_packing_is_differentiable():
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]])
    packed = pack_padded(mask, (2, 3), CPU)
    x = torch.randn(2, 3, 4, requires_grad=True)
    packed.unpack(packed.pack(x) * 2).sum().backward()
    assert torch.equal(x.grad, (mask * 2.0)[..., None].expand(2, 3, 4))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("model_class", [BertModel, BertForMaskedLM, BertForSequenceClassification], ids=name_of)
def test_texts_in_rows_whose_padding_is_kept_have_the_numbers_of_dropped_padding(model_class, masked):
    """With `unpad_inputs=False` the pooler said that compiled code needs cu_seq_lens_q, and no compiler was there."""
    ids, mask = ragged_batch([9, 9])
    positions = torch.cat((torch.arange(5), torch.arange(4))).expand(2, -1)
    layout = {"position_ids": positions, "attention_mask": mask if masked else None}
    kept, dropped = (tiny_model(model_class, unpad_inputs=unpad) for unpad in (False, True))
    assert_equal_outputs(outputs(kept, input_ids=ids, **layout), outputs(dropped, input_ids=ids, **layout))
    ordinary = {"position_ids": torch.arange(9)[None], "attention_mask": mask}
    assert_equal_outputs(outputs(kept, input_ids=ids, **ordinary), outputs(dropped, input_ids=ids, **ordinary))


@pytest.mark.parametrize("unpad", [False, True])
def test_texts_in_rows_with_padding_are_refused_by_name(unpad):
    ids, mask = ragged_batch([9, 7])
    positions = torch.cat((torch.arange(5), torch.arange(4))).expand(2, -1)
    with pytest.raises(ValueError, match="position_ids restart within a row of a batch with padding"):
        tiny_model(unpad_inputs=unpad)(ids, mask, position_ids=positions)
    whole = torch.ones_like(mask)
    answering = tiny_model(BertForQuestionAnswering, unpad_inputs=unpad)
    with pytest.raises(ValueError, match="position_ids that restart cannot be served by BertForQuestionAnswering"):
        answering(ids, whole, position_ids=positions)
