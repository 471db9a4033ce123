"""Final answers: what counts as the same answer, and what does not."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.verifiers import FinalAnswer, final_number, gold_answer, is_answer
from online_dpo.records import FinishReason, Prompt, Response, Score


def judge(
    text: str, gold: Any, *, finish_reason: FinishReason = "eos", field: str = "answer"
) -> Score:
    prompt = Prompt("p", "test", text="How many?", metadata={"answer": gold, "solution": gold})
    (score,) = FinalAnswer(field).score(prompt, [Response("r", "p", text, (1,), finish_reason)])
    return score


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("48 + 24 = 72\n#### 72", "72"),
        (r"so we get \boxed{72}.", "72"),
        ("The answer is 72.", 72),
        ("the answer is\n\n72", "72"),
        ("**Answer:** 72", "72"),
        ("The final answer is 72 clips, since 48 + 25 = 73.", "72"),
        ("Answer: 10 + 5 = 15 apples", "15"),
        ("First 3, then 4, which makes 7", "7"),
        ("#### Step 1\nTake 3.\n#### Step 2\nIt is 7.", "7"),
        (r"The final answer is \(\boxed{8}\).", "8"),
        (r"$\boxed{x = 5}$", "5"),
        (r"\boxed{5\text{ cm}}", "5"),
        ("It costs $1,234.50 in total.", "1234.5"),
        ("1{,}000", "1,000"),
        ("#### 1,234,567", 1234567),
        ("72.00", 72),
        ("It is -5", "-5"),
        ("It is \u22125.", "-5"),
        ("-$5", "-5"),
        ("7 - 2", "2"),
        ("between 3-4", "4"),
        (r"\boxed{\frac{14}{4}}", "7/2"),
        (r"\boxed{1\frac{1}{2}}", "1.5"),
        ("1 1/2 cups", "1.5"),
        ("0.125", "1/8"),
        ("The answer is 50%.", "50"),
        ("The answer is 50%.", "0.5"),
        ("0.2", "20%"),
        ("answer is 1e5", "100000"),
        ("5 km", "5 km"),
        ("The answer is Paris.", "paris"),
        ("I think it is this:\nParis", "Paris"),
        (r"\boxed{\text{(B)}}", "(B)"),
        (r"\boxed{x^{2} + 1}", "x^{2}+1"),
        ("It is 42.", "6 * 7 = 42\n#### 42"),
    ],
)
def test_the_same_answer_however_it_is_written(text: str, gold: Any) -> None:
    assert judge(text, gold) == Score(1.0)


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("#### 73", "72"),
        ("72 clips at first, 24 in the end", "72"),
        (r"72, no: \boxed{24}", "72"),
        ("#### 72\nNo, wait.\n#### 24", "72"),
        (r"\boxed{\sqrt{2}}", "2"),
        ("2x", "2"),
        ("x2", "2"),
        ("7 - 2", "-2"),
        ("5", "-5"),
        ("1.234", "1,234"),
        ("12,34", "1234"),
        ("1/0", "0"),
        ("", "72"),
        ("I do not know", "72"),
        ("9" * 10_000, "9"),
        ("1e999999999", "1"),
        ("#### 5 miles", "5 km"),
        ("London", "Paris"),
        ("It is not Paris", "Paris"),
        ("(1, 3)", "(1, 2)"),
        ("50%", "5"),
    ],
)
def test_another_answer(text: str, gold: Any) -> None:
    assert judge(text, gold) == Score(0.0)


def test_a_truncated_response_has_answered_only_what_it_marks() -> None:
    assert judge("First 48, then 72", "72", finish_reason="length") == Score(0.0)
    assert judge("The answer is 72. To check", "72", finish_reason="length") == Score(1.0)


@pytest.mark.parametrize("gold", [None, "", "  "])
def test_without_a_gold_answer_there_is_no_score(gold: Any) -> None:
    assert judge("72", gold) == Score(None, "the prompt has no gold answer in its field 'answer'")


def test_the_field_can_be_named() -> None:
    assert judge("72", "#### 72", field="solution") == Score(1.0)
    assert judge("72", "72", field="missing").value is None


@given(st.integers(-(10**9), 10**9), st.integers(-50, 50).filter(bool))
def test_every_way_of_writing_a_number_and_its_neighbours(number: int, off: int) -> None:
    text = "He had 12 of 30, and then 4 more.\n"
    for written in (str(number), f"{number:,}", f"{number}.0", f"${number}", f"{number} apples"):
        for form in ("#### {}", "\\boxed{{{}}}", "The answer is {}.", "So it is {}."):
            assert is_answer(text + form.format(written), str(number)), form.format(written)
            assert not is_answer(text + form.format(written), str(number + off))


@given(st.fractions(max_denominator=1000))
def test_fractions_are_exact(fraction: Fraction) -> None:
    number = final_number(f"\\boxed{{\\frac{{{fraction.numerator}}}{{{fraction.denominator}}}}}")
    assert number is not None and number.value == fraction


def test_a_worked_gold_solution_is_read_for_its_answer() -> None:
    assert gold_answer("12/60 = $<<12/60=0.2>>0.2 per minute.\n#### 10") == "10"
    assert gold_answer(" 3.5 ") == "3.5"
