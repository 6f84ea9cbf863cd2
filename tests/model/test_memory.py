"""No buffer grows with the square of the length: all allocations of the CPU allocator are traced."""

import json

import pytest
import torch
from models import VOCAB, tiny_model
from torch.profiler import ProfilerActivity, profile

from mosaicbert import bert_attention
from mosaicbert.bert_attention import alibi_slopes, sdpa_attention
from mosaicbert.bert_attention_cpu import cpu_attention, distance_bias
from mosaicbert.bert_padding import pack_flattened, pack_padded

SHORT, LONG = 2048, 16_384


def traced(function, folder):
    """Bytes of the largest single allocation, and the most bytes allocated at once beyond those at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = [event["args"] for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    assert events, "nothing was traced"
    sizes = [event["Bytes"] for event in events]
    totals = [event["Total Allocated"] for event in events]
    return max(sizes), max(totals) - (totals[0] - sizes[0])


def attention_step(length, train, dropout_p=0.0, hole=False):
    """A call that runs attention over one sequence, and its backward pass when `train`."""
    mask = torch.ones(1, length)
    if hole:
        mask[0, length // 2] = 0
        packed = pack_padded(mask, (1, length), mask.device)
    else:
        packed = pack_flattened(torch.tensor([0, length]), None, (1, length))
    qkv = torch.randn(len(packed.positions), 3, 2, 16, requires_grad=train)

    def step():
        attend = sdpa_attention if hole or dropout_p else cpu_attention
        context = attend(qkv, packed, torch.tensor([0.25, 2.0**-8]), 0.25, dropout_p)
        if train:
            context.sum().backward()

    return step


@pytest.mark.parametrize("train", [False, True], ids=["forward", "training"])
def test_attention_memory_is_linear_up_to_16384_tokens(train, tmp_path):
    largest, peak = traced(attention_step(LONG, train), tmp_path)
    assert largest < LONG**2 // 32
    _, short_peak = traced(attention_step(SHORT, train), tmp_path)
    assert peak <= 1.3 * short_peak * (LONG / SHORT)


@pytest.mark.parametrize("case", [{"hole": True}, {"dropout_p": 0.1}], ids=["hole", "dropout"])
def test_training_with_holes_or_dropout_allocates_nothing_quadratic(case, tmp_path, monkeypatch):
    """The bias and the weights of a chunk are bounded by a constant."""
    monkeypatch.setattr(bert_attention, "CPU_CHUNK_SCORES", SHORT**2 // 4)
    largest, peak = traced(attention_step(SHORT, True, **case), tmp_path)
    assert largest <= SHORT**2  # float32
    assert peak < 2 * 4 * SHORT**2


def test_bias_of_twelve_heads_takes_96_bytes_a_token():
    bias = distance_bias(torch.tensor(alibi_slopes(12)), LONG)
    assert bias.untyped_storage().nbytes() <= 96 * LONG


def test_a_training_step_of_the_model_allocates_nothing_quadratic(tmp_path):
    model = tiny_model(hidden_size=32, num_attention_heads=2, intermediate_size=32, num_hidden_layers=1)
    model.train()
    ids = torch.randint(1, VOCAB, (1, 8192), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[0, ::7] = ids[0, ::7]
    largest, _ = traced(lambda: model(ids, labels=labels).loss.backward(), tmp_path)
    assert largest < 8192**2 // 16
