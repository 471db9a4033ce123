"""Reading an LLM judge's reply: the verdict or the scores that are its own words; pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from online_dpo.asking.unusable_replies import CUT_OFF, EMPTY, NO_SCORE, NO_SUCH_SCORE, NO_VERDICT
from online_dpo.judging import ChatReply

P_OF_LABEL = {"a": 1.0, "first": 1.0, "b": 0.0, "second": 0.0, "tie": 0.5, "c": 0.5}
"""What each word for a verdict means; c is the tie of the [[A]], [[B]], [[C]] convention."""

REFUSED = "the model refused to answer"

MIN_QUOTE = 24
"""Characters of a response that a judge repeats by quoting alone, not by chance."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A verdict's p and the place in the reply where its word begins; without one, the reason."""

    p: float | None
    reason: str | None = None
    at: int = 0
    label: str = ""


@dataclass(frozen=True, slots=True)
class Scale:
    """The scores that a rubric has."""

    lowest: int
    highest: int


def read_verdict(reply: ChatReply, fence: str, responses: Sequence[str] = ()) -> Reading:
    """The verdict in a reply: the JSON object that was asked for, or the last one in words.

    What the reply quotes is not its own word: what stands between the call's fences, in code, in
    quotation marks or in quoted lines, and a response that is repeated whole.
    """
    start, text, own = _after_thinking(reply.text, fence, responses)
    found = _json_verdict(text)
    if found is None:
        if (reason := _unusable(reply, text)) is not None:
            return Reading(None, reason)
        found = _last_verdict(own)
    if found is None:
        return Reading(None, NO_VERDICT)
    label, at = found
    return Reading(P_OF_LABEL[label.lower()], None, start + at, label)


def read_scores(
    reply: ChatReply,
    names: Sequence[str],
    scale: Scale,
    fence: str,
    responses: Sequence[str] = (),
) -> tuple[list[float], str | None]:
    """The score of each name, in their order, and None; or no scores and the reason.

    A JSON object with these keys, or in words a last line `name: 7` for each; where there is but
    one name, [[7]] and a bare number too. Quotes count as little as in `read_verdict`.
    """
    _, text, own = _after_thinking(reply.text, fence, responses)
    found = _json_scores(text, names)
    if found is None:
        if (reason := _unusable(reply, text)) is not None:
            return [], reason
        found = [_last_score(own, name, scale, alone=len(names) == 1) for name in names]
    if any(score is None for score in found):
        return [], NO_SCORE
    scores = [score for score in found if score is not None]
    if not all(scale.lowest <= score <= scale.highest for score in scores):
        return [], NO_SUCH_SCORE
    return scores, None


def _after_thinking(text: str, fence: str, responses: Sequence[str]) -> tuple[int, str, str]:
    """Where thinking ends, what follows, and that with its quotes blanked out.

    A response may hold the end of a thought too: where it is quoted, it ends none.
    """
    begun = re.match(r"\s*<think>.*?</think>", text, re.DOTALL)
    start = begun.end() if begun else 0
    own = _own_words(text[start:], fence, responses)
    head, marker, _ = own.rpartition("</think>")
    end = len(head) + len(marker)
    return start + end, text[start + end :], own[end:]


def _unusable(reply: ChatReply, text: str) -> str | None:
    """Why words are not to be read for a verdict at all."""
    if reply.refused:
        return REFUSED
    if reply.finish_reason == "length":
        return CUT_OFF
    return None if text.strip() else f"{EMPTY} ({reply.finish_reason})"


_BARE = r"(?:a|b|tie|first|second)"
_QUOTES = (
    re.compile(r"```.*?(?:```|\Z)", re.DOTALL),
    re.compile(r"^[ \t]*>.*$", re.MULTILINE),
    re.compile(rf"`(?!{_BARE}`)[^`\n]*`", re.IGNORECASE),
    re.compile(rf"\u00ab(?!\s*{_BARE}\s*\u00bb)[^\u00ab\u00bb]*\u00bb", re.IGNORECASE),
    # Single marks within words are apostrophes.
    re.compile(
        rf"\u2018(?!{_BARE}\u2019)(?:[^\u2018\u2019]|(?<=\w)\u2019(?=\w))*\u2019", re.IGNORECASE
    ),
    re.compile(rf"(?<!\w)'(?!{_BARE}')(?:[^'\n]|(?<=\w)'(?=\w))*'(?!\w)", re.IGNORECASE),
)
_CURLY = re.compile(rf"\u201c(?!{_BARE}\u201d)[^\u201d]*\u201d", re.IGNORECASE)
_QUOTED_LINE = re.compile(rf'"(?!{_BARE}")[^"\n]*"', re.IGNORECASE)
_QUOTED = re.compile(rf'"(?!{_BARE}")[^"]*"', re.IGNORECASE)
_LEAD = r"^[^\w\n]*(?:(?:my|the|final|overall|total)\s+)*"
_MARKERS = re.compile(
    rf"\[\[\s*(?P<marker>{_BARE}|c)\s*\]\]"
    rf"|{_LEAD}verdict\W*(?:is\b\W*)?(?:(?:response|answer)\W+)?(?P<line>{_BARE})\b\W*$"
    rf"|\A\W*(?P<all>{_BARE})\W*\Z",
    re.IGNORECASE | re.MULTILINE,
)


def _own_words(text: str, fence: str, responses: Sequence[str]) -> str:
    """The text with every quote blanked out, so that places in it stay the same."""
    word = re.escape(fence)
    fenced = re.compile(rf"<<<[^<>\n]*{word}>>>.*?(?:<<<end[^<>\n]*{word}>>>|\Z)", re.DOTALL)
    whole = [body for r in responses if len(body := r.strip()) >= MIN_QUOTE]
    repeated = [re.compile(re.escape(body)) for body in sorted(whole, key=len, reverse=True)]
    for quote in (fenced, *repeated, *_QUOTES):
        text = quote.sub(_blank, text)
    # Behind the last closing mark no quote ends; to look for its end from every opening mark would
    # take time with the square of the reply's length.
    end = text.rfind("\u201d") + 1
    text = _CURLY.sub(_blank, text[:end]) + text[end:]
    # Quotation marks that are all paired may hold several lines.
    return (_QUOTED if text.count('"') % 2 == 0 else _QUOTED_LINE).sub(_blank, text)


def _blank(match: re.Match[str]) -> str:
    return "\0" * len(match[0])


def _last_verdict(text: str) -> tuple[str, int] | None:
    found = list(_MARKERS.finditer(text))
    if not found:
        return None
    group = str(found[-1].lastgroup)
    return found[-1][group], found[-1].start(group)


def _last_score(text: str, name: str, scale: Scale, *, alone: bool) -> float | None:
    number = rf"(?P<{{}}>-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*{scale.highest}|\s+points?)?"
    line = rf"{_LEAD}{re.escape(name)}[^\w\n-]*(?:is\b[^\w\n-]*)?{number.format('line')}[^\w\n/]*$"
    if alone:
        line += rf"|\[\[\s*{number.format('marker')}\s*\]\]"
        line += rf"|\A[^\w-]*{number.format('all')}[^\w/]*\Z"
    found = list(re.finditer(line, text, re.IGNORECASE | re.MULTILINE))
    return float(str(found[-1][str(found[-1].lastgroup)])) if found else None


def _json_object(text: str) -> tuple[dict[str, Any], int] | None:
    """A text that is wholly a JSON object, within a code fence or not, and where it begins."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", text, re.DOTALL)
    body, at = (fenced[1], fenced.start(1)) if fenced else (text, 0)
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return (found, at) if isinstance(found, dict) else None


def _json_verdict(text: str) -> tuple[str, int] | None:
    found = _json_object(text)
    if found is None:
        return None
    label = found[0].get("verdict")
    if not isinstance(label, str) or label.lower() not in P_OF_LABEL:
        return None
    places = list(re.finditer(r'"verdict"\s*:\s*"', text))
    return label, places[-1].end() if places else found[1]


def _json_scores(text: str, names: Sequence[str]) -> list[float | None] | None:
    found = _json_object(text)
    return None if found is None else list(_numbers(found[0], names))


def _numbers(found: dict[str, Any], names: Sequence[str]) -> Iterator[float | None]:
    for name in names:
        score = found.get(name)
        if isinstance(score, int | float) and not isinstance(score, bool):
            # Whole numbers have no largest one, floats do; neither is a score of any rubric.
            yield float(score) if -1e9 < score < 1e9 else float("inf")
        else:
            yield None
