"""Triton attention where only a GPU can tell: devices, streams, graphs, memory and long sequences."""

from dataclasses import replace

import pytest
import reference
import torch
from models import VOCAB, ragged_batch, tiny_model
from numerics import assert_same
from triton_kernels import (
    DEVICE,
    DTYPES,
    assert_as_good_as_eager,
    attend,
    on_gpu,
    packed_input,
    skip_at_every_length,
    slopes_of,
    with_gradient,
)

from mosaicbert import bert_layers


def sampled_truth(qkv, slopes, rows):
    """float64 context of some rows of one sequence, [rows, H, D]."""
    query, key, value = qkv.double().unbind(1)
    columns = torch.arange(len(qkv), device=qkv.device)
    scores = torch.einsum("qhd,khd->hqk", query[rows], key) * qkv.shape[-1] ** -0.5
    scores -= slopes.double()[:, None, None] * (rows[:, None] - columns[None, :]).abs()
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 112, 128])
def test_every_head_size_and_dtype_on_the_device(head_dim, dtype):
    qkv, packed = packed_input([1, 63, 97, 0, 128, 200], 3, head_dim, dtype)
    assert_as_good_as_eager(qkv, packed, slopes_of(3))


@on_gpu
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("length", [2048, 8192, 32768])
def test_long_sequences_on_the_device(monkeypatch, length, skip):
    skip_at_every_length(monkeypatch, skip)
    qkv, packed = packed_input([length], 12, 64, torch.bfloat16)
    slopes = slopes_of(12)
    context, (gradient,) = with_gradient(lambda x: attend(x, packed, slopes), qkv)
    rows = torch.randint(length, (64,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    truth = sampled_truth(qkv.detach(), slopes, rows)
    # Two roundings of bfloat16: of the weights before they multiply the values, and of the result.
    assert_same(context[rows], truth, 7.9e-3)
    assert gradient.isfinite().all()


@on_gpu
def test_memory_grows_with_the_length_only():
    peaks = []
    for length in (4096, 16384):
        qkv, packed = packed_input([length], 12, 64, torch.bfloat16)
        for _ in range(2):  # the second run has tuned tiles
            torch.cuda.reset_peak_memory_stats()
            with_gradient(lambda x, packed=packed: attend(x, packed, slopes_of(12)), qkv)
        peaks.append(torch.cuda.max_memory_allocated() / length)
        del qkv
    assert peaks[1] < 1.05 * peaks[0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    qkv, packed = packed_input([50], 2, 16)
    qkv, packed, slopes = (x.to("cuda:1") for x in (qkv.detach(), packed, slopes_of(2)))
    with torch.cuda.device(0):
        context = attend(qkv, packed, slopes)
    assert context.device == qkv.device
    assert_same(context, reference.attention(*qkv.cpu().unbind(1), [0, 50], None, slopes.tolist()), 1e-6)


@on_gpu
def test_whole_model_trains_as_with_eager_attention():
    losses = {}
    for name in ("triton", "eager"):
        model = tiny_model(hidden_size=192, attn_implementation=name).cuda().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids, mask = (tensor.cuda() for tensor in ragged_batch([60, 17, 1, 0]))
        losses[name] = []
        for _ in range(5):
            loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["eager"], rel=1e-4)


def flattened_batch(lengths, seed=0):
    """Arguments of a model for texts one after another in a row [1, T], with labels at every fourth token."""
    total = sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (1, total), generator=generator)
    labelled = torch.arange(0, total, 4)
    labels = torch.full_like(ids, -100)
    labels[0, labelled] = ids[0, labelled]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    tensors = {"input_ids": ids, "labels": labels, "masked_lm_positions": labelled, "cu_seq_lens_q": bounds}
    return {name: tensor.cuda() for name, tensor in tensors.items()} | {"max_length_q": max(lengths)}


@on_gpu
@pytest.mark.parametrize("longest", [100, 700])
def test_a_training_step_never_waits_for_the_device(longest):
    model = tiny_model(hidden_size=192).cuda().bfloat16().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = [flattened_batch([longest, 30, 61], seed) for seed in range(3)]

    def step(batch):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    step(batches[0])  # compiles and times
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@on_gpu
@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("longest", [100, 700])
def test_a_cuda_graph_of_the_model_answers_for_new_ids(flattened, longest):
    model = tiny_model(hidden_size=192).cuda().half().eval()
    if flattened:
        fixed = {name: flattened_batch([longest, 30])[name] for name in ("cu_seq_lens_q", "max_length_q")}
        shape = (1, longest + 30)
    else:
        fixed, shape = {}, (2, longest)
    generator = torch.Generator(DEVICE).manual_seed(0)
    first, second = torch.randint(1, VOCAB, (2, *shape), device=DEVICE, generator=generator)
    ids = first.clone()
    with torch.inference_mode():
        expected = [model(x, **fixed).logits.clone() for x in (first, second)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(ids, **fixed)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(ids, **fixed).logits
        for new_ids, answer in zip((second, first), reversed(expected)):
            ids.copy_(new_ids)
            graph.replay()
            # Two roundings of float16, as matrix products may add in another order.
            assert_same(logits, answer.double(), 2e-3)


@on_gpu
def test_the_compiled_model_goes_through_the_kernels_without_a_graph_break():
    model = tiny_model(hidden_size=192, attn_implementation="triton").cuda().half().eval()
    ids, mask = (tensor.cuda() for tensor in ragged_batch([60, 17, 1]))
    compiled = torch.compile(model, fullgraph=True)
    with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        logits = compiled(ids, attention_mask=mask).logits
        torch.cuda.synchronize()
    assert any("_forward_kernel" in event.name for event in profile.events())
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask).logits
    real = mask.bool()
    # Half precision, in another order of operations.
    assert_same(logits[real], expected[real].double(), 1e-2)


@on_gpu
def test_fused_layers_serve_a_training_step_on_the_device(monkeypatch):
    served = {}
    for name, row in bert_layers.FUSED_LAYERS.items():

        def count(*arguments, name=name, function=row.function):
            served[name] = served.get(name, 0) + 1
            return function(*arguments)

        monkeypatch.setitem(bert_layers.FUSED_LAYERS, name, replace(row, function=count))
    model = tiny_model(hidden_size=192).cuda().bfloat16().train()
    model(**flattened_batch([60, 17])).loss.backward()
    assert served == {"geglu": 2, "add_norm": 4}
