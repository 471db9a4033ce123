"""The rows of the ledger: what one holds, and how it changes inside a transaction."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import uuid
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from online_dpo.chat import PICO
from online_dpo.errors import BudgetError, CorruptError

SCHEMA = 3
SESSION = uuid.uuid4().hex
"""This process. Open rows of any other are what a killed one left."""
NO_ROWS = hashlib.sha256().hexdigest()
"""The running hash before the first final row."""

State = Literal["sent", "settled", "failed", "unknown"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One attempt of one call. Costs are in picodollars; None where no price is known."""

    key: str
    attempt: int
    state: State
    session: str
    seq: int | None
    """Place among the rows that are final, from 1; None before."""
    judge: str
    version: str
    model: str
    purpose: str
    round: int
    prompt_id: str
    response_ids: str
    swapped: int
    vote: int
    reserved: int | None
    cost: int | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    reply: str | None = None
    finish_reason: str | None = None
    refused: int | None = None
    answered_by: str | None = None
    logprobs: str | None = None
    """JSON, where they were asked for."""
    reason: str | None = None
    sent_at: float | None = None
    ended_at: float | None = None

    @property
    def charge(self) -> int:
        """What the row counts for against a budget, in picodollars."""
        if self.state == "failed":
            return 0
        return (self.cost if self.state == "settled" else self.reserved) or 0

    @property
    def sha256(self) -> str:
        """The hash of the row's content, stored beside it."""
        return _row_hash(self.values)

    @property
    def values(self) -> tuple[Any, ...]:
        """The row as the table holds it, without its hash."""
        return tuple(getattr(self, name) for name in _COLUMNS)


@dataclass(frozen=True, slots=True)
class Totals:
    """What all rows count for: picodollars and calls that were or may have been answered."""

    charged: int
    calls: int
    final: int
    """Rows in a final state."""
    sha256: str = NO_ROWS
    """The running hash over these rows' hashes, in the order in which they became final."""


_COLUMNS = [field.name for field in fields(Entry)]
_NAMES = ", ".join(f'"{name}"' for name in _COLUMNS)
_MARKS = ", ".join("?" * (len(_COLUMNS) + 1))
TABLES = f"""
CREATE TABLE calls ({_NAMES}, sha256 TEXT NOT NULL, PRIMARY KEY (key, attempt));
CREATE UNIQUE INDEX calls_seq ON calls (seq);
CREATE INDEX calls_open ON calls (session) WHERE state = 'sent';
CREATE TABLE totals (
    charged INTEGER NOT NULL, calls INTEGER NOT NULL, final INTEGER NOT NULL, sha256 TEXT NOT NULL
);
INSERT INTO totals VALUES (0, 0, 0, '{NO_ROWS}');
PRAGMA user_version = {SCHEMA};
"""


def recover(db: sqlite3.Connection) -> None:
    """Make what a killed process left in flight unknown."""
    db.execute("BEGIN IMMEDIATE")
    rows = db.execute(
        f"SELECT {_NAMES}, sha256 FROM calls WHERE state = 'sent' AND session != ?", (SESSION,)
    ).fetchall()
    for entry in [_entry(row) for row in rows]:
        end(db, replace(entry, state="unknown", reason="in flight when the process ended"))
    db.execute("COMMIT")


def settled(db: sqlite3.Connection, key: str) -> Entry | None:
    """The settled row of a key, checked."""
    row = db.execute(
        f"SELECT {_NAMES}, sha256 FROM calls WHERE key = ? AND state = 'settled'", (key,)
    ).fetchone()
    return None if row is None else _entry(row)


def send(
    db: sqlite3.Connection, entry: Entry, max_charge: int | None, max_calls: int | None
) -> Entry:
    """Write a new attempt as sent. Raises BudgetError, having written nothing."""
    so_far = totals(db)
    if max_charge is not None and so_far.charged + entry.charge > max_charge:
        raise BudgetError(
            f"The labelling budget of ${max_charge / PICO:.6g} has no room for another call: "
            f"${so_far.charged / PICO:.6g} is spent or reserved and the call may cost "
            f"${entry.charge / PICO:.6g}. Raise judge.budget to go on."
        )
    if max_calls is not None and so_far.calls >= max_calls:
        raise BudgetError(
            f"The limit of {max_calls} judge calls is reached. Raise judge.max_calls to go on."
        )
    (last,) = db.execute("SELECT max(attempt) FROM calls WHERE key = ?", (entry.key,)).fetchone()
    sent = replace(entry, attempt=(last or 0) + 1, sent_at=time.time())
    _put(db, sent)
    _set(db, replace(so_far, charged=so_far.charged + sent.charge, calls=so_far.calls + 1))
    return sent


def end(db: sqlite3.Connection, entry: Entry) -> Entry:
    """Make a sent row final, unless it is: a reply that came is not lost to a later doubt."""
    now = db.execute(
        f"SELECT {_NAMES}, sha256 FROM calls WHERE key = ? AND attempt = ?",
        (entry.key, entry.attempt),
    ).fetchone()
    before = _entry(now)
    if before.state != "sent":
        return before
    so_far = totals(db)
    ended = replace(entry, seq=so_far.final + 1, ended_at=time.time())
    row_hash = _put(db, ended)
    _set(
        db,
        Totals(
            charged=so_far.charged + ended.charge - before.charge,
            calls=so_far.calls - (ended.state == "failed"),
            final=so_far.final + 1,
            sha256=_extended(so_far.sha256, row_hash),
        ),
    )
    return ended


def _put(db: sqlite3.Connection, entry: Entry) -> str:
    """Write a row; returns its hash."""
    row_hash = entry.sha256
    db.execute(f"INSERT OR REPLACE INTO calls VALUES ({_MARKS})", (*entry.values, row_hash))
    return row_hash


def _set(db: sqlite3.Connection, now: Totals) -> None:
    """Bring the totals along; they are what limits are checked against."""
    db.execute("UPDATE totals SET charged = ?, calls = ?, final = ?, sha256 = ?", astuple(now))


def totals(db: sqlite3.Connection) -> Totals:
    """What all rows count for."""
    return Totals(*db.execute("SELECT charged, calls, final, sha256 FROM totals").fetchone())


def check(db: sqlite3.Connection, path: Path, rows: int) -> str:
    """Hash every row anew and compare them with the totals; the running hash after `rows` rows.

    Raises CorruptError where a row was altered, or where rows or totals are not what was written.
    """
    charged = calls = final = 0
    running = named = NO_ROWS
    for row in db.execute(f"SELECT {_NAMES}, sha256 FROM calls ORDER BY seq IS NULL, seq"):
        entry = _entry(row)
        charged += entry.charge
        calls += entry.state != "failed"
        if entry.seq is not None:
            final += 1
            running = _extended(running, row[-1])
            named = running if final <= rows else named
    recorded, found = totals(db), Totals(charged, calls, final, running)
    if final < max(recorded.final, rows):
        expected = max(recorded.final, rows)
        raise CorruptError(f"{path} holds {final} finished calls where {expected} were recorded.")
    if found != recorded:
        raise CorruptError(f"{path}: its totals are not those of its rows: {recorded}, {found}.")
    return named


def _entry(row: tuple[Any, ...]) -> Entry:
    entry = Entry(*row[:-1])
    if _row_hash(row[:-1]) != row[-1]:
        raise CorruptError(
            f"The ledger's row of prompt {entry.prompt_id!r} ({entry.key[:16]}, attempt "
            f"{entry.attempt}) is not what was written."
        )
    return entry


def _row_hash(values: tuple[Any, ...]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _extended(running: str, row: str) -> str:
    """The running hash with one row's hash more."""
    return hashlib.sha256(bytes.fromhex(running) + bytes.fromhex(row)).hexdigest()
