"""Attention against the float64 reference: every formula, layout, dtype, and the exactness of what is skipped."""

import math

import numerics
import pytest
import reference
import torch

from mosaicbert import bert_attention
from mosaicbert.bert_attention import HeadGroup, alibi_slopes, eager_attention, head_reach, sdpa_attention
from mosaicbert.bert_padding import pack_flattened, pack_padded

BACKENDS = {"eager": eager_attention, "sdpa": sdpa_attention}


def batch(lengths):
    """Concatenated sequences without holes."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return pack_flattened(bounds, None, sum(lengths))


def holed(lengths=(40, 33, 0, 25), length=40):
    """Padded rows, each but the first with holes or left padding."""
    mask = torch.zeros(len(lengths), length, dtype=torch.long)
    for row, count in enumerate(lengths):
        mask[row, torch.randperm(length, generator=torch.Generator().manual_seed(row))[:count]] = 1
    return pack_padded(mask, tuple(mask.shape), mask.device, traced=False)


def tensors(packed, heads=3, size=16, dtype=torch.float32, seed=0, norm=1.0):
    """query, key, value and a gradient of the context: [T, H, D] each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4, packed.positions.shape[0], heads, size)
    query, key, value, grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return query * norm, key * norm, value, grad


def attend(function, packed, query, key, value, grad, dropout_p=0.0):
    """Context and the gradients of query, key and value."""
    inputs = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    precision = torch.promote_types(query.dtype, torch.float32)
    slopes = torch.tensor(alibi_slopes(query.shape[1]), dtype=precision)
    context = function(torch.stack(inputs, dim=1), packed, slopes, query.shape[-1] ** -0.5, dropout_p)
    assert context.dtype == query.dtype and context.shape == query.shape
    context.backward(grad)
    return [context, *(x.grad for x in inputs)]


def truth(packed, query, key, value, grad):
    """The same by the reference, float64."""
    inputs = [x.detach().double().requires_grad_() for x in (query, key, value)]
    context = reference.attention(*inputs, packed.cu_seqlens.tolist(), packed.positions)
    context.backward(grad.double())
    return [context, *(x.grad for x in inputs)]


def assert_as_good_as_plain(function, packed, inputs, plain=eager_attention):
    """The kernel rule: at most 2 (gradients: 3) times the error of the plain formula in the same dtype."""
    expected = truth(packed, *inputs)
    plain = attend(plain, packed, *inputs)
    names = ("context", "query.grad", "key.grad", "value.grad")
    for name, got, base, exact in zip(names, attend(function, packed, *inputs), plain, expected):
        factor = numerics.FORWARD if name == "context" else numerics.GRADIENT
        numerics.assert_no_worse(got, base, exact, factor, name)


LAYOUTS = {
    "short ones": lambda: batch([1, 2, 1]),
    "odd lengths, one empty": lambda: batch([1, 63, 0, 97]),
    "neighbours of equal length": lambda: batch([17, 17, 17, 5, 17]),
    "holes": holed,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sdpa_matches_the_reference_forward_and_backward(layout, dtype):
    packed = LAYOUTS[layout]()
    assert_as_good_as_plain(sdpa_attention, packed, tensors(packed, dtype=dtype))


PROCESSORS = {"kernel": ("", frozenset()), "products": ("AuthenticAMD", frozenset({"avx512_bf16"}))}


@pytest.fixture(params=PROCESSORS)
def formula(request, monkeypatch):
    """Which formula serves bfloat16 on the CPU, whatever the processor here."""
    monkeypatch.setattr(bert_attention, "processor", lambda: PROCESSORS[request.param])
    return request.param


def plain_attention(qkv, packed, slopes, scale, dropout_p):
    """The plain formula with products in the dtype of `qkv` and softmax in float32; eager has float32 scores."""
    contexts = []
    for q, k, v in zip(*(x.split(packed.lengths) for x in qkv.unbind(1))):
        place = torch.arange(len(q))
        bias = -slopes[:, None, None] * (place[:, None] - place).abs()
        scores = torch.einsum("qhd,khd->hqk", q, k).float() * scale + bias
        contexts.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1).to(v.dtype), v))
    return torch.cat(contexts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_matches_the_reference_by_either_formula(formula, layout):
    packed = LAYOUTS[layout]()
    assert_as_good_as_plain(sdpa_attention, packed, tensors(packed, dtype=torch.bfloat16))


@pytest.mark.parametrize("norm", [0.3, 1.0, 2.0, 4.0], ids=lambda norm: f"norm {norm}")
def test_bfloat16_is_as_good_as_plain_at_any_norm_by_either_formula(formula, norm):
    packed = batch([64] * 3 + [200, 400])
    inputs = tensors(packed, dtype=torch.bfloat16, norm=norm)
    assert_as_good_as_plain(sdpa_attention, packed, inputs, plain_attention)
    arguments = (torch.stack(inputs[:3], dim=1), packed, torch.tensor(alibi_slopes(3)), 0.25, 0.0)
    expected = truth(packed, *inputs)[0]
    got = sdpa_attention(*arguments)  # without a backward pass the choice is another
    numerics.assert_no_worse(got, plain_attention(*arguments), expected, numerics.FORWARD)


def test_bands_in_bfloat16_are_as_good_as_plain_by_either_formula(band_for_all, formula):
    packed = batch([130, 97, 97])
    inputs = tensors(packed, heads=8, norm=0.05, dtype=torch.bfloat16)
    assert_as_good_as_plain(sdpa_attention, packed, inputs)
    arguments = (torch.stack(inputs[:3], dim=1), packed, torch.tensor(alibi_slopes(8)), 0.25, 0.0)
    expected = truth(packed, *inputs)[0]
    numerics.assert_no_worse(sdpa_attention(*arguments), eager_attention(*arguments), expected, numerics.FORWARD)


@pytest.mark.parametrize("most", [97 * 97 * 2, 97 * 97, 97 * 10, 1], ids=str)
def test_products_in_parts_equal_the_whole(monkeypatch, most):
    """Parts of two heads, one head, ten queries, one query; only the first two can have a backward pass."""
    query, key, value, grad = torch.randn(4, 2, 3, 97, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.randn(1, 3, 97, 97, generator=torch.Generator().manual_seed(1))

    def compute():
        context, sums = bert_attention.attend_by_products(query, key, value, mask, 0.25)
        if most < 97 * 97:
            return [context]
        fixed = {"dropout_p": 0.0, "is_causal": False, "attn_mask": mask, "scale": 0.25}
        return [context, *bert_attention.products_backward(grad, query, key, value, context, sums, **fixed)]

    whole = compute()
    monkeypatch.setattr(bert_attention, "PRODUCT_SCORES", most)
    for part, expected in zip(compute(), whole):
        torch.testing.assert_close(part, expected, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize(
    "vendor, flags, dtype, count, length, trained, by_products",
    [
        ("AuthenticAMD", {"avx512_bf16"}, torch.bfloat16, 1, 64, False, True),
        ("AuthenticAMD", {"avx512_bf16"}, torch.bfloat16, 1, 16, False, False),
        ("AuthenticAMD", {"avx512_bf16"}, torch.bfloat16, 1, 16, True, True),
        ("AuthenticAMD", {"avx512_bf16"}, torch.bfloat16, 1, 4096, False, True),
        ("AuthenticAMD", {"avx512_bf16"}, torch.bfloat16, 1, 4096, True, False),
        ("AuthenticAMD", {"avx512_bf16"}, torch.float32, 8, 128, False, False),
        ("AuthenticAMD", {"avx2"}, torch.bfloat16, 8, 128, False, False),
        ("GenuineIntel", {"avx512_bf16"}, torch.bfloat16, 8, 128, False, False),
    ],
)
def test_the_processor_decides_the_formula(monkeypatch, vendor, flags, dtype, count, length, trained, by_products):
    monkeypatch.setattr(bert_attention, "processor", lambda: (vendor, frozenset(flags)))
    formula = bert_attention.formula_for(dtype, count, 12, length, trained)
    assert (formula.forward is bert_attention.attend_by_products) is by_products
    assert (formula.backward is bert_attention.products_backward) is by_products


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_and_sdpa_match_the_reference_in_float64(layout, backend):
    packed = LAYOUTS[layout]()
    inputs = tensors(packed, heads=5, size=8, dtype=torch.float64)
    for got, exact in zip(attend(BACKENDS[backend], packed, *inputs), truth(packed, *inputs)):
        numerics.assert_same(got, exact, numerics.SAME[torch.float64])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_at_all_gives_an_empty_context(backend):
    packed = batch([0, 0])
    context = BACKENDS[backend](
        torch.stack(tensors(packed)[:3], dim=1), packed, torch.tensor(alibi_slopes(3)), 0.25, 0.0
    )
    assert context.shape == (0, 3, 16)


@pytest.mark.parametrize("layout", ["odd lengths, one empty", "holes"])
def test_the_formula_for_other_devices_matches_too(layout):
    """`chunked_attention` serves CUDA without Triton; here on the CPU, and with more than one chunk a sequence."""
    packed = LAYOUTS[layout]()

    def function(qkv, packed, slopes, scale, dropout_p):
        return bert_attention.chunked_attention(*qkv.unbind(1), packed, slopes, scale, dropout_p)

    assert_as_good_as_plain(function, packed, tensors(packed))
    before, bert_attention.CHUNK_ENTRIES = bert_attention.CHUNK_ENTRIES, 7 * 97
    try:
        assert_as_good_as_plain(function, packed, tensors(packed))
    finally:
        bert_attention.CHUNK_ENTRIES = before


@pytest.fixture
def band_for_all(monkeypatch):
    """Bands in short sequences, so that the slow reference can judge them."""
    monkeypatch.setattr(bert_attention, "BAND_FROM", 1)
    monkeypatch.setattr(bert_attention, "BAND_PAYS", 1.0)
    monkeypatch.setattr(bert_attention, "BAND_CHUNK", 16)


@pytest.mark.parametrize("norm", [0.05, 0.5, 1.0], ids=lambda norm: f"norm {norm}")
def test_keys_that_weigh_nothing_are_cut_off_exactly(monkeypatch, norm):
    """Below the length where bands begin, with and without a backward pass, in one block of keys and in several."""
    packed = batch([130, 700])
    inputs = tensors(packed, heads=2, size=8, norm=norm)
    assert head_reach(*inputs[:2], torch.tensor(alibi_slopes(2)), 8**-0.5, packed.lengths)[0] < 700, (
        "nothing is cut off here"
    )
    assert_as_good_as_plain(sdpa_attention, packed, inputs)
    cut = sdpa_attention(torch.stack(inputs[:3], dim=1), packed, torch.tensor([0.7, 0.25]), 0.25, 0.0)
    monkeypatch.setattr(bert_attention, "CUT_FROM", 10_000)
    whole = sdpa_attention(torch.stack(inputs[:3], dim=1), packed, torch.tensor([0.7, 0.25]), 0.25, 0.0)
    torch.testing.assert_close(cut, whole, rtol=0, atol=2**-22 * whole.abs().max().item())


@pytest.mark.parametrize("norm", [0.0, 0.05, 1.0, 4.0], ids=lambda norm: f"norm {norm}")
def test_a_band_is_exact_at_any_norm(band_for_all, norm):
    packed = batch([130, 97, 97])
    inputs = tensors(packed, heads=8, norm=norm)
    if norm == 0.05:  # the steep heads must really leave keys out, or this test shows nothing
        reach = head_reach(*inputs[:2], torch.tensor(alibi_slopes(8)), 0.25, packed.lengths)
        lists = bert_attention.plan_calls(packed.lengths, reach)
        assert any(group.reach < group.length for group in lists)
        assert sum(len(group.heads) * group.count for group in lists) == 3 * 8
    assert_as_good_as_plain(sdpa_attention, packed, inputs)


def test_a_band_is_exact_when_the_farthest_key_is_the_most_alike(band_for_all):
    """Adversarial: each query has one token's direction reversed as itself and the far end as its match."""
    packed = batch([180])
    query, key, value, grad = tensors(packed, heads=4)
    query = torch.nn.functional.normalize(query[:1].expand_as(query), dim=-1) * 6
    key = -query.clone()
    key[-1] = query[-1]
    key[0] = query[0]
    assert_as_good_as_plain(sdpa_attention, packed, (query, key, value, grad))


@pytest.mark.parametrize("near", [-1.0, 0.0, 0.5], ids=lambda near: f"near scores {near:+.1f} C")
@pytest.mark.parametrize("own", [-1.0, 0.0, 1.0], ids=lambda own: f"own score {own:+.0f} C")
@pytest.mark.parametrize("norm", [0.0, 1.0, 3.0], ids=lambda norm: f"norm {norm}")
@pytest.mark.parametrize("slope", [2**-0.5, 0.25, 2**-8], ids=lambda slope: f"slope {slope}")
def test_a_band_drops_less_than_one_rounding_of_a_row(slope, norm, own, near):
    """The bound itself, in float64 and at the worst case: the query comes first, so that its row has one side; the keys
    beyond its reach score C, and what is dropped comes from two sides, as it does for a key in backward."""
    length, bound = 50_000, norm**2
    query, key = torch.zeros(2, length, 1, 2)
    query[0, 0, 0] = norm
    scores = torch.full((length,), near)
    scores[0], scores[length // 2 :] = own, 1.0
    key[:, 0, 0], key[:, 0, 1] = scores * norm, (1 - scores**2).sqrt() * norm
    (reach,) = head_reach(query, key, torch.tensor([slope]), 1.0, [length])
    assert reach < length // 2
    distance = torch.arange(1, length, dtype=torch.float64)
    weights = torch.exp(torch.where(distance > reach, bound, near * bound) - slope * distance)
    row = math.exp(own * bound) + weights[distance <= reach].sum()
    assert 2 * weights[distance > reach].sum() < 2**-24 * row
    # Not farther than each of the bounds by itself; a block of 2 / slope keys costs one nat and the own key.
    tail = math.log(2 / -math.expm1(-slope))
    spreads = [bound - own * bound + tail, 2 * bound + math.log(2)]
    if slope < 0.1:
        spreads.append(bound - near * bound + 1.1)
    assert reach <= math.ceil((min(spreads) + 24 * math.log(2)) / slope) + 1


def test_scores_that_are_not_finite_look_everywhere():
    for bad in (float("nan"), float("inf")):
        query = torch.ones(9, 2, 4)
        query[3, 1, 2] = bad
        assert head_reach(query, torch.ones_like(query), torch.tensor([0.5, 0.5]), 1.0, [9])[1] == math.inf


def test_head_groups_cover_every_head_once_and_windows_every_query_once():
    group = HeadGroup(start=0, count=1, length=4000, heads=list(range(12)), reach=4000)
    reach = [4000, 30, 40, 900, 31, 4000, 100, 2000, 50, 60, 70, 80]
    parts = bert_attention.split_by_reach(group, reach)
    assert sorted(head for part in parts for head in part.heads) == list(range(12))
    assert len(parts) > 1
    numbers = torch.arange(12)
    for part in parts:
        assert numbers[part.selection].tolist() == part.heads
        assert part.reach == max(reach[head] for head in part.heads)
        windows = [
            tuple(edge + number * (end - start) for edge in (start, end, low, high))
            for start, end, low, high, repeats in part.windows()
            for number in range(repeats)
        ]
        queries = [query for start, end, _, _ in windows for query in range(start, end)]
        assert queries == list(range(4000))
        for start, end, low, high in windows:
            assert low == max(0, start - part.reach) and high == min(4000, end + part.reach)


@pytest.mark.parametrize("layout", ["odd lengths, one empty", "holes"])
def test_dropout_in_sdpa_has_the_right_mean_and_repeats_in_backward(layout):
    packed = LAYOUTS[layout]()
    query, key, value, grad = tensors(packed, heads=2, size=8, dtype=torch.float64)
    exact = truth(packed, query, key, value, grad)[0]
    torch.manual_seed(0)
    draws = torch.stack([attend(sdpa_attention, packed, query, key, value, grad, 0.3)[0].detach() for _ in range(300)])
    spread = draws.std(0) / 300**0.5
    # About 6,000 comparisons of a mean: six standard errors happen by chance once in 80,000 runs.
    assert ((draws.mean(0) - exact).abs() <= 6 * spread + 1e-9).all()

    # With one mask, the context is linear in value: its gradient must come from the mask of the forward pass.
    value = value.requires_grad_()
    slopes = torch.tensor(alibi_slopes(2), dtype=torch.float64)
    context = sdpa_attention(torch.stack((query, key, value), dim=1), packed, slopes, 8**-0.5, 0.3)
    (gradient,) = torch.autograd.grad(context, value, grad)
    numerics.assert_same((gradient * value).sum(), (context * grad).sum(), 1e-9)
