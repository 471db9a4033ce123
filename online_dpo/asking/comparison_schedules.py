"""Which responses a judge is asked to compare next, from the verdicts so far; pure."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Literal, get_args

from online_dpo.asking.verdicts import identical
from online_dpo.errors import ConfigError
from online_dpo.records import Prompt, Response, derive_seed

ScheduleName = Literal["draw", "knockout", "uncertainty", "reward_margin", "entropy"]
MarginChoice = Literal["wide", "narrow", "mixed"]
"""By which end of the implicit reward margins `reward_margin` begins; mixed takes them in turn."""
ACTIVE = get_args(ScheduleName)[2:]
"""The schedules that spend a budget of comparisons where it is thought to teach most."""
ACROSS_PROMPTS = ("uncertainty", "entropy")
"""Those of them that give some prompts more of the budget than others."""

Pair = tuple[int, int]
"""Two responses of a prompt by their places, the smaller first."""

Known = Mapping[Pair, float | None]
"""Verdicts on a prompt's pairs: p that the first is better, None where the judge gave none."""

Schedule = Callable[[Sequence[Known]], list[list[Pair]]]
"""From the verdicts on each prompt so far to the pairs to ask about next; none anywhere: done."""

Item = tuple[Prompt, Sequence[Response]]


def make_schedule(
    name: ScheduleName,
    comparisons: int | Literal["all"],
    items: Sequence[Item],
    *,
    seed: int,
    round: int,
    reference_logps: Mapping[str, float] | None = None,
    margins: MarginChoice = "wide",
    budget: int | None = None,
) -> Schedule:
    """The schedule for some prompts and their responses, a pure function of its arguments.

    `reference_logps` has the reference's log-prob of each response, in nats, for `reward_margin`;
    None where the reference is the policy, so that every margin is 0 and the seed decides;
    `margins` says which of the margins it asks about. `budget` is what all items together may
    spend, for schedules that spend across prompts; `comparisons` a prompt by default.
    """
    assert budget is None or name in ACROSS_PROMPTS, name
    draws = [random.Random(derive_seed(seed, round, "comparisons", p.id)) for p, _ in items]
    ordered = [_ordered(responses, draw) for (_, responses), draw in zip(items, draws, strict=True)]
    if name == "knockout":
        return _knockouts([_entrants(r, d) for (_, r), d in zip(items, draws, strict=True)])
    if name == "draw" or (comparisons == "all" and budget is None):
        most = None if comparisons == "all" else comparisons
        return _once([sorted(pairs[:most]) for pairs in ordered])
    distinct = [
        [(i, j) for i, j in pairs if not identical(responses[i], responses[j])]
        for (_, responses), pairs in zip(items, ordered, strict=True)
    ]
    if budget is None:
        assert comparisons != "all"
        budget = comparisons * len(items)
    if name == "uncertainty":
        ties = [draw.random() for draw in draws]
        return _uncertainty([len(r) for _, r in items], distinct, budget, ties)
    if name == "entropy":
        shares = allocate(
            [entropy(*item) for item in items],
            [len(pairs) for pairs in distinct],
            total=budget,
        )
        return _once([pairs[:n] for pairs, n in zip(distinct, shares, strict=True)])
    rewards = [_rewards(responses, reference_logps) for _, responses in items]
    ranked = [_by_margin(p, r, margins) for p, r in zip(distinct, rewards, strict=True)]
    assert comparisons != "all"
    return _once([pairs[:comparisons] for pairs in ranked])


def most_comparisons(name: ScheduleName, comparisons: int | Literal["all"], n: int) -> int:
    """The comparisons of a prompt with n responses: at most, and for active schedules on average.

    A knockout takes ceil(3n/2) - 2 for the best and the worst, and one between the two.
    """
    every = math.comb(n, 2)
    if name == "knockout":
        return min(every, math.ceil(3 * n / 2) - 1)
    return every if comparisons == "all" else min(every, comparisons)


def knockout(entrants: Sequence[int], known: Known) -> list[Pair]:
    """The matches to play next for the best and the worst, and at last between these two.

    Entrants meet in pairs; then winners meet winners until one is left, and losers losers. A spare
    one goes on as both. Without a winner (a tie, no verdict) the earlier entrant counts as one.
    """
    winners, losers, missing = _matches(entrants, known)
    if missing:
        return missing
    best, for_best = _last(winners, known, winning=True)
    worst, for_worst = _last(losers, known, winning=False)
    open_matches = list(dict.fromkeys([*for_best, *for_worst]))
    if open_matches or best == worst or _pair(best, worst) in known:
        return open_matches
    return [_pair(best, worst)]


def entropy(prompt: Prompt, responses: Sequence[Response]) -> float:
    """The policy's entropy on a prompt, in nats: minus the mean log-prob of its own responses.

    The predictive entropy of Muldrew et al. 2024 (2402.08114). Raises ConfigError where no response
    has log-probs.
    """
    sampled = [math.fsum(r.logprobs) for r in responses if r.logprobs is not None]
    if not sampled:
        raise ConfigError(
            f"judge.schedule: entropy needs the log-probs of the policy's responses, and those to "
            f"prompt {prompt.id!r} have none. Take judge.schedule: draw."
        )
    return -math.fsum(sampled) / len(sampled)


def allocate(weights: Sequence[float], capacities: Sequence[int], *, total: int) -> list[int]:
    """`total` seats in proportion to weights (D'Hondt), none beyond a capacity; the first wins."""
    seats = [0] * len(weights)
    queue = [(-weight, 0, i) for i, weight in enumerate(weights) if capacities[i]]
    heapq.heapify(queue)
    for _ in range(min(total, sum(capacities))):
        _, _, i = heapq.heappop(queue)
        seats[i] += 1
        if seats[i] < capacities[i]:
            heapq.heappush(queue, (-weights[i] / (seats[i] + 1), seats[i], i))
    return seats


def part_of_budget(sizes: Sequence[int], index: int, *, total: int) -> int:
    """The part of `total` that goes to one of several shards, in proportion to their sizes.

    By the largest remainder (Hare), the first of equals: the parts add up to `total`, each is its
    exact share rounded up or down, and none depends on what was spent before.
    """
    exact = [divmod(total * size, sum(sizes)) for size in sizes]
    left = total - sum(whole for whole, _ in exact)
    order = sorted(range(len(sizes)), key=lambda i: (-exact[i][1], i))
    return exact[index][0] + (index in order[:left])


def _ordered(responses: Sequence[Response], draw: random.Random) -> list[Pair]:
    """All pairs in a seeded order, distinct answers before identical ones."""
    pairs = list(combinations(range(len(responses)), 2))
    keys = [(identical(responses[i], responses[j]), draw.random()) for i, j in pairs]
    return [pair for _, pair in sorted(zip(keys, pairs, strict=True))]


def _once(chosen: list[list[Pair]]) -> Schedule:
    """All at once, whatever the verdicts."""
    return lambda known: [[] for _ in chosen] if any(known) else chosen


def _entrants(responses: Sequence[Response], draw: random.Random) -> tuple[list[int], list[Pair]]:
    """One response of each kind in a seeded order, and pairs of it with its doubles, which are ties
    that nobody is asked about."""
    entrants: list[int] = []
    doubles: list[Pair] = []
    for place, response in enumerate(responses):
        same = (i for i in entrants if identical(responses[i], response))
        if (first := next(same, None)) is None:
            entrants.append(place)
        else:
            doubles.append((first, place))
    draw.shuffle(entrants)
    return entrants, doubles


def _knockouts(fields: Sequence[tuple[list[int], list[Pair]]]) -> Schedule:
    def following(known: Sequence[Known]) -> list[list[Pair]]:
        return [
            [*(pair for pair in doubles if pair not in seen), *knockout(entrants, seen)]
            for (entrants, doubles), seen in zip(fields, known, strict=True)
        ]

    return following


def _matches(entrants: Sequence[int], known: Known) -> tuple[list[int], list[int], list[Pair]]:
    """Winners and losers of one round, and the matches that it still wants."""
    winners, losers, missing = [], [], []
    for first, second in zip(entrants[::2], entrants[1::2], strict=False):
        if _pair(first, second) not in known:
            missing.append(_pair(first, second))
            continue
        lost = _beats(second, first, known)
        winners.append(second if lost else first)
        losers.append(first if lost else second)
    spare = entrants[len(entrants) & ~1 :]
    return [*winners, *spare], [*losers, *spare], missing


def _last(entrants: Sequence[int], known: Known, *, winning: bool) -> tuple[int, list[Pair]]:
    """Who is left when only winners (or only losers) go on, and the matches still wanted."""
    while len(entrants) > 1:
        winners, losers, missing = _matches(entrants, known)
        if missing:
            return entrants[0], missing
        entrants = winners if winning else losers
    return (entrants[0] if entrants else 0), []


def _beats(one: int, other: int, known: Known) -> bool:
    p = known[_pair(one, other)]
    return p is not None and (p > 0.5 if one < other else p < 0.5)


def _pair(one: int, other: int) -> Pair:
    return (one, other) if one < other else (other, one)


def _uncertainty(
    sizes: Sequence[int], pairs: Sequence[list[Pair]], budget: int, ties: Sequence[float]
) -> Schedule:
    """In waves of a comparison a prompt on average, those that the verdicts so far foretell least.

    What is foretold is each prompt's Bradley-Terry model; a wave is filled greedily, as if each of
    its comparisons were made before the next is chosen. `ties` decides between equal prompts.
    """
    budget = min(budget, sum(map(len, pairs)))

    def following(known: Sequence[Known]) -> list[list[Pair]]:
        from online_dpo.asking.bradley_terry import Posterior

        chosen: list[list[Pair]] = [[] for _ in pairs]
        wave = min(len(pairs), budget - sum(map(len, known)))
        if wave <= 0:
            return chosen
        beliefs = [Posterior(n, seen) for n, seen in zip(sizes, known, strict=True)]
        open_pairs = [[p for p in ps if p not in k] for ps, k in zip(pairs, known, strict=True)]

        def best(i: int) -> tuple[float, int, float, int, Pair]:
            gain, pair = beliefs[i].most_informative(open_pairs[i])
            return -gain, len(known[i]) + len(chosen[i]), ties[i], i, pair

        queue = [best(i) for i, left in enumerate(open_pairs) if left]
        heapq.heapify(queue)
        for _ in range(wave):
            *_, i, pair = heapq.heappop(queue)
            chosen[i].append(pair)
            open_pairs[i].remove(pair)
            beliefs[i].expect(pair)
            if open_pairs[i]:
                heapq.heappush(queue, best(i))
        return chosen

    return following


def _rewards(
    responses: Sequence[Response], reference_logps: Mapping[str, float] | None
) -> list[float | None]:
    """log policy / reference of each response, in nats; None for what the policy did not draw."""
    return [
        None
        if r.logprobs is None
        else math.fsum(r.logprobs) - reference_logps[r.id]
        if reference_logps is not None
        else 0.0
        for r in responses
    ]


def _by_margin(
    pairs: Sequence[Pair], rewards: Sequence[float | None], choice: MarginChoice
) -> list[Pair]:
    """Pairs by the size of their implicit reward margin, as chosen; unknown ones last.

    wide: the largest first (Muldrew et al. 2024, 2402.08114); narrow: the smallest, which is where
    ADPO asks (Ji et al. 2024, 2402.09401); mixed: the largest, the smallest, the second largest ...
    """

    def width(pair: Pair) -> float | None:
        first, second = rewards[pair[0]], rewards[pair[1]]
        return None if first is None or second is None else abs(first - second)

    widths = {pair: width(pair) for pair in pairs}
    unknown = [pair for pair in pairs if widths[pair] is None]
    sign = 1 if choice == "narrow" else -1
    known = [pair for pair in pairs if widths[pair] is not None]
    known.sort(key=lambda pair: sign * (widths[pair] or 0.0))
    if choice == "mixed":
        ends = zip(known, reversed(known), strict=True)
        known = [pair for both in ends for pair in both][: len(known)]
    return known + unknown
