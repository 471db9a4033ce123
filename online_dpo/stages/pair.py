"""Stage 3: preferences from what was judged: exactly what will be trained on."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from online_dpo.errors import ConfigError, CorruptError, NoPairsError
from online_dpo.pairing import (
    SELECTORS,
    Candidate,
    Judged,
    Pairing,
    PairSelector,
    check,
    make_pairs,
    mix,
)
from online_dpo.plugins import SELECTOR_GROUP, resolve
from online_dpo.records import Comparison, Preference, Prompt, Score, to_dict
from online_dpo.stages.context import Context
from online_dpo.stages.sample import shard_names
from online_dpo.tables import preference_from_row, read_table, responses_by_prompt, write_table

Row = dict[str, Any]


def pair(context: Context) -> None:
    """Commit `pairs/`, if it is missing. Raises NoPairsError where nothing can be trained on."""
    if context.round.has("pairs"):
        return
    config = context.config.pairs
    shards = shard_names(context)
    labels = [shard.replace("samples/", "labels/") for shard in shards]
    inputs = {name: context.round.manifest(name)["sha256"] for name in [*shards, *labels]}
    judged = [item for s, v in zip(shards, labels, strict=True) for item in _judged(context, s, v)]
    _check_planned(context, judged)
    pairing = make_pairs(
        judged,
        find_selector(config.selector),
        round_number=context.round.number,
        seed=context.inputs.seed,
        scale=context.config.judge.scale,
        min_margin=config.min_margin,
        max_per_prompt=config.max_per_prompt,
    )
    num_responses = sum(len(item.responses) for item in judged)
    assert sum(pairing.fates.values()) == num_responses, "responses do not reconcile"
    if not pairing.preferences:
        raise NoPairsError(_why_none(pairing, num_responses))
    preferences = _mixed(context, pairing.preferences)
    check(preferences)
    _check_held_out(context, preferences)
    with context.round.commit("pairs", inputs=inputs) as draft:
        write_table(draft.path / "pairs.parquet", "pairs", [to_dict(p) for p in preferences])
        metrics = _metrics(pairing, preferences, judged)
        (draft.path / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        draft.rows = len(preferences)


def _check_planned(context: Context, judged: Sequence[Judged]) -> None:
    """What was sampled must be what the plan asks for, which may have been made anew."""
    sampled = {item.prompt.id for item in judged}
    if sampled != set(context.inputs.prompt_ids):
        raise CorruptError(
            f"{context.round.path / 'samples'} holds answers to other prompts than the round's "
            "plan names."
        )


def _judged(context: Context, shard: str, labels: str) -> list[Judged]:
    """Samples and labels of a shard, brought together by id."""
    samples = read_table(context.round.verify(shard) / "samples.parquet")
    verdicts: dict[str, list[Row]] = {}
    for row in read_table(context.round.verify(labels) / "labels.parquet"):
        verdicts.setdefault(row["prompt_id"], []).append(row)
    scored = context.round.manifest(labels)["kind"] == "score"
    prompts = context.load_prompts().by_id
    judged = []
    for prompt_id, responses in responses_by_prompt(samples).items():
        rows = verdicts.get(prompt_id, [])
        if scored:
            by_id = {row["first_id"]: Score(row["score"], row["reason"]) for row in rows}
            scores = [by_id[response.id] for response in responses]
            judged.append(Judged(prompts[prompt_id], responses, scores=scores))
        else:
            judged.append(Judged(prompts[prompt_id], responses, comparisons=_comparisons(rows)))
    return judged


def _comparisons(rows: Sequence[Row]) -> list[Comparison]:
    return [
        Comparison(r["prompt_id"], r["first_id"], r["second_id"], r["p"], r["reason"], r["orders"])
        for r in rows
    ]


def find_selector(name: str) -> PairSelector:
    """A built-in selector, or one of the user's own whose faults are named as its faults.

    Raises ConfigError where there is none of the name.
    """
    if name in SELECTORS:
        return SELECTORS[name]
    selector: PairSelector = resolve(name, group=SELECTOR_GROUP, built_in=tuple(SELECTORS))

    def select(
        prompt: Prompt, candidates: Sequence[Candidate], rng: random.Random
    ) -> Sequence[Candidate]:
        try:
            return list(selector(prompt, candidates, rng))
        except Exception as error:
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"The pair selector {name!r} failed on prompt {prompt.id!r}: {cause}"
            ) from error

    return select


def _mixed(context: Context, new: Sequence[Preference]) -> tuple[Preference, ...]:
    config = context.config.pairs
    earlier: list[Preference] = []
    if config.earlier_share:
        for number in range(1, context.round.number):
            table = context.run.round(number).verify("pairs") / "pairs.parquet"
            own = f"round-{number:03d}"
            earlier += [
                _aged(p) for p in map(preference_from_row, read_table(table)) if p.origin == own
            ]
    offline: list[Preference] = []
    if config.offline is not None:
        table = context.run.round(0).verify("offline") / "pairs.parquet"
        offline = [preference_from_row(row) for row in read_table(table)]
    return mix(
        new,
        earlier,
        offline,
        earlier_share=config.earlier_share,
        offline_share=config.offline.share if config.offline else 0.0,
        seed=context.inputs.seed,
    )


def _aged(preference: Preference) -> Preference:
    """Without the log-probs of the policy that drew it, which is no longer the one that samples."""
    return replace(preference, chosen_sampled_logp=None, rejected_sampled_logp=None)


def _check_held_out(context: Context, preferences: Sequence[Preference]) -> None:
    table = context.load_prompts()
    held_out = {table.by_id[i].token_ids for ids in table.eval.values() for i in ids}
    for preference in preferences:
        assert preference.prompt_token_ids not in held_out, (
            f"pair {preference.pair_id} would train on an evaluation prompt"
        )


def _metrics(
    pairing: Pairing, preferences: Sequence[Preference], judged: Sequence[Judged]
) -> dict[str, Any]:
    new = pairing.preferences
    origins: dict[str, int] = {}
    for preference in preferences:
        origins[preference.origin] = origins.get(preference.origin, 0) + 1
    return {
        "pairs": len(preferences),
        "prompts": len(judged),
        "prompts_with_pairs": len({p.prompt_id for p in new}),
        "responses": dict(pairing.fates),
        "by_source": _by_source(new, judged),
        "origins": dict(sorted(origins.items())),
        "mean_margin": sum(p.margin for p in new) / len(new),
        "mean_chosen_tokens": sum(len(p.chosen_token_ids) for p in new) / len(new),
        "mean_rejected_tokens": sum(len(p.rejected_token_ids) for p in new) / len(new),
    }


def _by_source(new: Sequence[Preference], judged: Sequence[Judged]) -> dict[str, dict[str, int]]:
    """Prompts and new pairs of each prompt source."""
    prompts = Counter(item.prompt.source for item in judged)
    pairs = Counter(preference.prompt_source for preference in new)
    return {s: {"prompts": prompts[s], "pairs": pairs[s]} for s in sorted(prompts)}


def _why_none(pairing: Pairing, num_responses: int) -> str:
    fates = ", ".join(f"{count} {fate}" for fate, count in pairing.fates.items())
    return (
        f"None of the {num_responses} judged responses can be paired: {fates}. Sample more or more "
        "varied responses (sampling.n, temperature), lower pairs.min_margin, or look at the "
        "judge's reasons in labels/."
    )
