"""The choice of tile sizes, how kernels start, and devices that cannot run them."""

import contextlib
import itertools
import logging
import math
import re
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch
import triton
from conftest import ROOT
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from triton_kernels import DTYPES, INTERPRETED, KERNELS, leaf, packed_input, slopes_of

from mosaicbert import geglu_triton, launch_triton, layer_norm_triton
from mosaicbert.bert_padding import pack_flattened

FORWARD, QUERY, KEY_VALUE = KERNELS
ON_H100 = 232_448  # bytes of shared memory per block


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
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
    assert all(tile.rows <= 32 for tile in leaf.tiles_for(FORWARD, torch.float32, 64, False, ON_H100))
    # A stage of (128, 64) at D = 64 takes 16 KiB, the owned tiles 32 KiB.
    assert (128, 64, 4, 3) not in leaf.tiles_for(FORWARD, torch.bfloat16, 64, False, 80 * 1024 - 1)
    assert leaf.tiles_for(FORWARD, torch.bfloat16, 128, False, 1024) == [(32, 32, 4, 1)]


def forward_of(max_seqlen, lengths=(40,)):
    qkv, packed = packed_input(list(lengths), 1, 16)
    leaf._forward(qkv.detach(), packed.cu_seqlens, slopes_of(1), None, None, None, 0.25, 0.0, max_seqlen)


@pytest.fixture
def launches(monkeypatch):
    """(kernel, grid, tile) of what `launch` is asked for; nothing runs."""
    recorded = []

    def record(kernel, grid, tile, tensors, strides, numbers, constants):
        assert [*tensors, *strides, *numbers, *constants] == kernel.arg_names
        recorded.append((kernel, grid, tile))

    monkeypatch.setattr(leaf, "launch", record)
    monkeypatch.setattr(leaf, "_chosen", {})
    return recorded


@pytest.mark.skipif(not INTERPRETED, reason="needs tensors on the CPU")
def test_one_kernel_runs_forward_two_where_something_may_be_skipped_and_two_backward(launches):
    qkv, packed = packed_input([40, 25], 2, 16)
    for max_seqlen, forward in ((512, [FORWARD]), (513, [leaf._measure_kernel, FORWARD])):
        context = leaf.triton_attention(qkv, replace(packed, max_seqlen=max_seqlen), slopes_of(2), 0.25, 0.0)
        assert [kernel for kernel, *_ in launches] == forward
        launches.clear()
        torch.autograd.grad(context, qkv, torch.zeros_like(context))
        assert [kernel for kernel, *_ in launches] == [QUERY, KEY_VALUE]
        for _, grid, tile in launches:
            assert grid == (65 // tile.rows + 2, 2, 1)
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
    tiles = [launch_triton.Tile(rows, 32, 4, 2) for rows in (128, 64, 32)]
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

    arg_names = ("x", "y", "stride", "total", "scale", "BLOCK")

    def __init__(self):
        self.fn, self.dispatched, self.ran = self, [], []

    def __getitem__(self, grid):
        def dispatch(*arguments, **options):
            (self.dispatched if options else self.ran).append((grid, arguments))
            return self

        return dispatch


@pytest.fixture
def knobs(monkeypatch):
    """Triton's knobs, where compiled kernels run again and none is kept yet."""
    monkeypatch.setattr(launch_triton, "_RUNS_COMPILED", True)
    monkeypatch.setattr(launch_triton, "_compiled", {})
    return pytest.importorskip("triton.knobs", reason="this Triton has no knobs")


def launch(kernel, x, **changes):
    """Launch a `CompiledKernel`; keyword arguments replace those of `launch_triton.launch`."""
    sizes = {"tile": launch_triton.Tile(32, 32, 4, 2), "strides": {"stride": 16}, "constants": {"BLOCK": 64}}
    usual = {**sizes, "tensors": {"x": x, "y": None}, "numbers": {"total": 1, "scale": 0.5}}
    launch_triton.launch(kernel, (3, 2, 1), **usual | changes)


def test_a_compiled_kernel_runs_again_without_dispatch_only_for_arguments_of_its_kind(knobs):
    kernel, x = CompiledKernel(), torch.zeros(64)
    same = [{}, {"numbers": {"total": 2, "scale": 0.25}}, {"tensors": {"x": x[4:], "y": None}}]
    other = [
        {"tensors": {"x": x[1:], "y": None}},  # not aligned to 16 bytes
        {"tensors": {"x": x.half(), "y": None}},
        {"tensors": {"x": x, "y": x}},
        {"strides": {"stride": 8}},
        {"constants": {"BLOCK": 32}},
        {"tile": launch_triton.Tile(32, 32, 8, 2)},
    ]
    for changes in (*same, *other, *other):
        launch(kernel, x, **changes)
    assert len(kernel.dispatched) == 1 + len(other)
    assert len(kernel.ran) == 2 + len(other)
    assert kernel.ran[0] == ((3, 2, 1), (x, None, 16, 2, 0.25, 64))


@pytest.mark.parametrize(
    "group, name, value", [("runtime", "debug", True), ("compilation", "instrumentation_mode", "fpsan")]
)
def test_debugging_and_instrumentation_run_kernels_of_their_own(knobs, monkeypatch, group, name, value):
    kernel, x = CompiledKernel(), torch.zeros(64)
    for setting in (None, value, value, None):
        with monkeypatch.context() as patch:
            if setting is not None:
                patch.setattr(getattr(knobs, group), name, setting)
            launch(kernel, x)
    assert (len(kernel.dispatched), len(kernel.ran)) == (2, 2)


def test_nothing_is_kept_while_a_hook_changes_the_compiler_or_on_a_triton_that_was_not_tested(knobs, monkeypatch):
    kernel, x = CompiledKernel(), torch.zeros(64)
    for runs_compiled, hook in ((True, lambda: ("key", "hash")), (False, None)):
        monkeypatch.setattr(launch_triton, "_RUNS_COMPILED", runs_compiled)
        monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", hook)
        for _ in range(2):
            launch(kernel, x)
    assert (len(kernel.dispatched), len(kernel.ran)) == (4, 0) and not launch_triton._compiled


def test_compiled_kernels_run_again_up_to_the_triton_that_the_tests_run_with():
    """Whoever pins a newer one compares `JITFunction.run` there with `_key`, and raises the limit."""
    ((major, minor),) = re.findall(r"^triton==(\d+)\.(\d+)", (ROOT / "constraints.txt").read_text(), flags=re.M)
    allowed = {"3.5.1": False, "3.6.0": True, f"{major}.{minor}.9+git1": True, f"{major}.{int(minor) + 1}.0": False}
    assert {version: launch_triton._runs_compiled(version) for version in allowed} == allowed
    assert launch_triton._RUNS_COMPILED is launch_triton._runs_compiled(triton.__version__)


def test_arguments_of_another_order_are_refused():
    message = "the kernel takes x, y, stride, total, scale, BLOCK, got x, y, stride, scale, total, BLOCK"
    with pytest.raises(TypeError, match=message):
        launch(CompiledKernel(), torch.zeros(64), numbers={"scale": 0.5, "total": 1})


class Specialized:
    """Stands for a kernel, and for what it compiles to: checks that Triton itself would run that again."""

    def __init__(self, kernel, target, compiled_for=None):
        self.kernel, self.target, self.compiled_for = kernel, target, compiled_for
        self.fn, self.arg_names = kernel.fn, kernel.arg_names

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
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **named: recorded.append((kernel, _, named)))
    # 2 GiB that are never written, so that they take no memory.
    reserve = torch.empty(2**30, dtype=torch.bfloat16)
    for start, storage in ((0, reserve[: 2**20].clone()), (1, reserve[: 2**20].clone()), (0, reserve)):
        for lengths, size in itertools.product(([1], [16], [40, 25]), (16, 24)):
            shape = (sum(lengths), 3, 1, size)
            qkv = storage[start : start + math.prod(shape)].view(shape).requires_grad_()
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
            for max_seqlen in (512, 513):
                packed = replace(pack_flattened(cu_seqlens, None, (1, len(qkv))), max_seqlen=max_seqlen)
                leaf.triton_attention(qkv, packed, torch.ones(1), 1.0, 0.0).sum().backward()
            rows = qkv.flatten(1)
            geglu_triton.triton_geglu(rows[:, : 2 * size]).sum().backward()
            layer_norm_triton.triton_add_layer_norm(rows, rows, rows[0], rows[0], 1e-12).sum().backward()
    monkeypatch.setattr(launch_triton, "_RUNS_COMPILED", True)
    monkeypatch.setattr(launch_triton, "_compiled", {})
    monkeypatch.setattr(torch.version, "hip", target[0] == "hip" or None)
    kernels = {kernel: Specialized(kernel, GPUTarget(*target)) for kernel, *_ in recorded}
    runs.clear()
    for kernel, positional, named in recorded:
        launch_triton.launch(kernels[kernel], *positional, **named)
    assert len(kernels) == 8 and set(runs) == set(kernels)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves CPU tensors")
def test_cpu_tensors_are_refused_with_the_reason():
    assert "interpreter" in launch_triton.triton_declines(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a device on which launching fails")
def test_a_card_on_which_launching_fails_is_reported_once(caplog):
    launch_triton._device_declines.cache_clear()
    with caplog.at_level(logging.WARNING):
        reasons = [launch_triton.triton_declines(torch.device("cuda:0")) for _ in range(2)]
    assert reasons[0] == reasons[1] and "failed on cuda:0" in reasons[0]
    assert len(caplog.records) == 1 and "Triton kernels are not used" in caplog.text
