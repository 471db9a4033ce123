"""Starting, feeding and ending worker processes: JSON lines over a socket."""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from online_dpo.errors import BY_NAME, CampaignError, EngineError, WorkerError

Event = dict[str, Any]
OnEvent = Callable[[Event], None]

TCP = "tcp:"
"""What an address of another machine begins with; others are files."""

SOCKET_ENV = "ONLINE_DPO_SOCKET"
TOKEN_ENV = "ONLINE_DPO_TOKEN"
RUN_ENV = "ONLINE_DPO_RUN"
START_TIMEOUT_S = 180.0
REMOTE_TIMEOUT_S = 1800.0
GREETING_TIMEOUT_S = 5.0
MAX_GREETING_BYTES = 4096


class Worker(Protocol):
    """Something that does one thing at a time when asked by name."""

    def call(self, method: str, *, on_event: OnEvent | None = None, **params: Any) -> Event:
        """Run a method; its progress goes to `on_event`, its result is returned."""

    def close(self) -> None:
        """End it and free all it holds. Safe to repeat."""


class InlineWorker:
    """A handler in this very process, made when first used: one process serves on a small CPU."""

    def __init__(self, make_handler: Callable[[], Any]) -> None:
        self._make_handler = make_handler
        self._handler: Any = None

    def call(self, method: str, *, on_event: OnEvent | None = None, **params: Any) -> Event:
        if self._handler is None:
            self._handler = self._make_handler()
        result: Event = getattr(self._handler, method)(emit=on_event or _ignore, **params)
        return result

    def close(self) -> None:
        if self._handler is not None:
            self._handler.close()
            self._handler = None


class ChildWorker:
    """A handler in a process of its own, or in several that all get the same calls.

    `handler` is `module:class`; `launcher` stands before `-m online_dpo.worker_main`, e.g. python
    itself or `accelerate launch`. Every process connects to the socket and exits when it closes.
    The process starts with the first call. `listen` is HOST:PORT for processes on other machines,
    which somebody starts there; without it the socket is a file that only this machine reaches.
    """

    def __init__(
        self,
        role: str,
        handler: str,
        settings: Mapping[str, Any],
        *,
        run: Path,
        log: Path,
        launcher: Sequence[str] = (sys.executable,),
        num_processes: int = 1,
        env: Mapping[str, str] | None = None,
        listen: str | None = None,
        stall_s: float | None = None,
    ) -> None:
        self.role = role
        self.log = log
        self._handler = handler
        self._settings = dict(settings)
        self._run = run
        self._launcher = list(launcher)
        self._num_processes = num_processes
        self._env = dict(env or {})
        self._listen = listen
        self._stall_s = stall_s
        self._process: subprocess.Popen[bytes] | None = None
        self._ranks: list[_Line] = []
        self._folder: Path | None = None

    @property
    def pid(self) -> int | None:
        """The process id of the worker (of its launcher, where it has one), if it runs."""
        return None if self._process is None else self._process.pid

    def call(self, method: str, *, on_event: OnEvent | None = None, **params: Any) -> Event:
        if self._process is None:
            self._start()
        try:
            for rank in self._ranks:
                rank.send({"method": method, "params": params})
            return self._collect(on_event or _ignore)
        except CampaignError:  # of whoever listens; a DiskError is an OSError too
            self.close()
            raise
        except (OSError, EOFError) as error:
            raise self._died(method) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        process, self._process = self._process, None
        for rank in self._ranks:
            rank.close()
        self._ranks = []
        if process is not None:
            _end(process)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start(self) -> None:
        token = os.environ.get(TOKEN_ENV) or secrets.token_hex(16)
        server, address = self._open_socket()
        with server:
            server.listen()
            server.settimeout(0.2)
            try:
                self._process = self._spawn(address, token)
                self._greet(server, token)
            except BaseException:
                self.close()
                raise

    def _greet(self, server: socket.socket, token: str) -> None:
        """Take every rank's connection and tell it what to be."""
        hello = {"handler": self._handler, "settings": self._settings}
        try:
            self._ranks = self._accept(server, token)
            for rank in self._ranks:
                rank.send(hello)
        except (OSError, EOFError, ValueError) as error:
            raise self._died("start") from error

    def _open_socket(self) -> tuple[socket.socket, str]:
        """A bound socket, and the address by which workers are told of it."""
        if self._listen is not None:
            host, _, port = self._listen.rpartition(":")
            try:
                return socket.create_server((host, int(port))), f"{TCP}{self._listen}"
            except OSError as error:
                raise EngineError(
                    f"The {self.role} cannot be listened for at {self._listen}: {error}. Name an "
                    "address of this machine and a free port."
                ) from error
        self._folder = Path(tempfile.mkdtemp(prefix="online-dpo-"))
        address = str(self._folder / "socket")
        server = socket.socket(socket.AF_UNIX)
        server.bind(address)
        return server, address

    def _spawn(self, address: str, token: str) -> subprocess.Popen[bytes]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, **self._env}
        env |= {SOCKET_ENV: address, TOKEN_ENV: token, RUN_ENV: str(self._run)}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*self._launcher, "-m", "online_dpo.worker_main"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                start_new_session=True,
            )

    def _accept(self, server: socket.socket, token: str) -> list[_Line]:
        ranks: dict[int, _Line] = {}
        wait_s = START_TIMEOUT_S if self._listen is None else REMOTE_TIMEOUT_S
        deadline = time.monotonic() + wait_s
        while len(ranks) < self._num_processes:
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise self._died("start")
            try:
                connection, _ = server.accept()
            except (TimeoutError, ConnectionAbortedError):
                continue
            line = _Line(connection)
            number = self._greeted(line, token)
            if number is None or number in ranks:
                line.close()
            else:
                ranks[number] = line
        return [ranks[rank] for rank in sorted(ranks)]

    def _greeted(self, line: _Line, token: str) -> int | None:
        """The rank that a new connection greets as; None for a stranger, or one that is gone."""
        try:
            greeting = line.receive_greeting()
            number, given = greeting["rank"], str(greeting["token"])
            known = hmac.compare_digest(given.encode(), token.encode())
        except (OSError, EOFError, ValueError, TypeError, LookupError, RecursionError):
            return None
        return number if known and number in range(self._num_processes) else None

    def _collect(self, on_event: OnEvent) -> Event:
        """Rank 0's result, once every rank has finished; events are passed on as they come."""
        with selectors.DefaultSelector() as selector:
            for number, rank in enumerate(self._ranks):
                selector.register(rank.connection, selectors.EVENT_READ, (number, rank))
            results: dict[int, Event] = {}
            heard = time.monotonic()
            while len(results) < len(self._ranks):
                for key, _ in selector.select(timeout=1.0):
                    heard = time.monotonic()
                    number, rank = key.data
                    for message in rank.receive_available():
                        if "error" in message:
                            raise _error(message["error"], self.role, self.log)
                        if "result" in message:
                            results[number] = message["result"]
                        elif number == 0:
                            on_event(message["event"])
                self._check_alive()
                if self._stall_s is not None and time.monotonic() - heard > self._stall_s:
                    raise self._stalled(self._stall_s)
        return results[0]

    def _check_alive(self) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            raise EOFError

    def _stalled(self, silent_s: float) -> WorkerError:
        self.close()
        return WorkerError(
            f"The {self.role} said nothing for {silent_s:g} s and was ended (sampling.stall_s). "
            f"The end of its log, {self.log}:\n{_tail(self.log)}"
        )

    def _died(self, doing: str) -> WorkerError:
        process = self._process
        code = None if process is None else _exit_code(process)
        self.close()
        how = "did not answer" if code is None else f"ended with {_exit_name(code)}"
        tail = _tail(self.log)
        return WorkerError(
            f"The {self.role} {how} during {doing!r}. The end of its log, {self.log}:\n{tail}"
        )


class _Line:
    """JSON lines over a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._buffer = b""

    def send(self, message: Mapping[str, Any]) -> None:
        self.connection.settimeout(None)
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive_greeting(self) -> Event:
        """The first message; OSError, EOFError or ValueError where none comes soon."""
        deadline = time.monotonic() + GREETING_TIMEOUT_S
        while b"\n" not in self._buffer:
            if len(self._buffer) > MAX_GREETING_BYTES:
                raise ValueError(f"no greeting in {MAX_GREETING_BYTES} bytes")
            self.connection.settimeout(max(deadline - time.monotonic(), 0.001))
            self._fill()
        return self._pop()

    def receive_available(self) -> list[Event]:
        """Every message that has wholly arrived, after one read of what is there."""
        self._fill()
        messages = []
        while b"\n" in self._buffer:
            messages.append(self._pop())
        return messages

    def close(self) -> None:
        self.connection.close()

    def _fill(self) -> None:
        data = self.connection.recv(1 << 20)
        if not data:
            raise EOFError
        self._buffer += data

    def _pop(self) -> Event:
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: Event = json.loads(line)
        return message


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker's whole group; the closed socket has told it already."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code of a process that has closed its socket; None where it hangs all the same."""
    try:
        return process.wait(timeout=2.0)
    except subprocess.TimeoutExpired:
        return None


def _error(data: Mapping[str, Any], role: str, log: Path) -> CampaignError:
    kind = BY_NAME.get(data["type"])
    if kind is None:
        return WorkerError(f"The {role} failed: {data['type']}: {data['message']}. Its log: {log}")
    return kind(data["message"], remedy=data.get("remedy"), safe=data.get("safe"))


def _exit_name(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _tail(log: Path, *, lines: int = 15) -> str:
    if not log.is_file():
        return "(empty)"
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in text[-lines:]) or "(empty)"


def _ignore(event: Event) -> None:
    """Where nobody listens to progress."""
