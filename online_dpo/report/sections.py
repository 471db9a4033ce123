"""What the parts of a report hold, gathered from a run directory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from online_dpo.display.judge_table import (
    SPENDING_LEGEND,
    judge_legend,
    judge_table,
    spending_table,
)
from online_dpo.display.lookup import PairView, example_pairs, spread
from online_dpo.display.wording import (
    FATES,
    change,
    drift,
    estimate,
    fate_order,
    figure,
    number,
    percent,
    precision,
    rate,
    seconds,
)
from online_dpo.files import read_json
from online_dpo.store import RunDir, read_lines
from online_dpo.views import Campaign, RoundView, evaluated, source_views

_MAX_PROMPTS = 200
_MAX_PAIR_ROUNDS = 10
_PAIRS_PER_ROUND = 3
_SECRET = re.compile(r"(^|_)(api_?key|secret|password|token|authorization)$", re.IGNORECASE)


@dataclass(frozen=True)
class Tile:
    """One figure of the last evaluation in large, with what it is to be compared with."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Answer:
    """One policy's answer to a held-out prompt. `outcome` is won, tied or lost against policy 0."""

    text: str
    num_tokens: int
    truncated: bool
    score: str
    reason: str
    outcome: str


@dataclass(frozen=True)
class AnsweredPrompt:
    """A held-out prompt with the answers of the policies of `Answers.rounds`."""

    text: str
    source: str
    answers: Sequence[Answer | None]


@dataclass(frozen=True)
class Answers:
    """Sample answers side by side: the first prompts, the others, and how many are left out."""

    rounds: Sequence[int]
    shown: Sequence[AnsweredPrompt]
    others: Sequence[AnsweredPrompt]
    left_out: int


@dataclass(frozen=True)
class Grid:
    """A table of text: titles, and rows whose first cell names them."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class ExamplePairs:
    """Pairs by round, and the number of rounds with pairs of which none are shown."""

    shown: Sequence[tuple[int, Sequence[PairView]]]
    left_out: int


def tiles(rounds: Sequence[RoundView]) -> list[Tile]:
    """The last evaluation against the first."""
    measured = evaluated(rounds)
    if not measured:
        return []
    first, last = measured[0], measured[-1]
    won, score, moved = (figure(last, n) for n in ("win_rate_policy0", "score", "kl_policy0"))
    found = []
    if won is not None:
        interval = f"95% interval {100 * won['low']:.0f}-{100 * won['high']:.0f}%"
        found.append(Tile("Wins against policy 0", percent(won["value"]), interval))
    if score is not None:
        before = figure(first, "score")
        digits = precision(score)
        known = last is not first and before is not None
        note = f"from {number(before['mean'], digits)}" if known else "policy 0"
        found.append(Tile("Reward", number(score["mean"], digits), note))
    if moved is not None:
        value = drift(moved).split(" ")[0]
        found.append(Tile("KL to policy 0", value, "nats per sequence"))
    for title, name, digits in (("Length", "mean_tokens", 1), ("Distinct-2", "distinct_2", 2)):
        before, after = figure(first, name), figure(last, name)
        if after is not None:
            note = "policy 0" if last is first else f"from {number(before, digits)}"
            found.append(Tile(title, number(after, digits), note))
    return found


def round_grid(rounds: Sequence[RoundView]) -> Grid:
    """A row a round with all its figures; columns without a value are left out."""
    titles = (
        "round", "stage", "reward", "wins vs 0", "vs previous", "KL to ref", "KL to 0", "tokens",
        "cut off", "distinct-2", "pairs", "good or bad", "loss",
    )  # fmt: skip
    rows = [_round_row(view) for view in rounds]
    kept = [i for i in range(len(titles)) if any(row[i] != "-" for row in rows)]
    return Grid([titles[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _round_row(view: RoundView) -> list[str]:
    training = view.training or {}
    return [
        str(view.round),
        view.stage,
        estimate(figure(view, "score")),
        rate(figure(view, "win_rate_policy0")),
        rate(figure(view, "win_rate_previous")),
        drift(figure(view, "kl_reference")),
        drift(figure(view, "kl_policy0")),
        number(figure(view, "mean_tokens"), 1),
        percent(figure(view, "truncated")),
        number(figure(view, "distinct_2")),
        str(view.pairs or "-"),
        str(view.unpaired or "-"),
        change(training.get("first_loss"), training.get("last_loss"), 3),
    ]


def source_grid(rounds: Sequence[RoundView]) -> Grid | None:
    """The last evaluation by prompt source, where there is more than one."""
    measured = evaluated(rounds)
    sources = source_views(measured[-1]) if measured else {}
    if len(sources) < 2:
        return None
    grid = round_grid(list(sources.values()))
    rows = [
        [name, str(figure(view, "prompts")), *row[2:]]
        for (name, view), row in zip(sources.items(), grid.rows, strict=True)
    ]
    return Grid(["source", "prompts", *grid.titles[2:]], rows)


def fate_grid(rounds: Sequence[RoundView]) -> tuple[Grid, list[tuple[str, str]]] | None:
    """Responses by fate in every round, and what the fates mean."""
    counted = [view for view in rounds if view.responses]
    if not counted:
        return None
    fates = fate_order(counted)
    rows = [
        [
            *(str(v.round), str(v.samples), *(str(v.responses.get(f, 0)) for f in fates)),
            str(v.pairs or v.unpaired),
        ]
        for v in counted
    ]
    what = "pairs" if any(v.pairs for v in counted) else "trained on"
    titles = ["round", "responses", *(fate.replace("_", " ") for fate in fates), what]
    meanings = [(f.replace("_", " "), FATES[f]) for f in fates if f in FATES]
    return Grid(titles, rows), meanings


def judge_grid(rounds: Sequence[RoundView]) -> tuple[Grid, str] | None:
    """How sound the judge's verdicts are in every round, and what the columns mean."""
    table = judge_table(rounds)
    return None if table is None else (Grid(*table), judge_legend(table[0]))


def spending_grid(rounds: Sequence[RoundView]) -> tuple[Grid, str] | None:
    """What paid calls came to in every round, and what the columns mean."""
    table = spending_table(rounds)
    return None if table is None else (Grid(*table), SPENDING_LEGEND)


def unjudged(rounds: Sequence[RoundView]) -> list[tuple[int, str, int]]:
    """(round, reason, count) of verdicts that are none."""
    return [
        (view.round, reason, count) for view in rounds for reason, count in view.no_verdict.items()
    ]


def time_grid(rounds: Sequence[RoundView]) -> Grid | None:
    """Where the time of each round went."""
    timed = [view for view in rounds if view.wall_s is not None]
    if not timed:
        return None
    order = ("sample", "label", "pair", "train", "evaluate")
    known = {stage for view in timed for stage in view.busy_s}
    stages = [s for s in order if s in known] + sorted(known - set(order))
    rows = [
        [str(v.round), *map(seconds, [*map(v.busy_s.get, stages), v.fixed_s, v.wall_s])]
        for v in timed
    ]
    return Grid(["round", *stages, "fixed", "wall"], rows)


def origin_grid(rounds: Sequence[RoundView]) -> Grid:
    """Policy and reference of every round by place and hash, and why it was promoted or not."""
    rows = [[str(v.round), _model(v.policy), _model(v.reference), v.why or "-"] for v in rounds]
    return Grid(["round", "policy", "reference", "promotion"], rows)


def _model(model: Mapping[str, str] | None) -> str:
    return "-" if model is None else f"{model['path']} {model['sha256'][:12]}"


def sample_answers(campaign: Campaign, rounds: Sequence[RoundView]) -> Answers | None:
    """The answers of policy 0, of a policy half-way and of the last one."""
    measured = [view.round for view in evaluated(rounds)]
    if not measured:
        return None
    chosen = [measured[index] for index in spread(len(measured), 3)]
    tables = [{row["prompt_id"]: row for row in campaign.answers(n)} for n in chosen]
    prompts = [
        AnsweredPrompt(
            row["prompt_text"], row["prompt_source"], [_answer(t.get(key)) for t in tables]
        )
        for key, row in tables[-1].items()
    ]
    first = campaign.config.evaluation.examples
    last = max(first, _MAX_PROMPTS)
    return Answers(chosen, prompts[:first], prompts[first:last], max(0, len(prompts) - last))


def _answer(row: Mapping[str, Any] | None) -> Answer | None:
    if row is None:
        return None
    p = row["p_policy0"]
    return Answer(
        text=row["text"],
        num_tokens=len(row["token_ids"]),
        truncated=row["finish_reason"] == "length",
        score="" if row["score"] is None else number(row["score"]),
        reason=row["reason"] or "",
        outcome="" if p is None else "won" if p > 0.5 else "lost" if p < 0.5 else "tied",
    )


def sample_pairs(campaign: Campaign, rounds: Sequence[RoundView]) -> ExamplePairs:
    """A few pairs of each round, of the widest, a middle and the narrowest margin."""
    paired = [view.round for view in rounds if view.pairs]
    chosen = [paired[index] for index in spread(len(paired), _MAX_PAIR_ROUNDS)]
    shown = [(n, example_pairs(campaign.path, n, _PAIRS_PER_ROUND)) for n in chosen]
    return ExamplePairs(shown, len(paired) - len(chosen))


def logged_steps(
    campaign: Campaign, rounds: Sequence[RoundView]
) -> dict[int, list[dict[str, Any]]]:
    """The optimizer steps of every round that has trained."""
    run = RunDir(campaign.path)
    files = {v.round: run.round(v.round).path / "training" / "steps.jsonl" for v in rounds}
    return {number: read_lines(file) for number, file in files.items() if file.is_file()}


def versions(campaign: Campaign) -> dict[str, str]:
    """What the campaign was started with."""
    file = campaign.path / "versions.json"
    known = read_json(file) if file.is_file() else {}
    return {name: str(value) for name, value in known.items() if value is not None}


def without_secrets(value: Any) -> Any:
    """A config's plain values with those of keys that name a secret hidden."""
    if isinstance(value, Mapping):
        return {
            key: "(hidden)" if inner and _SECRET.search(str(key)) else without_secrets(inner)
            for key, inner in value.items()
        }
    return [without_secrets(inner) for inner in value] if isinstance(value, list) else value
