"""What models and files say to a terminal: no control sequence but ours, no markup that runs."""

from __future__ import annotations

import io
import json
import re
import sys
import unicodedata
from pathlib import Path

import pytest
from hostile_texts import HOSTILE
from rich.console import Console
from run_fixture import make_run

from online_dpo import cli
from online_dpo.display.terminal import print_row, print_status, print_summary
from online_dpo.errors import CampaignError
from online_dpo.progress import LiveProgress, PlainProgress
from online_dpo.tables import read_table
from online_dpo.views import Campaign

TEXTS = [text[:300] for text in HOSTILE.values()]
ALL = "\n".join(text for text in TEXTS if len(text) < 200)
OURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""What rich writes: colours, and the cursor's moves that draw bars anew."""


def controls(shown: str) -> set[str]:
    """Control characters, but for line ends and the joiners that scripts are written with."""
    kept = "\n\t\u200c\u200d"
    return {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")} - set(kept)


@pytest.mark.parametrize("width", ["40", "80", "500"])
def test_every_view_shows_them_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    judge = {"name": "heuristic", "options": {"kind": "length", "note": ALL}}
    run = make_run(
        tmp_path, rounds=1, odd_answer=ALL, config={"judge": judge}, sources=(ALL[:200], "[/]")
    )
    pair = read_table(run / "rounds" / "001" / "pairs" / "pairs.parquet")[0]
    for show in (print_status, print_summary, lambda c: print_row(c, pair["pair_id"])):
        show(Campaign(run))
        assert controls(capsys.readouterr().out) == set()


@pytest.mark.parametrize("text", TEXTS, ids=list(HOSTILE))
def test_progress_prints_notes_as_text(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    PlainProgress().note(text)
    assert controls(capsys.readouterr().err) == set()
    drawn = io.StringIO()
    live = LiveProgress(Console(file=drawn, force_terminal=True, width=80))
    live.note(text)
    live.close()
    shown = drawn.getvalue()
    assert controls(OURS.sub("", shown)) <= {"\r"}
    assert not re.search(r"\x1b(?!\[)", shown) and "\x9b" not in shown


def test_errors_are_printed_as_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["online-dpo", "--debug", "status", "x"])

    def fail(*_: object) -> None:
        try:
            raise ValueError(ALL)
        except ValueError as error:
            raise CampaignError(ALL, remedy=ALL, safe=ALL) from error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr()
    assert "error: " in shown.err and "Traceback" in shown.err
    assert controls(shown.out + shown.err) == set()


def test_json_for_machines_is_ascii(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=1, odd_answer=ALL, sources=(ALL[:200],))
    text = json.dumps(Campaign(run).status(), indent=2)
    assert text.isascii() and controls(text) == set()
