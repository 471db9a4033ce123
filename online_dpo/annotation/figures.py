"""Who has labelled how much, how steadily and how rightly, and how far they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from online_dpo.annotation.agreement import agreement
from online_dpo.annotation.board import Board
from online_dpo.annotation.log import Given
from online_dpo.metrics import wilson


def figures(board: Board) -> dict[str, Any]:
    """What `online-dpo label RUN_DIR` shows, as plain JSON types.

    Rates are {value, low, high, count} with a 95% interval, None where nothing was measured.
    """
    votes = board.votes()
    waiting = board.still_to_do()
    gold = {item.id: item.gold for item in board.gold()}
    return {
        "annotators": {
            name: _of_annotator(board.given(name), gold) | {"to_do": waiting.get(name, 0)}
            for name in board.names
        },
        "agreement": agreement(list(votes.values())),
        "open_items": len(board.open_items()),
    }


def _of_annotator(given: Sequence[Given], gold: dict[str, float | None]) -> dict[str, Any]:
    items = [g for g in given if g.purpose == "item"]
    first = {g.item: g.value for g in items if g.value is not None}
    repeats = [g for g in given if g.purpose == "repeat" and g.value is not None]
    known = [g for g in given if g.purpose == "gold" and gold.get(g.item) is not None]
    seconds = [g.seconds for g in given if g.seconds is not None]
    return {
        "verdicts": len(items),
        "ties": sum(g.choice == "tie" for g in items),
        "skipped": sum(g.choice == "skip" for g in items),
        "took_a": _rate([float(g.choice == "a") for g in items if g.choice in ("a", "b")]),
        "steady": _rate([float(first[g.item] == g.value) for g in repeats if g.item in first]),
        "gold_right": _rate([float(g.value == gold[g.item]) for g in known]),
        "median_seconds": median(seconds) if seconds else None,
    }


def _rate(outcomes: Sequence[float]) -> dict[str, Any] | None:
    rate = wilson(outcomes)
    return None if rate is None else asdict(rate)
