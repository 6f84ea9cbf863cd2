"""Batches, inputs and the judge of attention functions."""

import numerics
import reference
import torch

from mosaicbert.bert_attention import alibi_slopes, eager_attention
from mosaicbert.bert_padding import pack_flattened, pack_padded


def batch(lengths):
    """Concatenated sequences without holes."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return pack_flattened(bounds, None, (1, sum(lengths)))


def holed(lengths=(40, 33, 0, 25), length=40):
    """Padded rows, each but the first with holes or left padding."""
    mask = torch.zeros(len(lengths), length, dtype=torch.long)
    for row, count in enumerate(lengths):
        mask[row, torch.randperm(length, generator=torch.Generator().manual_seed(row))[:count]] = 1
    return pack_padded(mask, tuple(mask.shape), mask.device)


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
    """The kernel rule: at most 2 (gradients: 3) times the error of the plain formula in the same dtype.

    Returns what `truth` does.
    """
    expected = truth(packed, *inputs)
    plain = attend(plain, packed, *inputs)
    names = ("context", "query.grad", "key.grad", "value.grad")
    for name, got, base, exact in zip(names, attend(function, packed, *inputs), plain, expected):
        factor = numerics.FORWARD if name == "context" else numerics.GRADIENT
        numerics.assert_no_worse(got, base, exact, factor, name)
    return expected


LAYOUTS = {
    "short ones": lambda: batch([1, 2, 1]),
    "odd lengths, one empty": lambda: batch([1, 63, 0, 97]),
    "neighbours of equal length": lambda: batch([17, 17, 17, 5, 17]),
    "holes": holed,
}


def plain_attention(qkv, packed, slopes, scale, dropout_p):
    """The plain formula with matrix products in the dtype of `qkv` and softmax in float32; eager has float32 scores."""
    contexts = []
    for q, k, v in zip(*(x.split(packed.lengths) for x in qkv.unbind(1))):
        position = torch.arange(len(q))
        bias = -slopes[:, None, None] * (position[:, None] - position).abs()
        scores = torch.einsum("qhd,khd->hqk", q, k).float() * scale + bias
        contexts.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1).to(v.dtype), v))
    return torch.cat(contexts)
