"""Answers that earlier runs paid for, read from their ledgers."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from online_dpo.errors import ConfigError
from online_dpo.paid import ledger_table as table
from online_dpo.paid.ledger import LEDGER, open_checked
from online_dpo.paid.ledger_rows import Entry


class EarlierLedgers:
    """The ledgers of other runs, open for reading alone; for one thread at a time."""

    def __init__(self, runs: Sequence[str]) -> None:
        """Each is a run directory or a ledger's file, and every row's hash is checked first.

        Raises ConfigError where there is none, CorruptError where one was altered.
        """
        self._open: list[tuple[Path, sqlite3.Connection]] = []
        for run in runs:
            path = Path(run) / LEDGER if Path(run).is_dir() else Path(run)
            if not path.is_file():
                raise ConfigError(f"judge.reuse_from: {run} has no ledger ({path} is no file).")
            self._open.append((path, open_checked(path)))

    def find(self, entry: Entry) -> Entry | None:
        """`entry` with the answer to exactly this call, where one of them holds it."""
        for path, db in self._open:
            found = table.find(db, entry.key)
            if found is not None and found.state != "sent":
                return _taken_over(entry, found, path)
        return None

    def close(self) -> None:
        for _, db in self._open:
            db.close()
        self._open.clear()


def _taken_over(entry: Entry, found: Entry, path: Path) -> Entry:
    return replace(
        entry,
        reserved=0,
        cost=0,
        tokens_in=found.tokens_in,
        tokens_out=found.tokens_out,
        tokens_cached=found.tokens_cached,
        reply=found.reply,
        finish_reason=found.finish_reason,
        refused=found.refused,
        answered_by=found.answered_by,
        logprobs=found.logprobs,
        latency_s=found.latency_s,
        reason=f"bought in {path}",
    )
