"""The ledger: every call to a paid or remote judge, on disk before it counts (SQLite).

A call's attempt is one row: sent, with its reservation, then settled (a reply came), failed
(refused, nothing charged) or unknown (it may have been charged: a timeout, a broken connection, a
crash with the call in flight). Unknown rows are charged at their reservation, or by the usage that
an unusable reply gave, so that the ledger never says less than the bill. A row that is reused holds
an answer that another ledger paid for. Reserving and noting as sent are one commit: nothing is
waited for in between. Money is counted in whole picodollars, so that sums are exact.

The journal is a rollback journal: WAL needs shared memory, which network file systems do not give.
TRUNCATE with synchronous=FULL syncs the emptied journal too, so that a committed row survives a
power cut. One thread owns the connection and commits whatever has queued up in one transaction:
durable for each caller, without one fsync for each.
"""

from __future__ import annotations

import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from online_dpo.errors import BudgetError, CorruptError, DiskError
from online_dpo.files import disk_faults, fsync_path
from online_dpo.paid import ledger_table as table
from online_dpo.paid.ledger_rows import NO_ROWS, Batch, Entry, Limits, Totals

T = TypeVar("T")

LEDGER = "judgments.sqlite"
"""Its name in a run directory."""


class Ledger:
    """An open ledger. Methods return futures: done means committed; they may be called anywhere."""

    def __init__(self, path: Path) -> None:
        """Open or create; what a killed process left in flight becomes unknown.

        Raises CorruptError where the file is no ledger, DiskError where it cannot be written.
        """
        self.path = path
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # Waited for instead of the thread: a signal that interrupts Thread.join makes CPython
        # before 3.13 take a thread that still runs for ended.
        self._ended = threading.Event()
        ready: Future[None] = Future()
        self._ready = ready
        threading.Thread(target=self._run, name="ledger", daemon=True).start()
        ready.result()

    def find(self, key: str) -> Future[Entry | None]:
        """The row that answers a key, or that is in a batch of an earlier process, if there is one.

        Raises CorruptError where it was altered.
        """
        return self._submit(lambda db: table.find(db, key))

    def send(self, entry: Entry, limits: Limits = Limits()) -> Future[Entry]:  # noqa: B008
        """Reserve for a new attempt that is about to leave; `attempt` is numbered here.

        Raises BudgetError, and writes nothing, where the limits leave no room for it.
        """
        return self._submit(lambda db: table.send(db, entry, limits))

    def reuse(self, entry: Entry) -> Future[Entry]:
        """Keep an answer that was paid for elsewhere."""
        return self._submit(lambda db: table.reuse(db, entry))

    def conclude(self, keys: Sequence[str], verdict: str) -> Future[None]:
        """Keep what a judge read off the answers to these keys, as JSON."""
        return self._submit(lambda db: table.conclude(db, keys, verdict))

    def settle(self, entry: Entry, **reply: Any) -> Future[Entry]:
        """Keep the reply, given as columns of Entry.

        Like `fail` and `lose`, it leaves a row that is final already as it is.
        """
        settled = replace(entry, state="settled", **reply)
        return self._submit(lambda db: table.end(db, settled))

    def fail(self, entry: Entry, reason: str, **columns: Any) -> Future[Entry]:
        """Note that the attempt came to nothing and costs nothing."""
        failed = replace(entry, state="failed", reason=reason, **columns)
        return self._submit(lambda db: table.end(db, failed))

    def lose(self, entry: Entry, reason: str, **columns: Any) -> Future[Entry]:
        """Note that the attempt gave no answer and may be billed.

        It is charged at `cost` where the columns hold one, and else at its reservation.
        """
        lost = replace(entry, state="unknown", reason=reason, **columns)
        return self._submit(lambda db: table.end(db, lost))

    def hand_in(self, batch: Batch, entries: Sequence[Entry]) -> Future[None]:
        """Note that these calls are about to be handed in as a batch: it may exist from now on."""
        return self._submit(lambda db: table.hand_in(db, batch, entries))

    def handed_in(self, batch: Batch, remote: str) -> Future[Batch]:
        """Note the endpoint's id of a batch."""
        return self._submit(lambda db: table.handed_in(db, batch, remote))

    def batch(self, id: str) -> Future[Batch]:
        """A batch by our own id for it."""
        return self._submit(lambda db: table.batch(db, id))

    def withdraw(self, entry: Entry, reason: str) -> Future[None]:
        """Note that a call reserved for a batch never left, unless it did."""
        return self._submit(lambda db: table.withdraw(db, entry, reason))

    def totals(self) -> Future[Totals]:
        """What all rows count for."""
        return self._submit(table.totals)

    def close(self) -> None:
        """Commit what is queued and close. Safe to repeat."""
        if not self._ended.is_set():
            self._jobs.put(None)
            self._ended.wait()

    def _submit(self, run: Callable[[sqlite3.Connection], T]) -> Future[T]:
        job = _Job(run)
        self._jobs.put(job)
        return job.future

    def _run(self) -> None:
        try:
            self._write()
        finally:
            self._ended.set()

    def _write(self) -> None:
        """The writer thread: take what has queued up, commit it once, tell everyone."""
        try:
            db = _open(self.path)
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        closing = False
        while not closing:
            batch = [self._jobs.get()]
            while not self._jobs.empty():
                batch.append(self._jobs.get())
            closing = None in batch
            _commit(db, self.path, [job for job in batch if job is not None and job.starts()])
        db.close()


class _Job:
    """Something to do in the writer's next transaction."""

    def __init__(self, run: Callable[[sqlite3.Connection], Any]) -> None:
        self.run = run
        self.future: Future[Any] = Future()
        self.result: Any = None
        self.error: BaseException | None = None

    def starts(self) -> bool:
        """Whether it is still wanted; from here on it cannot be cancelled."""
        return self.future.set_running_or_notify_cancel()


def check_ledger(path: Path, rows: int = 0, sha256: str = NO_ROWS) -> None:
    """Hash a ledger anew from its first row to its last; to be called once a start.

    Raises CorruptError where a row was altered or is missing, and unless the ledger still begins
    with the `rows` whose running hash a manifest names.
    """
    if not path.is_file() or path.stat().st_size == 0:
        if rows:
            raise CorruptError(f"{path} is missing; the labels rest on {rows} rows of it.")
        return
    if _read(path, lambda db: table.check(db, path, rows)) != sha256:
        raise CorruptError(f"{path} is not the ledger that the labels were made with.")


def open_checked(path: Path) -> sqlite3.Connection:
    """Another run's ledger, for reading alone, its every row's hash checked.

    Raises CorruptError where one was altered or the file cannot be read as it is.
    """
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=30.0, check_same_thread=False
    )
    try:
        _check_version(db, path)
        table.check(db, path, 0)
    except sqlite3.Error as error:
        db.close()
        raise CorruptError(
            f"{path} cannot be read ({error}). If its run was killed, resume that run first."
        ) from error
    except BaseException:
        db.close()
        raise
    return db


def digest_of(path: Path) -> tuple[int, str]:
    """(number of final rows, their running hash) of a ledger that may not exist.

    It is carried along with every row, so that this takes the same time whatever the ledger holds.
    Final rows are never changed: the hash after the first n stays what it was.
    """
    if not path.is_file():
        return 0, NO_ROWS
    totals = _read(path, table.totals)
    return totals.final, totals.sha256


def ledger_facts(run: Path) -> dict[str, Any]:
    """What a manifest says of the ledger that its artifact rests on; nothing without a ledger."""
    if not (run / LEDGER).is_file():
        return {}
    rows, digest = digest_of(run / LEDGER)
    return {"ledger": {"rows": rows, "sha256": digest}}


def _read(path: Path, run: Callable[[sqlite3.Connection], T]) -> T:
    """Something read from a ledger in one transaction, on a connection of its own."""
    db = sqlite3.connect(path, isolation_level=None, timeout=30.0)
    try:
        _check_version(db, path)
        db.execute("BEGIN")
        return run(db)
    except sqlite3.Error as error:
        raise _named(error, path) from error
    finally:
        db.close()


def _check_version(db: sqlite3.Connection, path: Path) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version != table.SCHEMA:
        raise CorruptError(
            f"{path} is no ledger of this version: its schema is {version}, and {table.SCHEMA} is "
            "read here. Go on with the version that wrote it, or start in another run directory."
        )


def _open(path: Path) -> sqlite3.Connection:
    new = not path.exists()
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
        if new:
            fsync_path(path.parent)
    db = sqlite3.connect(path, isolation_level=None, timeout=30.0)
    try:
        db.execute("PRAGMA journal_mode = TRUNCATE")
        db.execute("PRAGMA synchronous = FULL")
        if not db.execute("SELECT 1 FROM sqlite_master").fetchone():
            db.executescript(f"BEGIN IMMEDIATE; {table.TABLES} COMMIT;")
        _check_version(db, path)
        table.recover(db)
    except sqlite3.Error as error:
        db.close()
        raise _named(error, path) from error
    except BaseException:
        db.close()
        raise
    return db


def _commit(db: sqlite3.Connection, path: Path, jobs: list[_Job]) -> None:
    """Run jobs in one transaction. One that refuses has written nothing; a fault fails all."""
    try:
        db.execute("BEGIN IMMEDIATE")
        for job in jobs:
            try:
                job.result = job.run(db)
            except (BudgetError, CorruptError) as error:
                job.error = error
        db.execute("COMMIT")
    except BaseException as error:
        fault = _named(error, path) if isinstance(error, sqlite3.Error) else error
        if db.in_transaction:
            db.execute("ROLLBACK")
        for job in jobs:
            job.error = fault
    for job in jobs:
        if job.error is not None:
            job.future.set_exception(job.error)
        else:
            job.future.set_result(job.result)


def _named(error: sqlite3.Error, path: Path) -> DiskError | CorruptError:
    text = f"{path}: {error}"
    if isinstance(error, sqlite3.OperationalError):
        return DiskError(
            f"Writing the ledger failed. {text}", safe="Every settled answer is on disk."
        )
    return CorruptError(f"The ledger cannot be read. {text}")
