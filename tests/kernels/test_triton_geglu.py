"""GeGLU in Triton against float64."""

import pytest
import reference
import torch
import torch.nn.functional as F
from numerics import FORWARD, GRADIENT, assert_no_worse
from triton_kernels import DEVICE, launch_recorder, on_kernels, with_gradient

from mosaicbert import geglu_triton as leaf


def gated_input(rows, features, dtype=torch.float32, size=3.0):
    generator = torch.Generator().manual_seed(0)
    gated = torch.randn(rows, 2 * features, generator=generator) * size
    return gated.to(DEVICE, dtype).requires_grad_()


def plain(gated):
    gate, value = gated.chunk(2, dim=-1)
    return F.gelu(gate) * value


def truth(gated):
    gate, value = gated.double().chunk(2, dim=-1)
    return reference.gelu(gate) * value


@on_kernels
@pytest.mark.parametrize("rows, features", [(1, 1), (5, 40), (3, 1024), (2, 1025)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_and_gradient_match_float64(rows, features, dtype):
    gated = gated_input(rows, features, dtype)
    results = [with_gradient(function, gated) for function in (leaf.triton_geglu, plain, truth)]
    assert results[0][0].dtype == results[0][1][0].dtype == dtype
    assert_no_worse(*(out for out, _ in results), FORWARD, "result")
    assert_no_worse(*(gradient for _, (gradient,) in results), GRADIENT, "gradient")


@on_kernels
def test_extreme_gates_give_their_limits():
    gated = torch.tensor([[-1e4, -20.0, 0.0, 20.0, 1e4, *[2.0] * 5]], device=DEVICE, requires_grad=True)
    out, (gradient,) = with_gradient(leaf.triton_geglu, gated)
    assert out.tolist() == [[0.0, 0.0, 0.0, 40.0, 2e4]]
    assert gradient.isfinite().all()


@on_kernels
def test_strides_and_leading_axes_are_kept():
    gated = gated_input(6, 40)
    expected, (expected_gradient,) = with_gradient(leaf.triton_geglu, gated)
    wide = torch.cat((gated.detach(), gated.detach()), dim=1)[:, 80:].unflatten(0, (2, 3)).requires_grad_()
    assert not wide.is_contiguous()
    out, (gradient,) = with_gradient(leaf.triton_geglu, wide)
    assert torch.equal(out, expected.unflatten(0, (2, 3)))
    assert torch.equal(gradient, expected_gradient.unflatten(0, (2, 3)))
    transposed = gated.detach().t().contiguous().t()
    assert torch.equal(leaf.triton_geglu(transposed), expected)


@on_kernels
def test_no_rows_at_all():
    gated = torch.zeros(0, 8, device=DEVICE, requires_grad=True)
    out, (gradient,) = with_gradient(leaf.triton_geglu, gated)
    assert out.shape == (0, 4) and gradient.shape == (0, 8)


@on_kernels
def test_one_launch_forward_and_one_backward(monkeypatch):
    launches = launch_recorder(monkeypatch, leaf)
    with_gradient(leaf.triton_geglu, gated_input(3, 40))
    assert launches == [leaf._forward_kernel, leaf._backward_kernel]
