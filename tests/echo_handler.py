"""A worker's handler that does what a test asks of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from online_dpo.errors import ConfigError

Emit = Callable[[dict[str, Any]], None]


class Echo:
    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def echo(self, *, emit: Emit, text: str) -> dict[str, Any]:
        emit({"event": "heard", "text": text})
        print("noise on stdout")
        return {"text": text, "settings": self.settings, "pid": os.getpid()}

    def fail(self, *, emit: Emit) -> dict[str, Any]:
        raise ConfigError("no such thing", remedy="do this")

    def crash(self, *, emit: Emit) -> dict[str, Any]:
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    def spawn(self, *, emit: Emit) -> dict[str, Any]:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        return {"pid": os.getpid(), "child": child.pid}

    def sleep(self, *, emit: Emit) -> dict[str, Any]:
        emit({"event": "sleeping", "pid": os.getpid()})
        time.sleep(600)
        return {}
