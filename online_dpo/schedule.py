"""What a round will do, decided before it starts from the config and the history alone; pure."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from online_dpo.config import Config
from online_dpo.records import ModelRef, RoundPlan, derive_seed


@dataclass(frozen=True)
class PastRound:
    """What the schedule needs of a finished round (round 0 is where policy 0 came from)."""

    round: int
    prompt_ids: tuple[str, ...]
    policy: ModelRef
    promoted: bool
    optimizer: ModelRef | None
    optimizer_step: int
    manifest_sha256: str


@dataclass(frozen=True)
class PromptPool:
    """The training prompts of a campaign: ids by source, the sources' weights, the table's hash."""

    ids: Mapping[str, Sequence[str]]
    weights: Mapping[str, float]
    sha256: str

    @property
    def size(self) -> int:
        return sum(len(ids) for ids in self.ids.values())


def plan_round(config: Config, history: Sequence[PastRound], pool: PromptPool) -> RoundPlan:
    """The inputs of the round after `history`, which starts with round 0."""
    last = history[-1]
    number = last.round + 1
    reference = next(past for past in reversed(history) if past.promoted or past.round == 0)
    carry = config.train.optimizer == "carry"
    return RoundPlan(
        round=number,
        seed=derive_seed(config.campaign.seed, "round", number),
        prompt_ids=draw_prompts(
            pool,
            [past.prompt_ids for past in history],
            num_prompts=config.campaign.prompts_per_round,
            seed=config.campaign.seed,
        ),
        prompts_sha256=pool.sha256,
        policy=last.policy,
        reference=reference.policy,
        reference_round=reference.round,
        beta=config.train.beta,
        learning_rate=config.train.learning_rate,
        rounds=config.campaign.rounds,
        optimizer=last.optimizer if carry else None,
        optimizer_step=last.optimizer_step if carry else 0,
        evaluate=is_evaluated(config, number),
        previous_manifest_sha256=last.manifest_sha256,
    )


def is_evaluated(config: Config, number: int) -> bool:
    """Every k-th round, round 0 and the last."""
    last = number == config.campaign.rounds
    return number == 0 or last or number % config.evaluation.every == 0


def is_promoted(config: Config, number: int) -> tuple[bool, str]:
    """Whether round `number`'s policy becomes the next reference, and why."""
    promote = config.reference.promote
    if promote == "every_round":
        return True, "reference.promote is every_round"
    if promote == "never":
        return False, "reference.promote is never: policy 0 stays the reference"
    assert isinstance(promote, dict)
    k = promote["every"]
    if number % k == 0:
        return True, f"reference.promote is every {k} rounds"
    return (
        False,
        f"reference.promote is every {k} rounds; the next is round {(number // k + 1) * k}",
    )


def draw_prompts(
    pool: PromptPool, history: Sequence[Sequence[str]], *, num_prompts: int, seed: int
) -> tuple[str, ...]:
    """A round's prompt ids: least used first, in a seeded order, no repeats within a round.

    So nothing of a source repeats before the source is used up. Sources get places in proportion
    to their weights, counted over all rounds; where one has too few prompts, others fill in.
    """
    uses = Counter(prompt for ids in history for prompt in ids)
    queues = {name: _by_use(ids, uses, seed) for name, ids in pool.ids.items()}
    taken = {name: sum(uses[prompt] for prompt in ids) for name, ids in pool.ids.items()}
    chosen: list[str] = []
    while len(chosen) < num_prompts and any(queues.values()):
        source = _neediest(queues, taken, pool.weights)
        chosen.append(queues[source].pop())
        taken[source] += 1
    return tuple(chosen)


def _by_use(ids: Sequence[str], uses: Mapping[str, int], seed: int) -> list[str]:
    """Ids with the next to take last: fewest uses, then a hash of seed, use and id."""

    def key(prompt: str) -> tuple[int, bytes]:
        used = uses.get(prompt, 0)
        return used, hashlib.sha256(f"{seed}/{used}/{prompt}".encode()).digest()

    return sorted(ids, key=key, reverse=True)


def _neediest(
    queues: Mapping[str, Sequence[str]], taken: Mapping[str, int], weights: Mapping[str, float]
) -> str:
    """The source with prompts left that is furthest behind its share."""
    open_sources = [name for name, queue in queues.items() if queue]
    return min(open_sources, key=lambda name: ((taken[name] + 1) / weights[name], name))
