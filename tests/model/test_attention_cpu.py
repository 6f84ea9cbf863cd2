"""Attention on the CPU: all its kernels against the float64 reference, and the exactness of bands."""

import math

import numerics
import pytest
import torch
from attention_cases import LAYOUTS, assert_as_good_as_plain, attend, batch, plain_attention, tensors

from mosaicbert import bert_attention_cpu, bert_linear_cpu
from mosaicbert.bert_attention import alibi_slopes, eager_attention
from mosaicbert.bert_attention_cpu import HeadGroup, cpu_attention, cpu_declines, head_radii
from mosaicbert.bert_padding import pack_padded, pack_rows

PACKED = [layout for layout in LAYOUTS if layout != "holes"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", PACKED)
def test_every_layout_matches_the_reference_forward_and_backward(layout, dtype):
    packed = LAYOUTS[layout]()
    inputs = tensors(packed, dtype=dtype)
    expected = assert_as_good_as_plain(cpu_attention, packed, inputs)
    if dtype == torch.float64:
        for got, exact in zip(attend(cpu_attention, packed, *inputs), expected):
            numerics.assert_same(got, exact, numerics.SAME[torch.float64])


def test_holes_and_kept_padding_are_declined_with_a_reason():
    mask = torch.tensor([[1, 0, 1]])
    holes, full = pack_padded(mask, (1, 3), mask.device), pack_padded(None, (1, 3), mask.device)
    assert cpu_declines(None, full) is None
    assert "holes" in cpu_declines(None, holes)
    assert "its plan depends on data" in cpu_declines(None, pack_rows(mask, (1, 3), mask.device))


PROCESSORS = {"torch": ("", frozenset()), "matrix products": ("AuthenticAMD", frozenset({"avx512_bf16"}))}


@pytest.fixture(params=PROCESSORS)
def kernels(request, monkeypatch):
    """The kernels that serve bfloat16, whatever processor runs the test."""
    monkeypatch.setattr(bert_linear_cpu, "processor", lambda: PROCESSORS[request.param])
    return request.param


@pytest.mark.parametrize("layout", PACKED)
def test_bfloat16_matches_the_reference_by_either_kernel(kernels, layout):
    packed = LAYOUTS[layout]()
    assert_as_good_as_plain(cpu_attention, packed, tensors(packed, dtype=torch.bfloat16))


@pytest.mark.parametrize("norm", [0.3, 1.0, 4.0], ids=lambda norm: f"norm {norm}")
def test_bfloat16_is_as_good_as_plain_at_any_norm_by_either_kernel(kernels, norm):
    packed = batch([64] * 3 + [200, 400])
    inputs = tensors(packed, dtype=torch.bfloat16, norm=norm)
    expected, *_ = assert_as_good_as_plain(cpu_attention, packed, inputs, plain_attention)
    arguments = (torch.stack(inputs[:3], dim=1), packed, torch.tensor(alibi_slopes(3)), 0.25, 0.0)
    got = cpu_attention(*arguments)  # without a backward pass another kernel may be chosen
    numerics.assert_no_worse(got, plain_attention(*arguments), expected, numerics.FORWARD)


@pytest.mark.parametrize("heads", [8, 12], ids="{} heads".format)
def test_bands_in_bfloat16_are_as_good_as_plain_by_either_kernel(monkeypatch, band_for_all, kernels, heads):
    """Of 8 heads, neighbours have similar radii; of 12, others have too, so that a list selects the heads of a band."""
    monkeypatch.setattr(bert_attention_cpu, "BAND_GROWTH", 3.0)
    packed = batch([130, 97, 97])
    inputs = tensors(packed, heads=heads, norm=0.05, dtype=torch.bfloat16)
    radii = head_radii(torch.stack(inputs[:3], dim=1), torch.tensor(alibi_slopes(heads)), 0.25)
    bands = [group for group in bert_attention_cpu.plan_calls(packed.lengths, radii) if not group.is_whole]
    assert bands and any(isinstance(group.selection, list) for group in bands) == (heads == 12)
    expected, *_ = assert_as_good_as_plain(cpu_attention, packed, inputs)
    arguments = (torch.stack(inputs[:3], dim=1), packed, torch.tensor(alibi_slopes(heads)), 0.25, 0.0)
    numerics.assert_no_worse(cpu_attention(*arguments), eager_attention(*arguments), expected, numerics.FORWARD)


@pytest.mark.parametrize("most", [97 * 97 * 2, 97 * 97, 97 * 10, 1], ids=str)
def test_matrix_products_in_parts_equal_the_whole(monkeypatch, most):
    """A part holds two heads, one head, ten queries or one query; only the first two have a backward pass."""
    query, key, value, grad = torch.randn(4, 2, 3, 97, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.randn(1, 3, 97, 97, generator=torch.Generator().manual_seed(1))

    def compute():
        context, sums = bert_attention_cpu.attend_by_products(query, key, value, mask, 0.25)
        if most < 97 * 97:
            return [context]
        fixed = {"dropout_p": 0.0, "is_causal": False, "attn_mask": mask, "scale": 0.25}
        return [context, *bert_attention_cpu.products_backward(grad, query, key, value, context, sums, **fixed)]

    whole = compute()
    monkeypatch.setattr(bert_attention_cpu, "PRODUCT_SCORES", most)
    for part, expected in zip(compute(), whole):
        torch.testing.assert_close(part, expected, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize(
    "vendor, flags, dtype, count, length, trained, by_products",
    [
        ("AuthenticAMD", {"avx512_bf16"}, torch.bfloat16, 1, 64, False, True),
        ("AuthenticAMD", {"avx512_bf16"}, torch.bfloat16, 1, 16, False, False),
        ("AuthenticAMD", {"avx512_bf16"}, torch.bfloat16, 1, 16, True, True),
        ("AuthenticAMD", {"avx512_bf16"}, torch.bfloat16, 1, 2048, False, True),
        ("AuthenticAMD", {"avx512_bf16"}, torch.bfloat16, 1, 2049, False, False),
        ("AuthenticAMD", {"avx512_bf16"}, torch.bfloat16, 1, 4096, True, False),
        ("AuthenticAMD", {"avx512_bf16"}, torch.float32, 8, 128, False, False),
        ("AuthenticAMD", {"avx2"}, torch.bfloat16, 8, 128, False, False),
        ("GenuineIntel", {"avx512_bf16"}, torch.bfloat16, 8, 128, False, False),
    ],
)
def test_the_processor_decides_the_kernels(monkeypatch, vendor, flags, dtype, count, length, trained, by_products):
    monkeypatch.setattr(bert_linear_cpu, "processor", lambda: (vendor, frozenset(flags)))
    group = HeadGroup(start=0, count=count, length=length, heads=list(range(12)), radius=length)
    forward, backward = bert_attention_cpu.choose_kernels(dtype, group, trained)
    assert (forward is bert_attention_cpu.attend_by_products) is by_products
    assert (backward is bert_attention_cpu.products_backward) is by_products


@pytest.fixture
def band_for_all(monkeypatch):
    """Bands in short sequences, so that the slow reference can judge them."""
    monkeypatch.setattr(bert_attention_cpu, "CUT_FROM", 1)
    monkeypatch.setattr(bert_attention_cpu, "BAND_FROM", 1)
    monkeypatch.setattr(bert_attention_cpu, "BAND_PAYS", 1.0)
    monkeypatch.setattr(bert_attention_cpu, "BAND_CHUNK", 16)


@pytest.mark.parametrize("norm", [0.05, 0.5, 1.0], ids=lambda norm: f"norm {norm}")
def test_keys_beyond_the_radius_are_cut_off_exactly(monkeypatch, norm):
    """Lengths are below those of bands, with and without a backward pass, in one block of keys and in several."""
    packed = batch([130, 700])
    inputs = tensors(packed, heads=2, size=8, norm=norm)
    qkv = torch.stack(inputs[:3], dim=1)
    radius, _ = head_radii(qkv, torch.tensor(alibi_slopes(2)), 8**-0.5)
    assert radius < 700, "nothing is cut off here"
    assert_as_good_as_plain(cpu_attention, packed, inputs)
    cut = cpu_attention(qkv, packed, torch.tensor([0.7, 0.25]), 0.25, 0.0)
    monkeypatch.setattr(bert_attention_cpu, "CUT_FROM", 10_000)
    whole = cpu_attention(qkv, packed, torch.tensor([0.7, 0.25]), 0.25, 0.0)
    torch.testing.assert_close(cut, whole, rtol=0, atol=2**-22 * whole.abs().max().item())


@pytest.mark.parametrize("norm", [0.0, 0.05, 1.0, 4.0], ids=lambda norm: f"norm {norm}")
def test_a_band_is_exact_at_any_norm(band_for_all, norm):
    packed = batch([130, 97, 97])
    inputs = tensors(packed, heads=8, norm=norm)
    if norm == 0.05:  # the test shows nothing unless the steep heads leave keys out
        radii = head_radii(torch.stack(inputs[:3], dim=1), torch.tensor(alibi_slopes(8)), 0.25)
        lists = bert_attention_cpu.plan_calls(packed.lengths, radii)
        assert any(group.radius < group.length for group in lists)
        assert sum(len(group.heads) * group.count for group in lists) == 3 * 8
    assert_as_good_as_plain(cpu_attention, packed, inputs)


def test_a_band_is_exact_when_the_farthest_key_is_the_most_alike(band_for_all):
    """In this adversarial input the own key of each query is its opposite, and the keys at both ends match it."""
    packed = batch([180])
    query, key, value, grad = tensors(packed, heads=4)
    query = torch.nn.functional.normalize(query[:1].expand_as(query), dim=-1) * 6
    key = -query.clone()
    key[-1] = query[-1]
    key[0] = query[0]
    assert_as_good_as_plain(cpu_attention, packed, (query, key, value, grad))


@pytest.mark.parametrize("near", [-1.0, 0.0, 0.5], ids=lambda near: f"near scores {near:+.1f} C")
@pytest.mark.parametrize("own", [-1.0, 0.0, 1.0], ids=lambda own: f"own score {own:+.0f} C")
@pytest.mark.parametrize("norm", [0.0, 1.0, 3.0], ids=lambda norm: f"norm {norm}")
@pytest.mark.parametrize("slope", [2**-0.5, 0.25, 2**-8], ids=lambda slope: f"slope {slope}")
def test_a_band_drops_less_than_one_rounding_of_a_row(slope, norm, own, near):
    """The bound itself, in float64 and at the worst case: the query comes first, so that its row has one side; the keys
    beyond its radius score C, and what is dropped comes from two sides, as it does for a key in backward."""
    length, bound = 50_000, norm**2
    query, key = torch.zeros(2, length, 1, 2)
    query[0, 0, 0] = norm
    scores = torch.full((length,), near)
    scores[0], scores[length // 2 :] = own, 1.0
    key[:, 0, 0], key[:, 0, 1] = scores * norm, (1 - scores**2).sqrt() * norm
    (radius,) = head_radii(torch.stack((query, key, key), dim=1), torch.tensor([slope]), 1.0)
    assert radius < length // 2
    distance = torch.arange(1, length, dtype=torch.float64)
    weights = torch.exp(torch.where(distance > radius, bound, near * bound) - slope * distance)
    row = math.exp(own * bound) + weights[distance <= radius].sum()
    assert 2 * weights[distance > radius].sum() < 2**-24 * row
    # Not farther than each of the bounds by itself.
    spreads = (bound - own * bound + math.log(2 / -math.expm1(-slope)), 2 * bound + math.log(2))
    assert radius <= math.ceil((min(spreads) + 24 * math.log(2)) / slope) + 1


def test_scores_that_are_not_finite_give_an_infinite_radius():
    for bad in (float("nan"), float("inf")):
        query = torch.ones(9, 2, 4)
        query[3, 1, 2] = bad
        qkv = torch.stack((query, torch.ones_like(query), torch.ones_like(query)), dim=1)
        assert head_radii(qkv, torch.tensor([0.5, 0.5]), 1.0)[1] == math.inf


def test_head_groups_cover_every_head_once_and_windows_every_query_once():
    group = HeadGroup(start=0, count=1, length=4000, heads=list(range(12)), radius=4000)
    radii = [4000, 30, 40, 900, 31, 4000, 100, 2000, 50, 60, 70, 80]
    parts = bert_attention_cpu.split_by_radius(group, radii)
    assert sorted(head for part in parts for head in part.heads) == list(range(12))
    assert len(parts) > 1
    numbers = torch.arange(12)
    for part in parts:
        assert numbers[part.selection].tolist() == part.heads
        assert part.radius == max(radii[head] for head in part.heads)
        windows = list(part.windows())
        queries = [query for start, end, _, _ in windows for query in range(start, end)]
        assert queries == list(range(4000))
        for start, end, low, high in windows:
            assert low == max(0, start - part.radius) and high == min(4000, end + part.radius)
