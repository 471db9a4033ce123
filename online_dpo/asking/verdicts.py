"""From responses to the questions that a judge is asked, and from its answers to labels; pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from online_dpo.records import Comparison, Prompt, Response, Score, Verdict, derive_seed

Kind = Literal["score", "compare"]
"""score: each response by itself; compare: two responses of one prompt."""

NO_VERDICT = "the judge gave no verdict"
IDENTICAL = "identical responses"
DISAGREE = "the orders disagree"

_ROUNDING = 1e-9
"""A mean of p this near to 0.5 is a tie: averages of opposite verdicts miss it by rounding."""


class InvalidJudgement(ValueError):
    """A judge returned what is neither a judgement nor an abstention."""


@dataclass(frozen=True, slots=True)
class Question:
    """One thing asked of a judge: to score all `responses`, or to compare the two as shown.

    `swapped` says that the two are shown in the reverse of the pair's order.
    """

    prompt: Prompt
    responses: tuple[Response, ...]
    vote: int = 0
    swapped: bool = False


@dataclass(frozen=True, slots=True)
class Labels:
    """The judge's word on one prompt: scores aligned with its responses, or comparisons of them."""

    prompt_id: str
    scores: tuple[Score, ...] | None = None
    comparisons: tuple[Comparison, ...] | None = None


def identical(first: Response, second: Response) -> bool:
    """Whether a judge could see no difference, so that asking it would be paying for a tie."""
    return first.text == second.text and first.finish_reason == second.finish_reason


def compare_questions(
    prompt: Prompt,
    first: Response,
    second: Response,
    *,
    orders: Literal["both", "one"],
    votes: int,
    seed: int,
    round: int,
) -> list[Question]:
    """What is asked about one pair: each order and each vote; nothing about identical responses."""
    if identical(first, second):
        return []
    drawn = shown_swapped(prompt.id, first.id, second.id, seed=seed, round=round)
    shown = (False, True) if orders == "both" else (drawn,)
    return [
        Question(prompt, (second, first) if swapped else (first, second), vote, swapped)
        for swapped in shown
        for vote in range(votes)
    ]


def shown_swapped(prompt_id: str, first_id: str, second_id: str, *, seed: int, round: int) -> bool:
    """Whether a pair that is shown in one order is shown in the reverse of its own."""
    return bool(derive_seed(seed, round, "order", prompt_id, first_id, second_id) & 1)


def combine_verdicts(
    prompt: Prompt,
    first: Response,
    second: Response,
    answers: Sequence[tuple[Question, Verdict]],
    *,
    swap: Literal["soft", "agree"] = "soft",
) -> Comparison:
    """One comparison from the answers to `compare_questions`.

    An order's p is the mean over its votes that gave one, swapped back. `soft` averages the orders;
    `agree` does so where they prefer the same response, and otherwise makes it a tie. An order
    without any p makes the pair invalid, with the reason of its first vote.
    """
    if not answers:
        return Comparison(prompt.id, first.id, second.id, 0.5, IDENTICAL, orders=0)
    orders = sorted({question.swapped for question, _ in answers})
    raws = tuple(verdict.raw for _, verdict in answers if verdict.raw is not None)
    means = []
    for swapped in orders:
        votes = [v.swap() if swapped else v for q, v in answers if q.swapped == swapped]
        given = [vote.p for vote in votes if vote.p is not None]
        if not given:
            reason = votes[0].reason or NO_VERDICT
            return Comparison(prompt.id, first.id, second.id, None, reason, len(orders), raws)
        means.append(_mean_p(given))
    conflict = swap == "agree" and len({_preferred(mean) for mean in means}) > 1
    p, why = (0.5, DISAGREE) if conflict else (_mean_p(means), None)
    return Comparison(prompt.id, first.id, second.id, p, why, len(orders), raws, tuple(means))


def _mean_p(ps: Sequence[float]) -> float:
    mean = fmean(ps)
    return 0.5 if abs(mean - 0.5) < _ROUNDING else mean


def _preferred(p: float) -> int:
    """1 for the first, -1 for the second, 0 for neither."""
    return (p > 0.5) - (p < 0.5)


def combine_scores(votes: Sequence[Sequence[Score]]) -> tuple[Score, ...]:
    """Each response's mean over the votes that scored it; without any, the first vote's reason."""
    combined = []
    for scores in zip(*votes, strict=True):
        given = [score.value for score in scores if score.value is not None]
        if len(scores) == 1 or not given:
            combined.append(scores[0])
        else:
            combined.append(Score(fmean(given)))
    return tuple(combined)


def checked_scores(result: Any, num_responses: int) -> tuple[Score, ...]:
    """A scorer's result as Scores: a sequence of Score, number or None, one for each response.

    Raises InvalidJudgement for anything else, for a wrong count and for values that are not finite.
    """
    if isinstance(result, str | bytes | Mapping) or not isinstance(result, Iterable):
        raise InvalidJudgement(f"a sequence of scores was expected, not {_shown(result)}")
    values = list(result)
    if len(values) != num_responses:
        raise InvalidJudgement(f"{len(values)} scores for {num_responses} responses")
    return tuple(_score(value) for value in values)


def checked_verdict(result: Any) -> Verdict:
    """A pairwise judge's result as a Verdict: a Verdict, p in [0, 1], or None.

    Raises InvalidJudgement for anything else.
    """
    if isinstance(result, Verdict):
        return result
    if result is None:
        return Verdict(None, NO_VERDICT)
    p = _number(result)
    if not 0.0 <= p <= 1.0:
        raise InvalidJudgement(f"p must lie in [0, 1], not {p}")
    return Verdict(p)


def _score(value: Any) -> Score:
    if isinstance(value, Score):
        if value.value is None:
            return value
        return Score(_number(value.value), value.reason)
    if value is None:
        return Score(None, NO_VERDICT)
    return Score(_number(value))


def _number(value: Any) -> float:
    """A finite float from a number of any library (numpy's and torch's scalars have __float__)."""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise InvalidJudgement(f"a number was expected, not {_shown(value)}")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidJudgement(f"a number was expected, not {_shown(value)}: {error}") from None
    if not math.isfinite(number):
        raise InvalidJudgement(f"a finite number was expected, not {number}")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
