"""The entry of a worker process: connect, take calls one by one, end when the socket closes."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any

from online_dpo.errors import CampaignError
from online_dpo.files import as_disk_error
from online_dpo.locks import hold_as_worker
from online_dpo.workers import REMOTE_TIMEOUT_S, RUN_ENV, SOCKET_ENV, TCP, TOKEN_ENV

GUARD_POLL_MS = 200


def main() -> None:
    """Serve until the socket closes; the process group then dies with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lock = hold_as_worker(Path(os.environ[RUN_ENV]))
    connection = _connect(os.environ[SOCKET_ENV])
    _fork_guard(connection, lock)
    rank = int(os.environ.get("RANK", "0"))
    send = _Sender(connection)
    send({"rank": rank, "token": os.environ.pop(TOKEN_ENV)})
    messages: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read, args=(connection, messages), daemon=True).start()
    with lock:
        _serve(messages, send)


def _connect(address: str) -> socket.socket:
    if address.startswith(TCP):
        host, _, port = address.removeprefix(TCP).rpartition(":")
        connection = _patiently(host, int(port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return connection
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    return connection


def _patiently(host: str, port: int) -> socket.socket:
    """Connect to the first machine, which may not listen yet."""
    deadline = time.monotonic() + REMOTE_TIMEOUT_S
    while True:
        try:
            return socket.create_connection((host, port))
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _fork_guard(connection: socket.socket, lock: IO[str]) -> None:
    """A process that ends the group once the socket has closed or this process has ended.

    `_read` cannot do so while native code holds the interpreter. A parent-death signal would not
    reach engine cores, and would come where merely the thread that started the worker ends.
    """
    guarded = os.getpid()
    if os.fork() > 0:
        return
    try:
        lock.close()
        poll = select.poll()
        poll.register(connection, select.POLLRDHUP)
        while os.getppid() == guarded and not poll.poll(GUARD_POLL_MS):
            pass
    finally:
        _die()


def _serve(messages: queue.Queue[dict[str, Any]], send: _Sender) -> None:
    hello = messages.get()
    handler: Any = None
    while True:
        request = messages.get()
        try:
            if handler is None:
                handler = _load(hello["handler"])(hello["settings"])
            method = getattr(handler, request["method"])
            result = method(emit=lambda event: send({"event": event}), **request["params"])
            send({"result": result})
        except BaseException as error:
            traceback.print_exc(file=sys.stderr)
            send({"error": _describe(error)})


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _describe(error: BaseException) -> dict[str, Any]:
    error = as_disk_error(error, os.environ.get(RUN_ENV)) or error
    if isinstance(error, CampaignError):
        facts = {"message": error.message, "remedy": error.remedy, "safe": error.safe}
        return {"type": type(error).__name__, **facts}
    return {"type": type(error).__name__, "message": str(error)}


class _Sender:
    """Writes whole JSON lines; a closed socket ends the process."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def __call__(self, message: dict[str, Any]) -> None:
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            _die()


def _read(connection: socket.socket, messages: queue.Queue[dict[str, Any]]) -> None:
    """Pass on what arrives. The orchestrator is gone when nothing can arrive any more."""
    with contextlib.suppress(OSError), connection.makefile("rb") as lines:
        for line in lines:
            messages.put(json.loads(line))
    _die()


def _die() -> None:
    """End this process and every other of its group (ranks, engine cores) at once."""
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()
