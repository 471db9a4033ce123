"""Mathematical answers: worked solutions, their reformattings, wrong neighbours, limits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from judges.verifiers import FinalAnswer, gold_answer
from judges.verifiers_math import MathAnswer
from online_dpo.records import FinishReason, Prompt, Response, Score

WORKED = Path(__file__).parent / "worked_answers.jsonl"


@pytest.fixture(scope="module")
def math_answer() -> Iterator[MathAnswer]:
    """One judge, and one process that compares, for all tests."""
    judge = MathAnswer(timeout_s=10)
    yield judge
    judge.close()


def judged(
    judge: MathAnswer | FinalAnswer, text: str, gold: Any, finish_reason: FinishReason = "eos"
) -> Score:
    prompt = Prompt("p", "test", text="What is it?", metadata={"answer": gold})
    (score,) = judge.score(prompt, [Response("r", "p", text, (1,), finish_reason)])
    return score


EQUAL = [
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
    (r"The answer is $\frac{\sqrt{3}}{2}$, as shown.", r"\frac{\sqrt3}{2}"),
    (r"Hence the area is $\dfrac{\sqrt{3}}{2}\text{ cm}^2$.", r"\frac{\sqrt{3}}{2}"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1"),
    (r"\boxed{\{2, 1\}}", r"\{1, 2\}"),
    ("The answer is 1, 2 and 3.", "1, 2, 3"),
    ("The answer is (1, 2).", "(1,2)"),
    (r"#### [0, 1)", "[0,1)"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{5}", "x=5"),
    (r"\boxed{y = 2x + 1}", "y=1+2x"),
    (r"\boxed{x}", "y = x"),
    (r"\boxed{\begin{bmatrix}1&2\\3&4\end{bmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\boxed{\sqrt{9}}", "3"),
    (r"The answer is \sqrt{9}", "3"),
    (r"\boxed{2^{10}}", "1024"),
    (r"\boxed{2+3i}", "3i+2"),
    (r"so \[x = \frac{\pi}{2}\]", r"\frac{\pi}{2}"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\boxed{\text{(B)}}", "B"),
    ("The answer is (B).", r"\text{(B)}"),
    ("The answer is Paris.", "paris"),
    (r"\boxed{\text{June 6}}", "June 6"),
    ("The final answer is 72 clips, since 48 + 25 = 73.", "72"),
    ("The answer is 7.", "#### 7"),
    ("First 3, then $4$, which makes 7", "7"),
    ("It costs $1,234.50 in total.", "1234.5"),
    ("1 1/2 cups", "1.5"),
    (r"\boxed{50\%}", "0.5"),
    (r"\boxed{\frac{14}{4}}", "7/2"),
]

DIFFERENT = [
    (r"\boxed{\sqrt{2}}", "2"),
    (r"\boxed{2\sqrt{3}}", r"\sqrt{8}"),
    (r"\boxed{(x-1)^2}", "x^2+2x+1"),
    (r"\boxed{(2,1)}", "(1,2)"),
    (r"\boxed{[0,1]}", "[0,1)"),
    ("The answer is 1, 2 and 4.", "1, 2, 3"),
    (r"\boxed{\pm 2}", "2"),
    (r"\boxed{x > 2}", "x < 2"),
    (r"\boxed{12_8}", "12_6"),
    ("The answer is seat.", "east"),
    (r"\boxed{\text{seat}}", "east"),
    ("The answer is C.", "B"),
    ("#### 5 miles", "5 km"),
    (r"\boxed{0.333333}", "1/3"),
    (r"\boxed{1.414}", r"\sqrt{2}"),
    ("72 clips at first, 24 in the end", "72"),
    ("I do not know", r"\sqrt{2}"),
    ("", r"\sqrt{2}"),
    ("9" * 10_000, r"\sqrt{2}"),
]


@pytest.mark.parametrize(("text", "gold"), EQUAL)
def test_the_same_answer_in_another_form(math_answer: MathAnswer, text: str, gold: Any) -> None:
    assert judged(math_answer, text, gold) == Score(1.0)


@pytest.mark.parametrize(("text", "gold"), DIFFERENT)
def test_another_answer(math_answer: MathAnswer, text: str, gold: Any) -> None:
    assert judged(math_answer, text, gold) == Score(0.0)


def test_what_cannot_be_compared_is_no_verdict(math_answer: MathAnswer) -> None:
    assert judged(math_answer, "72", "  ").value is None
    score = judged(math_answer, r"\boxed{x+1}", r"A \cup B")
    assert score.value is None and "could not be compared" in str(score.reason)


def test_a_comparison_that_does_not_end_is_ended_and_the_next_one_is_made() -> None:
    judge = MathAnswer(timeout_s=1)
    endless = r"\boxed{\prod_{k=1}^{10^{7}} (k^{k} + x)}"
    assert judged(judge, r"\boxed{\sqrt{8}}", r"2\sqrt{2}") == Score(1.0)
    score = judged(judge, endless, r"\sqrt{2}")
    assert score.value is None and "took longer than 1 s" in str(score.reason), score
    assert judged(judge, r"\boxed{\sqrt{8}}", r"2\sqrt{2}") == Score(1.0)
    judge.close()


def worked() -> list[dict[str, str]]:
    return [json.loads(line) for line in WORKED.read_text(encoding="utf-8").splitlines()]


def reformatted(answer: str) -> list[str]:
    """The ways in which a model would give a whole or decimal answer."""
    plain = answer.replace(",", "")
    number = Fraction(plain)
    forms = {answer, plain, f"{float(number):,}", f"{plain}.00" if "." not in plain else plain}
    return [
        form.format(written)
        for written in sorted(forms)
        for form in (
            "#### {}",
            "Thus \\boxed{{{}}}.",
            "The answer is {}.",
            "**Final answer:** {}",
            "So she has ${} left.",
            "$x = {}$",
            "= {}",
            "\\boxed{{{}\\text{{ units}}}}",
        )
    ] + [rf"\boxed{{\frac{{{number.numerator}}}{{{number.denominator}}}}}"]


def neighbours(answer: str) -> list[str]:
    """Wrong answers that look like the right one."""
    number = Fraction(answer.replace(",", ""))
    wrong = [number + 1, number - 1, number * 10, number / 10, -number]
    return [str(float(n)) if n.denominator != 1 else str(n) for n in wrong if n != number]


def false_verdicts(judge: MathAnswer | FinalAnswer, rows: list[dict[str, str]]) -> list[str]:
    """What a judge says wrongly of worked answers, their reformattings and wrong neighbours."""
    wrong = []
    for row in rows:
        solution, answer = row["answer"], gold_answer(row["answer"])
        body = solution.rpartition("####")[0]
        right = [solution, *(body + form for form in reformatted(answer))]
        for text in right:
            wrong += [f"{answer!r} not seen: {text!r}"] * (judged(judge, text, solution).value != 1)
        for near in neighbours(answer):
            for form in ("#### {}", "\\boxed{{{}}}", "The answer is {}."):
                text = body + form.format(near)
                wrong += [f"{answer!r} seen in {text!r}"] * (judged(judge, text, answer).value != 0)
    return wrong


def test_no_false_verdict_on_worked_answers(math_answer: MathAnswer) -> None:
    rows = worked()
    assert len(rows) >= 20
    for judge in (FinalAnswer(), math_answer):
        assert false_verdicts(judge, rows) == []
