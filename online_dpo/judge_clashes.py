"""Settings of a judge that nothing would read, or that contradict each other, and why; pure.

As in clashes.py, each rule yields a sentence that names the setting first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import BaseModel

from online_dpo.asking.comparison_schedules import ACROSS_PROMPTS, ACTIVE
from online_dpo.loss_rules import needs_reference

if TYPE_CHECKING:
    from online_dpo.config import Config, JudgeConfig

MAX_P_MARGIN = 0.5

PEOPLE = "human"
"""The judge that asks people."""

CALLING = (
    "concurrency",
    "retries",
    "deadline_s",
    "requests_per_minute",
    "tokens_per_minute",
    "service_tier",
    "batch",
    "max_invalid",
    "max_invalid_after",
    "model_mismatch",
    "reuse_from",
)
"""Settings of judges that call an API."""

DEFAULT_PROBES = 32
"""Of a judge whose answers cost neither money nor anybody's time."""

COMPARING = ("orders", "swap", "comparisons", "comparisons_per_round", "schedule", "margins")
"""Settings of judges that compare."""


def is_given(section: BaseModel, field: str) -> bool:
    """Whether a field says something else than its default."""
    return bool(getattr(section, field) != type(section).model_fields[field].default)


def in_judges(config: Config) -> Iterator[str]:
    """What does not go together in the settings of judges, whatever they turn out to be."""
    yield from _swap(config.judge, "judge")
    yield from _schedule(config.judge)
    yield from _implicit_rewards(config)
    yield from _evaluation_judge(config)


def of_judge(
    config: JudgeConfig,
    *,
    section: str,
    compares: bool,
    mode: str,
    priced: bool = True,
    repeats: bool = False,
) -> Iterator[str]:
    """What a judge of this kind and mode (inline, async, worker or own_model) would not read.

    `priced` is False where the judge says that it knows no price for its calls, `repeats` True
    where it answers at temperature 0.
    """
    if repeats:
        yield from _votes(config, section)
    if not priced:
        yield from _money(config, section)
    yield from _kind(config, section, compares)
    yield from _mode(config, section, mode)
    yield from _checks(config, section, mode)
    yield from _timeout(config, section, mode)


def with_judges(
    config: Config, pays: bool, compares: bool, *, also_priced: bool = True
) -> Iterator[str]:
    """What does not go with the judges: `pays`, one may make paid calls; `compares`, labels do.

    `also_priced` is False where nobody knows what sampling.also costs.
    """
    if config.judge.budget.max_usd is not None and not also_priced:
        yield (
            "sampling.also.price_per_million: judge.budget.max_usd cannot be kept without it, and "
            "the price file has none for that model there; give [IN, OUT] in dollars, [0, 0] where "
            "it is free"
        )
    buys = pays or config.sampling.also is not None
    for field in () if buys else ("budget", "prices"):
        if is_given(config.judge, field):
            yield (
                f"judge.{field} is for paid calls, and neither the judge {config.judge.name!r} nor "
                f"another part of this campaign makes any. Leave judge.{field} out"
            )
    if compares and config.pairs.threshold is not None:
        yield (
            f"pairs.threshold holds scores against {config.pairs.threshold:g}, and "
            f"{config.judge.name!r} compares; take a judge that scores, or leave it out"
        )
    if compares and config.pairs.min_margin > MAX_P_MARGIN:
        yield (
            f"pairs.min_margin: {config.pairs.min_margin:g} can never be reached: "
            f"{config.judge.name!r} compares, and a margin is then |p - 0.5|, at most 0.5"
        )


def num_probes(config: JudgeConfig, mode: str) -> int:
    """How often a round probes a judge of this mode with a constant response."""
    if config.probes is not None:
        return config.probes
    return 0 if mode in ("async", "people") else DEFAULT_PROBES


def _votes(config: JudgeConfig, section: str) -> Iterator[str]:
    """Votes of a judge that repeats itself."""
    if config.votes > 1:
        place = "options.members[...].options" if config.options.get("members") else "options"
        yield (
            f"{section}.votes: {config.votes} would buy the same answer so often, for "
            f"{config.name!r} answers at temperature 0. Set {section}.{place}.temperature, e.g. "
            f"0.7, or leave {section}.votes out"
        )


def _money(config: JudgeConfig, section: str) -> Iterator[str]:
    """A budget for calls of unknown price."""
    if config.budget.max_usd is not None:
        yield (
            "judge.budget.max_usd cannot be kept without a price: the price file has none for the "
            f"model of {section} at its endpoint and tier. Set {section}.options.price_per_million"
            ": [IN, OUT] in dollars ([0, 0] where it is free), or name a price file in judge.prices"
        )


def _kind(config: JudgeConfig, section: str, compares: bool) -> Iterator[str]:
    """Settings of the other kind of judge."""
    for field in () if compares else COMPARING:
        if is_given(config, field):
            yield (
                f"{section}.{field}: {getattr(config, field)} is for judges that compare; "
                f"{config.name!r} scores each response by itself. Leave {section}.{field} out"
            )
    if compares and is_given(config, "scale"):
        yield (
            f"{section}.scale makes p of two scores; {config.name!r} compares and gives p itself. "
            f"Leave {section}.scale out"
        )


def _mode(config: JudgeConfig, section: str, mode: str) -> Iterator[str]:
    """Settings of judges that are asked in another way."""
    for field in () if mode == "async" else CALLING:
        if is_given(config, field):
            yield (
                f"{section}.{field} is for judges that call an API; {config.name!r} makes no "
                f"calls. Leave {section}.{field} out"
            )
    for field in ("orders", "votes") if mode == "people" else ():
        if is_given(config, field):
            yield (
                f"{section}.{field}: each annotator is shown a pair once, in an order drawn for "
                f"them; {section}.options.per_item is how many are asked. Leave {section}.{field} "
                "out"
            )


def _checks(config: JudgeConfig, section: str, mode: str) -> Iterator[str]:
    """What is asked of a judge beside labels, to see how good it is."""
    if mode == "people":
        own = "judge.options.gold and judge.options.repeats measure annotators"
        for field in ("gold", "gold_pairs", "probes", "constant"):
            if is_given(config, field):
                yield f"{section}.{field}: {own}. Leave {section}.{field} out"
    if is_given(config, "gold_pairs") and config.gold is None:
        yield (
            f"{section}.gold_pairs is how many of the comparisons of {section}.gold are asked "
            "about, which is not set; give both or neither"
        )
    if is_given(config, "constant") and not num_probes(config, mode):
        yield (
            f"{section}.constant is set against the policy's responses {section}.probes times a "
            f"round, and that is 0{'' if config.probes == 0 else ' for a judge that makes calls'}; "
            f"set {section}.probes, or leave {section}.constant out"
        )


def _timeout(config: JudgeConfig, section: str, mode: str) -> Iterator[str]:
    """A deadline for those who have none."""
    if mode == "people" and is_given(config, "timeout_s"):
        yield f"{section}.timeout_s: people take their time. Leave {section}.timeout_s out"
    if mode in ("inline", "own_model") and is_given(config, "timeout_s"):
        how = "is called directly" if mode == "inline" else "is asked through the sampler"
        yield (
            f"{section}.timeout_s: {config.name!r} {how}, without a deadline. Leave "
            f"{section}.timeout_s out"
        )


def _swap(judge: JudgeConfig, section: str) -> Iterator[str]:
    if judge.orders == "one" and is_given(judge, "swap"):
        yield (
            f"{section}.swap: {judge.swap} combines two orders, and {section}.orders is one; leave "
            "one of the two out"
        )


def _schedule(judge: JudgeConfig) -> Iterator[str]:
    if judge.schedule == "knockout" and judge.comparisons != "all":
        yield (
            "judge.comparisons: a knockout has as many comparisons as it takes to find the best "
            "and the worst; leave it out"
        )
    of_round = judge.comparisons_per_round
    if judge.schedule in ACTIVE and judge.comparisons == "all" and of_round is None:
        yield (
            f"judge.schedule: {judge.schedule} chooses which comparisons a budget goes to; set "
            "judge.comparisons, their number for each prompt"
        )
    if of_round is None:
        return
    if judge.schedule not in ACROSS_PROMPTS:
        yield (
            f"judge.comparisons_per_round: {of_round} is for schedules that give some prompts more "
            f"than others ({', '.join(ACROSS_PROMPTS)}), and judge.schedule is {judge.schedule}; "
            "set judge.comparisons, the number for each prompt, or one of these schedules"
        )
    if judge.comparisons != "all":
        yield (
            f"judge.comparisons_per_round: {of_round} stands in the place of judge.comparisons: "
            f"{judge.comparisons}; leave one of the two out"
        )


def _implicit_rewards(config: Config) -> Iterator[str]:
    if config.judge.schedule != "reward_margin":
        if is_given(config.judge, "margins"):
            yield (
                f"judge.margins: {config.judge.margins} says which implicit margins judge.schedule:"
                f" reward_margin asks about, and judge.schedule is {config.judge.schedule}; leave "
                "one of the two out"
            )
        return
    if not needs_reference(config.train.loss):
        yield (
            "judge.schedule: reward_margin goes by log(policy / reference), and the loss has no "
            "reference; take another schedule"
        )
    if config.reference.promote == "every_round":
        yield (
            "judge.schedule: reward_margin goes by log(policy / reference), which is 0 where the "
            "policy that samples is the reference, as with reference.promote: every_round; set "
            "that to never or {every: k}, or take another schedule"
        )


def _evaluation_judge(config: Config) -> Iterator[str]:
    if config.eval_judge.name == PEOPLE:
        yield (
            f"evaluation.judge: people (judge.name: {PEOPLE}) label what is trained on, and "
            "answers to held-out prompts are not kept for them; name another judge there"
        )
    judge = config.evaluation.judge
    if judge is None:
        return
    yield from _swap(judge, "evaluation.judge")
    reasons = {
        **dict.fromkeys(
            ("comparisons", "comparisons_per_round", "schedule", "margins"),
            "an evaluation compares each answer with policy 0's and the previous one's",
        ),
        "scale": "an evaluation counts wins, and no p is made of its scores",
        **dict.fromkeys(
            ("gold", "gold_pairs", "probes", "constant"), "the judge that labels is checked"
        ),
    }
    for field, reason in reasons.items():
        if is_given(judge, field):
            yield f"evaluation.judge.{field}: {reason}; leave it out"
