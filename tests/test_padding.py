"""PackedBatch: where tokens sit, and that packing and unpacking are inverse."""

import pytest
import torch

from mosaicbert.bert_padding import pack_flattened, pack_padded

CPU = torch.device("cpu")


def test_a_batch_of_two_by_four_written_out_by_hand():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    packed = pack_padded(mask, (2, 4), CPU, traced=False)
    assert packed.indices.tolist() == [0, 1, 4, 5, 6]
    assert packed.cu_seqlens.tolist() == [0, 2, 5] and packed.cu_seqlens.dtype == torch.int32
    assert packed.positions.tolist() == [0, 1, 0, 1, 2]
    assert packed.lengths == [2, 3] and packed.max_seqlen == 3 and packed.num_sequences == 2
    assert not packed.has_holes and not packed.keeps_padding
    tokens = torch.tensor([[10, 11, 98, 99], [20, 21, 22, 99]])
    assert packed.pack(tokens).tolist() == [10, 11, 20, 21, 22]
    assert packed.unpack(packed.pack(tokens)).tolist() == [[10, 11, 0, 0], [20, 21, 22, 0]]
    assert packed.row_mask().tolist() == mask.bool().tolist()


def test_holes_left_padding_and_empty_rows_keep_their_columns():
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    packed = pack_padded(mask, (4, 4), CPU, traced=False)
    assert packed.positions.tolist() == [2, 3, 0, 2, 3, 1]
    assert packed.lengths == [2, 3, 0, 1]
    assert packed.has_holes
    assert packed.first_tokens(packed.pack(torch.arange(1, 17).view(4, 4))).tolist() == [3, 5, 0, 14]
    assert packed.row_mask().tolist() == mask.bool().tolist()
    assert packed.from_rows(packed.to_rows(packed.positions)).tolist() == packed.positions.tolist()
    left_only = pack_padded(mask[:1], (1, 4), CPU, traced=False)
    assert not left_only.has_holes


def test_reversal_turns_each_sequence_around_and_undoes_itself():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    packed = pack_padded(mask, (3, 4), CPU, traced=False)
    assert packed.reversal.tolist() == [2, 1, 0, 4, 3]
    assert packed.reversal[packed.reversal].tolist() == [0, 1, 2, 3, 4]
    assert pack_padded(None, (2, 3), CPU, traced=False).reversal.tolist() == [2, 1, 0, 5, 4, 3]
    assert pack_flattened(torch.tensor([0, 1, 3]), None, 3).reversal.tolist() == [0, 2, 1]


def test_what_layers_share_is_made_once_a_batch():
    packed, other = (pack_padded(None, (1, 2), CPU, traced=False) for _ in range(2))
    made = []
    assert packed.shared("plan", lambda: made.append(1) or "first") == "first"
    assert packed.shared("plan", lambda: made.append(1) or "second") == "first"
    assert other.shared("plan", lambda: made.append(1) or "third") == "third" and len(made) == 2


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_mask_dtypes_mean_the_same(dtype):
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pack_padded(mask.to(dtype), (2, 3), CPU, traced=False).indices.tolist() == [0, 1, 3, 4, 5]


def test_full_batch_needs_no_indices():
    for mask in (None, torch.ones(2, 3)):
        packed = pack_padded(mask, (2, 3), CPU, traced=False)
        assert packed.indices is None
        assert packed.cu_seqlens.tolist() == [0, 3, 6]
        assert packed.lengths == [3, 3]
        assert packed.positions.tolist() == [0, 1, 2, 0, 1, 2]


def test_traced_batch_keeps_padding_and_marks_it():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    packed = pack_padded(mask, (2, 3), CPU, traced=True)
    assert packed.keeps_padding and packed.indices is None and packed.lengths == [3, 3]
    tokens = torch.arange(1, 7).view(2, 3)
    assert packed.pack(tokens).tolist() == [1, 2, 3, 4, 5, 6]
    assert packed.unpack(packed.pack(tokens)).tolist() == [[1, 2, 0], [0, 0, 0]]
    assert packed.first_tokens(packed.pack(tokens)).tolist() == [1, 0]


def test_flattened_sequences_count_positions_from_their_start():
    packed = pack_flattened(torch.tensor([0, 2, 2, 5]), None, 5)
    assert packed.shape == (1, 5)
    assert packed.positions.tolist() == [0, 1, 0, 1, 2]
    assert packed.max_seqlen == 3 and packed.lengths == [2, 0, 3]
    assert packed.to_rows(torch.tensor([1, 2, 3, 4, 5])).tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]
    assert packed.first_tokens(torch.tensor([1, 2, 3, 4, 5])).tolist() == [1, 0, 3]


def test_packing_is_differentiable():
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]])
    packed = pack_padded(mask, (2, 3), CPU, traced=False)
    x = torch.randn(2, 3, 4, requires_grad=True)
    packed.unpack(packed.pack(x) * 2).sum().backward()
    assert torch.equal(x.grad, (mask * 2.0)[..., None].expand(2, 3, 4))


def test_a_batch_without_columns_or_rows():
    for shape in ((2, 0), (0, 3)):
        packed = pack_padded(torch.ones(shape), shape, CPU, traced=False)
        assert packed.lengths == [0] * shape[0]
        assert packed.unpack(packed.pack(torch.ones(shape))).shape == shape
