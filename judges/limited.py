"""Calls a function in a process of its own, which the system ends at a time or memory limit.

A regular expression or a power of a power can keep the interpreter inside one C call, where no
signal handler and no thread of the same process can stop it.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from typing import Any

MEMORY_LIMIT = 4 * 2**30
"""Bytes of address space: more is a runaway computation, not an answer."""


class NoResult(Exception):
    """The function gave no result; its text says why."""


class Limited:
    """A function `module:function` of this package, over JSON values, called with a time limit.

    The process starts with the first call, and again after one that it did not survive.
    """

    def __init__(self, function: str, *, timeout_s: float) -> None:
        if not 0 < timeout_s < float("inf"):
            raise ValueError(f"timeout_s must be positive, not {timeout_s}")
        self._function = function
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._end: weakref.finalize[..., Limited] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """The function's result. Raises NoResult where it raises, dies or takes too long."""
        process = self._running() or self._start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([self._timeout_s, arguments]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise NoResult(self._cause_of_death(process))
        reply = json.loads(line)
        if "error" in reply:
            raise NoResult(reply["error"])
        return reply["result"]

    def close(self) -> None:
        """End the process, if it runs; the next call starts it again."""
        if self._end is not None:
            self._end()
        self._process = None

    def _running(self) -> subprocess.Popen[str] | None:
        """The process, unless something has ended it since the last call."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        return self._process

    def _start(self) -> subprocess.Popen[str]:
        # -P: a folder called `judges` in the working directory is not ours.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "judges.limited", self._function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._end = weakref.finalize(self, _kill, self._process)
        return self._process

    def _cause_of_death(self, process: subprocess.Popen[str]) -> str:
        code = process.wait()
        self.close()
        if code == -signal.SIGALRM:
            return f"took longer than {self._timeout_s:g} s"
        return f"its process ended with exit code {code}"


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def serve(name: str) -> None:
    """Answer requests on standard input, one a line, until it closes."""
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    # What the function prints must not be taken for a reply.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default ends the process, wherever it is
    for line in sys.stdin:
        timeout_s, arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            reply = {"result": function(*arguments)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
