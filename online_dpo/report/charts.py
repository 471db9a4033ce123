"""Which curves a report shows, from the figures of rounds and of optimizer steps; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from online_dpo.display.judge_table import judge_figure
from online_dpo.display.wording import figure, number, percent
from online_dpo.metrics import Z95
from online_dpo.report.curves import Chart, Point, Series, thinned
from online_dpo.views import RoundView, evaluated

Steps = Mapping[int, Sequence[Mapping[str, Any]]]
"""The logged optimizer steps of each round, by round."""


def round_charts(rounds: Sequence[RoundView]) -> list[Chart]:
    """What evaluations measured, over rounds."""
    measured = evaluated(rounds)
    return [
        Chart(
            "Reward",
            "mean score",
            [Series("reward", _estimates(measured, "score"))],
            note="Mean score on held-out prompts; band: 95% interval.",
            write=lambda value: f"{value:.3g}",
        ),
        Chart(
            "Win rate",
            "share won",
            [
                Series("against policy 0", _rates(measured, "win_rate_policy0")),
                Series("against the previous", _shares(measured, "win_rate_previous")),
            ],
            note="Held-out prompts won, a tie counted half; band: 95% interval against policy 0.",
            write=percent,
            baseline=(0.5, "no difference"),
            bounds=(0.0, 1.0),
        ),
        Chart(
            "Drift",
            "KL, nats per sequence",
            [
                Series("to policy 0", _estimates(measured, "kl_policy0")),
                Series("to the round's reference", _estimates(measured, "kl_reference")),
            ],
            note="Estimated on fresh samples of the policy; band: 95% interval.",
            write=number,
            includes=(0.0,),
        ),
        Chart(
            "Length",
            "tokens",
            [Series("mean length", _values(measured, "mean_tokens"))],
            note="Mean length of the answers in tokens.",
            write=lambda value: number(value, 1),
            includes=(0.0,),
        ),
        Chart(
            "Diversity",
            "distinct-2",
            [Series("distinct-2", _values(measured, "distinct_2"))],
            note="Distinct word pairs over all word pairs of the answers.",
            write=number,
            includes=(0.0,),
        ),
        Chart(
            "Cut off",
            "share of answers",
            [Series("cut off", _values(measured, "truncated"))],
            note="Answers that reached the token limit.",
            write=percent,
            bounds=(0.0, 1.0),
        ),
    ]


def judge_charts(rounds: Sequence[RoundView]) -> list[Chart]:
    """How sound the judge's verdicts are, over rounds."""
    return [
        Chart(
            "Verdicts in doubt",
            "share of verdicts",
            [
                Series("unreadable", _judged(rounds, "labels", "invalid")),
                Series("abstained", _judged(rounds, "labels", "abstained")),
                Series("in conflict", _judged(rounds, "labels", "order_conflicts")),
            ],
            note="Of each round's labels, before it trained on them.",
            write=percent,
            bounds=(0.0, 1.0),
        ),
        Chart(
            "What wins",
            "share won",
            [
                Series("the longer", _judged(rounds, "labels", "prefers_longer", "value")),
                Series("the first shown", _judged(rounds, "labels", "prefers_first", "value")),
                Series("a constant", _judged(rounds, "constant", "value")),
            ],
            note="Of decided pairs, of decided orders, and of a constant response's probes.",
            write=percent,
            baseline=(0.5, "no leaning"),
            bounds=(0.0, 1.0),
        ),
        Chart(
            "On the gold set",
            "agreement with labels",
            [
                Series("accuracy", _judged(rounds, "gold", "accuracy", "value")),
                Series("Cohen's kappa", _judged(rounds, "gold", "kappa")),
            ],
            note="The comparisons of judge.gold, the same ones in every round.",
            write=number,
            includes=(0.0, 1.0),
        ),
    ]


def step_charts(steps: Steps) -> list[Chart]:
    """What training logged, over the optimizer steps of all rounds; the sft stage by itself."""
    trained = {n: rows for n, rows in steps.items() if n > 0 and rows}
    marks = _round_marks(trained)
    return [
        Chart(
            "Training loss",
            "loss",
            [Series("loss", _logged(trained, "loss"))],
            x_label="step",
            note="Preference loss per optimizer step; a line where a round begins.",
            marks=marks,
        ),
        Chart(
            "Training accuracy",
            "share of pairs",
            [Series("accuracy", _logged(trained, "accuracy"))],
            x_label="step",
            note="Pairs whose chosen response gained more than the rejected one.",
            write=percent,
            bounds=(0.0, 1.0),
            marks=marks,
        ),
        Chart(
            "Implicit rewards",
            "beta x log-ratio",
            [
                Series("chosen", _logged(trained, "chosen_reward")),
                Series("rejected", _logged(trained, "rejected_reward")),
            ],
            x_label="step",
            note="Chosen below zero: less likely than under the reference.",
            marks=marks,
        ),
        Chart(
            "Supervised fine-tuning",
            "loss per token",
            [Series("loss", _logged({0: steps.get(0, ())}, "loss"))],
            x_label="step",
            note="How policy 0 was made from demonstrations.",
        ),
    ]


def _values(measured: Sequence[RoundView], name: str) -> list[Point]:
    values = [(view.round, figure(view, name)) for view in measured]
    return [Point(x, float(value)) for x, value in values if value is not None]


def _judged(rounds: Sequence[RoundView], *place: str) -> list[Point]:
    values = [(view.round, judge_figure(view, *place)) for view in rounds]
    return [Point(x, float(value)) for x, value in values if value is not None]


def _rates(measured: Sequence[RoundView], name: str) -> list[Point]:
    rates = [(view.round, figure(view, name)) for view in measured]
    return [Point(x, r["value"], r["low"], r["high"]) for x, r in rates if r is not None]


def _shares(measured: Sequence[RoundView], name: str) -> list[Point]:
    return [Point(point.x, point.y) for point in _rates(measured, name)]


def _estimates(measured: Sequence[RoundView], name: str) -> list[Point]:
    found = [(view.round, figure(view, name)) for view in measured]
    return [
        Point(x, e["mean"], e["mean"] - Z95 * e["stderr"], e["mean"] + Z95 * e["stderr"])
        for x, e in found
        if e is not None
    ]


def _logged(steps: Steps, name: str) -> list[Point]:
    """A metric over the steps of all rounds, counted on from round to round."""
    rows = [row for _, logged in sorted(steps.items()) for row in logged]
    points = [Point(x, float(row[name])) for x, row in enumerate(rows, start=1) if name in row]
    return thinned(points)


def _round_marks(steps: Steps) -> list[tuple[float, str]]:
    marks, first = [], 1
    for round_number in sorted(steps):
        marks.append((float(first), str(round_number)))
        first += len(steps[round_number])
    return marks
