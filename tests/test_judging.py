"""Labelling: every form of judge, orders, votes, broken judges in real processes, cancelling."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_dpo.asking.verdicts import DISAGREE, combine_verdicts, compare_questions
from online_dpo.config import JudgeConfig
from online_dpo.errors import ConfigError, JudgeError
from online_dpo.judging import Labeller, Labels
from online_dpo.pairing import Judged, all_pairs, make_pairs
from online_dpo.records import Prompt, Response, Score, Verdict

CASES = Path(__file__).parent / "judge_cases.py"
PROMPT = Prompt("p1", "test", text="Say something.", metadata={"weight": 2.0})

MakeLabeller = Callable[..., Labeller]


def response(text: str, number: int = 0, finish_reason: Any = "eos") -> Response:
    return Response(f"r{number}-{text}", "p1", text, (1, 2, 0), finish_reason)


@pytest.fixture
def make(open_labeller: MakeLabeller) -> MakeLabeller:
    """Makes labellers for judges in judge_cases.py, or for a name given whole."""

    def make_labeller(name: str, **config: Any) -> Labeller:
        if "/" not in name and name not in ("scripted", "llm_pairwise"):
            name = f"{CASES}:{name}"
        return open_labeller(seed=7, name=name, **config)

    return make_labeller


def scores(labels: list[Labels]) -> list[list[float | None]]:
    assert all(label.scores is not None for label in labels)
    return [[score.value for score in label.scores or ()] for label in labels]


def ps(labels: list[Labels]) -> list[list[float | None]]:
    assert all(label.comparisons is not None for label in labels)
    return [[comparison.p for comparison in label.comparisons or ()] for label in labels]


# --- forms of judge


def test_plain_function_scores_in_a_process_of_its_own(make: MakeLabeller) -> None:
    labeller = make("length")
    assert labeller.kind == "score"
    assert labeller.identity == {"name": f"{CASES}:length", "version": "0"}
    items = [(PROMPT, [response("abc"), response("a")]), (PROMPT, [response("ab")])]
    assert scores(labeller.label(items, purpose="label")) == [[3.0, 1.0], [2.0]]
    pid = make("process_id").label([(PROMPT, [response("a")])], purpose="label")
    assert scores(pid) != [[float(os.getpid())]]


def test_class_gets_its_options_and_the_metadata(make: MakeLabeller) -> None:
    labeller = make("Versioned", options={"bonus": 0.5})
    assert labeller.identity["version"] == "2024-05"
    assert scores(labeller.label([(PROMPT, [response("abc")])], purpose="label")) == [[6.5]]


def test_async_function_is_awaited(make: MakeLabeller) -> None:
    labeller = make("async_length")
    assert scores(labeller.label([(PROMPT, [response("abcd")])], purpose="label")) == [[4.0]]


def test_relative_file_is_found_from_the_base(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def judge(prompt, response):\n    return 1.5\n")
    labeller = Labeller(
        JudgeConfig(name="mine.py:judge"),
        base=tmp_path,
        ledger_path=tmp_path / "judgments.sqlite",
        seed=0,
        round=1,
        on_event=lambda event: None,
    )
    try:
        assert scores(labeller.label([(PROMPT, [response("a")])], purpose="label")) == [[1.5]]
    finally:
        labeller.close()


def test_local_judges_leave_no_ledger(make: MakeLabeller, tmp_path: Path) -> None:
    make("length").label([(PROMPT, [response("a")])], purpose="label")
    assert not (tmp_path / "judgments.sqlite").exists()


def test_label_works_outside_the_main_thread(make: MakeLabeller) -> None:
    found = []
    labellers = [make("AsyncFirst"), make("longer"), make("scripted", options={"scores": {"a": 1}})]

    def run() -> None:
        for labeller in labellers:
            items = [(PROMPT, [response("a"), response("bb")])]
            found.extend(labeller.label(items, purpose="label"))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ps(found[:2]) == [[0.5], [pytest.approx(0.1)]]
    assert scores(found[2:]) == [[1.0, None]]


# --- orders, votes, comparisons


def test_a_verdict_that_depends_on_the_order_is_a_tie(make: MakeLabeller) -> None:
    labels = make("AsyncFirst").label([(PROMPT, [response("a"), response("b")])], purpose="label")
    (comparison,) = labels[0].comparisons or ()
    assert (comparison.p, comparison.orders) == (0.5, 2)
    assert comparison.raws == ("r0-a beats r0-b", "r0-b beats r0-a")


def test_one_order_is_drawn_by_seed(make: MakeLabeller) -> None:
    labeller = make("AsyncFirst", orders="one")
    pairs = [(PROMPT, response("a", i), response("b", i)) for i in range(60)]
    found = labeller.compare_pairs(pairs, purpose="label")
    assert {(c.p, c.orders) for c in found} == {(1.0, 1), (0.0, 1)}
    assert 15 < sum(c.p == 1.0 for c in found) < 45
    assert labeller.compare_pairs(pairs, purpose="evaluation") == found


def test_one_invalid_order_makes_the_pair_invalid(make: MakeLabeller) -> None:
    events: list[Any] = []
    labeller = make("longer", events=events)
    (valid, invalid) = labeller.compare_pairs(
        [(PROMPT, response("aaa"), response("b")), (PROMPT, response("a"), response("b?"))],
        purpose="label",
    )
    assert valid.p == pytest.approx(0.9)
    assert (invalid.p, invalid.reason) == (None, "the judge gave no verdict")
    last = events[-1]
    assert (last["event"], last["done"], last["total"]) == ("judged", 4, 4)
    assert last["invalid"] == {"the judge gave no verdict": 1}


def test_votes_are_averaged_and_identical_responses_are_not_asked_about() -> None:
    a, b = response("a"), response("b")
    asked = compare_questions(PROMPT, a, b, orders="both", votes=2, seed=0, round=1)
    shown = [(q.responses[0].text, q.vote) for q in asked]
    assert shown == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    said = [Verdict(1.0), Verdict(0.5), Verdict(0.25), Verdict(None, "unreadable")]
    combined = combine_verdicts(PROMPT, a, b, list(zip(asked, said, strict=True)))
    assert combined.p == pytest.approx((0.75 + 0.75) / 2)
    same = compare_questions(PROMPT, a, response("a", 1), orders="both", votes=2, seed=0, round=1)
    assert same == []
    tie = combine_verdicts(PROMPT, a, response("a", 1), [])
    assert (tie.p, tie.reason, tie.orders) == (0.5, "identical responses", 0)
    cut = response("a", 1, "length")
    assert compare_questions(PROMPT, a, cut, orders="one", votes=1, seed=0, round=1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.sampled_from(["soft", "agree"]))
def test_a_judge_of_positions_alone_labels_nothing(said: list[float], swap: Any) -> None:
    """Whatever p it gives to the one that is shown first, and however often it is asked."""
    a, b = response("a"), response("b")
    asked = compare_questions(PROMPT, a, b, orders="both", votes=len(said), seed=0, round=1)
    answers = [(question, Verdict(said[question.vote])) for question in asked]
    assert combine_verdicts(PROMPT, a, b, answers, swap=swap).p == 0.5


def test_only_orders_that_agree_give_a_verdict() -> None:
    a, b = response("a"), response("b")
    asked = compare_questions(PROMPT, a, b, orders="both", votes=1, seed=0, round=1)

    def agreed(first: float | None, swapped: float | None) -> tuple[float | None, str | None]:
        said = [Verdict(p, "unreadable" if p is None else None) for p in (first, swapped)]
        found = combine_verdicts(PROMPT, a, b, list(zip(asked, said, strict=True)), swap="agree")
        return found.p, found.reason

    assert agreed(0.9, 0.3) == (pytest.approx(0.8), None)
    assert agreed(0.2, 0.6) == (pytest.approx(0.3), None)
    assert agreed(0.9, 0.6) == (0.5, DISAGREE)
    assert agreed(1.0, 0.5) == (0.5, DISAGREE)
    assert agreed(0.5, 0.5) == (0.5, None)
    assert agreed(0.9, None) == (None, "unreadable")


@pytest.mark.parametrize("swap", ["soft", "agree"])
def test_always_first_gives_ties_only(make: MakeLabeller, swap: str) -> None:
    labeller = make("AsyncFirst", swap=swap)
    pairs = [(PROMPT, response("a", i), response("b", i)) for i in range(20)]
    found = labeller.compare_pairs(pairs, purpose="label")
    assert {c.p for c in found} == {0.5}
    assert {c.order_ps for c in found} == {(1.0, 0.0)}
    answers = [
        replace(answer, token_ids=tuple(answer.id.encode()))
        for _, *both in pairs
        for answer in both
    ]
    item = Judged(PROMPT, answers, comparisons=found)
    made = make_pairs(
        [item], all_pairs, round_number=1, seed=0, scale=1.0, min_margin=0.0, max_per_prompt=None
    )
    assert made.preferences == () and made.fates == {"tied": 40}


def test_votes_at_temperature_0_are_refused(make: MakeLabeller) -> None:
    options = {"model": "m", "base_url": "http://localhost:1/v1"}
    with pytest.raises(ConfigError, match="votes: 3 would buy the same answer"):
        make("llm_pairwise", votes=3, options=options)
    assert make("llm_pairwise", votes=3, options={**options, "temperature": 0.7}).mode == "async"


@given(
    st.lists(st.none() | st.floats(0, 1), min_size=2, max_size=2),
    st.sampled_from(["both", "one"]),
    st.integers(0, 50),
)
def test_swapping_a_pair_turns_p_round(said: list[float | None], orders: Any, seed: int) -> None:
    a, b = response("a"), response("b")

    def ask(first: Response, second: Response) -> float | None:
        questions = compare_questions(
            PROMPT, first, second, orders=orders, votes=1, seed=seed, round=1
        )
        answers = []
        for question in questions:
            p = said[0] if question.responses[0] is a else said[1]
            answers.append((question, Verdict(p, "none" if p is None else None)))
        return combine_verdicts(PROMPT, first, second, answers).p

    forward, backward = ask(a, b), ask(b, a)
    if orders == "both":
        assert (forward is None) == (backward is None) == (None in said)
        if forward is not None and backward is not None:
            assert forward == pytest.approx(1.0 - backward)


def test_scores_of_votes_are_averaged(make: MakeLabeller) -> None:
    labeller = make("scripted", options={"scores": {"a": 2.0, "b": None}}, votes=3)
    (label,) = labeller.label([(PROMPT, [response("a"), response("b")])], purpose="label")
    assert label.scores == (Score(2.0), Score(None, "not in the script"))


# --- refusals


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("length", {"orders": "one"}, "judge.orders: one is for judges that compare"),
        ("length", {"comparisons": 2}, "judge.comparisons: 2 is for judges that compare"),
        ("length", {"options": {"x": 1}}, "takes no judge.options"),
        ("Versioned", {"options": {"bonis": 1}}, "judge.options do not fit"),
        ("nobody", {}, "has no 'nobody'"),
        ("CannotBeMade", {}, "OSError: the weights are gone"),
        ("Unrelated", {}, "is no judge"),
        ("Both", {}, "has both `score` and `compare`"),
        ("/nowhere/judge.py:j", {}, "does not exist"),
        ("scripted", {"options": {}}, "exactly one of scores and verdicts"),
    ],
)
def test_what_cannot_be_used_is_refused(
    make: MakeLabeller, name: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match="(?s)" + message.replace("(", r"\(")):
        make(name, **config)


# --- broken judges


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "prompt 'p1': KeyError: 'no entry for a'"),
        ("not_a_number", "prompt 'p1': InvalidJudgement: a finite number was expected, not nan"),
        ("not_a_score", "a number was expected, not str 'good'"),
        ("WrongCount", "1 scores for 2 responses"),
        ("exits", "called sys.exit\\(3\\) on prompt 'p1'"),
        ("dies", "died on prompt 'p1'.*SIGKILL"),
        ("out_of_range", r"p must lie in \[0, 1\], not 7.0"),
        ("AsyncRaises", "prompt 'p1': ZeroDivisionError: by nothing"),
    ],
)
def test_a_broken_judge_is_named_with_the_prompt(
    make: MakeLabeller, tmp_path: Path, name: str, message: str
) -> None:
    labeller = make(name)
    with pytest.raises(JudgeError, match=f"(?s)judge_cases.py:{name}'.*{message}"):
        labeller.label([(PROMPT, [response("a"), response("b")])], purpose="label")
    if name in ("raises", "AsyncRaises"):
        log = (tmp_path / "logs" / "judge.log").read_text()
        assert "Traceback" in log and "in raises" in log or "in compare" in log


def test_a_judge_that_hangs_is_killed(make: MakeLabeller) -> None:
    labeller = make("hangs", timeout_s=0.3)
    with pytest.raises(JudgeError, match="did not answer within 0.6 s on prompt 'p1'"):
        labeller.label([(PROMPT, [response("a"), response("hang")])], purpose="label")
    again = labeller.label([(PROMPT, [response("a")])], purpose="label")
    assert scores(again) == [[1.0]], "a fresh process serves what comes next"


def test_an_async_judge_that_hangs_is_ended(make: MakeLabeller) -> None:
    labeller = make("AsyncHangs", timeout_s=0.2)
    with pytest.raises(JudgeError, match="did not answer within 0.2 s on prompt 'p1'"):
        labeller.label([(PROMPT, [response("a"), response("b")])], purpose="label")


def test_an_async_judge_that_blocks_the_loop_is_given_up(
    make: MakeLabeller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("online_dpo.asking.judge_loop.BLOCKED_GRACE_S", 0.5)
    labeller = make("AsyncBlocks", timeout_s=0.2)
    with pytest.raises(JudgeError, match="has blocked the event loop"):
        labeller.label([(PROMPT, [response("a"), response("b")])], purpose="label")


@pytest.mark.parametrize("name", ["hangs", "AsyncHangs"])
def test_cancel_ends_a_blocked_label_soon(make: MakeLabeller, name: str) -> None:
    labeller = make(name, timeout_s=600)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            labeller.label([(PROMPT, [response("hang"), response("b")])], purpose="label")
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.5)
    labeller.cancel()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert isinstance(failures[0], CancelledError)
    with pytest.raises(CancelledError):
        labeller.label([(PROMPT, [response("a")])], purpose="label")


class Interrupted(BaseException):
    """What a signal handler raises."""


def test_a_signal_while_closing_loses_no_thread(make: MakeLabeller) -> None:
    labeller = make("AsyncBlocks", timeout_s=60, orders="one")

    def ask() -> None:
        with contextlib.suppress(CancelledError):
            labeller.label([(PROMPT, [response("a"), response("b")])], purpose="label")

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    asking = threading.Thread(target=ask)
    asking.start()
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        time.sleep(0.2)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Interrupted):
            labeller.close()
        labeller.close()
    finally:
        signal.signal(signal.SIGALRM, old)
    asking.join(timeout=5)
    for thread in threading.enumerate():
        if thread.name in ("judge", "ledger"):
            thread.join(timeout=5)
            assert not thread.is_alive()


ORPHAN = """
import sys
from pathlib import Path
from online_dpo.config import JudgeConfig
from online_dpo.judging import Labeller
from online_dpo.records import Prompt, Response

def ask(name, text):
    labeller = Labeller(JudgeConfig(name=f"{sys.argv[1]}:{name}"), base=None, seed=0, round=1,
        ledger_path=Path(sys.argv[2]) / "judgments.sqlite", on_event=lambda event: None)
    print("asking", flush=True)
    items = [(Prompt("p", "s", text="x"), [Response("r", "p", text, (1,), "eos")])]
    return labeller, int(labeller.score(items, purpose="x")[0][0].value)

idle, pid = ask("process_id", "a")
print(pid, flush=True)
ask("hangs", "hang")
"""


def test_the_judge_process_dies_with_its_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(CASES), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    said = [parent.stdout.readline() for _ in range(3)]
    idle = int(said[1])
    time.sleep(0.3)
    busy = [pid for pid in _children(parent.pid) if pid != idle]
    assert len(busy) == 1 and _alive(idle)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(200):
        if not _alive(idle) and not _alive(busy[0]):
            return
        time.sleep(0.05)
    raise AssertionError("a judge process outlived its parent")


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_importing_judging_loads_nothing_heavy() -> None:
    heavy = "torch", "transformers", "vllm", "openai", "jinja2", "judges"
    code = f"import sys, online_dpo.judging; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert found.strip() == "[]"
