"""Checks a response against a gold answer in mathematics: numbers exactly, the rest by math-verify.

math-verify (https://github.com/huggingface/Math-Verify) reads LaTeX into sympy and decides whether
two expressions, sets, intervals, matrices or equations are the same. Only its LaTeX reader is used:
its reader of plain expressions evaluates Python.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

from judges.limited import Limited, NoResult
from judges.verifiers import (
    CLAUSE,
    Mark,
    as_number,
    final_number,
    gold_answer,
    marks,
    no_gold,
    normal_text,
)
from online_dpo.errors import ConfigError
from online_dpo.records import Prompt, Response, Score

MAX_LENGTH = 2000
"""Characters of an answer: more is prose, which would be read as a product of letters."""

_INLINE = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_BASE = re.compile(r"\d\s*_\s*\{?\s*(\d+)")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_PUNCTUATION = " $.,;:!?()*'\"-"
_OUTER_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}")


class MathAnswer:
    """A scorer by the final answer, like `final_answer`, of any mathematical form.

    Runs in a judge worker; comparing takes place in one more process, which the system ends after
    `timeout_s`. The response then has no score, with the reason.
    """

    name: ClassVar[str] = "math_answer"
    version: ClassVar[str] = "1"

    def __init__(self, field: str = "answer", timeout_s: float = 5.0) -> None:
        """Raises ConfigError where math-verify is not installed."""
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "The judge 'math_answer' needs the package math-verify: "
                "pip install 'online-dpo[verifiers]'. The judge 'final_answer' needs none; it "
                "compares numbers and words."
            )
        self.field = field
        self._compare = Limited("judges.verifiers_math:same_value", timeout_s=timeout_s)

    def score(self, prompt: Prompt, responses: Sequence[Response]) -> list[Score]:
        """1.0 or 0.0 for each response; None where its answer could not be compared."""
        gold = prompt.metadata.get(self.field)
        if gold is None or not str(gold).strip():
            return [no_gold(self.field) for _ in responses]
        expected = gold_answer(gold)
        return [self._score(response, expected) for response in responses]

    def close(self) -> None:
        """End the process that compares, if it runs."""
        self._compare.close()

    def _score(self, response: Response, expected: str) -> Score:
        try:
            return Score(float(self._is_answer(response, expected)))
        except NoResult as cause:
            return Score(None, f"the answer could not be compared: {cause}")

    def _is_answer(self, response: Response, expected: str) -> bool:
        """Whether the first of the response's readings that can be read is the expected answer."""
        number = as_number(expected)
        listed = number is None and "," in expected
        for answer in final_expressions(response.text, truncated=response.truncated, listed=listed):
            if normal_text(answer) == normal_text(expected):
                return True
            found = as_number(answer.rpartition("=")[2])
            if number is not None and found is not None:
                return found.equals(number)
            if is_words(expected) or is_words(answer) or (number and _PROSE.search(answer)):
                continue
            same = self._same_value(expected, answer)
            if same is not None:
                return same
        found = final_number(response.text, truncated=response.truncated)
        return number is not None and found is not None and found.equals(number)

    def _same_value(self, expected: str, answer: str) -> bool | None:
        if max(len(expected), len(answer)) > MAX_LENGTH:
            return None
        same: bool | None = self._compare(expected, answer)
        return same


def final_expressions(text: str, *, truncated: bool, listed: bool) -> Iterator[str]:
    """What a text may mean as its final answer, the likeliest reading first.

    That is what it marks last; without a mark, a formula that ends it or its last line, unless it
    was cut off. `listed` says that the answer is a list, whose commas end no clause.
    """
    marked = marks(text)
    if marked:
        yield from _readings(marked[-1], listed)
    elif not truncated and text.strip():
        line = text.strip().splitlines()[-1].rstrip(" \t.!*")
        last = list(_INLINE.finditer(line))[-1:]
        if last and last[0].end() == len(line):
            yield _formulas(last[0][0])[0]
        elif not _PROSE.search(line):
            yield line


def is_words(answer: str) -> bool:
    """Whether an answer is words, which a reader of LaTeX takes for products of letters.

    Such answers are compared as text.
    """
    text = _OUTER_TEXT.sub(r"\1", answer)
    words = [bare for word in text.split() if (bare := word.strip(_PUNCTUATION))]
    return any(len(word) > 1 for word in words) and all(map(str.isalpha, words))


def same_value(expected: str, answer: str) -> bool | None:
    """Whether two answers in LaTeX are the same; None where one of them cannot be read.

    Decimals that are compared with roots, pi and the like are right to six places.
    """
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)  # it warns that it runs without a timeout of its own
    bases = [_BASE.findall(text) for text in (expected, answer)]
    if bases[0] and bases[1] and bases[0] != bases[1]:
        return False  # the reader drops them
    gold, given = (
        parse(
            f"${_inner(text)}$",
            [LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )
        for text in (expected, answer)
    )
    if not gold:
        raise ValueError(f"the gold answer {expected!r} is no LaTeX that math-verify reads")
    return bool(verify(gold, given, timeout_seconds=None)) if given else None


def _readings(mark: Mark, listed: bool) -> Iterator[str]:
    formulas = _formulas(mark.answer)
    if len(formulas) == 1:
        yield formulas[0]
    if mark.kind != "stated":
        yield mark.answer
        return
    answer = mark.answer.strip(" *.,;:")
    clause = CLAUSE.split(answer)[0]
    yield from (answer, clause) if listed or not _is_closed(clause) else (clause, answer)


def _is_closed(text: str) -> bool:
    """Whether every bracket of a text is closed, however intervals mix their kinds."""
    return sum(map(text.count, "([{")) == sum(map(text.count, ")]}"))


def _formulas(text: str) -> list[str]:
    """What stands between a text's math delimiters."""
    return [next(filter(None, match.groups())).strip() for match in _INLINE.finditer(text)]


def _inner(text: str) -> str:
    """An answer as one line, without delimiters around it and without final punctuation."""
    formulas = _formulas(text)
    inner = formulas[0] if len(formulas) == 1 else text
    return re.sub(r"(?<!\\)\$|\s+", " ", inner).strip(" .,;:!?")
