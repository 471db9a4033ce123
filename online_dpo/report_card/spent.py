"""What calls came to, those in a folder's ledger and those of one run: money, tokens, time."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

from online_dpo.paid.chat import PICO


def spent(ledger: Path) -> dict[str, Any] | None:
    """Figures of all calls that a ledger holds, or None where no call was made.

    `calls` were or may have been answered, `usd` is None where a price is unknown. `latency_s` is
    the median of the calls that were answered.
    """
    if not ledger.is_file():
        return None
    with closing(sqlite3.connect(f"{ledger.absolute().as_uri()}?mode=ro", uri=True)) as db:
        calls, tokens, charged = db.execute("SELECT calls, tokens, charged FROM totals").fetchone()
        paid = "FROM calls WHERE state NOT IN ('failed', 'reused')"
        (unpriced,) = db.execute(f"SELECT count(*) {paid} AND reserved IS NULL").fetchone()
        answered = db.execute(
            f"SELECT answered_by, tokens_in, tokens_out, latency_s {paid} AND state = 'settled'"
        ).fetchall()
    return {
        "calls": calls,
        "tokens": tokens,
        "tokens_in": _sum([row[1] for row in answered]),
        "tokens_out": _sum([row[2] for row in answered]),
        "usd": None if unpriced else charged / PICO,
        "latency_s": median(row[3] for row in answered) if answered else None,
        "answered_by": sorted({row[0] for row in answered if row[0]}),
    }


def bought(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run did, by its events: calls sent, answers taken from the ledger, dollars.

    `usd` is None where a price is unknown.
    """
    done = [event for event in events if event["event"] == "judge_calls"]
    costs = [event["cost_usd"] for event in done]
    return {
        "requests": sum(event.get("requests", 0) for event in done),
        "from_ledger": sum(event.get("from_ledger", 0) for event in done),
        "usd": None if None in costs else sum(costs),
    }


def _sum(counts: Sequence[int | None]) -> int:
    return sum(count or 0 for count in counts)
