"""From judged responses to preferences; pure."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from online_dpo.errors import ConfigError
from online_dpo.records import (
    Comparison,
    Preference,
    Prompt,
    Response,
    Score,
    Unpaired,
    derive_seed,
)


@dataclass(frozen=True)
class Candidate:
    """Two distinct responses of one prompt, the first judged better.

    `margin` is in score units for scores and p - 0.5 for comparisons; a merit is a response's
    score, or its mean p over its comparisons: `merit` the chosen one's.
    """

    chosen: Response
    rejected: Response
    margin: float
    p: float
    merit: float
    rejected_merit: float


Row = TypeVar("Row", Preference, Unpaired)

PairSelector = Callable[[Prompt, Sequence[Candidate], random.Random], Sequence[Candidate]]
"""Chooses among the candidates of one prompt; returns some of them."""


@dataclass(frozen=True)
class Judged:
    """A prompt, its responses and what the judge said: scores aligned with them, or comparisons."""

    prompt: Prompt
    responses: Sequence[Response]
    scores: Sequence[Score] | None = None
    comparisons: Sequence[Comparison] | None = None


@dataclass(frozen=True)
class Pairing:
    """Preferences, and the fate of every response by name; the counts add up to all responses."""

    preferences: tuple[Preference, ...]
    fates: Mapping[str, int]


def best_worst(
    prompt: Prompt, candidates: Sequence[Candidate], rng: random.Random
) -> Sequence[Candidate]:
    """The best response against the worst: the pair with the widest gap of merits.

    Of scores that is the widest margin; of several comparisons, the most wins against the fewest.
    """
    return [max(candidates, key=lambda c: (c.merit - c.rejected_merit, c.margin))]


def best_random(
    prompt: Prompt, candidates: Sequence[Candidate], rng: random.Random
) -> Sequence[Candidate]:
    """The best response against one at random of those it beat."""
    best = max(candidates, key=lambda c: c.merit).chosen.id
    return [rng.choice([c for c in candidates if c.chosen.id == best])]


def random_pair(
    prompt: Prompt, candidates: Sequence[Candidate], rng: random.Random
) -> Sequence[Candidate]:
    """One pair at random."""
    return [rng.choice(candidates)]


def all_pairs(
    prompt: Prompt, candidates: Sequence[Candidate], rng: random.Random
) -> Sequence[Candidate]:
    """Every pair, the widest margins first."""
    return sorted(candidates, key=lambda c: -c.margin)


SELECTORS: dict[str, PairSelector] = {
    "best_worst": best_worst,
    "best_random": best_random,
    "random": random_pair,
    "all": all_pairs,
}


def make_pairs(
    judged: Sequence[Judged],
    selector: PairSelector,
    *,
    round_number: int,
    seed: int,
    scale: float,
    min_margin: float,
    max_per_prompt: int | None,
) -> Pairing:
    """The round's preferences, in the order of the prompts.

    A response's fate is `paired`, `invalid` (no verdict), `identical` (to its counterpart),
    `tied`, `below_margin`, `not_selected` or `alone`.
    """
    preferences: list[Preference] = []
    fates: Counter[str] = Counter()
    for item in judged:
        rng = random.Random(derive_seed(seed, "pair", item.prompt.id))
        candidates, obstacles = _candidates(item, scale=scale, min_margin=min_margin)
        rng.shuffle(candidates)
        chosen = _select(selector, item.prompt, candidates, rng, max_per_prompt)
        preferences += [_preference(item.prompt, c, round_number) for c in chosen]
        fates.update(_fates(item.responses, candidates, chosen, obstacles))
    return Pairing(tuple(preferences), dict(sorted(fates.items())))


def _candidates(
    item: Judged, *, scale: float, min_margin: float
) -> tuple[list[Candidate], dict[str, str]]:
    """The pairs that may be trained on, and for every response the nearest it came otherwise."""
    obstacles = {response.id: "alone" for response in item.responses}
    by_id = {response.id: response for response in item.responses}
    verdicts = _verdicts(item, scale, obstacles)
    candidates = []
    for first, second, p, margin, merits in verdicts:
        a, b = by_id[first], by_id[second]
        obstacle = _obstacle(a, b, margin, min_margin)
        if obstacle is not None:
            obstacles |= {first: obstacle, second: obstacle}
        elif margin > 0:
            candidates.append(Candidate(a, b, margin, p, *merits))
        else:
            candidates.append(Candidate(b, a, -margin, 1.0 - p, *reversed(merits)))
    return candidates, obstacles


_Verdict = tuple[str, str, float, float, tuple[float, float]]


def _verdicts(item: Judged, scale: float, obstacles: dict[str, str]) -> list[_Verdict]:
    """(first id, second id, p, signed margin, merits) for every valid judgement of a pair."""
    if item.scores is not None:
        return _score_verdicts(item, item.scores, scale, obstacles)
    valid = []
    for comparison in item.comparisons or ():
        if comparison.p is None:
            obstacles |= {comparison.first_id: "invalid", comparison.second_id: "invalid"}
        else:
            valid.append((comparison, comparison.p))
    merits = _mean_p(valid)
    return [
        (c.first_id, c.second_id, p, p - 0.5, (merits[c.first_id], merits[c.second_id]))
        for c, p in valid
    ]


def _score_verdicts(
    item: Judged, scores: Sequence[Score], scale: float, obstacles: dict[str, str]
) -> list[_Verdict]:
    scored: list[tuple[str, float]] = []
    for response, score in zip(item.responses, scores, strict=True):
        if score.value is None:
            obstacles[response.id] = "invalid"
        else:
            scored.append((response.id, score.value))
    return [
        (first, second, sigmoid((a - b) / scale), a - b, (a, b))
        for i, (first, a) in enumerate(scored)
        for second, b in scored[i + 1 :]
    ]


def _mean_p(valid: Sequence[tuple[Comparison, float]]) -> dict[str, float]:
    totals: dict[str, list[float]] = {}
    for comparison, p in valid:
        totals.setdefault(comparison.first_id, []).append(p)
        totals.setdefault(comparison.second_id, []).append(1.0 - p)
    return {name: sum(values) / len(values) for name, values in totals.items()}


def _obstacle(a: Response, b: Response, margin: float, min_margin: float) -> str | None:
    if a.token_ids == b.token_ids or a.text == b.text:
        return "identical"
    if margin == 0.0:
        return "tied"
    return "below_margin" if abs(margin) < min_margin else None


def _select(
    selector: PairSelector,
    prompt: Prompt,
    candidates: Sequence[Candidate],
    rng: random.Random,
    max_per_prompt: int | None,
) -> Sequence[Candidate]:
    if not candidates:
        return []
    chosen = list(selector(prompt, candidates, rng))
    foreign = [c for c in chosen if c not in candidates]
    if foreign or len({id(c) for c in chosen}) < len(chosen):
        raise ConfigError(
            f"The pair selector returned a pair twice, or one that was not offered, for prompt "
            f"{prompt.id!r}; it returns some of its candidates, each once."
        )
    if max_per_prompt is None:
        return chosen
    return sorted(chosen, key=lambda c: -c.margin)[:max_per_prompt]


def _fates(
    responses: Sequence[Response],
    candidates: Sequence[Candidate],
    chosen: Sequence[Candidate],
    obstacles: Mapping[str, str],
) -> list[str]:
    paired = {r.id for c in chosen for r in (c.chosen, c.rejected)}
    offered = {r.id for c in candidates for r in (c.chosen, c.rejected)}
    return [
        "paired" if r.id in paired else "not_selected" if r.id in offered else obstacles[r.id]
        for r in responses
    ]


def _preference(prompt: Prompt, candidate: Candidate, round_number: int) -> Preference:
    chosen, rejected = candidate.chosen, candidate.rejected
    key = f"{round_number}/{chosen.id}/{rejected.id}"
    return Preference(
        pair_id=hashlib.sha256(key.encode()).hexdigest()[:16],
        prompt_id=prompt.id,
        prompt_source=prompt.source,
        prompt_token_ids=prompt.token_ids,
        chosen_id=chosen.id,
        rejected_id=rejected.id,
        chosen_token_ids=chosen.token_ids,
        rejected_token_ids=rejected.token_ids,
        chosen_text=chosen.text,
        rejected_text=rejected.text,
        chosen_truncated=chosen.truncated,
        rejected_truncated=rejected.truncated,
        margin=candidate.margin,
        p=candidate.p,
        origin=f"round-{round_number:03d}",
        chosen_sampled_logp=_total(chosen.logprobs),
        rejected_sampled_logp=_total(rejected.logprobs),
    )


def _total(logprobs: Sequence[float] | None) -> float | None:
    return None if logprobs is None else math.fsum(logprobs)


def mix(
    new: Sequence[Row],
    earlier: Sequence[Row],
    offline: Sequence[Row],
    *,
    earlier_share: float,
    offline_share: float,
    seed: int,
) -> tuple[Row, ...]:
    """New rows with earlier and offline ones, so that these make up their shares of the whole.

    Where too few are there, all are taken. Drawn by seed, without replacement.
    """
    total = len(new) / (1.0 - earlier_share - offline_share)
    rng = random.Random(derive_seed(seed, "mix"))
    mixed = list(new)
    for pool, share in ((earlier, earlier_share), (offline, offline_share)):
        mixed += rng.sample(list(pool), min(len(pool), round(total * share)))
    return tuple(mixed)


def check(preferences: Sequence[Preference]) -> None:
    """Assert what training relies on: distinct ids and tokens, a response, a real margin."""
    assert len({p.pair_id for p in preferences}) == len(preferences), "pair ids repeat"
    for p in preferences:
        assert p.chosen_token_ids != p.rejected_token_ids, p.pair_id
        assert p.chosen_token_ids and p.rejected_token_ids and p.prompt_token_ids, p.pair_id
        assert p.margin > 0 and p.p >= 0.5, p.pair_id


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    e = math.exp(x)
    return e / (1.0 + e)
