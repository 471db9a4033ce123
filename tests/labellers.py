"""Labellers with an LLM judge on one ledger, against a server of the test's own."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import TOKENS_IN, TOKENS_OUT, Answer, JudgeServer

from online_dpo.config import JudgeConfig
from online_dpo.judging import Labeller

PRICE = [1.0, 2.0]
COST = (TOKENS_IN * 1.0 + TOKENS_OUT * 2.0) / 1e6
"""Dollars of one proper reply at that price."""

MakeLabeller = Callable[..., Labeller]


def serve(*answers: Answer) -> JudgeServer:
    """Gives the answers in turn, the last one for ever."""
    return JudgeServer(lambda request, number: answers[min(number, len(answers) - 1)])


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeLabeller]:
    """Makes labellers with an LLM judge on one ledger, and closes them."""
    made = []

    def make_labeller(
        server: JudgeServer, *, events: list[Any] | None = None, **settings: Any
    ) -> Labeller:
        options = {"model": "m", "base_url": server.url, "price_per_million": PRICE}
        labeller = Labeller(
            JudgeConfig(
                name=settings.pop("name", "llm_pairwise"),
                options=settings.pop("options", {**options, **settings.pop("also", {})}),
                **settings,
            ),
            base=None,
            ledger_path=tmp_path / "judgments.sqlite",
            seed=3,
            round=1,
            on_event=(events if events is not None else []).append,
        )
        made.append(labeller)
        return labeller

    yield make_labeller
    for labeller in made:
        labeller.close()


def rows(tmp_path: Path, columns: str) -> list[tuple[Any, ...]]:
    """Columns of the ledger's calls."""
    with sqlite3.connect(tmp_path / "judgments.sqlite") as db:
        found = db.execute(f"SELECT {columns} FROM calls ORDER BY rowid").fetchall()
    db.close()
    return found
