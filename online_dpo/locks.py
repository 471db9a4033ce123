"""Locks of a run directory: one orchestrator, and none before a dead one's workers are gone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from online_dpo.errors import LockedError

LOCK = "lock"
WORKERS_LOCK = "workers.lock"
SIGNING_S = 1.0
"""Longest wait for the name of a holder that has only just taken the lock."""


class RunLock:
    """The orchestrator's hold on a run directory, gone with the process that has it."""

    def __init__(self, run: Path, *, workers_timeout_s: float = 30.0) -> None:
        self._file = _open(run / LOCK)
        try:
            self._acquire(run, workers_timeout_s)
        except BaseException:
            self._file.close()
            raise

    def _acquire(self, run: Path, workers_timeout_s: float) -> None:
        while not _try_lock(self._file, fcntl.LOCK_EX):
            if not _try_lock(self._file, fcntl.LOCK_SH):
                status = f"online-dpo status {shlex.quote(str(run))}"
                raise LockedError(f"{run} is in use{_holder(run)}.", remedy=status)
            # Shared, so nobody holds it: somebody looks (`holder`), which takes it for an instant.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            time.sleep(0.01)
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        self._file.truncate(0)
        self._file.write(json.dumps(facts))
        self._file.flush()
        _await_workers(run, workers_timeout_s)

    def release(self) -> None:
        self._file.close()


@contextlib.contextmanager
def holding(run: Path) -> Iterator[None]:
    """The orchestrator's hold for as long as the block runs."""
    lock = RunLock(run)
    try:
        yield
    finally:
        lock.release()


def holder(run: Path) -> dict[str, object] | None:
    """Who holds a run directory now, or None where nobody does."""
    if not (run / LOCK).is_file():
        return None
    with (run / LOCK).open("r") as file:
        if _try_lock(file, fcntl.LOCK_SH):
            return None
        try:
            data: dict[str, object] = json.loads(file.read())
        except ValueError:
            data = {}
        return data


def hold_as_worker(run: Path) -> IO[str]:
    """A worker's shared hold, for as long as the returned file stays open."""
    file = _open(run / WORKERS_LOCK)
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def _await_workers(run: Path, timeout_s: float) -> None:
    """Wait until the workers of a killed orchestrator are gone."""
    deadline = time.monotonic() + timeout_s
    with _open(run / WORKERS_LOCK) as file:
        while not _try_lock(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                pids = _open_in(run / WORKERS_LOCK)
                named = f" (process {', '.join(map(str, pids))})" if pids else ""
                raise LockedError(
                    f"{run}: workers of an earlier start are still running after "
                    f"{timeout_s:.0f} s{named}. End them and start again."
                )
            time.sleep(0.05)


def _open(path: Path) -> IO[str]:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+")


def _open_in(path: Path) -> list[int]:
    """The other processes of this machine that have a file open, as far as /proc shows them."""
    numbers = {int(e.name) for e in Path("/proc").glob("[0-9]*") if e.name.isdigit()}
    return sorted(pid for pid in numbers - {os.getpid()} if _has_open(pid, path))


def _has_open(pid: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.path.samefile(entry, path):
                    return True
    return False


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(run: Path) -> str:
    """Who is in the way; a holder that has only just come is waited for until it has signed."""
    deadline = time.monotonic() + SIGNING_S
    while not _is_alive(data := holder(run) or {}):
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.01)
    return f" by process {data['pid']} on {data['host']}"


def _is_alive(data: Mapping[str, object]) -> bool:
    """Whether the process that signed is there, as far as this machine can tell."""
    if "pid" not in data:
        return False
    return data["host"] != socket.gethostname() or Path(f"/proc/{data['pid']}").exists()
