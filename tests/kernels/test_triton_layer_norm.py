"""Residual, dropout and LayerNorm in Triton against float64."""

import pytest
import reference
import torch
import torch.nn.functional as F
from numerics import FORWARD, GRADIENT, assert_no_worse, assert_same
from triton_kernels import DEVICE, INTERPRETED, launch_recorder, on_kernels, with_gradient

from mosaicbert import bert_layers
from mosaicbert import layer_norm_triton as leaf

EPS = 1e-12


def norm_input(rows, size, dtype=torch.float32, residual_dtype=None):
    """x, residual, weight and bias, which require gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, size), (rows, size), (size,), (size,)]
    dtypes = [dtype, residual_dtype or dtype, dtype, dtype]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[0] = tensors[0] * 2 + 0.5
    return [x.to(DEVICE, dtype).requires_grad_() for x, dtype in zip(tensors, dtypes)]


def kernel(x, residual, weight, bias):
    return leaf.triton_add_layer_norm(x, residual, weight, bias, EPS)


def plain(x, residual, weight, bias):
    return F.layer_norm(x + residual, x.shape[-1:], weight, bias, EPS)


def truth(x, residual, weight, bias, keep=1.0):
    x, residual, weight, bias = (tensor.double() for tensor in (x, residual, weight, bias))
    return reference.layer_norm(x * keep + residual, weight, bias, EPS)


@on_kernels
@pytest.mark.parametrize("rows, size", [(1, 8), (7, 40), (3, 768), (2, 1025)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_and_gradients_match_float64(rows, size, dtype):
    tensors = norm_input(rows, size, dtype)
    results = [with_gradient(function, *tensors) for function in (kernel, plain, truth)]
    assert results[0][0].dtype == dtype
    assert_no_worse(*(out for out, _ in results), FORWARD, "result")
    for name, *gradients in zip(("x", "residual", "weight", "bias"), *(gradients for _, gradients in results)):
        assert gradients[0].dtype == dtype
        assert_no_worse(*gradients, GRADIENT, name)


@on_kernels
def test_gradients_of_weight_and_bias_count_every_row(monkeypatch):
    monkeypatch.setattr(leaf, "PARTS", 4)
    tensors = norm_input(11, 24)
    _, gradients = with_gradient(kernel, *tensors)
    _, expected = with_gradient(truth, *tensors)
    for actual, exact in zip(gradients, expected):
        assert_same(actual, exact, 1e-6)


@on_kernels
def test_residual_of_another_dtype_and_a_result_of_a_third():
    tensors = norm_input(5, 40, torch.float16, torch.float32)
    out, gradients = with_gradient(kernel, *tensors)
    assert out.dtype == torch.float32, "as torch adds them"
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in tensors]
    assert_same(out, truth(*tensors), 1e-6)
    rounded = leaf.triton_add_layer_norm(*tensors, EPS, dtype=torch.bfloat16)
    assert torch.equal(rounded, out.bfloat16())


def test_row_size_is_a_power_of_two_and_no_size_up_to_the_largest_is_refused():
    for size in (1, 16, 17, 768, 1024, 1025, bert_layers.FUSED_LAYERS["add_norm"].max_channels):
        tile = leaf._tile(size)
        assert tile.step >= max(16, size) and tile.step & (tile.step - 1) == 0


@on_kernels
def test_dropout_is_reproducible_and_scaled_and_its_gradient_uses_the_same_mask():
    rows, size, dropout_p = 24, 128, 0.25
    tensors = norm_input(rows, size)

    def dropped(*tensors):
        torch.manual_seed(3)
        return leaf.triton_add_layer_norm(*tensors, EPS, dropout_p)

    # Where x is huge and the residual 0, a dropped number shows: it lies on the other side of the mean.
    ones = torch.ones(rows, size, device=DEVICE)
    keep = dropped(ones, ones * 0, ones[0], ones[0] * 0) > 0
    assert keep.equal(dropped(ones, ones * 0, ones[0], ones[0] * 0) > 0)
    deviation = (dropout_p * (1 - dropout_p) / keep.numel()) ** 0.5
    assert abs(keep.float().mean().item() - (1 - dropout_p)) < 5 * deviation
    for means, draws in ((keep.float().mean(0), rows), (keep.float().mean(1), size)):
        assert (means - (1 - dropout_p)).abs().max() < 5 * (dropout_p * (1 - dropout_p) / draws) ** 0.5

    out, gradients = with_gradient(dropped, *tensors)
    expected, exact = with_gradient(lambda *t: truth(*t, keep=keep / (1 - dropout_p)), *tensors)
    assert_same(out, expected, 1e-6)
    for actual, gradient in zip(gradients, exact):
        assert_same(actual, gradient, 2e-6)


@on_kernels
def test_dropout_differs_between_calls_rows_and_channels():
    ones = torch.ones(32, 64, device=DEVICE)
    torch.manual_seed(4)
    first, second = (leaf.triton_add_layer_norm(ones, ones * 0, ones[0], ones[0] * 0, EPS, 0.5) > 0 for _ in range(2))
    for other in (second, first.roll(1, 0), first.roll(1, 1), first.roll(16, 1)):
        # 2,048 fair coins agree in half of all cases, give or take 5 standard deviations of 0.011.
        assert abs((first == other).float().mean().item() - 0.5) < 0.056


@on_kernels
def test_runs_are_bitwise_equal():
    tensors = norm_input(6, 96, torch.float16)

    def dropped(*tensors):
        torch.manual_seed(5)
        return leaf.triton_add_layer_norm(*tensors, EPS, 0.1)

    runs = [with_gradient(dropped, *tensors) for _ in range(2 if INTERPRETED else 100)]
    for out, gradients in runs[1:]:
        assert torch.equal(out, runs[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, runs[0][1]))


@on_kernels
def test_strides_and_leading_axes_are_kept():
    x, residual, weight, bias = norm_input(6, 40)
    expected = kernel(x, residual, weight, bias)
    wide = torch.stack((x.detach(), x.detach()), dim=1)[:, 1].unflatten(0, (2, 3))
    transposed = residual.detach().t().contiguous().t().unflatten(0, (2, 3))
    assert not wide.is_contiguous() and transposed.stride(-1) != 1
    assert torch.equal(kernel(wide, transposed, weight, bias), expected.unflatten(0, (2, 3)))


@on_kernels
def test_no_rows_at_all():
    tensors = norm_input(0, 8)
    out, gradients = with_gradient(kernel, *tensors)
    assert out.shape == (0, 8)
    assert all((gradient == 0).all() and gradient.shape == x.shape for gradient, x in zip(gradients, tensors))


@on_kernels
def test_one_launch_forward_and_one_backward(monkeypatch):
    launches = launch_recorder(monkeypatch, leaf)
    with_gradient(kernel, *norm_input(3, 40))
    assert launches == [leaf._forward_kernel, leaf._backward_kernel]
