"""What a door has done, and what of it is told in events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from online_dpo.paid.chat import PICO, ChatReply
from online_dpo.paid.ledger_rows import Entry
from online_dpo.paid.model_names import is_same_model
from online_dpo.paid.prices import Tariff


class Tally:
    """Counts calls and cost since `begin`, and tells of prices, retries and exchanged models."""

    def __init__(self, judge: str, on_event: Callable[[dict[str, Any]], None]) -> None:
        self._judge = judge
        self._on_event = on_event
        self._counts: Counter[str] = Counter()
        self._answered_by: dict[str, str] = {}
        self._priced: set[str] = set()
        self._mistaken: set[str] = set()

    def begin(self) -> None:
        """Count anew."""
        self._counts.clear()

    def add(self, name: str) -> None:
        """One more of requests, answers from_ledger or answers reused."""
        self._counts[name] += 1

    def ended(self, entry: Entry) -> None:
        """An attempt has ended, well or not."""
        self._counts["faults"] += entry.state != "settled"
        self._counts["cost_pico"] += entry.charge
        self._counts["unpriced"] += entry.calls and entry.reserved is None

    def answered(self, model: str, reply: ChatReply) -> ChatReply:
        """The reply; told where another model answers than before: a judge has been exchanged."""
        before = self._answered_by.setdefault(model, reply.model)
        if reply.model != before:
            self._answered_by[model] = reply.model
            message = f"{model!r} was answered by {before!r} and now by {reply.model!r}"
            self._on_event({"event": "judge_model_changed", "message": message})
        if not is_same_model(model, reply.model):
            self._counts["other_model"] += 1
            if model not in self._mistaken:
                self._mistaken.add(model)
                message = f"The judge {self._judge!r} asked for {model!r}, and {reply.model!r} "
                message += "answered. judge.model_mismatch: refuse takes no such reply."
                self._on_event({"event": "judge_model_mismatch", "message": message})
        return reply

    def priced(self, model: str, tier: str | None, tariff: Tariff | None) -> None:
        """A model is called: told once, with what its calls are reckoned at, and whence."""
        if model not in self._priced:
            self._priced.add(model)
            price = "unknown" if tariff is None else tariff.shown
            source = "unknown" if tariff is None else tariff.source
            self._on_event(
                {
                    "event": "judge_price",
                    "model": model,
                    "tier": tier,
                    "price_per_million": price,
                    "source": source,
                }
            )

    def retried(self, message: str, pause_s: float) -> None:
        """Another attempt follows after a pause."""
        self._on_event({"event": "judge_retry", "message": message, "pause_s": pause_s})

    def summary(self) -> dict[str, Any] | None:
        """An event with the counts, if there are any; `cost_usd` None where a price is unknown."""
        if not self._counts:
            return None
        counts = dict(self._counts)
        cost: float | None = counts.pop("cost_pico", 0) / PICO
        if counts.get("unpriced"):
            cost = None
        return {"event": "judge_calls", "judge": self._judge, **counts, "cost_usd": cost}
