"""Which tile size runs, how kernels start, and devices that cannot run them."""

import contextlib
import itertools
import logging
import math

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from triton_kernels import INTERPRETED, KERNELS, leaf, packed_input, slopes_of

from mosaicbert import geglu_triton, launch_triton, layer_norm_triton

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

    current = []

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    def fastest(tiles, run):
        assert current == [-1], "the device of the tensors, which need not be the current one, is timed"
        timed.append(tiles)
        for tile in tiles:
            run(tile)
        return tiles[1]

    monkeypatch.setattr(leaf, "fastest", fastest)
    monkeypatch.setattr(leaf, "shared_memory", lambda device: ON_H100)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "device", device)
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


class Specialized:
    """Stands for a kernel, and for what it compiles to: checks that Triton itself would run that again."""

    def __init__(self, kernel, target, compiled_for=None):
        self.kernel, self.target, self.compiled_for = kernel, target, compiled_for

    def __getitem__(self, grid):
        def run(*arguments, **options):
            bind = create_function_from_signature(self.kernel.signature, self.kernel.params, make_backend(self.target))
            _, specialization, _ = bind(*arguments)
            if options:
                return Specialized(self.kernel, self.target, specialization)
            assert specialization == self.compiled_for
            runs.append(self.kernel)

        return run


runs = []


@pytest.mark.skipif(INTERPRETED or not launch_triton._RUNS_COMPILED, reason="nothing compiled runs again")
@pytest.mark.parametrize("target", [("cuda", 90, 32), ("hip", "gfx942", 64)])
def test_no_compiled_kernel_runs_for_what_triton_would_compile_anew(monkeypatch, target):
    recorded = []
    for module in (leaf, geglu_triton, layer_norm_triton):
        monkeypatch.setattr(module, "launch", lambda *arguments: recorded.append(arguments))
    # 2 GiB that are never written, so that they take no memory.
    reserve = torch.empty(2**30, dtype=torch.bfloat16)
    for start, storage in ((0, reserve[: 2**20].clone()), (1, reserve[: 2**20].clone()), (0, reserve)):
        for lengths, size in itertools.product(([1], [16], [40, 25]), (16, 24)):
            shape = (sum(lengths), 3, 1, size)
            qkv = storage[start : start + math.prod(shape)].view(shape).requires_grad_()
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
            for max_seqlen in (512, 513):
                leaf._attend(qkv, cu_seqlens, max_seqlen, torch.ones(1), 1.0, 0.0).sum().backward()
            rows = qkv.flatten(1)
            geglu_triton.triton_geglu(rows[:, : 2 * size]).sum().backward()
            layer_norm_triton.triton_add_layer_norm(rows, rows, rows[0], rows[0], 1e-12).sum().backward()
    monkeypatch.setattr(launch_triton, "_RUNS_COMPILED", True)
    monkeypatch.setattr(launch_triton, "_compiled", {})
    monkeypatch.setattr(torch.version, "hip", target[0] == "hip" or None)
    kernels = {kernel: Specialized(kernel, GPUTarget(*target)) for kernel, *_ in recorded}
    runs.clear()
    for kernel, *arguments in recorded:
        launch_triton.launch(kernels[kernel], *arguments)
    assert len(kernels) == 8 and set(runs) == set(kernels)


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
