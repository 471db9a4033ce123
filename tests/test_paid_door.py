"""The paid door: prices, tiers, rates, deadlines, lasting faults, and other runs' ledgers."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_cases import pair
from judge_server import BAD_KEY, Answer, JudgeServer, Raw, Request, Say
from paid_labelling import A, good_wins, rows

from online_dpo.config import JudgeConfig
from online_dpo.errors import ConfigError, CorruptError, JudgeError
from online_dpo.judging import Labeller
from online_dpo.paid.model_names import is_same_model
from online_dpo.paid.rates import endpoint_of

MakeLabeller = Callable[..., Labeller]

PRICES = """
{url}:
  date: "2026-11-24"
  source: a contract
  models:
    m: {{input: 2, cached_input: 0.5, output: 8, tiers: {{flex: {{input: 1, output: 4}}}}}}
"""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeLabeller]:
    """Makes labellers with an LLM judge, each on a ledger in the run directory given."""
    made = []

    def make_labeller(
        server: JudgeServer,
        *,
        run: str = "run",
        events: list[Any] | None = None,
        also: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Labeller:
        options = {"model": "m", "base_url": server.url, **(also or {})}
        labeller = Labeller(
            JudgeConfig(name="llm_pairwise", options=options, **settings),
            base=None,
            ledger_path=tmp_path / run / "judgments.sqlite",
            seed=3,
            round=1,
            on_event=(events if events is not None else []).append,
        )
        made.append(labeller)
        return labeller

    yield make_labeller
    for labeller in made:
        labeller.close()


def always(answer: Answer) -> JudgeServer:
    return JudgeServer(lambda request, number: answer)


def events_of(kind: str, events: list[Any]) -> list[Any]:
    return [event for event in events if event["event"] == kind]


# --- prices and tiers


def test_a_tier_is_asked_for_and_paid_as_the_reply_says(make: MakeLabeller, tmp_path: Path) -> None:
    tiers = iter(["flex", "default"])

    def answer(request: Request, number: int) -> Answer:
        return Say(A.text, tier=next(tiers), cached=60)

    events: list[Any] = []
    with JudgeServer(answer) as server:
        (tmp_path / "prices.yaml").write_text(PRICES.format(url=server.url))
        prices = str(tmp_path / "prices.yaml")
        labeller = make(
            server, events=events, prices=prices, service_tier="flex", budget={"max_usd": 1},
            concurrency=1,
        )  # fmt: skip
        labeller.compare_pairs([pair()], purpose="label")
        assert [request["service_tier"] for request in server.requests] == ["flex", "flex"]
    (told,) = events_of("judge_price", events)
    assert told["price_per_million"] == {"input": 1, "output": 4, "cached_input": None}
    assert told["source"] == f"{prices}, 2026-11-24: a contract"
    paid = rows(tmp_path / "run", "SELECT tier, cost / 1e6, tokens_cached FROM calls ORDER BY cost")
    flex, standard = 100 * 1 + 10 * 4, 40 * 2 + 60 * 0.5 + 10 * 8
    assert paid == [("flex", flex, 60), ("default", standard, 60)]


def test_an_unknown_price_is_said_to_be_unknown(make: MakeLabeller) -> None:
    events: list[Any] = []
    with always(A) as server:
        make(server, events=events).compare_pairs([pair()], purpose="label")
        (told,) = events_of("judge_price", events)
        assert (told["price_per_million"], told["source"]) == ("unknown", "unknown")
        (summary,) = events_of("judge_calls", events)
        assert (summary["cost_usd"], summary["unpriced"]) == (None, 2)
        with pytest.raises(ConfigError, match="cannot be kept without a price"):
            make(server, budget={"max_usd": 1})
        make(server, budget={"max_usd": 1}, also={"price_per_million": [0, 0]})


def test_a_tier_in_the_requests_own_body_is_refused(make: MakeLabeller) -> None:
    with always(A) as server:
        labeller = make(server, also={"extra_body": {"service_tier": "flex"}})
        with pytest.raises(ConfigError, match=r"set judge\.service_tier instead"):
            labeller.compare_pairs([pair()], purpose="label")


def test_another_model_that_answers_is_told_and_recorded(
    make: MakeLabeller, tmp_path: Path
) -> None:
    events: list[Any] = []
    models = iter(["m-1", "m-1", "m-2", "m-2"])
    with JudgeServer(lambda request, number: Say(A.text, model=next(models))) as server:
        labeller = make(server, events=events, concurrency=1)
        labeller.compare_pairs([pair(0), pair(1)], purpose="label")
    (told,) = events_of("judge_model_changed", events)
    assert told["message"] == "'m' was answered by 'm-1' and now by 'm-2'"
    answered = rows(tmp_path / "run", "SELECT answered_by FROM calls ORDER BY rowid")
    assert answered == [("m-1",), ("m-1",), ("m-2",), ("m-2",)]


@pytest.mark.parametrize(
    ("asked", "answered", "same"),
    [
        ("gpt-4o-mini", "gpt-4o-mini-2024-07-18", True),
        ("gpt-4", "gpt-4-0613", True),
        ("claude-x-latest", "claude-x-20241022", True),
        ("gemini-2.5-flash", "models/gemini-2.5-flash-preview-05-20", True),
        ("openai/GPT-4o-mini", "gpt-4o-mini", True),
        ("gemini-1.5-pro", "gemini-1.5-pro-002", True),
        ("m", "unknown", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("gpt-4o-mini", "gpt-4o", False),
        ("gpt-4", "gpt-4.1", False),
        ("gpt-4", "gpt-4-turbo", False),
        ("llama-3-70b", "llama-3-8b", False),
        ("a/m", "a/n", False),
    ],
)
def test_versions_of_a_model_are_the_same_model(asked: str, answered: str, same: bool) -> None:
    assert is_same_model(asked, answered) is same


def test_a_wrong_model_name_is_said_once_and_may_be_refused(
    make: MakeLabeller, tmp_path: Path
) -> None:
    events: list[Any] = []
    with JudgeServer(lambda request, number: Say(A.text, model="other-model")) as server:
        labeller = make(server, events=events)
        labeller.compare_pairs([pair(0)], purpose="label")
        labeller.compare_pairs([pair(1)], purpose="label")
        (told,) = events_of("judge_model_mismatch", events)
        assert "asked for 'm', and 'other-model' answered" in told["message"]
        assert [e["other_model"] for e in events_of("judge_calls", events)] == [2, 2]
        labeller.close()
        strict = make(server, model_mismatch="refuse")
        with pytest.raises(JudgeError, match="'other-model' answered for prompt"):
            strict.compare_pairs([pair(0)], purpose="label")  # out of the ledger
        with pytest.raises(JudgeError, match="judge.model_mismatch: warn"):
            strict.compare_pairs([pair(2)], purpose="label")
        assert 5 <= len(server.requests) <= 6
    answered = rows(tmp_path / "run", "SELECT DISTINCT state, answered_by FROM calls")
    assert ("settled", "other-model") in answered


def test_a_version_of_the_model_is_neither_said_nor_refused(make: MakeLabeller) -> None:
    events: list[Any] = []
    with JudgeServer(lambda request, number: Say(A.text, model="m-2024-07-18")) as server:
        labeller = make(server, events=events, model_mismatch="refuse")
        labeller.compare_pairs([pair()], purpose="label")
    assert not events_of("judge_model_mismatch", events)
    assert "other_model" not in events_of("judge_calls", events)[0]


# --- rates


def test_what_a_judge_sends_counts_at_its_endpoint(make: MakeLabeller) -> None:
    with always(A) as server:
        make(server).compare_pairs([pair()], purpose="label")
        endpoint = endpoint_of(server.url, os.environ.get("OPENAI_API_KEY"))
    now = endpoint.clock()
    assert endpoint.requests.wait_s(1, 2, now) > 50 and endpoint.requests.wait_s(1, 3, now) == 0
    # Settled at what the two replies say that they used, 110 tokens each.
    assert endpoint.tokens.wait_s(1, 220, now) > 50 and endpoint.tokens.wait_s(1, 221, now) == 0


def test_a_call_larger_than_a_minutes_tokens_is_refused(make: MakeLabeller) -> None:
    with always(A) as server:
        labeller = make(server, tokens_per_minute=50)
        with pytest.raises(ConfigError, match=r"judge\.tokens_per_minute: 50 is less than the"):
            labeller.compare_pairs([pair()], purpose="label")
        assert not server.requests


# --- rows


def test_a_row_says_all_of_a_call(make: MakeLabeller, tmp_path: Path) -> None:
    with JudgeServer(lambda request, number: Say("so [[A]]" if number else "both")) as server:
        labeller = make(server, orders="one", also={"price_per_million": [1, 2]}, concurrency=1)
        labeller.compare_pairs([pair(0), pair(1)], purpose="label")
    columns = (
        "length(key), length(request_sha256), judge, version != '', prompt_id, response_ids, vote, "
        "reply, verdict, answered_by, tokens_in, tokens_out, cost > 0, latency_s > 0, attempt"
    )
    first, second = rows(tmp_path / "run", f"SELECT {columns} FROM judgments ORDER BY prompt_id")
    common = (64, 64, "llm_pairwise", 1)
    ids = '["0-a", "0-b"]'
    rest = ("m-002", 100, 10, 1, 1, 1)
    unread = '{"p": null, "reason": "no verdict in the reply"}'
    assert first == (*common, "p0", ids, 0, "both", unread, *rest)
    assert second[7:9] == ("so [[A]]", '{"p": 1.0, "reason": null}')
    assert rows(tmp_path / "run", "SELECT count(DISTINCT request_sha256) FROM calls") == [(2,)]


# --- faults that last


def test_a_key_that_is_revoked_on_the_way_ends_with_its_name(
    make: MakeLabeller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-1")

    def answer(request: Request, number: int) -> Answer:
        return good_wins(request, number) if number < 4 else BAD_KEY

    with JudgeServer(answer) as server:
        labeller = make(server, concurrency=2, also={"api_key_env": "MY_KEY"})
        with pytest.raises(JudgeError, match=r"HTTP 401: bad key \(the key in MY_KEY\)"):
            labeller.compare_pairs([pair(i) for i in range(9)], purpose="label")
        assert len(server.requests) <= 6
    states = dict(rows(tmp_path / "run", "SELECT state, count(*) FROM calls GROUP BY state"))
    assert states["settled"] == 4 and set(states) == {"settled", "failed"}


@pytest.mark.parametrize("wait", ["7200", "1"])
def test_a_call_ends_at_its_deadline(make: MakeLabeller, wait: str) -> None:
    """However long the server asks to wait, and however often: a pause that is too long is not."""
    busy = Raw('{"error": {"message": "slow down"}}', 429, {"Retry-After": wait})
    with always(busy) as server:
        labeller = make(server, deadline_s=1.5, retries=20, orders="one")
        with pytest.raises(JudgeError, match=r"slow down. There is no time.*deadline_s is 1\.5"):
            labeller.compare_pairs([pair()], purpose="label")
        assert len(server.requests) == (1 if wait == "7200" else 2)


def test_a_wait_that_a_server_asks_for_is_kept_and_bounded(
    make: MakeLabeller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("online_dpo.paid.door.MAX_PAUSE_S", 0.05)
    busy = Raw('{"error": {"message": "slow down"}}', 429, {"Retry-After": "7200"})
    brief = Raw('{"error": {"message": "slow down"}}', 429, {"Retry-After": "0.01"})
    answers = iter([busy, brief, A])
    events: list[Any] = []
    with JudgeServer(lambda request, number: next(answers)) as server:
        labeller = make(server, events=events, orders="one")
        labeller.compare_pairs([pair()], purpose="label")
    pauses = [event["pause_s"] for event in events_of("judge_retry", events)]
    assert pauses[0] == 0.05 and 0.01 <= pauses[1] <= 0.0125


# --- rates


@pytest.mark.parametrize(
    "limits",
    [{"requests_per_minute": 120}, {"tokens_per_minute": 200_000}],
    ids=["calls", "tokens"],
)
def test_requests_are_spread_over_the_minute(make: MakeLabeller, limits: dict[str, int]) -> None:
    """Two at once, then one each half second; some 1,900 tokens each at 3,333 a second."""
    arrivals = []

    def answer(request: Request, number: int) -> Answer:
        arrivals.append(time.monotonic())
        return A

    with JudgeServer(answer) as server:
        labeller = make(server, orders="one", **limits)
        labeller.compare_pairs([pair(i) for i in range(4)], purpose="label")
    assert len(arrivals) == 4
    assert arrivals[3] - arrivals[0] > (0.6 if "requests_per_minute" in limits else 0.3)


# --- answers of earlier runs


def test_an_earlier_run_answers_identical_calls(make: MakeLabeller, tmp_path: Path) -> None:
    pairs = [pair(i) for i in range(4)]
    with JudgeServer(good_wins) as server:
        old = make(server, run="old")
        found = old.compare_pairs(pairs[:3], purpose="label")
        old.close()
        before = (tmp_path / "old/judgments.sqlite").read_bytes()
        events: list[Any] = []
        reuse_from = [str(tmp_path / "old")]
        again = make(server, run="new", events=events, reuse_from=reuse_from)
        assert again.compare_pairs(pairs, purpose="label")[:3] == found
        assert len(server.requests) == 8
        again.close()
        # The copies are this run's own: it goes on without the other.
        make(server, run="new").compare_pairs(pairs, purpose="label")
        assert len(server.requests) == 8
    assert (tmp_path / "old/judgments.sqlite").read_bytes() == before
    (summary,) = events_of("judge_calls", events)
    assert (summary["reused"], summary["requests"]) == (6, 2)
    states = rows(tmp_path / "new", "SELECT state, count(*), sum(cost) FROM calls GROUP BY state")
    assert states == [("reused", 6, 0), ("settled", 2, None)]
    assert rows(tmp_path / "new", "SELECT calls, tokens FROM totals") == [(2, 220)]


def test_an_earlier_ledger_is_checked_before_it_is_believed(
    make: MakeLabeller, tmp_path: Path
) -> None:
    with JudgeServer(good_wins) as server:
        make(server, run="old").compare_pairs([pair()], purpose="label")
        with pytest.raises(ConfigError, match="judge.reuse_from: .*nowhere has no ledger"):
            make(server, run="new", reuse_from=[str(tmp_path / "nowhere")])
        with sqlite3.connect(tmp_path / "old/judgments.sqlite") as db:
            db.execute('UPDATE calls SET reply = \'{"verdict": "tie"}\' WHERE swapped = 1')
        db.close()
        with pytest.raises(CorruptError, match="is not what was written"):
            make(server, run="new", reuse_from=[str(tmp_path / "old")])


# --- a judge that gives too few verdicts


def test_too_many_invalid_replies_stop_the_round(make: MakeLabeller) -> None:
    def answer(request: Request, number: int) -> Answer:
        return (
            Say("I like both") if number % 2 else Say("[[A]]", "length" if number % 8 else "stop")
        )

    with JudgeServer(answer) as server:
        labeller = make(server, concurrency=1, max_invalid=0.4, max_invalid_after=20)
        with pytest.raises(JudgeError) as caught:
            labeller.compare_pairs([pair(i) for i in range(40)], purpose="label")
        assert len(server.requests) == 20
    message = caught.value.message
    assert "gave no verdict in 17 of 20 answers, and judge.max_invalid is 0.4" in message
    assert "no verdict in the reply (10), reply cut off at max_tokens (7)" in message
    assert "whose reply was 'I like both'" in message and "raise judge.max_invalid" in message


def test_a_share_that_is_borne_drops_and_counts_them(make: MakeLabeller) -> None:
    events: list[Any] = []
    with JudgeServer(lambda request, number: Say("both") if number < 8 else A) as server:
        labeller = make(server, events=events, concurrency=1, max_invalid_after=40)
        found = labeller.compare_pairs([pair(i) for i in range(20)], purpose="label")
        assert sum(c.p is None for c in found) == 4
        assert events[-1]["invalid"] == {"no verdict in the reply": 8}
        labeller.round = 2  # a new count
        labeller.compare_pairs([pair(i) for i in range(20)], purpose="label")
        with pytest.raises(JudgeError, match="8 of 40"):
            make(server, max_invalid=0.1, max_invalid_after=40).compare_pairs(
                [pair(i) for i in range(20)], purpose="label"
            )
        assert len(server.requests) == 40
