"""What `online-dpo label` does in a run directory: serve the page, exchange labels, report."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from online_dpo.annotation.board import Board
from online_dpo.annotation.desk import Desk
from online_dpo.annotation.figures import figures
from online_dpo.annotation.options import people_options
from online_dpo.annotation.server import LabelServer
from online_dpo.drift import current_config
from online_dpo.endings import resume_command
from online_dpo.errors import ConfigError
from online_dpo.judge_clashes import PEOPLE
from online_dpo.store import RunDir

Say = Callable[[str], None]


def open_board(run_dir: Path) -> Board:
    """The board of a campaign that asks people. Raises ConfigError where it asks none."""
    folder = RunDir(run_dir)
    config = current_config(folder)
    if config.judge.name != PEOPLE:
        raise ConfigError(
            f"{folder.path} asks nobody to label: its judge is {config.judge.name!r}. People label "
            f"under judge: {{name: {PEOPLE}, options: {{annotators: [...]}}}}."
        )
    options = people_options(config.judge.options)
    return Board(folder.path, options, seed=config.campaign.seed)


def serve(
    run_dir: Path, annotator: str, *, port: int = 0, stand_in: bool = False, say: Say
) -> None:
    """Serve the page to one annotator until SIGINT or SIGTERM.

    Raises ConfigError for a name that the config does not list, LockedError where that annotator's
    page is served already.
    """
    board = open_board(run_dir)
    if annotator not in board.options.annotators:
        known = ", ".join(board.options.annotators)
        raise ConfigError(
            f"{annotator!r} is no annotator of {board.path.parent}; judge.options.annotators "
            f"names {known}."
        )
    with board.open_log(annotator) as log:
        desk = Desk(board, log, annotator, stand_in=stand_in)
        with LabelServer(desk, port=port) as server:
            say(f"{annotator} labels at {server.url}")
            say("Verdicts are saved one by one; Ctrl-C ends the page.")
            _until_stopped(server)
        say(f"{desk.num_saved} verdicts of {annotator} saved. {_next(board)}")


def describe(board: Board) -> str:
    """A line for each annotator, the agreement between them, and what comes next."""
    found = figures(board)
    rows = [["annotator", *_COLUMNS]]
    for name, facts in found["annotators"].items():
        rows.append([name, *(show(facts[key]) for key, show in _COLUMNS.values())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join((*lines, "", _agreement(found["agreement"]), _next(board)))


def _agreement(found: dict[str, Any]) -> str:
    shared = found["items_shared"]
    if not shared:
        return "Agreement: no item has two verdicts yet."
    names = {
        "observed": "observed",
        "cohen_kappa": "Cohen's kappa",
        "fleiss_kappa": "Fleiss' kappa",
        "krippendorff_alpha": "Krippendorff's alpha",
    }
    parts = [f"{text} {_number(found[key], 2)}" for key, text in names.items() if key in found]
    return f"Agreement on {shared} items: {', '.join(parts)}."


def _next(board: Board) -> str:
    count = len(board.open_items())
    if count:
        return f"{count} items still lack verdicts."
    folder = RunDir(board.path.parent)
    return f"Every item has its verdicts; next: {resume_command(folder, current_config(folder))}"


def _percent(rate: dict[str, Any] | None) -> str:
    return "-" if rate is None else f"{rate['value']:.0%} of {rate['count']}"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "verdicts": ("verdicts", str),
    "to do": ("to_do", str),
    "ties": ("ties", str),
    "skipped": ("skipped", str),
    "took A": ("took_a", _percent),
    "steady": ("steady", _percent),
    "gold": ("gold_right", _percent),
    "seconds": ("median_seconds", _number),
}


def _until_stopped(server: LabelServer) -> None:
    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    old = {kind: signal.signal(kind, stop) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.serve_forever(poll_interval=0.1)
    except KeyboardInterrupt:
        pass
    finally:
        for kind, handler in old.items():
            signal.signal(kind, handler)
        server.settle()
