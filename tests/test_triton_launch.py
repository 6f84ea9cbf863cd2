"""Which tile size runs, how kernels start, and devices that cannot run them."""

import logging

import pytest
import torch
import triton
from triton_kernels import INTERPRETED, KERNELS, leaf, packed_input, slopes_of

from mosaicbert import launch_triton

FORWARD, QUERY, KEY_VALUE = KERNELS
ON_H100 = 232_448  # bytes of shared memory a block


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", leaf.DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128])
@pytest.mark.parametrize("has_dropout", [False, True])
def test_at_most_three_sizes_are_tried(kernel, dtype, head_dim, has_dropout):
    tiles = leaf.tiles_for(kernel, dtype, head_dim, has_dropout, ON_H100)
    assert 1 <= len(tiles) <= 3
    assert all(tile.warps == 4 for tile in tiles) or head_dim > 64 or dtype == torch.float32


def test_sizes_suit_the_dtype_and_the_card():
    assert (128, 64, 4, 3) in leaf.tiles_for(FORWARD, torch.bfloat16, 64, False, ON_H100)
    assert (128, 64, 4, 2) in leaf.tiles_for(QUERY, torch.bfloat16, 64, False, ON_H100)
    assert (64, 128, 4, 2) in leaf.tiles_for(KEY_VALUE, torch.bfloat16, 64, False, ON_H100)
    assert all(tile.own <= 32 for tile in leaf.tiles_for(FORWARD, torch.float32, 64, False, ON_H100))
    # A stage of (128, 64) at D = 64 takes 16 KiB, the owned tiles 32 KiB.
    assert (128, 64, 4, 3) not in leaf.tiles_for(FORWARD, torch.bfloat16, 64, False, 80 * 1024 - 1)
    assert leaf.tiles_for(FORWARD, torch.bfloat16, 128, False, 1024) == [(32, 32, 4, 1)]


def forward_of(max_seqlen, lengths=(40,)):
    qkv, cu_seqlens = packed_input(list(lengths), 1, 16)
    return leaf._forward(
        qkv.detach(), cu_seqlens, slopes_of(1), None, None, None, 0.25, 0.0, max_seqlen, max_seqlen > 512
    )


@pytest.fixture
def launches(monkeypatch):
    """(kernel, grid, tile) of what `launch` is asked for; nothing runs."""
    recorded = []

    def record(kernel, grid, tensors, strides, numbers, constants, tile):
        recorded.append((kernel, grid, tile))

    monkeypatch.setattr(leaf, "launch", record)
    monkeypatch.setattr(leaf, "_chosen", {})
    return recorded


@pytest.mark.skipif(not INTERPRETED, reason="needs tensors on the CPU")
def test_one_kernel_runs_forward_two_where_something_may_be_skipped_and_two_backward(launches):
    qkv, cu_seqlens = packed_input([40, 25], 2, 16)
    for max_seqlen, forward in ((512, [FORWARD]), (513, [leaf._measure_kernel, FORWARD])):
        context = leaf._attend(qkv, cu_seqlens, max_seqlen, slopes_of(2), 0.25, 0.0)
        assert [kernel for kernel, *_ in launches] == forward
        launches.clear()
        torch.autograd.grad(context, qkv, torch.zeros_like(context))
        assert [kernel for kernel, *_ in launches] == [QUERY, KEY_VALUE]
        for _, grid, tile in launches:
            assert grid == (65 // tile.own + 2, 2, 1)
        launches.clear()


@pytest.mark.skipif(not INTERPRETED, reason="a GPU times for real")
def test_tiles_are_timed_once_for_each_range_of_lengths(monkeypatch, launches):
    timed = []

    def fastest(tiles, run):
        timed.append(tiles)
        for tile in tiles:
            run(tile)
        return tiles[1]

    monkeypatch.setattr(leaf, "fastest", fastest)
    monkeypatch.setattr(leaf, "shared_memory", lambda device: ON_H100)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for max_seqlen, times in ((40, 1), (50, 1), (300, 2), (256, 2)):
        forward_of(max_seqlen)
        assert len(timed) == times
        assert launches[-1][2] == timed[-1][1]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    forward_of(2000)
    assert len(timed) == 2 and launches[-1][2] == timed[-1][0], "a graph that is captured gets the first size, untimed"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    forward_of(2000)
    assert len(timed) == 3, "which is not remembered"


def test_fastest_leaves_out_what_does_not_fit(monkeypatch):
    tiles = [launch_triton.Tile(own, 32, 4, 2) for own in (128, 64, 32)]
    seconds = dict(zip(tiles, (1.0, 2.0, 3.0)))

    def run(tile):
        if tile in too_large:
            raise triton.runtime.OutOfResources(2, 1, "shared memory")
        ran.append(tile)

    def do_bench(function, warmup, rep):
        function()
        return seconds[ran[-1]]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    too_large, ran = tiles[:1], []
    assert launch_triton.fastest(tiles, run) == tiles[1]
    too_large = tiles
    with pytest.raises(triton.runtime.OutOfResources):
        launch_triton.fastest(tiles, run)


class CompiledKernel:
    """Stands for a triton.jit function and for what it compiles to."""

    def __init__(self):
        self.dispatched, self.ran = [], []

    def __getitem__(self, grid):
        def dispatch(*arguments, **options):
            (self.dispatched if options else self.ran).append((grid, arguments))
            return self

        return dispatch


def test_a_compiled_kernel_runs_again_without_dispatch_only_for_arguments_of_its_kind(monkeypatch):
    monkeypatch.setattr(launch_triton, "_RUNS_COMPILED", True)
    monkeypatch.setattr(launch_triton, "_compiled", {})
    kernel, tile = CompiledKernel(), launch_triton.Tile(32, 32, 4, 2)
    x = torch.zeros(64)
    usual = {"tensors": (x, None), "strides": (16,), "numbers": (1, 0.5), "constants": (64,), "tile": tile}
    same = [usual, {**usual, "numbers": (2, 0.25)}, {**usual, "tensors": (x[4:], None)}]
    other = [
        {**usual, "tensors": (x[1:], None)},  # not aligned to 16 bytes
        {**usual, "tensors": (x.half(), None)},
        {**usual, "tensors": (x, x)},
        {**usual, "strides": (8,)},
        {**usual, "constants": (32,)},
        {**usual, "tile": tile._replace(warps=8)},
    ]
    for arguments in (*same, *other, *other):
        launch_triton.launch(kernel, (3, 2, 1), **arguments)
    assert len(kernel.dispatched) == 1 + len(other)
    assert len(kernel.ran) == 2 + len(other)
    assert kernel.ran[0] == ((3, 2, 1), (x, None, 16, 2, 0.25, 64))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves CPU tensors")
def test_cpu_tensors_are_refused_with_the_reason():
    assert "interpreter" in launch_triton.triton_declines(torch.device("cpu"))
    with pytest.raises(ValueError, match="qkv must be on a device that Triton can use: Triton runs on the CPU under"):
        leaf.flash_attn_qkvpacked_func(torch.zeros(1, 4, 3, 2, 16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a device on which launching fails")
def test_a_card_on_which_launching_fails_is_reported_once(caplog):
    launch_triton._reason_against.cache_clear()
    with caplog.at_level(logging.WARNING):
        reasons = [launch_triton.triton_declines(torch.device("cuda:0")) for _ in range(2)]
    assert reasons[0] == reasons[1] and "failed on cuda:0" in reasons[0]
    assert len(caplog.records) == 1 and "Triton kernels are not used" in caplog.text
