"""Labellers on one ledger of the test, closed at its end; LLM judges ask a server of its own."""

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
def open_labeller(tmp_path: Path) -> Iterator[MakeLabeller]:
    """Opens labellers of round 1 by the fields of their config, and closes them."""
    made = []

    def open_labeller(*, seed: int, events: list[Any] | None = None, **config: Any) -> Labeller:
        labeller = Labeller(
            JudgeConfig(**config),
            base=None,
            ledger_path=tmp_path / "judgments.sqlite",
            seed=seed,
            round=1,
            on_event=(events if events is not None else []).append,
        )
        made.append(labeller)
        return labeller

    yield open_labeller
    for labeller in made:
        labeller.close()


@pytest.fixture
def make(open_labeller: MakeLabeller) -> MakeLabeller:
    """Makes labellers with an LLM judge against a server."""

    def make_labeller(server: JudgeServer, **settings: Any) -> Labeller:
        options = {"model": "m", "base_url": server.url, "price_per_million": PRICE}
        given = {"name": "llm_pairwise", "options": {**options, **settings.pop("also", {})}}
        return open_labeller(seed=3, **{**given, **settings})

    return make_labeller


def rows(tmp_path: Path, columns: str) -> list[tuple[Any, ...]]:
    """Columns of the ledger's calls."""
    with sqlite3.connect(tmp_path / "judgments.sqlite") as db:
        found = db.execute(f"SELECT {columns} FROM calls ORDER BY rowid").fetchall()
    db.close()
    return found
