"""What paid labelling promises: one verdict a pair, nothing bought twice, never over budget."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
from judge_server import RATE_LIMIT, SERVER_ERROR, Answer, JudgeServer, Request, Say
from paid_labelling import (
    PICO_IN,
    PICO_OUT,
    USUAL,
    Faulty,
    good_wins,
    label,
    label_with_kills,
    nothing_chosen,
    rows,
)

from online_dpo.errors import BudgetError
from online_dpo.paid.chat import PICO
from online_dpo.paid.ledger import check_ledger

CONCURRENCY = 8
IMPATIENT = {"concurrency": CONCURRENCY, "timeout_s": 4.0, "max_invalid": 0.5}
"""A drip is cut off after four seconds; refusals make one answer in thirty invalid."""

quick_and_full = pytest.mark.parametrize(
    "num_pairs", [30, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)


def unusable(faulty: Faulty) -> int:
    """Replies that were billed and hold no answer."""
    return sum(faulty.served[name] for name in ("truncated", "empty", "drip"))


def check_rows(folder: Path, num_pairs: int) -> None:
    """Each order of each pair has one settled row, and its verdict beside it."""
    asked = [(f"p{i}", swapped) for i in range(num_pairs) for swapped in (0, 1)]
    found = rows(folder, "SELECT prompt_id, swapped, verdict FROM judgments WHERE state='settled'")
    assert sorted((prompt, swapped) for prompt, swapped, _ in found) == sorted(asked)
    assert all(verdict is not None for _, _, verdict in found)
    assert rows(folder, "SELECT count(*) FROM calls WHERE state = 'sent'") == [(0,)]
    check_ledger(folder / "judgments.sqlite")


@quick_and_full
def test_faults_cost_one_request_each_and_no_verdict(tmp_path: Path, num_pairs: int) -> None:
    faulty = Faulty(seed=1, share=0.3)
    with JudgeServer(faulty) as server:
        found = label(str(tmp_path), server.url, num_pairs, IMPATIENT)
    assert len(found) == num_pairs
    refused = rows(tmp_path, "SELECT DISTINCT prompt_id FROM calls WHERE refused = 1")
    assert {c.prompt_id for c in found if c.p is None} == {prompt for (prompt,) in refused}
    assert all(c.reason == "the model refused to answer" for c in found if c.p is None)
    check_rows(tmp_path, num_pairs)
    assert faulty.num_retryable > num_pairs / 4 and len(faulty.served) > 4
    assert len(server.requests) == 2 * num_pairs + faulty.num_retryable
    replies = 2 * num_pairs + unusable(faulty)
    assert server.bill == (replies * USUAL[0], replies * USUAL[1])
    ((charged,),) = rows(tmp_path, "SELECT charged FROM totals")
    assert charged >= server.bill[0] * PICO_IN + server.bill[1] * PICO_OUT


@pytest.mark.parametrize(
    ("num_pairs", "num_kills"),
    [(20, 2), pytest.param(500, 10, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_a_kill_costs_at_most_what_was_in_flight(
    tmp_path: Path, num_pairs: int, num_kills: int
) -> None:
    faulty = Faulty(seed=2, share=0.3)
    apart = 2 * num_pairs // (num_kills + 1)
    draw = random.Random(num_kills)
    kill_at = {(i + 1) * apart + draw.randint(-2, 2) for i in range(num_kills)}
    codes = []

    def go_on(server: JudgeServer, code: int) -> dict[str, Any] | None:
        codes.append(code)
        return None if code == 0 else IMPATIENT

    server = label_with_kills(
        tmp_path, faulty, num_pairs=num_pairs, settings=IMPATIENT, kill_at=kill_at, after_run=go_on
    )
    assert codes == [-signal.SIGKILL] * num_kills + [0]
    check_rows(tmp_path, num_pairs)
    extra = CONCURRENCY * num_kills
    assert len(server.requests) <= 2 * num_pairs + faulty.num_retryable + extra
    assert server.bill[0] <= (2 * num_pairs + unusable(faulty) + extra) * USUAL[0]


class Schedule:
    """A random campaign's labelling: its budget, its replies and faults, and when it is killed."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.num_pairs = draw.randint(3, 8)
        self.settings: dict[str, Any] = {"concurrency": draw.randint(1, 8), "retries": 20}
        self.settings["budget"] = self._budget(draw)
        most = 3 * self.num_pairs
        self.kill_at = set(draw.sample(range(1, most), draw.randint(1, 2)))
        self._seed = seed

    def _budget(self, draw: random.Random) -> dict[str, float]:
        """Room for a few calls at their reservations: some 1,500 tokens, or $0.0016."""
        kind = draw.choice(["max_usd", "max_calls", "max_tokens"])
        few = draw.randint(1, 2 * self.num_pairs)
        return {kind: {"max_usd": few * 2e-3, "max_calls": few, "max_tokens": few * 1600}[kind]}

    def __call__(self, request: Request, number: int) -> Answer:
        draw = random.Random(f"{self._seed} {number}")
        tokens = (draw.randint(1, 1000), draw.randint(1, 40))
        fate = draw.random()
        if fate < 0.1:
            return RATE_LIMIT
        if fate < 0.2:
            return SERVER_ERROR
        if fate < 0.3:
            return nothing_chosen(tokens)
        said = good_wins(request, number)
        assert isinstance(said, Say)
        return Say(said.text, tokens=tokens)

    def raise_budget(self) -> None:
        self.settings["budget"] = {k: 2 * v for k, v in self.settings["budget"].items()}

    def check(self, folder: Path, server: JudgeServer, *, killed: bool) -> None:
        """Within the budget; what the ledger says is the bill, or no less after a kill."""
        ((charged, calls, tokens),) = rows(folder, "SELECT charged, calls, tokens FROM totals")
        budget = self.settings["budget"]
        assert charged <= round(budget.get("max_usd", 1e6) * PICO)
        assert calls <= budget.get("max_calls", 1e6)
        assert tokens <= budget.get("max_tokens", 1e9)
        tokens_in, tokens_out = server.bill
        bill = tokens_in * PICO_IN + tokens_out * PICO_OUT
        if killed:
            assert charged >= bill and tokens >= tokens_in + tokens_out
        else:
            assert (charged, tokens) == (bill, tokens_in + tokens_out)


schedules = pytest.mark.parametrize(
    "seeds",
    [range(6), pytest.param(range(6, 106), marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
    ids=["few", "hundred"],
)


@schedules
def test_never_over_budget_and_the_ledger_is_the_bill(tmp_path: Path, seeds: range) -> None:
    ended = 0
    for seed in seeds:
        schedule, folder = Schedule(seed), tmp_path / str(seed)
        with JudgeServer(schedule) as server:
            while True:
                try:
                    label(str(folder), server.url, schedule.num_pairs, schedule.settings)
                    break
                except BudgetError:
                    ended += 1
                    schedule.check(folder, server, killed=False)
                    schedule.raise_budget()
            schedule.check(folder, server, killed=False)
        check_rows(folder, schedule.num_pairs)
    assert ended, "no budget was ever reached"


@pytest.mark.parametrize(
    "seeds",
    [range(2), pytest.param(range(2, 102), marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
    ids=["few", "hundred"],
)
def test_never_over_budget_with_kills(tmp_path: Path, seeds: range) -> None:
    kills = 0
    for seed in seeds:
        schedule, folder = Schedule(seed), tmp_path / str(seed)

        def after_run(
            server: JudgeServer, code: int, schedule: Schedule = schedule, folder: Path = folder
        ) -> dict[str, Any] | None:
            nonlocal kills
            assert code in (0, BudgetError.exit_code, -signal.SIGKILL)
            kills += code == -signal.SIGKILL
            if (folder / "judgments.sqlite").exists():
                schedule.check(folder, server, killed=True)
            if code == BudgetError.exit_code:
                schedule.raise_budget()
            return None if code == 0 else schedule.settings

        label_with_kills(
            folder, schedule, num_pairs=schedule.num_pairs, settings=schedule.settings,
            kill_at=schedule.kill_at, after_run=after_run,
        )  # fmt: skip
        check_rows(folder, schedule.num_pairs)
    assert kills
