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
from online_dpo.judge_health import Asked, Shown, asked_row, gold_figures, label_figures, win_rate
from online_dpo.paid.ledger import LEDGER, digest_of
from online_dpo.records import Response, Score
from online_dpo.stages.context import Context
from online_dpo.stages.judge_questions import ask_gold, ask_probes, probed_prompts
from online_dpo.stages.sample import shard_names
from online_dpo.tables import read_table, responses_by_prompt, write_table

if TYPE_CHECKING:
    from online_dpo.judging import Labeller

CHECK = "judge_check"

Row = dict[str, Any]


@dataclass
class _Labelled:
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
    round_ = _read(context, set(prompts))
    scores = {row["first_id"]: Score(row["score"], row["reason"]) for row in _scored(round_.labels)}
    gold = ask_gold(context, labeller)
    probes = ask_probes(context, labeller, [round_.probed[i] for i in prompts], scores)
    figures = label_figures(
        round_.labels,
        round_.samples,
        kind=labeller.kind,
        scale=context.config.judge.scale,
        is_swapped=lambda row: _is_swapped(context, labeller, row),
    )
    figures |= {"gold": gold_figures(gold), "constant": win_rate(p.said for p in probes)}
    _commit(context, labeller, gold, probes, {"kind": labeller.kind, **figures})


def heed_alarms(context: Context) -> None:
    """Tell of every alarm that the round's figures raise.

    Raises StoppedError where the config has one of them stop the campaign.
    """
    figures = read_json(context.round.artifact(CHECK) / "metrics.json")
    number = context.round.number
    alarms = judge_alarms(figures, context.config.alarms, round=number)
    for alarm in alarms:
        context.progress.note(f"alarm: {alarm.sentence}")
        facts = {"alarm": alarm.name, "sentence": alarm.sentence, "action": alarm.action}
        context.run.event("alarm", round=number, **facts)
    if stops := [alarm for alarm in alarms if alarm.action == "stop"]:
        told = " ".join(f"{a.sentence} (alarms.actions.{a.name} is stop.)" for a in stops)
        raise StoppedError(f"{told} Nothing has been trained on the labels of this round.")


def _read(context: Context, probed: set[str]) -> _Labelled:
    """A round's labels with their responses, shard by shard."""
    found = _Labelled()
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


def _scored(labels: Sequence[Row]) -> Sequence[Row]:
    return [row for row in labels if row["second_id"] is None]


def _is_swapped(context: Context, labeller: Labeller, row: Mapping[str, Any]) -> bool | None:
    """How a label of one order was shown; people each have an order of their own."""
    if labeller.mode == "people":
        return None
    ids = (row["prompt_id"], row["first_id"], row["second_id"])
    return drawn_order(*ids, seed=context.config.campaign.seed, round=context.round.number)


def _commit(
    context: Context,
    labeller: Labeller,
    gold: Sequence[Asked],
    probes: Sequence[Asked],
    metrics: Mapping[str, Any],
) -> None:
    labels = context.round.children("labels")
    inputs = {name: context.round.manifest(name)["sha256"] for name in labels}
    if gold:
        told = [[a.prompt.id, a.first.id, a.second.id, a.gold] for a in gold]
        inputs["gold"] = sha256_text(json.dumps(told))
    with context.round.commit(CHECK, inputs=inputs) as draft:
        table = [asked_row(asked) for asked in (*gold, *probes)]
        write_table(draft.path / "checks.parquet", "checks", table)
        (draft.path / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        draft.rows = len(table)
        draft.facts = {"judge": labeller.identity}
        ledger = context.run.path / LEDGER
        if ledger.is_file():
            rows, digest = digest_of(ledger)
            draft.facts["ledger"] = {"rows": rows, "sha256": digest}
