"""What the calls of each round came to, read from the ledger: money, tokens, time."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from online_dpo.paid.chat import PICO

_BY_ROUND = """
SELECT round, count(*),
    sum(CASE WHEN tokens_in IS NULL OR tokens_out IS NULL
        THEN reserved_tokens ELSE tokens_in + tokens_out END),
    sum(coalesce(cost, reserved, 0)), sum(cost IS NULL AND reserved IS NULL), avg(latency_s)
FROM calls WHERE state NOT IN ('failed', 'reused') GROUP BY round
"""
"""Of the rows that `Entry.calls` counts, what `Entry.tokens` and `Entry.charge` say of each."""


@dataclass(frozen=True, slots=True)
class Spending:
    """What calls that were or may have been answered count for, as for a budget."""

    calls: int
    tokens: int
    usd: float | None
    """None where the price of one is unknown."""
    mean_s: float | None
    """Seconds from sending to the reply; None while nothing has ended."""


def spending_by_round(ledger: Path) -> dict[int, Spending]:
    """What was spent under each round's number; a gold set, asked about once, stands under 0.

    Only read. Nothing where there is no ledger, and where a killed run's needs mending first, which
    `resume` does.
    """
    if not ledger.is_file():
        return {}
    try:
        with closing(sqlite3.connect(f"{ledger.absolute().as_uri()}?mode=ro", uri=True)) as db:
            rows = db.execute(_BY_ROUND).fetchall()
    except sqlite3.Error:
        return {}
    return {
        number: Spending(calls, tokens, None if unpriced else charged / PICO, mean_s)
        for number, calls, tokens, charged, unpriced, mean_s in rows
    }


def total(spent: Iterable[Spending | None]) -> Spending | None:
    """The sum of several; None where nothing was spent."""
    known = [each for each in spent if each is not None]
    if not known:
        return None
    costs = [each.usd for each in known if each.usd is not None]
    timed = [(each.mean_s, each.calls) for each in known if each.mean_s is not None]
    return Spending(
        sum(each.calls for each in known),
        sum(each.tokens for each in known),
        sum(costs) if len(costs) == len(known) else None,
        sum(s * n for s, n in timed) / sum(n for _, n in timed) if timed else None,
    )
