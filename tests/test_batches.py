"""The batch API: handed in once, polled by whoever comes, and each line ends as a call would."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from batch_server import BatchServer
from judge_server import NO_QUOTA, RATE_LIMIT, SERVER_ERROR, Answer, JudgeServer, Raw, Request
from paid_labelling import PICO_IN, PICO_OUT, USUAL, good_wins, label, label_and_exit, rows
from tiny import start_child

from online_dpo.config import JudgeConfig
from online_dpo.errors import BudgetError, JudgeError
from online_dpo.paid.ledger import check_ledger

BATCH: dict[str, Any] = {"batch": {"poll_s": 0.05}}
CREATE = "POST /batches"


def states(folder: Path) -> dict[str, int]:
    check_ledger(folder / "judgments.sqlite")
    return dict(rows(folder, "SELECT state, count(*) FROM calls GROUP BY state"))


def charged(folder: Path) -> int:
    ((picodollars,),) = rows(folder, "SELECT charged FROM totals")
    return int(picodollars)


def bill(server: JudgeServer) -> int:
    return server.bill[0] * PICO_IN + server.bill[1] * PICO_OUT


def test_all_calls_go_in_one_batch_and_are_bought_once(tmp_path: Path) -> None:
    with BatchServer(good_wins) as server:
        found = label(str(tmp_path), server.url, 6, BATCH)
        assert [c.p for c in found] == [1.0] * 6
        assert server.calls.count(CREATE) == 1
        assert len(server.batches[0].lines) == len(server.requests) == 12
        assert server.requests[0]["max_tokens"] == 40
        assert label(str(tmp_path), server.url, 6, BATCH) == found
        assert server.calls.count(CREATE) == 1
    assert states(tmp_path) == {"settled": 12}
    assert rows(tmp_path, "SELECT DISTINCT tier, attempt FROM calls") == [("batch", 1)]
    assert charged(tmp_path) == bill(server) == 12 * (USUAL[0] * PICO_IN + USUAL[1] * PICO_OUT)


def test_a_batch_holds_no_more_than_it_may(tmp_path: Path) -> None:
    with BatchServer(good_wins) as server:
        label(str(tmp_path), server.url, 6, {"batch": {"poll_s": 0.05, "max_requests": 5}})
        assert sum(len(batch.lines) for batch in server.batches) == 12
        assert max(len(batch.lines) for batch in server.batches) == 5


@pytest.mark.parametrize(
    ("kill_at", "num_batches", "lost"),
    [
        ("POST /files", 1, "failed"),  # never handed in: nothing is charged
        (CREATE, 1, None),  # handed in, and killed before the reply: found by its metadata
        ("GET /batches/", 1, None),  # handed in and looked at
        ("GET /files/", 1, None),  # done, and killed before the results came
    ],
)
def test_a_killed_process_leaves_its_batch_to_the_next(
    tmp_path: Path, kill_at: str, num_batches: int, lost: str | None
) -> None:
    with BatchServer(good_wins) as server:
        settings = (str(tmp_path), server.url, 5, BATCH)

        def kill(method: str, path: str) -> None:
            if f"{method} {path}".startswith(kill_at):
                server.watch = lambda method, path: None
                child.kill()

        server.watch = kill
        child = start_child(label_and_exit, *settings)
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        assert [c.p for c in label(*settings)] == [1.0] * 5
        assert len(server.batches) == num_batches
        assert len(server.requests) == 10
    assert states(tmp_path) == {"settled": 10} | ({lost: 10} if lost else {})
    assert charged(tmp_path) == bill(server)


def test_a_batch_that_the_endpoint_never_had_is_charged_and_made_again(tmp_path: Path) -> None:
    """The process ended between the note and the request: whether it arrived cannot be known."""
    with BatchServer(good_wins) as server:

        def kill(method: str, path: str) -> None:
            if f"{method} {path}" == CREATE:
                server.watch = lambda method, path: None
                server.batches.clear()
                child.kill()

        server.watch = kill
        child = start_child(label_and_exit, str(tmp_path), server.url, 2, BATCH)
        child.join(60)
        label(str(tmp_path), server.url, 2, BATCH)
    assert states(tmp_path) == {"settled": 4, "unknown": 4}
    assert charged(tmp_path) > 2 * bill(server)


def test_what_expired_goes_into_the_next_batch(tmp_path: Path) -> None:
    with BatchServer(good_wins, finish=lambda n: "completed" if n else "expired") as server:
        found = label(str(tmp_path), server.url, 4, BATCH)
        assert [c.p for c in found] == [1.0] * 4
        assert [len(batch.lines) for batch in server.batches] == [8, 4]
    assert states(tmp_path) == {"settled": 8, "failed": 4}
    assert charged(tmp_path) == bill(server)


def test_a_line_with_a_passing_fault_goes_into_the_next_batch(tmp_path: Path) -> None:
    def answer(request: Request, number: int) -> Answer:
        return {0: RATE_LIMIT, 1: SERVER_ERROR}.get(number) or good_wins(request, number)

    with BatchServer(answer) as server:
        assert [c.p for c in label(str(tmp_path), server.url, 3, BATCH)] == [1.0] * 3
        assert [len(batch.lines) for batch in server.batches] == [6, 2]
    assert states(tmp_path) == {"settled": 6, "failed": 2}


def test_a_line_with_a_lasting_fault_ends_the_labelling(tmp_path: Path) -> None:
    def answer(request: Request, number: int) -> Answer:
        return good_wins(request, number) if number else NO_QUOTA

    with (
        BatchServer(answer) as server,
        pytest.raises(JudgeError, match="HTTP 429: no money left.*quota is used up"),
    ):
        label(str(tmp_path), server.url, 3, BATCH)
    assert states(tmp_path) == {"settled": 5, "failed": 1}


@pytest.mark.parametrize(
    ("status", "said"),
    [("failed", "is failed: line 1 is no request"), ("cancelled", "is cancelled")],
)
def test_a_batch_that_is_refused_costs_nothing(tmp_path: Path, status: str, said: str) -> None:
    with (
        BatchServer(good_wins, finish=lambda number: status) as server,
        pytest.raises(JudgeError, match=f"the batch batch-0 {said}"),
    ):
        label(str(tmp_path), server.url, 2, BATCH)
    assert states(tmp_path) == {"failed": 4}
    assert charged(tmp_path) == 0


def test_an_endpoint_that_stumbles_is_asked_again(tmp_path: Path) -> None:
    with BatchServer(good_wins) as server:
        server.fail_next = [None, None, SERVER_ERROR, Raw("<html>", 502)]
        assert [c.p for c in label(str(tmp_path), server.url, 2, BATCH)] == [1.0] * 2
        assert len(server.batches) == 1


def test_a_batch_of_unknown_fate_is_looked_for_before_another_is_made(tmp_path: Path) -> None:
    with BatchServer(good_wins) as server:
        server.fail_next = [None]

        def cut(method: str, path: str) -> None:
            if f"{method} {path}" == CREATE:
                raise ConnectionResetError

        server.watch = cut
        assert [c.p for c in label(str(tmp_path), server.url, 2, BATCH)] == [1.0] * 2
        assert len(server.batches) == 1
        assert "GET /batches" in server.calls


def test_a_batch_that_cannot_be_looked_at_waits_for_a_resume(tmp_path: Path) -> None:
    with BatchServer(good_wins, looks=1) as server:
        server.fail_next = [None, None, SERVER_ERROR, SERVER_ERROR]
        with pytest.raises(JudgeError, match="batch batch-0 cannot be looked at: HTTP 500"):
            label(str(tmp_path), server.url, 2, {**BATCH, "retries": 1})
        assert states(tmp_path) == {"sent": 4}
        # One by one again: what was handed in is still fetched, and not bought a second time.
        assert [c.p for c in label(str(tmp_path), server.url, 2, {})] == [1.0] * 2
        assert len(server.requests) == 4 and len(server.batches) == 1
    assert states(tmp_path) == {"settled": 4}


def test_an_endpoint_without_batches_is_named(tmp_path: Path) -> None:
    with (
        JudgeServer(good_wins) as server,
        pytest.raises(JudgeError, match="HTTP 404.*is for endpoints with a batch API"),
    ):
        label(str(tmp_path), server.url, 2, BATCH)
    assert states(tmp_path) == {"failed": 4}


def test_a_budget_holds_for_batches(tmp_path: Path) -> None:
    """What has room is handed in; the rest follows as that settles for less, or ends the run."""
    with BatchServer(good_wins) as server:
        limits = {**BATCH, "budget": {"max_calls": 5}}
        with pytest.raises(BudgetError, match="limit of 5 judge calls"):
            label(str(tmp_path), server.url, 4, limits)
        assert [len(batch.lines) for batch in server.batches] == [5]
        label(str(tmp_path), server.url, 4, {**BATCH, "budget": {"max_calls": 8}})
        assert [len(batch.lines) for batch in server.batches] == [5, 3]
    assert states(tmp_path) == {"settled": 8}


@pytest.mark.parametrize("field", ["concurrency", "service_tier", "deadline_s"])
def test_settings_of_single_requests_do_not_go_with_batches(field: str) -> None:
    value: Any = {"service_tier": "flex"}.get(field, 7)
    with pytest.raises(ValueError, match=f"{field} is for single requests"):
        JudgeConfig(name="llm_pairwise", batch={}, **{field: value})  # type: ignore[arg-type]
