"""Eager and SDPA attention against the float64 reference: every layout and dtype, dropout, kept padding."""

import numerics
import pytest
import torch
from attention_cases import LAYOUTS, assert_as_good_as_plain, attend, tensors, truth

from mosaicbert import bert_attention
from mosaicbert.bert_attention import alibi_slopes, eager_attention, sdpa_attention
from mosaicbert.bert_padding import pack_flattened, pack_padded, pack_rows

BACKENDS = {"eager": eager_attention, "sdpa": sdpa_attention}
SAME = numerics.SAME[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sdpa_matches_the_reference_forward_and_backward(layout, dtype):
    packed = LAYOUTS[layout]()
    assert_as_good_as_plain(sdpa_attention, packed, tensors(packed, dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_eager_and_sdpa_match_the_reference_in_float64(layout, backend):
    packed = LAYOUTS[layout]()
    inputs = tensors(packed, heads=5, size=8, dtype=torch.float64)
    for got, exact in zip(attend(BACKENDS[backend], packed, *inputs), truth(packed, *inputs)):
        numerics.assert_same(got, exact, numerics.SAME[torch.float64])


@pytest.mark.parametrize("layout", ["odd lengths, one empty", "holes"])
def test_sdpa_in_chunks_of_a_few_queries_matches_too(monkeypatch, layout):
    monkeypatch.setattr(bert_attention, "CPU_CHUNK_SCORES", 4 * 3 * 7 * 97)
    packed = LAYOUTS[layout]()
    assert_as_good_as_plain(sdpa_attention, packed, tensors(packed))


@pytest.mark.parametrize("backend", [eager_attention, sdpa_attention])
def test_kept_padding_gives_the_numbers_of_dropped_padding(backend):
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]])
    kept, dropped = pack_rows(mask, (3, 5), mask.device), pack_padded(mask, (3, 5), mask.device)
    qkv = torch.randn(15, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    arguments = (torch.tensor([0.5, 0.1]), 0.3, 0.0)
    got = backend(qkv, kept, *arguments)[mask.bool().flatten()]
    numerics.assert_same(got, backend(dropped.pack(qkv.unflatten(0, (3, 5))), dropped, *arguments), SAME)


@pytest.mark.parametrize("backend", [eager_attention, sdpa_attention])
def test_sequences_in_one_row_with_kept_padding_do_not_mix(backend):
    bounds = torch.tensor([0, 4, 5, 12])
    kept, dropped = (pack_flattened(bounds, None, (1, 12), keep_padding=keep) for keep in (True, False))
    qkv = torch.randn(12, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    arguments = (torch.tensor([0.5, 0.1]), 0.3, 0.0)
    numerics.assert_same(backend(qkv, kept, *arguments), backend(qkv, dropped, *arguments), SAME)


LONE = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
LONE_TOKENS = {
    "dropped padding": pack_padded(LONE, (3, 4), LONE.device),
    "kept padding": pack_rows(LONE, (3, 4), LONE.device),
    "texts in one row": pack_flattened(torch.arange(6), None, (1, 5), keep_padding=True),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LONE_TOKENS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_with_a_score_of_minus_60000_still_sees_nothing_but_itself(backend, layout, dtype):
    """The lowest number of float16, -65,504, left room for padding and for other texts."""
    packed = LONE_TOKENS[layout]
    total = packed.positions.shape[0]
    key, value = (torch.randn(total, 2, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    key = key / key.norm(dim=-1, keepdim=True) * 400
    qkv = torch.stack((-key, key, value), dim=1).to(dtype).requires_grad_()
    context = BACKENDS[backend](qkv, packed, torch.tensor([0.5, 0.1]), 0.375, 0.0)
    real = slice(None) if packed.key_mask is None else packed.key_mask.flatten()
    assert torch.equal(context[real], qkv[real, 2])
    context[real].sum().backward()
    assert qkv.grad.isfinite().all() and (qkv.grad[real, 2] == 1).all()


@pytest.mark.parametrize("layout", ["odd lengths, one empty", "holes"])
def test_dropout_in_sdpa_repeats_in_backward(layout):
    packed = LAYOUTS[layout]()
    query, key, value, grad = tensors(packed, heads=2, size=8, dtype=torch.float64)
    torch.manual_seed(0)
    # With one mask, the context is linear in value: its gradient must come from the mask of the forward pass.
    value = value.requires_grad_()
    slopes = torch.tensor(alibi_slopes(2), dtype=torch.float64)
    context = sdpa_attention(torch.stack((query, key, value), dim=1), packed, slopes, 8**-0.5, 0.3)
    (gradient,) = torch.autograd.grad(context, value, grad)
    numerics.assert_same((gradient * value).sum(), (context * grad).sum(), 1e-9)
