"""What a judge says of pairs, alike for one that compares and one that scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from online_dpo.asking.members import verdict_of_scores
from online_dpo.asking.verdicts import Question, combine_scores, combine_verdicts
from online_dpo.judge_figures import Judged
from online_dpo.judging import Labeller, OnShare
from online_dpo.progress import Progress
from online_dpo.records import Comparison, Prompt, Response, Score, Verdict
from online_dpo.report_card.comparisons import Labelled

Pair = tuple[Prompt, Response, Response]

ShownPs = dict[bool | None, float]
"""A p for each order, by whether the response that it speaks for stood first; None: no order."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A judge's word on a pair: the verdict as the config combines it, and all that it rests on.

    `votes` has, for each order asked, the p of every vote that the first is better, those beyond
    the config's included. `swapped` is known where one order was asked. A judge that scores has no
    orders: its comparison holds none, and all its votes are in one group.
    """

    comparison: Comparison
    votes: tuple[tuple[float | None, ...], ...]
    swapped: bool | None = None

    def shown(self, response: Response) -> ShownPs:
        """Each order's p that this one of the two responses is better."""
        made = self.comparison
        is_first = response.id == made.first_id
        if made.orders == 0:
            return {} if made.p is None else {None: made.p if is_first else 1.0 - made.p}
        orders = (False, True) if made.orders == 2 else (bool(self.swapped),)
        return {
            is_first != swapped: p if is_first else 1.0 - p
            for swapped, p in zip(orders, made.order_ps, strict=False)
        }


def judged(row: Labelled, said: Answered) -> Judged:
    """A labelled comparison with the judge's word on it, lengths in characters."""
    made = said.comparison
    return Judged(
        order_ps=made.order_ps,
        p=made.p,
        reason=made.reason,
        first_length=len(row.first.text),
        second_length=len(row.second.text),
        gold=row.gold,
        swapped=said.swapped,
        votes=said.votes,
        prompt_id=row.prompt.id,
        first_id=row.first.id,
        second_id=row.second.id,
    )


class Answers:
    """Asks one judge about pairs. A response that is scored is scored once, for all its pairs."""

    def __init__(self, labeller: Labeller, progress: Progress) -> None:
        self._labeller = labeller
        self._progress = progress
        self._scores: dict[tuple[str, str, str], list[Score]] = {}

    def on(self, pairs: Sequence[Pair], *, purpose: str, more_votes: int = 0) -> list[Answered]:
        """One Answered for each pair, in their order; `more_votes` are asked beyond the config's.

        Raises what Labeller raises.
        """
        if not pairs:
            return []
        votes = self._labeller.config.votes + more_votes
        with self._progress.stage(purpose, total=len(pairs), unit="pairs") as bar:

            def on_share(share: float) -> None:
                bar.set(int(share * len(pairs)))

            if self._labeller.kind == "score":
                self._score(pairs, purpose, votes, on_share)
                found = [self._from_scores(pair, votes) for pair in pairs]
            else:
                said = self._labeller.pair_votes(
                    pairs, purpose=purpose, votes=votes, on_share=on_share
                )
                found = [self._from_verdicts(*each) for each in zip(pairs, said, strict=True)]
            bar.set(len(pairs))
        return found

    def _from_verdicts(self, pair: Pair, answers: Sequence[tuple[Question, Verdict]]) -> Answered:
        config = self._labeller.config
        counted = [(q, verdict) for q, verdict in answers if q.vote < config.votes]
        orders = sorted({question.swapped for question, _ in answers})
        votes = tuple(
            tuple((v.swap() if swapped else v).p for q, v in answers if q.swapped == swapped)
            for swapped in orders
        )
        made = combine_verdicts(*pair, counted, swap=config.swap)
        return Answered(made, votes, orders[0] if len(orders) == 1 else None)

    def _score(self, pairs: Sequence[Pair], purpose: str, votes: int, on_share: OnShare) -> None:
        """Have every response scored so often, unless it has been."""
        missing = {
            _key(prompt, response): (prompt, (response,))
            for prompt, *responses in pairs
            for response in responses
            if len(self._scores.get(_key(prompt, response), ())) < votes
        }
        given = self._labeller.score_votes(
            list(missing.values()), purpose=purpose, votes=votes, on_share=on_share
        )
        for key, scored in zip(missing, given, strict=True):
            self._scores[key] = [scores[0] for scores in scored]

    def _from_scores(self, pair: Pair, votes: int) -> Answered:
        prompt, first, second = pair
        config = self._labeller.config
        sides = [self._scores[_key(prompt, response)][:votes] for response in (first, second)]
        each = tuple(
            verdict_of_scores(a, b, scale=config.scale).p for a, b in zip(*sides, strict=True)
        )
        one, other = (combine_scores([(s,) for s in side[: config.votes]])[0] for side in sides)
        whole = verdict_of_scores(one, other, scale=config.scale)
        raws = () if whole.raw is None else (whole.raw,)
        made = Comparison(prompt.id, first.id, second.id, whole.p, whole.reason, 0, raws)
        return Answered(made, (each,))


def _key(prompt: Prompt, response: Response) -> tuple[str, str, str]:
    """Two rows may have one prompt with other metadata, which a judge sees."""
    return prompt.id, str(prompt.metadata), response.id
