"""What a round asks its judge beside labels: a gold set, and whether empty words win."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any, Literal

from online_dpo.asking.verdicts import drawn_order
from online_dpo.clashes import num_probes
from online_dpo.config import Config
from online_dpo.judge_health import Asked, comparison_of_scores
from online_dpo.records import Comparison, Prompt, Response, Score, derive_seed
from online_dpo.report_card.comparisons import Labelled, read_comparisons
from online_dpo.stages.context import Context

if TYPE_CHECKING:
    from online_dpo.judging import Labeller

Pair = tuple[Prompt, Response, Response]

GOLD: Literal["gold"] = "gold"
CONSTANT: Literal["constant"] = "constant"
NO_ROUND = 0


def chosen_gold(config: Config) -> list[Labelled]:
    """The comparisons of judge.gold that every round asks about. Raises ConfigError."""
    if config.judge.gold is None:
        return []
    seed = config.campaign.seed
    found, _ = read_comparisons(config.judge.gold, seed=seed)
    drawn = sorted(found, key=lambda g: derive_seed(seed, "gold", g.first.id, g.second.id))
    return drawn[: config.judge.gold_pairs]


def ask_gold(context: Context, labeller: Labeller) -> list[Asked]:
    """The judge's word on the gold set.

    The questions are of no round: even where one order is drawn, they are the same in every one.
    """
    gold = chosen_gold(context.config)
    pairs = [(g.prompt, g.first, g.second) for g in gold]
    labeller.round = NO_ROUND
    try:
        if labeller.kind == "compare":
            said = _compare(context, labeller, pairs, GOLD)
        else:
            items = [(prompt, (first, second)) for prompt, first, second in pairs]
            said = _from_scores(context, pairs, _score(context, labeller, items, GOLD))
    finally:
        labeller.round = context.round.number
    return [
        Asked(GOLD, *pair, comparison, _is_swapped(context, comparison, NO_ROUND), g.gold)
        for g, pair, comparison in zip(gold, pairs, said, strict=True)
    ]


def probed_prompts(context: Context, labeller: Labeller) -> list[str]:
    """The round's prompts on which the constant response is set against the policy's, by seed."""
    seed, number = context.config.campaign.seed, context.round.number
    drawn = sorted(context.inputs.prompt_ids, key=lambda i: derive_seed(seed, "probe", number, i))
    return drawn[: num_probes(context.config.judge, labeller.mode)]


def ask_probes(
    context: Context,
    labeller: Labeller,
    responses: Sequence[Sequence[Response]],
    scores: Mapping[str, Score],
) -> list[Asked]:
    """The judge's word on the constant response against the policy's.

    `responses` are those of each probed prompt. Where the judge scores, `scores` are its labels.
    """
    number, purpose = context.round.number, f"{CONSTANT}-{context.round.number:03d}"
    pairs = _probes(context, responses, num_probes(context.config.judge, labeller.mode))
    if labeller.kind == "compare":
        said = _compare(context, labeller, pairs, purpose)
    else:
        alone = {prompt.id: (prompt, (constant,)) for prompt, constant, _ in pairs}
        given = _score(context, labeller, list(alone.values()), purpose)
        of_constant = {i: score for i, (score,) in zip(alone, given, strict=True)}
        both = [(of_constant[prompt.id], scores[other.id]) for prompt, _, other in pairs]
        said = _from_scores(context, pairs, both)
    return [
        Asked(CONSTANT, *pair, comparison, _is_swapped(context, comparison, number))
        for pair, comparison in zip(pairs, said, strict=True)
    ]


def _probes(context: Context, responses: Sequence[Sequence[Response]], count: int) -> list[Pair]:
    """The constant response against `count` of the policy's, one of each prompt in turn."""
    own = [[r for r in group if r.source == "policy"] for group in responses]
    turns = (r for turn in zip_longest(*own) for r in turn if r is not None)
    chosen = list(islice(turns, count))
    if not chosen:
        return []
    text = context.config.judge.constant
    encoded = context.crew.sampler().call(
        "encode",
        model=context.model_params(context.inputs.policy),
        answers=[{"text": text, "append_eos": True}],
    )
    prompts, tokens = context.load_prompts().by_id, tuple(encoded["ids"][0])
    return [
        (
            prompts[other.prompt_id],
            Response(f"{other.prompt_id}:constant", other.prompt_id, text, tokens, "eos", "given"),
            other,
        )
        for other in chosen
    ]


def _compare(
    context: Context, labeller: Labeller, pairs: Sequence[Pair], purpose: str
) -> list[Comparison]:
    if not pairs:
        return []
    with _shown(context, labeller, len(pairs)) as on_share:
        return labeller.compare_pairs(pairs, purpose=purpose, on_share=on_share)


def _score(
    context: Context,
    labeller: Labeller,
    items: Sequence[tuple[Prompt, Sequence[Response]]],
    purpose: str,
) -> list[tuple[Score, ...]]:
    if not items:
        return []
    with _shown(context, labeller, len(items)) as on_share:
        return labeller.score(items, purpose=purpose, on_share=on_share)


def _from_scores(
    context: Context, pairs: Sequence[Pair], scores: Sequence[Sequence[Score]]
) -> list[Comparison]:
    scale = context.config.judge.scale
    return [
        comparison_of_scores(pair, *both, scale=scale)
        for pair, both in zip(pairs, scores, strict=True)
    ]


def _is_swapped(context: Context, said: Comparison, number: int) -> bool | None:
    """How a pair that was asked about in one order was shown."""
    if len(said.order_ps) != 1:
        return None
    ids = (said.prompt_id, said.first_id, said.second_id)
    return drawn_order(*ids, seed=context.config.campaign.seed, round=number)


@contextmanager
def _shown(
    context: Context, labeller: Labeller, total: int
) -> Iterator[Callable[[float], Any] | None]:
    """A bar for a judge that takes its time; what is called directly takes none."""
    if labeller.mode == "inline":
        yield None
        return
    with context.progress.stage("check", total=total, unit="pairs") as bar:
        yield lambda share: bar.set(int(share * total))
        bar.set(total)
