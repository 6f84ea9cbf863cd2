"""Stops a process before each of its file operations in turn: Python announces them to audit hooks, which may raise or
kill."""

import os
import signal
import sys


def stopped_ever_later(prepare, work, stop="kill"):
    """Call `prepare` and then, in a child process, `work`, which is stopped one file operation later each time.

    Args:
        prepare: called before each child.
        work: what is stopped.
        stop: "kill" (SIGKILL), "interrupt" (KeyboardInterrupt) or "error" (OSError).

    Yields:
        None after each child; the last one was not stopped.
    """
    last, status = 0, 1
    while status:
        last += 1
        prepare()
        child = os.fork()
        if not child:
            _stop_at(last, work, stop)
        status = os.waitpid(child, 0)[1]
        yield


def _stop_at(last, work, stop):
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event.split(".")[0] in ("open", "os", "shutil", "fcntl", "ctypes") and event != "os.kill":
            count += 1
            if count == last:
                if stop == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt if stop == "interrupt" else OSError(5, "Input/output error")

    sys.addaudithook(hook)
    try:
        work()
    except (KeyboardInterrupt, OSError):
        pass
    os._exit(count >= last)
