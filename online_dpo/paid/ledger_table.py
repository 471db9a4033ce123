"""The tables of the ledger: how its rows change inside a transaction."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

from online_dpo.errors import CorruptError
from online_dpo.paid.ledger_rows import (
    COLUMNS,
    GATHERING,
    NO_ROWS,
    Batch,
    Entry,
    Limits,
    Totals,
    row_hash,
    session,
)

SCHEMA = 4

_NAMES = ", ".join(f'"{name}"' for name in COLUMNS)
_MARKS = ", ".join("?" * (len(COLUMNS) + 1))
TABLES = f"""
CREATE TABLE calls ({_NAMES}, sha256 TEXT NOT NULL, PRIMARY KEY (key, attempt));
CREATE UNIQUE INDEX calls_seq ON calls (seq);
CREATE INDEX calls_open ON calls (session) WHERE state = 'sent';
CREATE TABLE totals (
    charged INTEGER NOT NULL, calls INTEGER NOT NULL, tokens INTEGER NOT NULL,
    final INTEGER NOT NULL, sha256 TEXT NOT NULL
);
INSERT INTO totals VALUES (0, 0, 0, 0, '{NO_ROWS}');
CREATE TABLE verdicts (key TEXT PRIMARY KEY, verdict TEXT NOT NULL, sha256 TEXT NOT NULL);
CREATE VIEW judgments AS SELECT calls.*, verdict FROM calls LEFT JOIN verdicts
    ON verdicts.key = calls.key AND state IN ('settled', 'reused');
CREATE TABLE batches (
    id TEXT PRIMARY KEY, base_url TEXT, api_key_env TEXT NOT NULL, remote TEXT, created_at REAL
);
PRAGMA user_version = {SCHEMA};
"""


def recover(db: sqlite3.Connection) -> None:
    """Make what a killed process left in flight unknown."""
    db.execute("BEGIN IMMEDIATE")
    rows = db.execute(
        f"SELECT {_NAMES}, sha256 FROM calls WHERE state = 'sent' AND session != ?", (session(),)
    ).fetchall()
    for entry in [_entry(row) for row in rows]:
        if entry.batch is None:
            end(db, replace(entry, state="unknown", reason="in flight when the process ended"))
        elif entry.batch == GATHERING:
            end(db, replace(entry, state="failed", reason="never handed in"))
    db.execute("COMMIT")


def find(db: sqlite3.Connection, key: str) -> Entry | None:
    """The row of a key that holds its answer, or that a batch will answer; checked."""
    row = db.execute(
        f"SELECT {_NAMES}, sha256 FROM calls WHERE key = ? AND (state IN ('settled', 'reused') "
        "OR state = 'sent' AND batch != ?)",
        (key, GATHERING),
    ).fetchone()
    return None if row is None else _entry(row)


def send(db: sqlite3.Connection, entry: Entry, limits: Limits) -> Entry:
    """Write a new attempt as sent. Raises BudgetError, having written nothing."""
    so_far = totals(db)
    limits.check(so_far, entry)
    sent = _next_attempt(db, entry)
    _put(db, sent)
    _set(
        db,
        replace(
            so_far,
            charged=so_far.charged + sent.charge,
            calls=so_far.calls + sent.calls,
            tokens=so_far.tokens + sent.tokens,
        ),
    )
    return sent


def hand_in(db: sqlite3.Connection, batch: Batch, entries: Sequence[Entry]) -> None:
    """Note that a batch of these calls is about to be handed in."""
    values = (*astuple(batch), time.time())
    db.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?)", values)
    for entry in entries:
        _put(db, replace(entry, batch=batch.id))


def handed_in(db: sqlite3.Connection, batch: Batch, remote: str) -> Batch:
    """Note the endpoint's id of a batch."""
    db.execute("UPDATE batches SET remote = ? WHERE id = ?", (remote, batch.id))
    return replace(batch, remote=remote)


def batch(db: sqlite3.Connection, id: str) -> Batch:
    """A batch that was handed in, or was about to be."""
    row = db.execute("SELECT id, base_url, api_key_env, remote FROM batches WHERE id = ?", (id,))
    return Batch(*row.fetchone())


def withdraw(db: sqlite3.Connection, entry: Entry, reason: str) -> None:
    """Take back a call that was reserved for a batch, unless it is in one by now."""
    (now,) = db.execute(
        "SELECT batch FROM calls WHERE key = ? AND attempt = ?", (entry.key, entry.attempt)
    ).fetchone()
    if now == GATHERING:
        end(db, replace(entry, state="failed", reason=reason))


def reuse(db: sqlite3.Connection, entry: Entry) -> Entry:
    """Write an answer that another ledger paid for; it counts for nothing here."""
    so_far = totals(db)
    kept = replace(_next_attempt(db, entry), state="reused", seq=so_far.final + 1)
    row_hash = _put(db, kept)
    running = _extended(so_far.sha256, row_hash)
    _set(db, replace(so_far, final=so_far.final + 1, sha256=running))
    return kept


def conclude(db: sqlite3.Connection, keys: Sequence[str], verdict: str) -> None:
    """Keep what a judge made of the answers to some calls, as JSON; it may be read off anew."""
    rows = [(key, verdict, row_hash((key, verdict))) for key in keys]
    db.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", rows)


def _next_attempt(db: sqlite3.Connection, entry: Entry) -> Entry:
    (last,) = db.execute("SELECT max(attempt) FROM calls WHERE key = ?", (entry.key,)).fetchone()
    return replace(entry, attempt=(last or 0) + 1, sent_at=time.time())


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
    ended = replace(entry, batch=before.batch, seq=so_far.final + 1, ended_at=time.time())
    row_hash = _put(db, ended)
    _set(
        db,
        Totals(
            charged=so_far.charged + ended.charge - before.charge,
            calls=so_far.calls + ended.calls - before.calls,
            tokens=so_far.tokens + ended.tokens - before.tokens,
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
    names = ", ".join(f"{field.name} = ?" for field in fields(Totals))
    db.execute(f"UPDATE totals SET {names}", astuple(now))


def totals(db: sqlite3.Connection) -> Totals:
    """What all rows count for."""
    return Totals(*db.execute("SELECT * FROM totals").fetchone())


def check(db: sqlite3.Connection, path: Path, rows: int) -> str:
    """Hash every row anew and compare them with the totals; the running hash after `rows` rows.

    Raises CorruptError where a row was altered, or where rows or totals are not what was written.
    """
    charged = calls = tokens = final = 0
    running = named = NO_ROWS
    for row in db.execute(f"SELECT {_NAMES}, sha256 FROM calls ORDER BY seq IS NULL, seq"):
        entry = _entry(row)
        charged += entry.charge
        calls += entry.calls
        tokens += entry.tokens
        if entry.seq is not None:
            final += 1
            running = _extended(running, row[-1])
            named = running if final <= rows else named
    recorded, found = totals(db), Totals(charged, calls, tokens, final, running)
    if final < max(recorded.final, rows):
        expected = max(recorded.final, rows)
        raise CorruptError(f"{path} holds {final} finished calls where {expected} were recorded.")
    if found != recorded:
        raise CorruptError(f"{path}: its totals are not those of its rows: {recorded}, {found}.")
    for key, verdict, sha256 in db.execute("SELECT key, verdict, sha256 FROM verdicts"):
        if row_hash((key, verdict)) != sha256:
            raise CorruptError(f"{path}: the verdict of {key[:16]} is not what was written.")
    return named


def _entry(row: tuple[Any, ...]) -> Entry:
    entry = Entry(*row[:-1])
    if row_hash(row[:-1]) != row[-1]:
        raise CorruptError(
            f"The ledger's row of prompt {entry.prompt_id!r} ({entry.key[:16]}, attempt "
            f"{entry.attempt}) is not what was written."
        )
    return entry


def _extended(running: str, row: str) -> str:
    """The running hash with one row's hash more."""
    return hashlib.sha256(bytes.fromhex(running) + bytes.fromhex(row)).hexdigest()
