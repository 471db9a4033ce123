"""Labelling by an LLM judge in this process or in one that is killed, against a faulty server."""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from judge_cases import pair
from judge_server import (
    BAD_GATEWAY,
    HTML,
    RATE_LIMIT,
    SERVER_ERROR,
    TOKENS_IN,
    TOKENS_OUT,
    Answer,
    Hang,
    JudgeServer,
    Raw,
    Request,
    Reset,
    Say,
    usage_of,
)
from tiny import start_child

from online_dpo.config import JudgeConfig
from online_dpo.errors import CampaignError
from online_dpo.judging import Labeller
from online_dpo.records import Comparison

PRICE = (1.0, 2.0)
PICO_IN, PICO_OUT = 10**6, 2 * 10**6
"""Picodollars of a token at that price."""

USUAL = (TOKENS_IN, TOKENS_OUT)
A, B = Say('{"verdict": "A"}'), Say('{"verdict": "B"}')


def nothing_chosen(tokens: tuple[int, int]) -> Raw:
    """A reply without choices, which says what it is billed at."""
    body = {"object": "chat.completion", "model": "m", "choices": [], "usage": usage_of(*tokens)}
    return Raw(json.dumps(body), tokens=tokens)


RETRYABLE: dict[str, Answer] = {
    "429": RATE_LIMIT,
    "500": SERVER_ERROR,
    "502": BAD_GATEWAY,
    "reset": Reset(),
    "truncated": Raw('{"id": "x", "choi', tokens=USUAL),
    "html": HTML,
    "empty": nothing_chosen(USUAL),
    "drip": Hang(drip=True, tokens=USUAL),
}
ODD = {"refusal": Say(None, refusal="I cannot."), "another model": Say(A.text, model="another")}
"""Proper replies that a judge must live with."""


def good_wins(request: Request, number: int) -> Answer:
    """Prefers what says good, in whichever place it stands."""
    text = request["messages"][-1]["content"]
    return A if text.index("good") < text.index("poor") else B


class Faulty:
    """Answers of which a seeded share are faults, at most three for any one request."""

    def __init__(self, seed: int, share: float) -> None:
        self.served: Counter[str] = Counter()
        self._seed = seed
        self._share = share
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def num_retryable(self) -> int:
        return sum(count for name, count in self.served.items() if name in RETRYABLE)

    def __call__(self, request: Request, number: int) -> Answer:
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        with self._lock:
            self._seen[key] += 1
            draw = random.Random(f"{self._seed} {key} {self._seen[key]}")
            if self._seen[key] > 3 or draw.random() >= self._share:
                return good_wins(request, number)
            name = draw.choice([*RETRYABLE, *ODD])
            self.served[name] += 1
        return RETRYABLE.get(name) or ODD[name]


def label(folder: str, url: str, num_pairs: int, settings: dict[str, Any]) -> list[Comparison]:
    """Both orders of so many pairs, on the ledger in a folder, with short pauses."""
    from online_dpo.paid import batches, door

    door.BACKOFF_S = 0.01
    batches.GATHER_S = 0.2
    options = {"model": "m", "base_url": url, "price_per_million": PRICE, "max_tokens": 40}
    labeller = Labeller(
        JudgeConfig(name="llm_pairwise", options=options, **settings),
        base=None,
        ledger_path=Path(folder) / "judgments.sqlite",
        seed=3,
        round=1,
        on_event=lambda event: None,
    )
    try:
        return labeller.compare_pairs([pair(i) for i in range(num_pairs)], purpose="label")
    finally:
        labeller.close()


def label_and_exit(folder: str, url: str, num_pairs: int, settings: dict[str, Any]) -> None:
    """`label`, for a process of its own: it exits as a campaign would."""
    try:
        label(folder, url, num_pairs, settings)
    except CampaignError as error:
        sys.exit(error.exit_code)


def label_with_kills(
    folder: Path,
    answer: Callable[[Request, int], Answer],
    *,
    num_pairs: int,
    settings: dict[str, Any],
    kill_at: set[int],
    after_run: Callable[[JudgeServer, int], dict[str, Any] | None],
) -> JudgeServer:
    """Label in processes, one after the other, each killed when a request of `kill_at` arrives.

    `after_run` sees the server and each exit code, and gives the next process's settings, or None.
    """
    child: list[Any] = []

    def answer_or_kill(request: Request, number: int) -> Answer:
        if number in kill_at:
            child[-1].kill()
        return answer(request, number)

    with JudgeServer(answer_or_kill) as server:
        wanted: dict[str, Any] | None = settings
        while wanted is not None:
            child.append(start_child(label_and_exit, str(folder), server.url, num_pairs, wanted))
            child[-1].join(300)
            wanted = after_run(server, child[-1].exitcode)
    return server


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    """What the ledger in a folder says."""
    with sqlite3.connect(folder / "judgments.sqlite") as db:
        found = db.execute(query).fetchall()
    db.close()
    return found
