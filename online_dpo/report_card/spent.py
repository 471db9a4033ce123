"""What calls came to, those that a set rests on and those of one run: money, tokens, time."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

from online_dpo.paid.chat import PICO
from online_dpo.paid.ledger_rows import COLUMNS, Entry


def spent(ledger: Path, keys: Collection[str]) -> dict[str, Any] | None:
    """Figures of the calls under some keys of a ledger, whenever made; None where there are none.

    `calls` were or may have been answered, and each counts at its cost or else its reservation, as
    for a budget. `usd` is None where a price is unknown. `latency_s` is the median of the calls
    that were answered.
    """
    if not keys:
        return None
    with closing(sqlite3.connect(f"{ledger.absolute().as_uri()}?mode=ro", uri=True)) as db:
        found = db.execute(f"SELECT {', '.join(COLUMNS)} FROM calls").fetchall()
    calls = [entry for row in found if (entry := Entry(*row)).key in keys]
    paid = [entry for entry in calls if entry.calls]
    latencies = [entry.latency_s for entry in paid if entry.latency_s is not None]
    return {
        "calls": len(paid),
        "tokens": sum(entry.tokens for entry in paid),
        "usd": _usd(paid),
        "latency_s": median(latencies) if latencies else None,
        "answered_by": sorted({entry.answered_by for entry in calls if entry.answered_by}),
    }


def _usd(paid: Sequence[Entry]) -> float | None:
    if any(entry.cost is None and entry.reserved is None for entry in paid):
        return None
    return sum(entry.charge for entry in paid) / PICO


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
