"""The tables of `status`: rounds, counts by reason, times; as wide as the screen and no wider."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from online_dpo.display.judge_table import (
    SPENDING_LEGEND,
    judge_legend,
    judge_table,
    spending_table,
)
from online_dpo.display.visible import visible
from online_dpo.display.wording import (
    FATES,
    change,
    drift,
    estimate,
    fate_order,
    figure,
    number,
    percent,
    rate,
    seconds,
)
from online_dpo.views import RoundView, evaluated, source_views

RECENT = 12
"""Rounds shown where not all are."""

_GAP = 2
_STAGES = ("sample", "label", "pair", "train", "evaluate")


@dataclass(frozen=True)
class _Column:
    """A column of the table of rounds; where the screen is narrow, the highest rank goes first."""

    title: str
    cell: Callable[[RoundView], str]
    rank: int
    legend: str = ""


def make_console() -> Console:
    """Where everything is printed: without colour where that is no terminal, and never failing over
    a character that the output's encoding lacks.
    """
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
    return Console(markup=False, highlight=False, emoji=False)


def say(console: Console, text: str, style: str = "") -> None:
    """Lines as they are: nothing in them is markup, a command or a control sequence."""
    console.print(Text(visible(text), style=style), soft_wrap=True)


def say_folded(console: Console, text: str, style: str = "", *, indent: str = "") -> None:
    """One paragraph, folded at the width of the screen."""
    say(console, textwrap.fill(text, console.width, subsequent_indent=indent), style)


def print_rounds(console: Console, rounds: Sequence[RoundView]) -> None:
    """A row a round. Columns without any value, or without room, are left out; the latter named."""
    filled = [c for c in _COLUMNS if any(c.cell(r) != "-" for r in rounds)]
    shown = _fitting(filled, rounds, console.width)
    _print_table(console, [c.title for c in shown], [[c.cell(r) for c in shown] for r in rounds])
    legend = [column.legend for column in shown if column.legend]
    if legend:
        console.print()
        say_folded(console, "; ".join(legend) + ".", "dim")
    left_out = ", ".join(column.title for column in filled if column not in shown)
    if left_out:
        text = f"No room at {console.width} columns for: {left_out}. --json has everything."
        say_folded(console, text, "dim")


def print_sources(console: Console, rounds: Sequence[RoundView]) -> None:
    """The last evaluation on the prompts of each source, where there is more than one."""
    measured = evaluated(rounds)
    sources = source_views(measured[-1]) if measured else {}
    if len(sources) < 2:
        return
    views = list(sources.values())
    filled = [c for c in _COLUMNS if c.rank and any(c.cell(view) != "-" for view in views)]
    names = max(len("source"), *map(len, sources))
    room = console.width - names - len("prompts") - 2 * _GAP
    shown = _fitting(filled, views, room)
    rows = [
        [name, str(figure(view, "prompts")), *(c.cell(view) for c in shown)]
        for name, view in sources.items()
    ]
    say(console, f"\nround {measured[-1].round} by source")
    _print_table(console, ["source", "prompts", *(c.title for c in shown)], rows)


def print_fates(console: Console, rounds: Sequence[RoundView]) -> None:
    """Counts by reason: what became of the responses of the latest rounds, and of all."""
    counted = [r for r in rounds if r.responses]
    if not counted:
        return
    fates = fate_order(counted)
    rows = [(str(r.round), r.responses) for r in counted[-RECENT:]]
    if len(counted) > 1:
        rows.append(("all", {f: sum(r.responses.get(f, 0) for r in counted) for f in fates}))
    cells = [
        [name, str(sum(counts.values())), *(str(counts.get(fate, 0)) for fate in fates)]
        for name, counts in rows
    ]
    _print_table(console, ["round", "responses", *(f.replace("_", " ") for f in fates)], cells)
    console.print()
    notes = [f"{fate.replace('_', ' ')}: {text}" for fate, text in FATES.items() if fate in fates]
    say_folded(console, "; ".join(notes) + ".", "dim")
    for view in counted[-RECENT:]:
        for reason, count in view.no_verdict.items():
            say(console, f"round {view.round}: {count} without a verdict: {reason}")


def print_judge(console: Console, rounds: Sequence[RoundView]) -> None:
    """How sound the verdicts of the latest rounds are."""
    table = judge_table(rounds)
    if table is None:
        return
    titles, rows = table
    say(console, "\nthe judge")
    _print_table(console, titles, rows[-RECENT:])
    console.print()
    say_folded(console, judge_legend(titles), "dim")


def print_spending(console: Console, rounds: Sequence[RoundView]) -> None:
    """What the paid calls of the latest rounds came to, and of all."""
    table = spending_table(rounds)
    if table is None:
        return
    titles, rows = table
    say(console, "\npaid calls")
    _print_table(console, titles, rows[-1 - RECENT :])
    console.print()
    say_folded(console, SPENDING_LEGEND, "dim")


def print_times(console: Console, rounds: Sequence[RoundView]) -> None:
    """Where the time of the latest rounds went; what no stage accounts for is the fixed cost."""
    timed = [r for r in rounds if r.wall_s is not None]
    if not timed:
        return
    known = {stage for r in timed for stage in r.busy_s}
    stages = [s for s in _STAGES if s in known] + sorted(known - set(_STAGES))
    rows = [
        [str(r.round), *map(seconds, [*map(r.busy_s.get, stages), r.fixed_s, r.wall_s])]
        for r in timed[-RECENT:]
    ]
    _print_table(console, ["round", *stages, "fixed", "wall"], rows)
    say(console, "\nfixed: wall time less the work of all stages.", "dim")


def _print_table(console: Console, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table as wide as its content, numbers to the right, after an empty line."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for title in titles:
        justify: Any = "left" if title in ("stage", "source") else "right"
        table.add_column(Text(visible(title)), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    console.print()
    console.print(table)


def _fitting(columns: Sequence[_Column], rounds: Sequence[RoundView], width: int) -> list[_Column]:
    """The columns that fit, in their order; those of the highest rank go first."""
    shown = list(columns)
    while sum(_width(c, rounds) + _GAP for c in shown) > width and any(c.rank for c in shown):
        shown.remove(max(reversed(shown), key=lambda c: c.rank))
    return shown


def _width(column: _Column, rounds: Sequence[RoundView]) -> int:
    return max(len(column.title), *(len(column.cell(view)) for view in rounds))


def _loss(view: RoundView) -> str:
    training = view.training or {}
    return change(training.get("first_loss"), training.get("last_loss"), 3)


_COLUMNS = (
    _Column("round", lambda r: str(r.round), 0),
    _Column("stage", lambda r: r.stage, 0),
    _Column(
        "reward",
        lambda r: estimate(figure(r, "score")),
        1,
        "reward: mean score ± standard error on held-out prompts",
    ),
    _Column(
        "wins vs 0",
        lambda r: rate(figure(r, "win_rate_policy0")),
        1,
        "wins: share of held-out prompts won, ties half (95% interval); 0: policy 0",
    ),
    _Column("vs previous", lambda r: rate(figure(r, "win_rate_previous")), 8),
    _Column("KL to ref", lambda r: drift(figure(r, "kl_reference")), 7),
    _Column("KL to 0", lambda r: drift(figure(r, "kl_policy0")), 2, "KL: nats per sequence"),
    _Column("tokens", lambda r: number(figure(r, "mean_tokens"), 1), 3),
    _Column(
        "cut",
        lambda r: percent(figure(r, "truncated")),
        6,
        "cut: answers that reached the token limit",
    ),
    _Column(
        "dist-2",
        lambda r: number(figure(r, "distinct_2")),
        4,
        "dist-2: distinct word pairs / word pairs",
    ),
    _Column("pairs", lambda r: str(r.pairs) if r.pairs else "-", 5),
    _Column("good/bad", lambda r: str(r.unpaired) if r.unpaired else "-", 5),
    _Column("loss", _loss, 9, "loss: of the first and of the last step"),
)
