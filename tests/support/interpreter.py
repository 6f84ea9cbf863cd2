"""Runs files of tests in a process of its own; a file apart, because a process that is spawned imports it first."""

import contextlib
import io

import pytest


def serve(connection) -> None:
    """Run the files whose names arrive, and answer each with pytest's exit status and output."""
    while True:
        arguments = ["-p", "no:cacheprovider", connection.recv()]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            status = pytest.main(arguments)
        connection.send((int(status), output.getvalue()))
