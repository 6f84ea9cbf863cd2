"""Runs programs in forks of a process that has imported torch; a file apart, because each fork imports it first."""

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

# Most of what transformers imports; none of it reads the variables that a program may set.
PRELOADED = ["torch._dynamo", "sklearn.metrics", "scipy.stats", "pandas"]


def call(program: str, arguments: list, cwd, environment: dict, stdin: str) -> subprocess.CompletedProcess:
    """Run a program as `python -c` does, with this environment and no other."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        files[0].write_text(stdin, encoding="utf-8")
        process = context.Process(target=_run, args=(program, arguments, cwd, environment, files))
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # the first call also starts what is forked
            process.start()
        process.join(600)
        if process.is_alive():
            process.kill()
        process.join()
        printed = [file.read_text(encoding="utf-8") for file in files[1:] if file.exists()]
    return subprocess.CompletedProcess(program, process.exitcode, *printed)


def _run(program, arguments, cwd, environment, files):
    gc.freeze()  # what is preloaded outlives every collection
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, (file, mode) in enumerate(zip(files, "rww")):
        with open(file, mode) as opened:
            os.dup2(opened.fileno(), number)
    sys.stdin, sys.stdout, sys.stderr = (open(number, mode, encoding="utf-8") for number, mode in enumerate("rww"))
    sys.argv = ["-c", *arguments]
    standard = (sys.prefix, sys.base_prefix)
    installed = [path for path in sys.path if path.startswith(standard) or path.endswith("site-packages")]
    sys.path[:] = ["", *filter(None, environment["PYTHONPATH"].split(os.pathsep)), *installed]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(program, "<string>", "exec"), main.__dict__)
