"""What a round asks its judge beside labels: a gold set, and whether empty words win."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any

from online_dpo.config import Config
from online_dpo.judge_clashes import num_probes
from online_dpo.progress import SilentProgress
from online_dpo.records import Response, derive_seed, to_dict
from online_dpo.report_card.answers import Answered, Answers, Pair
from online_dpo.report_card.comparisons import Labelled, read_comparisons
from online_dpo.resources import find_rows
from online_dpo.stages.context import Context

if TYPE_CHECKING:
    from online_dpo.judging import Labeller

GOLD = "gold"
CONSTANT = "constant"


def chosen_gold(config: Config) -> list[Labelled]:
    """The comparisons of judge.gold that every round asks about. Raises ConfigError."""
    gold, seed = config.judge.gold, config.campaign.seed
    if gold is None:
        return []
    found, _ = read_comparisons(find_rows(gold), seed=seed)
    drawn = sorted(found, key=lambda g: derive_seed(seed, GOLD, g.first.id, g.second.id))
    return drawn[: config.judge.gold_pairs]


def ask_gold(context: Context, labeller: Labeller, gold: Sequence[Labelled]) -> list[Answered]:
    """The judge's word on each comparison of the gold set.

    The questions are of no round: even where one order is drawn, they are the same in every one.
    """
    pairs = [(row.prompt, row.first, row.second) for row in gold]
    labeller.round = 0
    try:
        return _answers(context, labeller).on(pairs, purpose=GOLD)
    finally:
        labeller.round = context.round.number


def ask_probes(context: Context, labeller: Labeller, probes: Sequence[Pair]) -> list[Answered]:
    """The judge's word on the constant response against each of the policy's."""
    purpose = f"{CONSTANT}-{context.round.number:03d}"
    return _answers(context, labeller).on(probes, purpose=purpose)


def probed_prompts(context: Context, labeller: Labeller) -> list[str]:
    """The round's prompts on which the constant response is set against the policy's, by seed."""
    seed, number = context.config.campaign.seed, context.round.number
    drawn = sorted(context.inputs.prompt_ids, key=lambda i: derive_seed(seed, "probe", number, i))
    return drawn[: num_probes(context.config.judge, labeller.mode)]


def make_probes(
    context: Context, labeller: Labeller, responses: Sequence[Sequence[Response]]
) -> list[Pair]:
    """The constant response against the policy's, one of each prompt in turn.

    `responses` are those of each of `probed_prompts`.
    """
    own = [[r for r in group if r.source == "policy"] for group in responses]
    turns = (r for turn in zip_longest(*own) for r in turn if r is not None)
    chosen = list(islice(turns, num_probes(context.config.judge, labeller.mode)))
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


def check_row(part: str, pair: Pair, said: Answered, gold: float | None = None) -> dict[str, Any]:
    """A row of the checks table."""
    prompt, first, second = pair
    return {
        "part": part,
        "prompt_text": prompt.content,
        "first_text": first.text,
        "second_text": second.text,
        "gold": gold,
        **to_dict(said.comparison),
    }


def _answers(context: Context, labeller: Labeller) -> Answers:
    """A judge that is called directly takes no time worth a bar."""
    inline = labeller.mode == "inline"
    return Answers(labeller, SilentProgress() if inline else context.progress)
