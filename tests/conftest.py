"""Makes the repository root importable as the package `mosaicbert`, the way the Hub and pip see its files, and keeps
tests away from the network and from the user's cache."""

import gc
import importlib.util
import json
import multiprocessing.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from lib import cli

ROOT = Path(__file__).resolve().parent.parent

# Read when huggingface_hub and transformers are imported, so set before either is.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="mosaicbert-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
multiprocessing.util.Finalize(None, shutil.rmtree, (os.environ["HF_HOME"], True), exitpriority=0)


def _import_root_as_package(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


_import_root_as_package("mosaicbert")


def pytest_collection_finish():
    """Keep garbage collections, one of which ends each training, away from the million objects of imported modules."""
    gc.freeze()


@pytest.fixture
def text(tmp_path):
    """A file of short documents that the tokenizer of `folders` knows."""
    path = tmp_path / "text.jsonl"
    words = "the cat sat on the mat and then it ran under a big red tree over the small house".split()
    lines = [" ".join(words[i % 7 :] + words[: i % 5]) for i in range(60)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A tokenizer of the words of `corpus`, which is also in the folder of its name."""
    from corpora import make_tokenizer

    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A file of 60 documents."""
    from corpora import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(params=["eager", "sdpa", "auto"])
def backend(request):
    """The attention implementations that every device serves."""
    return request.param


@pytest.fixture
def run_script(monkeypatch):
    """Calls `run_script(module, *arguments)`, which runs a script as the command line does."""

    def run_script(module, *arguments):
        monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, arguments)])
        cli.run(module.main)

    return run_script


@pytest.fixture(scope="session")
def export_demo(tmp_path_factory):
    """Exports the shipped checkpoint: a function from `onnx` or `gguf` to the folder, made once a process."""
    folders = {}

    def export_demo(kind):
        if kind not in folders:
            folder = tmp_path_factory.mktemp("export") / "demo"
            program = (
                "import sys, export\n"
                "from lib import cli, exporting\n"
                "exporting.CHECKED_BATCHES = ((1,), (9, 1, 40))\n"
                f"sys.argv = {['export.py', str(ROOT), str(folder), '--format', kind]!r}\n"
                "cli.run(export.main)\n"
            )
            from processes import run_python

            run_python(program)
            folders[kind] = folder
        return folders[kind]

    return export_demo


@pytest.fixture(scope="session")
def interpreted():
    """Runs pytest in a process whose Triton interprets kernels on the CPU: a function from arguments to its output."""
    pytest.importorskip("triton", reason="Triton is made for Linux")
    import interpreter

    context = multiprocessing.get_context("spawn")
    connection, end = context.Pipe()
    process = context.Process(target=interpreter.serve, args=(end,), daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}.items():
            patch.setenv(name, value)
        process.start()
    end.close()

    def run(*arguments):
        connection.send([str(argument) for argument in arguments])
        assert connection.poll(600), "the tests take longer than 10 minutes"
        status, output = connection.recv()
        assert status == 0, output[-8000:]
        return output

    yield run
    connection.close()
    process.join(10)
    process.kill()


@pytest.fixture
def bfloat16_in_the_interpreter(monkeypatch):
    """Triton's interpreter multiplies and rounds bfloat16 as a GPU does.

    NumPy has no bfloat16: on its own the interpreter multiplies the raw bits and truncates where a GPU rounds to even.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding_convert(data, source, target, *rest):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, *rest)
        floats = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
        return floats.bfloat16().view(torch.int16).numpy().view(np.uint16)

    def widening_dot(self, a, b, *rest):
        def widen(handle):
            if handle.dtype.scalar != tl.bfloat16:
                return handle
            return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        return dot(self, widen(a), widen(b), *rest)

    monkeypatch.setattr(interpreter, "_convert_float", rounding_convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widening_dot)


@pytest.fixture
def poisoned_memory():
    """What torch.empty and its relatives return is NaN."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def small_tiles(monkeypatch):
    """Attention under Triton's interpreter in tiles of 32 rows: short sequences have several, and few steps are run."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton_kernels import use_tiles

        use_tiles(monkeypatch, 32, 32)
