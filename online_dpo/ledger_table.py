"""The rows of the ledger: what one holds, and how it changes inside a transaction."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import uuid
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from online_dpo.chat import PICO
from online_dpo.errors import BudgetError, CorruptError

SCHEMA = 1
SESSION = uuid.uuid4().hex
"""This process. Open rows of any other are what a killed one left."""

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
        return hashlib.sha256(json.dumps(self.values).encode()).hexdigest()

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


_COLUMNS = [field.name for field in fields(Entry)]
_NAMES = ", ".join(f'"{name}"' for name in _COLUMNS)
_MARKS = ", ".join("?" * (len(_COLUMNS) + 1))
TABLES = f"""
CREATE TABLE calls ({_NAMES}, sha256 TEXT NOT NULL, PRIMARY KEY (key, attempt));
CREATE UNIQUE INDEX calls_seq ON calls (seq);
CREATE INDEX calls_open ON calls (session) WHERE state = 'sent';
CREATE TABLE totals (charged INTEGER NOT NULL, calls INTEGER NOT NULL, final INTEGER NOT NULL);
INSERT INTO totals VALUES (0, 0, 0);
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
    _count(db, charged=sent.charge, calls=1)
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
    ended = replace(entry, seq=totals(db).final + 1, ended_at=time.time())
    _put(db, ended)
    calls = -1 if ended.state == "failed" else 0
    _count(db, charged=ended.charge - before.charge, calls=calls, final=1)
    return ended


def _put(db: sqlite3.Connection, entry: Entry) -> None:
    db.execute(f"INSERT OR REPLACE INTO calls VALUES ({_MARKS})", (*entry.values, entry.sha256))


def _count(db: sqlite3.Connection, *, charged: int, calls: int, final: int = 0) -> None:
    """Bring the totals along; they are what limits are checked against."""
    db.execute(
        "UPDATE totals SET charged = charged + ?, calls = calls + ?, final = final + ?",
        (charged, calls, final),
    )


def totals(db: sqlite3.Connection) -> Totals:
    """What all rows count for."""
    return Totals(*db.execute("SELECT charged, calls, final FROM totals").fetchone())


def digest(db: sqlite3.Connection, path: Path, rows: int | None) -> tuple[int, str]:
    """Count and hash of the final rows, or of the first `rows`, each checked."""
    total = hashlib.sha256()
    count = 0
    for row in db.execute(
        f"SELECT {_NAMES}, sha256 FROM calls WHERE seq IS NOT NULL ORDER BY seq LIMIT ?",
        (-1 if rows is None else rows,),
    ):
        total.update(bytes.fromhex(_entry(row).sha256))
        count += 1
    expected = totals(db).final if rows is None else rows
    if count != expected:
        raise CorruptError(f"{path} holds {count} finished calls where {expected} were recorded.")
    return count, total.hexdigest()


def _entry(row: tuple[Any, ...]) -> Entry:
    entry = Entry(*row[:-1])
    if entry.sha256 != row[-1]:
        raise CorruptError(
            f"The ledger's row of prompt {entry.prompt_id!r} ({entry.key[:16]}, attempt "
            f"{entry.attempt}) is not what was written."
        )
    return entry
