"""Runs tests in a process of its own; a file apart, because a process that is spawned imports it first."""

import contextlib
import io

import pytest
from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """Triton patches its language again for every call of a device function, which takes a quarter of the time."""
    launch, patched = interpreter.GridExecutor.__call__, set()

    def start(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__ = start, call


def serve(connection) -> None:
    """Run pytest with the arguments that arrive and answer with status and output, until the other end closes."""
    patch_once_a_launch()
    with contextlib.suppress(EOFError):
        while True:
            arguments = ["-p", "no:cacheprovider", *connection.recv()]
            with contextlib.redirect_stdout(io.StringIO()) as output:
                status = pytest.main(arguments)
            connection.send((int(status), output.getvalue()))
