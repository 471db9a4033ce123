"""Stage 3: from what was judged to exactly what will be trained on."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from online_dpo.errors import ConfigError, CorruptError, NoPairsError
from online_dpo.pairing import (
    SELECTORS,
    Candidate,
    Judged,
    Pairing,
    PairSelector,
    Row,
    check,
    make_pairs,
    mix,
)
from online_dpo.plugins import SELECTOR_GROUP, resolve
from online_dpo.records import Comparison, Preference, Prompt, Score, Unpaired, to_dict
from online_dpo.stages.context import Context, trained_on
from online_dpo.stages.sample import shard_names
from online_dpo.tables import (
    preference_from_row,
    read_table,
    responses_by_prompt,
    unpaired_from_row,
    write_table,
)
from online_dpo.unpaired import Labelling, check_unpaired, make_unpaired


def pair(context: Context) -> None:
    """Commit `pairs/`, or `unpaired/` by pairs.threshold, if it is missing.

    Raises NoPairsError where nothing can be trained on.
    """
    if context.round.has(trained_on(context.round)):
        return
    shards = shard_names(context)
    labels = [shard.replace("samples/", "labels/") for shard in shards]
    inputs = {name: context.round.manifest(name)["sha256"] for name in [*shards, *labels]}
    judged = [item for s, v in zip(shards, labels, strict=True) for item in _judged(context, s, v)]
    _check_planned(context, judged)
    if context.config.pairs.threshold is None:
        _commit_pairs(context, judged, inputs)
    else:
        _commit_unpaired(context, judged, inputs, threshold=context.config.pairs.threshold)


def _commit_pairs(context: Context, judged: Sequence[Judged], inputs: dict[str, str]) -> None:
    config = context.config.pairs
    pairing = make_pairs(
        judged,
        find_selector(config.selector),
        round_number=context.round.number,
        seed=context.inputs.seed,
        scale=context.config.judge.scale,
        min_margin=config.min_margin,
        max_per_prompt=config.max_per_prompt,
    )
    num_responses = _reconciled(judged, pairing.fates)
    if not pairing.preferences:
        raise NoPairsError(_why_none("paired", pairing.fates, num_responses))
    preferences = _mixed(context, pairing.preferences, "pairs", _aged)
    check(preferences)
    metrics = _metrics(pairing, preferences, judged)
    _commit(context, "pairs", preferences, metrics, inputs)


def _commit_unpaired(
    context: Context, judged: Sequence[Judged], inputs: dict[str, str], *, threshold: float
) -> None:
    labelling = make_unpaired(
        judged,
        threshold=threshold,
        min_margin=context.config.pairs.min_margin,
        round_number=context.round.number,
    )
    num_responses = _reconciled(judged, labelling.fates)
    if len({row.label for row in labelling.rows}) < 2:
        raise NoPairsError(_why_none("told into good and bad", labelling.fates, num_responses))
    rows = _mixed(context, labelling.rows, "unpaired", unpaired_from_row)
    check_unpaired(rows)
    _commit(context, "unpaired", rows, _unpaired_metrics(labelling, rows, judged), inputs)


def _commit(
    context: Context,
    name: str,
    rows: Sequence[Preference] | Sequence[Unpaired],
    metrics: dict[str, Any],
    inputs: dict[str, str],
) -> None:
    _check_held_out(context, rows)
    with context.round.commit(name, inputs=inputs) as draft:
        write_table(draft.path / f"{name}.parquet", name, [to_dict(row) for row in rows])
        (draft.path / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        draft.rows = len(rows)


def _reconciled(judged: Sequence[Judged], fates: Mapping[str, int]) -> int:
    """The number of responses, each of which has a fate."""
    num_responses = sum(len(item.responses) for item in judged)
    assert sum(fates.values()) == num_responses, "responses do not reconcile"
    return num_responses


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
    verdicts: dict[str, list[dict[str, Any]]] = {}
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


def _comparisons(rows: Sequence[dict[str, Any]]) -> list[Comparison]:
    return [
        Comparison(
            r["prompt_id"],
            r["first_id"],
            r["second_id"],
            r["p"],
            r["reason"],
            r["orders"],
            tuple(r["raws"]),
            tuple(r["order_ps"]),
        )
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


def _mixed(
    context: Context, new: Sequence[Row], name: str, parse: Callable[[dict[str, Any]], Row]
) -> tuple[Row, ...]:
    """New rows with those of earlier artifacts of this name, and with round 0's offline ones."""
    config = context.config.pairs
    earlier: list[Row] = []
    if config.earlier_share:
        for number in range(1, context.round.number):
            if context.run.round(number).has(name):
                table = context.run.round(number).verify(name) / f"{name}.parquet"
                own = f"round-{number:03d}"
                earlier += [r for r in map(parse, read_table(table)) if r.origin == own]
    offline: list[Row] = []
    if config.offline is not None:
        table = context.run.round(0).verify("offline") / f"{name}.parquet"
        offline = [parse(row) for row in read_table(table)]
    return mix(
        new,
        earlier,
        offline,
        earlier_share=config.earlier_share,
        offline_share=config.offline.share if config.offline else 0.0,
        seed=context.inputs.seed,
    )


def _aged(row: dict[str, Any]) -> Preference:
    """Without the log-probs of the policy that drew it, which is no longer the one that samples."""
    preference = preference_from_row(row)
    return replace(preference, chosen_sampled_logp=None, rejected_sampled_logp=None)


def _check_held_out(context: Context, rows: Sequence[Preference] | Sequence[Unpaired]) -> None:
    table = context.load_prompts()
    held_out = {table.by_id[i].token_ids for ids in table.eval.values() for i in ids}
    for row in rows:
        assert row.prompt_token_ids not in held_out, (
            f"a row of {row.prompt_source} would train on the evaluation prompt {row.prompt_id}"
        )


def _metrics(
    pairing: Pairing, preferences: Sequence[Preference], judged: Sequence[Judged]
) -> dict[str, Any]:
    new = pairing.preferences
    return {
        "pairs": len(preferences),
        **_shared_metrics(pairing.fates, new, preferences, judged, "pairs"),
        "mean_margin": sum(p.margin for p in new) / len(new),
        "mean_chosen_tokens": sum(len(p.chosen_token_ids) for p in new) / len(new),
        "mean_rejected_tokens": sum(len(p.rejected_token_ids) for p in new) / len(new),
    }


def _unpaired_metrics(
    labelling: Labelling, rows: Sequence[Unpaired], judged: Sequence[Judged]
) -> dict[str, Any]:
    new = labelling.rows
    tokens = {
        label: [len(row.completion_token_ids) for row in new if row.label is label]
        for label in (True, False)
    }
    return {
        "unpaired": len(rows),
        "good": sum(row.label for row in rows),
        "bad": sum(not row.label for row in rows),
        **_shared_metrics(labelling.fates, new, rows, judged, "unpaired"),
        "mean_margin": sum(row.margin for row in new) / len(new),
        "mean_good_tokens": sum(tokens[True]) / len(tokens[True]),
        "mean_bad_tokens": sum(tokens[False]) / len(tokens[False]),
    }


def _shared_metrics(
    fates: Mapping[str, int],
    new: Sequence[Preference] | Sequence[Unpaired],
    rows: Sequence[Preference] | Sequence[Unpaired],
    judged: Sequence[Judged],
    name: str,
) -> dict[str, Any]:
    prompts = Counter(item.prompt.source for item in judged)
    made = Counter(row.prompt_source for row in new)
    return {
        "prompts": len(judged),
        f"prompts_with_{name}": len({row.prompt_id for row in new}),
        "responses": dict(fates),
        "by_source": {s: {"prompts": prompts[s], name: made[s]} for s in sorted(prompts)},
        "origins": dict(sorted(Counter(row.origin for row in rows).items())),
    }


def _why_none(done: str, fates: Mapping[str, int], num_responses: int) -> str:
    told = ", ".join(f"{count} {fate}" for fate, count in fates.items())
    return (
        f"None of the {num_responses} judged responses can be {done}: {told}. Sample more or more "
        "varied responses (sampling.n, temperature), lower pairs.min_margin, or look at the "
        "judge's reasons in labels/."
    )
