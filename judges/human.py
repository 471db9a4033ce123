"""People as the judge: the verdicts of annotators, made into one by a rule."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from online_dpo.annotation.asker import Ballots
from online_dpo.annotation.items import read_gold
from online_dpo.annotation.options import people_options
from online_dpo.records import Prompt, Response, Score, Verdict
from online_dpo.voting import combine_votes

SKIPPED = "every annotator skipped it"


class Human:
    """Asks `annotators` on the page of `online-dpo label`; see docs/human_labels.md.

    It is called once enough of them have answered, with what they said as its `calls`.
    """

    name: ClassVar[str] = "human"
    version: ClassVar[str] = "1"
    people: ClassVar[bool] = True

    def __init__(
        self,
        annotators: Sequence[str],
        per_item: int = 1,
        ask: str = "compare",
        combine: str = "majority",
        repeats: float = 0.1,
        gold: str | None = None,
        gold_share: float = 0.1,
        rubric: str = "",
    ) -> None:
        """Raises ConfigError for options that do not fit, and for a gold file that is none."""
        self.options = people_options(
            {
                "annotators": annotators,
                "per_item": per_item,
                "ask": ask,
                "combine": combine,
                "repeats": repeats,
                "gold": gold,
                "gold_share": gold_share,
                "rubric": rubric,
            }
        )
        self.kind: Literal["score", "compare"] = "score" if ask == "rate" else "compare"
        self.gold = [] if gold is None else read_gold(gold, self.options.ask)

    def compare(
        self, prompt: Prompt, first: Response, second: Response, *, calls: Ballots
    ) -> Verdict:
        """The annotators' verdict on two responses; `raw` has what each of them said."""
        votes = calls.on(prompt, (first, second))
        names = {1.0: first.id, 0.5: "tie", 0.0: second.id, None: "skip"}
        raw = json.dumps({who: names[value] for who, value in votes.items()})
        p = self._combined(votes)
        return Verdict(p, SKIPPED if p is None else None, raw)

    def score(
        self, prompt: Prompt, responses: Sequence[Response], *, calls: Ballots
    ) -> list[Score]:
        """1 for good and 0 for bad, or what the rule makes of several verdicts."""
        values = [self._combined(calls.on(prompt, (response,))) for response in responses]
        return [Score(value, SKIPPED if value is None else None) for value in values]

    def _combined(self, votes: Mapping[str, float | None]) -> float | None:
        given: list[Any] = [value for value in votes.values() if value is not None]
        return combine_votes(given, self.options.combine) if given else None
