"""The pairwise LLM judge and the paid door, against a real server and one that misbehaves."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from judge_cases import pair
from judge_server import (
    BAD_GATEWAY,
    BAD_KEY,
    HTML,
    NO_CHOICES,
    NO_JSON,
    NO_MODEL,
    NO_QUOTA,
    NO_SCHEMA,
    RATE_LIMIT,
    SERVER_ERROR,
    TOKENS_IN,
    TOKENS_OUT,
    TOO_LONG,
    Answer,
    Hang,
    JudgeServer,
    Request,
    Reset,
    Say,
)
from labellers import COST, MakeLabeller, rows, serve
from vllm_processes import VllmServer

from judges.llm_pairwise import LLMPairwise
from online_dpo.errors import BudgetError, ConfigError, JudgeError
from online_dpo.paid.ledger import digest_of
from online_dpo.records import Message, Prompt, Response

CASES = Path(__file__).parent / "judge_cases.py"
A = Say('{"verdict": "A"}')
B = Say('{"verdict": "B"}')


def good_wins(request: Request, number: int) -> Answer:
    """Prefers what says good, in whichever place it stands."""
    text = request["messages"][-1]["content"]
    return A if text.index("good") < text.index("poor") else B


# --- asking


def test_both_orders_are_asked_and_bought_once(make: MakeLabeller, tmp_path: Path) -> None:
    pairs = [pair(i) if i % 2 else pair(i, "poor", "good") for i in range(10)]
    with JudgeServer(good_wins) as server:
        found = make(server).compare_pairs(pairs, purpose="label")
        assert [c.p for c in found] == [0.0, 1.0] * 5
        assert {c.orders for c in found} == {2}
        assert len(server.requests) == 20
        events: list[Any] = []
        again = make(server, events=events)
        assert again.compare_pairs(pairs, purpose="evaluation") == found
        assert len(server.requests) == 20
    assert events[-2] == {
        "event": "judge_calls", "judge": "llm_pairwise", "from_ledger": 20, "cost_usd": 0.0,
    }  # fmt: skip
    charged = rows(tmp_path, "state, tokens_in, tokens_out, cost, answered_by, attempt")
    assert charged == [("settled", TOKENS_IN, TOKENS_OUT, COST * 1e12, "m-002", 1)] * 20
    assert digest_of(tmp_path / "judgments.sqlite")[0] == 20


def test_the_request_holds_schema_fences_and_metadata(make: MakeLabeller) -> None:
    asked = pair(0, "one", "{{ 1 + 1 }} {% raw %}", rubric="Be brief.", answer="42")
    with serve(A) as server:
        make(server, orders="one", also={"max_tokens": 9}).compare_pairs([asked], purpose="x")
        (request,) = server.requests
    assert request["response_format"]["json_schema"]["schema"]["properties"]["verdict"] == {
        "type": "string",
        "enum": ["A", "B", "tie"],
    }
    assert (request["max_tokens"], request["temperature"]) == (9, 0.0)
    system, user = request["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    for part in ("Say hello.", "one 0", "{{ 1 + 1 }} {% raw %} 0", "Be brief.", "42"):
        assert part in user["content"]
    fence = user["content"].split("<<<request ")[1].split(">>>")[0]
    assert len(fence) == 16 and fence in system["content"]


def test_a_server_without_schemas_is_asked_in_words(make: MakeLabeller) -> None:
    def words_only(request: Request, number: int) -> Answer:
        return NO_SCHEMA if "response_format" in request else Say("Both are fine.\n\nVerdict: A")

    with JudgeServer(words_only) as server:
        labeller = make(server, concurrency=1)
        found = labeller.compare_pairs([pair(0), pair(1)], purpose="label")
        assert [c.p for c in found] == [0.5, 0.5]
        assert len(server.requests) == 1 + 4, "refused once, then remembered"
        assert "Verdict: tie" in server.requests[-1]["messages"][-1]["content"]


def test_votes_are_calls_of_their_own(make: MakeLabeller) -> None:
    with serve(A, Say('{"verdict": "tie"}')) as server:
        labeller = make(server, orders="one", votes=4, also={"temperature": 0.7})
        (found,) = labeller.compare_pairs([pair()], purpose="label")
        assert len(server.requests) == 4
    assert found.p in (pytest.approx(0.625), pytest.approx(0.375))


# --- reading replies


def test_what_is_no_verdict_has_its_reason_and_raw_reply(make: MakeLabeller) -> None:
    cases: Sequence[tuple[Answer, str, str]] = [
        (Say("I like both"), "no verdict in the reply", "I like both"),
        (Say("so [[A]]", "length"), "reply cut off at max_tokens", "so [[A]]"),
        (Say(None), "empty reply (stop)", ""),
        (Say("", "content_filter"), "empty reply (content_filter)", ""),
        (Say(None, refusal="I cannot"), "the model refused to answer", "I cannot"),
    ]
    for number, (answer, reason, raw) in enumerate(cases):
        with serve(answer) as server:
            labeller = make(server)
            (found,) = labeller.compare_pairs([pair(number)], purpose="label")
            assert (found.p, found.reason, found.raws) == (None, reason, (raw, raw))


def test_a_pair_that_is_too_long_for_the_judge_is_invalid(make: MakeLabeller) -> None:
    with serve(TOO_LONG) as server:
        (found,) = make(server).compare_pairs([pair()], purpose="label")
        assert (found.p, found.reason) == (None, "too long for the judge")
        assert len(server.requests) == 2


# --- faults


@pytest.mark.parametrize(
    ("fault", "state"),
    [
        (RATE_LIMIT, "failed"),
        (SERVER_ERROR, "failed"),
        (BAD_GATEWAY, "unknown"),
        (HTML, "unknown"),
        (NO_JSON, "unknown"),
        (NO_CHOICES, "unknown"),
        (Reset(), "unknown"),
        (Hang(), "unknown"),
        (Hang(drip=True), "unknown"),
    ],
)
def test_a_passing_fault_is_tried_again(
    make: MakeLabeller, tmp_path: Path, fault: Answer, state: str
) -> None:
    events: list[Any] = []
    with serve(fault, A) as server:
        labeller = make(server, events=events, orders="one", timeout_s=0.5, retries=1)
        (found,) = labeller.compare_pairs([pair()], purpose="label")
        assert found.p in (0.0, 1.0)
        assert len(server.requests) == 2
    assert rows(tmp_path, "state, attempt") == [(state, 1), ("settled", 2)]
    told = ["judge_price", "judge_retry", "judge_calls", "judged"]
    assert [e["event"] for e in events] == told
    assert (events[2]["requests"], events[2]["faults"]) == (2, 1)


@pytest.mark.parametrize(
    ("fault", "num_requests", "message"),
    [
        (NO_QUOTA, 1, "HTTP 429: no money left"),
        (BAD_KEY, 1, r"HTTP 401: bad key \(the environment variable NO_SUCH_KEY is not set\)"),
        (NO_MODEL, 1, "HTTP 404: no such model"),
        (SERVER_ERROR, 3, "attempt 3: HTTP 500: oops"),
        (RATE_LIMIT, 3, "attempt 3: HTTP 429: slow down"),
    ],
)
def test_a_lasting_fault_ends_the_labelling(
    make: MakeLabeller, fault: Answer, num_requests: int, message: str
) -> None:
    with serve(fault) as server:
        also = {"api_key_env": "NO_SUCH_KEY"}
        labeller = make(server, concurrency=1, retries=2, also=also)
        with pytest.raises(JudgeError, match=f"'llm_pairwise'.*'p0'.*'m'.*{message}") as caught:
            labeller.compare_pairs([pair(0), pair(1)], purpose="label")
        assert caught.value.exit_code == 5
        assert len(server.requests) == num_requests


def test_nobody_listening_costs_nothing(make: MakeLabeller, tmp_path: Path) -> None:
    server = serve(A)
    server._server.server_close()
    with pytest.raises(JudgeError, match="connection failed: ConnectError"):
        make(server, retries=0).compare_pairs([pair()], purpose="label")
    assert {state for (state,) in rows(tmp_path, "state")} == {"failed"}


def test_calls_in_flight_settle_when_another_fails(make: MakeLabeller, tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def answer(request: Request, number: int) -> Answer:
        together.wait(timeout=20)
        return NO_QUOTA if number == 0 else A

    with JudgeServer(answer) as server:
        labeller = make(server, orders="one", concurrency=4)
        with pytest.raises(JudgeError, match="no money left"):
            labeller.compare_pairs([pair(i) for i in range(12)], purpose="label")
        assert len(server.requests) == 4
    assert sorted(state for (state,) in rows(tmp_path, "state")) == ["failed"] + ["settled"] * 3


@pytest.mark.parametrize("ending", ["cancel", "close"])
def test_cancelled_calls_are_charged_as_unknown(
    make: MakeLabeller, tmp_path: Path, ending: str
) -> None:
    with serve(Hang()) as server:
        labeller = make(server, orders="one")
        failures = []

        def run() -> None:
            try:
                labeller.compare_pairs([pair(i) for i in range(3)], purpose="label")
            except Exception as error:
                failures.append(type(error).__name__)

        thread = threading.Thread(target=run)
        thread.start()
        while len(server.requests) < 3:
            thread.join(0.01)
        getattr(labeller, ending)()
        thread.join(20)
        labeller.close()
    assert failures == ["CancelledError"]
    assert [state for (state,) in rows(tmp_path, "state")] == ["unknown"] * 3


# --- money


def test_the_budget_stops_before_it_is_exceeded_and_can_be_raised(
    make: MakeLabeller, tmp_path: Path
) -> None:
    pairs = [pair(i) for i in range(30)]
    with JudgeServer(good_wins) as server:
        budget = 0.007
        with pytest.raises(
            BudgetError, match=r"budget of \$0.007 has no room.*judge.budget.max_usd"
        ):
            make(server, budget={"max_usd": budget}).compare_pairs(pairs, purpose="label")
        bought = server.num_billed
        assert 0 < bought < 60
        assert bought * COST <= budget
        found = make(server, budget={"max_usd": 1.0}).compare_pairs(pairs, purpose="label")
        assert [c.p for c in found] == [1.0] * 30
        assert server.num_billed == 60
        assert sum(cost for (cost,) in rows(tmp_path, "cost")) == round(60 * COST * 1e12)


def test_the_budget_waits_for_what_is_in_flight(make: MakeLabeller) -> None:
    """A reservation is some twenty times a cost here: two fit at a time, all of them in turn."""
    with JudgeServer(good_wins) as server:
        found = make(server, budget={"max_usd": 0.008}).compare_pairs(
            [pair(i) for i in range(10)], purpose="label"
        )
        assert len(found) == 10 and server.num_billed == 20


def test_max_calls_counts_calls_over_all_labelling(make: MakeLabeller) -> None:
    with JudgeServer(good_wins) as server:
        labeller = make(server, budget={"max_calls": 5})
        labeller.compare_pairs([pair(0), pair(1)], purpose="label")
        with pytest.raises(BudgetError, match="limit of 5 judge calls"):
            labeller.compare_pairs([pair(2), pair(3)], purpose="evaluation")
        assert len(server.requests) == 5


def test_an_unknown_price_is_not_free(make: MakeLabeller, tmp_path: Path) -> None:
    options = {"model": "m"}
    with serve(A) as server:
        options["base_url"] = server.url
        with pytest.raises(ConfigError, match=r"without a price.*price_per_million"):
            make(server, options=options, budget={"max_usd": 1.0})
        assert server.requests == []
        make(server, options=options).compare_pairs([pair()], purpose="label")
    assert rows(tmp_path, "reserved, cost, tokens_in") == [(None, None, TOKENS_IN)] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "m", "price_per_million": 3}, "price_per_million is"),
        ({"model": "m", "template": "none.jinja"}, "does not exist"),
        ({"model": "m", "modle": 1}, "do not fit"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, TypeError), match="(?s)unexpected keyword|" + message):
        LLMPairwise(**options)


def test_a_missing_key_is_named(make: MakeLabeller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serve(A) as unused:
        with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
            make(unused, options={"model": "m"})
        make(unused)  # a server of one's own may need none


def test_a_template_of_ones_own_is_sandboxed(make: MakeLabeller, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% block user %}{{ first }} or {{ second }}?{% endblock %}")
    with serve(A) as server:
        also = {"template": str(template)}
        make(server, orders="one", also=also).compare_pairs([pair()], purpose="label")
        (message,) = server.requests[0]["messages"]
        assert message["role"] == "user"
        assert set(message["content"].split()) == {"good", "0", "or", "poor", "0?"}
        template.write_text("{% block user %}{{ first.__class__.__mro__ }}{% endblock %}")
        with pytest.raises(ConfigError, match="cannot be rendered.*__class__"):
            make(server, also=also).compare_pairs([pair()], purpose="label")
        template.write_text("{{ first }}")
        with pytest.raises(ConfigError, match="no block `user`"):
            make(server, also=also)


# --- a user's own judge over the paid door


def test_a_users_async_judge_pays_through_the_same_door(make: MakeLabeller, tmp_path: Path) -> None:
    answers = [Response(f"r{i}", "p", f"text {i}", (i,), "eos") for i in range(3)]
    prompt = Prompt("p", "test", messages=(Message("user", "hi"), Message("assistant", "yes?")))

    def grade(request: Request, number: int) -> Answer:
        return Say(request["messages"][0]["content"][-1])

    with JudgeServer(grade) as server:
        custom = {"name": f"{CASES}:Paying", "options": {"base_url": server.url}}
        labeller = make(server, **custom)
        assert [s.value for s in labeller.score([(prompt, answers)], purpose="x")[0]] == [0, 1, 2]
        labeller.label([(prompt, answers)], purpose="x")
        assert len(server.requests) == 3
        with pytest.raises(BudgetError, match="limit of 3 judge calls"):
            # The judge swallows every exception; the door does not forget.
            make(server, **custom, budget={"max_calls": 3}).score(
                [(prompt, answers[:1] * 2)] * 2 + [(Prompt("q", "test", text="other"), answers)],
                purpose="x",
            )
    assert rows(tmp_path, "judge, version, model")[0] == (f"{CASES}:Paying", "1", "grader")


def test_time_in_paid_calls_is_not_the_judges_own(make: MakeLabeller) -> None:
    answers = [Response(f"r{i}", "p", f"text {i}", (i,), "eos") for i in range(3)]
    slow: Iterator[Answer] = itertools.cycle([RATE_LIMIT, RATE_LIMIT, Say("1")])
    with JudgeServer(lambda request, number: next(slow)) as server:
        custom = {
            "name": f"{CASES}:SleepsBesidesPaying",
            "options": {"base_url": server.url},
        }
        labeller = make(server, **custom, timeout_s=1.0)
        started = labeller.score([(Prompt("p", "t", text="x"), answers)], purpose="x")
        assert [score.value for score in started[0]] == [1.0, 1.0, 1.0]


# --- kill -9

CAMPAIGN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from judge_cases import pair
from online_dpo.config import JudgeConfig
from online_dpo.judging import Labeller
labeller = Labeller(
    JudgeConfig(name="llm_pairwise", concurrency=4, options={"model": "m", "base_url": sys.argv[2],
                "price_per_million": [1, 2]}),
    base=None, ledger_path=Path(sys.argv[1]) / "judgments.sqlite", seed=3, round=1,
    on_event=lambda event: None)
found = labeller.compare_pairs([pair(i) for i in range(40)], purpose="label")
print([c.p for c in found])
labeller.close()
"""


def test_kill_9_buys_no_settled_answer_twice(tmp_path: Path) -> None:
    kill_at = {25, 60}
    killed: list[int] = []
    child: list[subprocess.Popen[str]] = []

    def answer(request: Request, number: int) -> Answer:
        if number in kill_at:
            child[-1].send_signal(signal.SIGKILL)
            killed.append(number)
        return good_wins(request, number)

    command = [sys.executable, "-c", CAMPAIGN, str(tmp_path)]
    with JudgeServer(answer) as server:
        for _ in range(3):
            arguments = [*command, server.url, str(Path(__file__).parent)]
            child.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True))
            said, _ = child[-1].communicate(timeout=120)
        assert len(killed) == 2
        assert json.loads(said) == [1.0] * 40
        assert 80 <= len(server.requests) <= 80 + 4 * len(killed)
        billed = server.num_billed * COST
    states = rows(tmp_path, "state, cost, reserved")
    assert sum(state == "settled" for state, _, _ in states) == 80
    assert not any(state == "sent" for state, _, _ in states)
    charged = sum(cost if state == "settled" else reserved for state, cost, reserved in states)
    assert charged >= round(billed * 1e12), "the ledger never says less than the bill"


# --- a real server


def test_a_real_server_gives_verdicts_by_schema_and_by_choice(
    vllm_server: VllmServer, make: MakeLabeller, tmp_path: Path
) -> None:
    template = tmp_path / "short.jinja"
    template.write_text("{% block user %}A: {{ first }} B: {{ second }}{% endblock %}")
    options = {
        "model": vllm_server.model,
        "base_url": vllm_server.base_url,
        "price_per_million": [0, 0],
        "template": str(template),
        "max_tokens": 32,
    }
    choice = {"structured_outputs": {"choice": ["[[A]]", "[[B]]", "[[C]]"]}}
    in_words = {**options, "structured": False, "extra_body": choice}
    pairs = [pair(i) for i in range(4)]
    with serve(A) as unused:
        for chosen, first_sign in ((options, "{"), (in_words, "[")):
            labeller = make(unused, options=chosen, timeout_s=120)
            for comparison in labeller.compare_pairs(pairs, purpose="label"):
                assert comparison.p in (0.0, 0.25, 0.5, 0.75, 1.0)
                assert [raw[0] for raw in comparison.raws] == [first_sign] * 2
        too_long = {**options, "template": "pairwise.jinja"}
        labeller = make(unused, options=too_long, timeout_s=120)
        (cut,) = labeller.compare_pairs([pair(9, "good " * 400)], purpose="label")
        assert (cut.p, cut.reason) == (None, "too long for the judge")
        with pytest.raises(JudgeError, match="HTTP 404"):
            wrong = make(unused, options={**options, "model": "another"})
            wrong.compare_pairs([pair()], purpose="label")
        assert unused.requests == []
    counted = rows(tmp_path, "tokens_in > 0, tokens_out > 0, answered_by")
    assert counted.count((1, 1, vllm_server.model)) == 16
