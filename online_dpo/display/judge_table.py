"""The judge's figures and its cost by round as cells, for terminal and report alike; pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from online_dpo.alarms import latest
from online_dpo.display.wording import number, percent, seconds, usd
from online_dpo.paid.spending import Spending, total
from online_dpo.views import RoundView

_COLUMNS: dict[str, tuple[Callable[[float | None], str], tuple[str, ...]]] = {
    "invalid": (percent, ("labels", "invalid")),
    "abstains": (percent, ("labels", "abstained")),
    "ties": (percent, ("labels", "ties")),
    "conflicts": (percent, ("labels", "order_conflicts")),
    "longer": (percent, ("labels", "prefers_longer", "value")),
    "first": (percent, ("labels", "prefers_first", "value")),
    "gold": (percent, ("gold", "accuracy", "value")),
    "kappa": (number, ("gold", "kappa")),
    "constant": (percent, ("constant", "value")),
}
"""By title, how a figure is written, and its place in a round's `judge`."""

LEGEND = {
    "invalid": "verdicts that could not be read",
    "abstains": "verdicts that the judge would not give",
    "conflicts": "pairs whose two orders prefer different responses",
    "longer": "decided pairs won by the longer response",
    "first": "decided orders won by the response shown first",
    "gold": "accuracy on judge.gold",
    "kappa": "Cohen's, with the labels of judge.gold",
    "constant": "probes won by judge.constant",
}


def judge_figure(view: RoundView, *place: str) -> Any:
    """A figure of a round's judge by its place, e.g. ("labels", "invalid"); None for none."""
    found: Any = view.judge
    for key in place:
        if found is None:
            return None
        found = found.get(key)
    return found


def judge_table(rounds: Sequence[RoundView]) -> tuple[list[str], list[list[str]]] | None:
    """Titles, and a row for each round whose judge was checked; columns without a value are left
    out. None where there is no such round.
    """
    checked = [view for view in rounds if view.judge is not None]
    if not checked:
        return None
    columns = {
        title: [write(judge_figure(view, *place)) for view in checked]
        for title, (write, place) in _COLUMNS.items()
    }
    titles = [title for title, cells in columns.items() if any(cell != "-" for cell in cells)]
    rows = [
        [str(view.round), *(columns[title][index] for title in titles)]
        for index, view in enumerate(checked)
    ]
    return ["round", *titles], rows


def judge_legend(titles: Sequence[str]) -> str:
    """What the columns mean."""
    return "; ".join(f"{title}: {LEGEND[title]}" for title in titles if title in LEGEND) + "."


SPENDING_LEGEND = (
    "calls: those that were or may have been answered, of evaluations and sampling.also too; "
    "a call: mean time to its reply. The gold set, asked about once, stands in round 0."
)


def spending_table(rounds: Sequence[RoundView]) -> tuple[list[str], list[list[str]]] | None:
    """Titles, a row for each round that paid for calls, and their sum; None where none did."""
    paid = [(str(view.round), view.spent) for view in rounds if view.spent is not None]
    everything = total(spent for _, spent in paid)
    if everything is None:
        return None
    rows = [[name, *_spent(spent)] for name, spent in (*paid, ("all", everything))]
    return ["round", "calls", "tokens", "cost", "a call"], rows


def _spent(spent: Spending) -> list[str]:
    cost = "unknown" if spent.usd is None else usd(spent.usd)
    return [f"{spent.calls:,}", f"{spent.tokens:,}", cost, seconds(spent.mean_s)]


def alarms_of(rounds: Sequence[RoundView]) -> list[str]:
    """A sentence for each alarm of these rounds, the last time that it was raised."""
    return latest([alarm for view in rounds for alarm in view.alarms])
