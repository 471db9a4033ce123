"""Canned judgements, for tests, examples and reproducing what a judge would have said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from online_dpo.errors import ConfigError
from online_dpo.records import Prompt, Response, Score, Verdict

UNSCRIPTED = "not in the script"


class Scripted:
    """Looks responses up by their text.

    `scores` maps a response's text to its score. `verdicts` lists {first, second, p}, read in both
    orders. `default` is the score, or the p of the first, of what is in neither; without it there
    is no judgement. `Scripted(verdicts=[], default=1.0)` always prefers the first.
    """

    name: ClassVar[str] = "scripted"
    version: ClassVar[str] = "1"
    inline: ClassVar[bool] = True

    def __init__(
        self,
        scores: Mapping[str, float | None] | None = None,
        verdicts: Sequence[Mapping[str, Any]] | None = None,
        default: float | None = None,
    ) -> None:
        """Raises ConfigError unless exactly one of `scores` and `verdicts` is given."""
        if (scores is None) == (verdicts is None):
            raise ConfigError("a scripted judge takes exactly one of scores and verdicts")
        self.kind: Literal["score", "compare"] = "compare" if scores is None else "score"
        self._scores = dict(scores or {})
        self._verdicts = _both_orders(verdicts or [])
        self._default = default
        if scores is None:
            _check_p(default)

    def score(self, prompt: Prompt, responses: Sequence[Response]) -> list[Score]:
        """The scripted score of each response."""
        values = [self._scores.get(response.text, self._default) for response in responses]
        return [Score(value, UNSCRIPTED if value is None else None) for value in values]

    def compare(self, prompt: Prompt, first: Response, second: Response) -> Verdict:
        """The scripted verdict on two responses."""
        p = self._verdicts.get((first.text, second.text), self._default)
        return Verdict(p, UNSCRIPTED if p is None else None)


def _check_p(p: Any) -> None:
    if p is not None and not (isinstance(p, int | float) and 0 <= p <= 1):
        raise ConfigError(f"a scripted p lies in [0, 1] or is null, not {p!r}")


def _both_orders(verdicts: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], float | None]:
    """Every verdict and its mirror image, unless the mirror image has a line of its own."""
    scripted: dict[tuple[str, str], float | None] = {}
    mirrored: dict[tuple[str, str], float | None] = {}
    for verdict in verdicts:
        if set(verdict) != {"first", "second", "p"}:
            raise ConfigError(f"a scripted verdict has first, second and p, not {dict(verdict)}")
        first, second, p = verdict["first"], verdict["second"], verdict["p"]
        _check_p(p)
        scripted[first, second] = p
        mirrored[second, first] = None if p is None else 1.0 - p
    return mirrored | scripted
