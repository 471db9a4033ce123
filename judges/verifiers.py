"""Checks a response against a gold answer: 1 where the final answers are equal, else 0."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

from online_dpo.records import Prompt, Response, Score

MAX_DIGITS = 400
"""Longer numerals are no numbers here: exact arithmetic on them would take forever."""

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}(?![\w.]))?"
_NUMBER = (
    rf"(?P<sign>[-+]?)[$€£]?(?P<minus>-?)"
    rf"(?:(?P<whole>{_DIGITS})\s+(?=\d+\s?/\s?\d))?"
    rf"(?P<top>{_DECIMAL})(?:\s?/\s?(?P<bottom>{_DECIMAL}))?\s?(?P<percent>%?)"
)
_IN_TEXT = re.compile(_NUMBER)
_ALONE = re.compile(rf"{_NUMBER}(?P<unit>[^\d=<>+*^(){{}}\\]*)")
_VARIABLE = re.compile(r"(?![mgshlLCFKWVAJN])[^\W\d_](?![^\W\d_])")
_UNIT = re.compile(r"[mgshlLCFKWVAJN]?|[^\W\d_]{2,}.*|°.*", re.DOTALL)

_STATED = re.compile(r"(?<!/)\banswer\s*(?:is|was|=|:)[\s:*]*(?P<answer>[^\n]+)", re.IGNORECASE)
_HASHES = re.compile(r"####\s*(?P<answer>[^\n]+)")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
CLAUSE = re.compile(r"[,;](?=\s)|[.!?](?=\s|$)|\s(?:because|since|as|so|which)\b")

_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r" \1/\2"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:left|right|[,!;:() \[\]])|\^\s*\{?\\circ\}?|[`*]"), ""),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile("[\u2212\u2013]"), "-"),
    (re.compile("[\u00a0\u2009\u202f]"), " "),
)


@dataclass(frozen=True, slots=True)
class Number:
    """A number as written in an answer. `percent`: a percent sign follows; `unit`: what follows."""

    value: Fraction
    percent: bool = False
    unit: str = ""

    def equals(self, other: Number) -> bool:
        """Whether both mean the same. 50% is 50 and 0.5; units count where both have one."""
        if self.unit and other.unit and self.unit != other.unit:
            return False
        if self.value == other.value:
            return True
        if self.percent == other.percent:
            return False
        percent, plain = (self, other) if self.percent else (other, self)
        return percent.value / 100 == plain.value


@dataclass(frozen=True, slots=True)
class Mark:
    """A place where a text says what its answer is."""

    kind: Literal["boxed", "hashes", "stated"]
    start: int
    answer: str


class FinalAnswer:
    """A scorer by the final answer: plain numbers, fractions, decimals, percentages, or text.

    A response's answer is what stands last in \\boxed{...}, after "####" or after "answer is";
    without any of these, the last number of a response that was not cut off. Thousands separators,
    currency signs and units are ignored. A prompt without `metadata[field]` gets no score.
    """

    name: ClassVar[str] = "final_answer"
    version: ClassVar[str] = "2"
    inline: ClassVar[bool] = True

    def __init__(self, field: str = "answer") -> None:
        self.field = field

    def score(self, prompt: Prompt, responses: Sequence[Response]) -> list[Score]:
        """1.0 or 0.0 for each response."""
        gold = prompt.metadata.get(self.field)
        if gold is None or not str(gold).strip():
            return [no_gold(self.field) for _ in responses]
        expected = gold_answer(gold)
        return [
            Score(float(is_answer(response.text, expected, truncated=response.truncated)))
            for response in responses
        ]


def no_gold(field: str) -> Score:
    """The score of a response whose prompt has no gold answer."""
    return Score(None, f"the prompt has no gold answer in its field {field!r}")


def gold_answer(gold: Any) -> str:
    """The answer in a gold field: a bare answer, or the one that a worked solution marks."""
    text = str(gold)
    marked = marks(text)
    return marked[-1].answer if marked else text.strip()


def is_answer(text: str, expected: str, *, truncated: bool = False) -> bool:
    """Whether the final answer of a text is the expected one."""
    number = as_number(expected)
    if number is None:
        return normal_text(expected) in {normal_text(answer) for answer in _final_texts(text)}
    found = final_number(text, truncated=truncated)
    return found is not None and found.equals(number)


def final_number(text: str, *, truncated: bool = False) -> Number | None:
    """The number that a text ends up with, or None."""
    for mark in reversed(marks(text)):
        answer = mark.answer
        if mark.kind == "stated":
            answer = CLAUSE.split(_plain(answer))[0]
        answer = answer.rpartition("=")[2]
        number = as_number(answer)
        if number is None and mark.kind == "stated":
            number = next(_numbers(answer), None)
        if number is not None or mark.kind == "boxed":
            return number
    if truncated:
        return None
    found = list(_numbers(_plain(text)))
    return found[-1] if found else None


def marks(text: str) -> list[Mark]:
    """Where a text says what its answer is, in order."""
    found = [Mark("hashes", m.start(), m["answer"].strip()) for m in _HASHES.finditer(text)]
    found += [Mark("stated", m.start(), m["answer"].strip()) for m in _STATED.finditer(text)]
    found += [
        Mark("boxed", m.start(), answer)
        for m in _BOXED.finditer(text)
        if (answer := _braced(text, m.end())) is not None
    ]
    # What is boxed inside a stated answer is that answer.
    return sorted(found, key=lambda mark: mark.start)


def as_number(text: str) -> Number | None:
    """A text that is one number, with a unit or without; None for anything else."""
    text = _plain(text).strip(" \t\n$.,;:!?'\"")
    match = _ALONE.fullmatch(text)
    if match is None:
        return None
    unit = match["unit"].strip(" \t\n$.,;:!?'\"")
    if not _UNIT.fullmatch(unit):
        return None
    return _number(match, unit=unit.casefold().removesuffix("s"))


def _numbers(text: str) -> Iterator[Number]:
    """The numbers in a plain text, in order; a sign after a digit or word is a subtraction's."""
    for match in _IN_TEXT.finditer(text):
        before = text[match.start() - 1] if match.start() else " "
        attached = before.isalnum() or before in ")_"
        if (attached and not match["sign"]) or _VARIABLE.match(text, match.end()):
            continue
        number = _number(match, signed=not attached)
        if number is not None:
            yield number


def _number(match: re.Match[str], *, unit: str = "", signed: bool = True) -> Number | None:
    if len(match[0]) > MAX_DIGITS:
        return None
    top, bottom = _fraction(match["top"]), _fraction(match["bottom"] or "1")
    if bottom == 0:
        return None
    value = top / bottom + _fraction(match["whole"] or "0")
    negative = (signed and match["sign"] == "-") or bool(match["minus"])
    return Number(-value if negative else value, bool(match["percent"]), unit)


def _fraction(decimal: str) -> Fraction:
    return Fraction(decimal.replace(",", ""))


def _final_texts(text: str) -> list[str]:
    """What a text may mean as its answer in words: the last mark or the last line."""
    marked = marks(text)
    if marked:
        answer = marked[-1].answer
        return [answer, CLAUSE.split(answer)[0]]
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1:]


def _braced(text: str, start: int) -> str | None:
    """What stands between an opened brace, before `start`, and the one that closes it."""
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None


def _plain(text: str) -> str:
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def normal_text(text: str) -> str:
    """Text for comparison: without LaTeX's wrappers, spaces, case and final punctuation.

    The brackets around the letter of a choice, (B), go too.
    """
    bare = re.sub(r"[\s$]+", "", _plain(text)).strip(".,;:!?'\"").casefold()
    return bare[1:-1] if re.fullmatch(r"\([^\W\d_]\)", bare) else bare
