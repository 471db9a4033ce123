"""Stage 2b: how sound a round's verdicts are, measured before they are trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from online_dpo.alarms import judge_alarms
from online_dpo.asking.verdicts import drawn_order
from online_dpo.errors import StoppedError
from online_dpo.files import read_json, sha256_text
from online_dpo.judge_health import Shown, gold_figures, label_figures, win_rate
from online_dpo.paid.ledger import ledger_facts
from online_dpo.records import Response
from online_dpo.report_card.answers import Pair
from online_dpo.report_card.comparisons import Labelled
from online_dpo.stages.context import Context
from online_dpo.stages.judge_questions import (
    CONSTANT,
    GOLD,
    ask_gold,
    ask_probes,
    check_row,
    chosen_gold,
    make_probes,
    probed_prompts,
)
from online_dpo.stages.sample import shard_names
from online_dpo.tables import read_table, responses_by_prompt, write_table

if TYPE_CHECKING:
    from online_dpo.judging import Labeller

CHECK = "judge_check"

Row = dict[str, Any]


@dataclass
class _Collected:
    """A round's labels, what judges saw of its responses, and the responses to some prompts."""

    labels: list[Row] = field(default_factory=list)
    samples: dict[str, Shown] = field(default_factory=dict)
    probed: dict[str, list[Response]] = field(default_factory=dict)


def check_judge(context: Context) -> None:
    """Commit `judge_check/`, if it is missing: the judge's figures on the round's labels, on the
    gold set and on a constant response.
    """
    if context.round.has(CHECK):
        return
    labeller = context.make_labeller(False)
    prompts = probed_prompts(context, labeller)
    collected = _read(context, set(prompts))
    figures = label_figures(
        collected.labels,
        collected.samples,
        kind=labeller.kind,
        scale=context.config.judge.scale,
        is_swapped=lambda row: _is_swapped(context, labeller, row),
    )
    gold = chosen_gold(context.config)
    on_gold = ask_gold(context, labeller, gold)
    probes = make_probes(context, labeller, [collected.probed[i] for i in prompts])
    on_probes = ask_probes(context, labeller, probes)
    metrics = {
        "kind": labeller.kind,
        **figures,
        "gold": gold_figures(gold, on_gold),
        "constant": win_rate(said.comparison for said in on_probes),
    }
    rows = [check_row(GOLD, _pair(g), a, g.gold) for g, a in zip(gold, on_gold, strict=True)]
    rows += [check_row(CONSTANT, p, a) for p, a in zip(probes, on_probes, strict=True)]
    _commit(context, labeller, rows, metrics, gold)


def heed_alarms(context: Context) -> None:
    """Tell of every alarm that the round's figures raise.

    Raises StoppedError where the config has one of them stop the campaign.
    """
    figures = read_json(context.round.verify(CHECK) / "metrics.json")
    number = context.round.number
    alarms = judge_alarms(figures, context.config.alarms, round=number)
    for alarm in alarms:
        context.progress.note(f"alarm: {alarm.sentence}")
        facts = {"alarm": alarm.name, "sentence": alarm.sentence, "action": alarm.action}
        context.run.event("alarm", round=number, **facts)
    if stops := [alarm for alarm in alarms if alarm.action == "stop"]:
        told = " ".join(f"{a.sentence} (alarms.actions.{a.name} is stop.)" for a in stops)
        raise StoppedError(f"{told} Nothing has been trained on the labels of this round.")


def _read(context: Context, probed: set[str]) -> _Collected:
    """A round's labels with their responses, shard by shard."""
    found = _Collected()
    for shard in shard_names(context):
        labels = shard.replace("samples/", "labels/")
        found.labels += read_table(context.round.verify(labels) / "labels.parquet")
        rows = read_table(context.round.verify(shard) / "samples.parquet")
        for prompt_id, responses in responses_by_prompt(rows).items():
            for r in responses:
                found.samples[r.id] = Shown(r.text, r.finish_reason, len(r.token_ids))
            if prompt_id in probed:
                found.probed[prompt_id] = responses
    return found


def _pair(row: Labelled) -> Pair:
    return row.prompt, row.first, row.second


def _is_swapped(context: Context, labeller: Labeller, row: Mapping[str, Any]) -> bool | None:
    """How a label of one order was shown; people each have an order of their own."""
    if labeller.mode == "people":
        return None
    ids = (row["prompt_id"], row["first_id"], row["second_id"])
    return drawn_order(*ids, seed=context.config.campaign.seed, round=context.round.number)


def _commit(
    context: Context,
    labeller: Labeller,
    rows: Sequence[Row],
    metrics: Mapping[str, Any],
    gold: Sequence[Labelled],
) -> None:
    labels = context.round.children("labels")
    inputs = {name: context.round.manifest(name)["sha256"] for name in labels}
    if gold:
        told = [[g.prompt.id, g.first.id, g.second.id, g.gold] for g in gold]
        inputs[GOLD] = sha256_text(json.dumps(told))
    with context.round.commit(CHECK, inputs=inputs) as draft:
        write_table(draft.path / "checks.parquet", "checks", rows)
        (draft.path / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        draft.rows = len(rows)
        draft.facts = {"judge": labeller.identity, **ledger_facts(context.run.path)}
