"""Single preferences of a run, each with what the judge said of its two responses."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.display.visible import visible
from online_dpo.errors import ConfigError
from online_dpo.records import Prompt
from online_dpo.stages.context import read_prompts
from online_dpo.store import RoundDir, RunDir

Row = dict[str, Any]

_MIN_PREFIX = 4
_PLAIN_COLUMNS = ("pair_id", "margin")


@dataclass(frozen=True)
class Side:
    """One response of a pair. `score` is None where the judge compares or gave none."""

    response_id: str
    text: str
    num_tokens: int
    truncated: bool
    score: float | None
    reason: str | None


@dataclass(frozen=True)
class Comparisons:
    """A comparing judge's word on a pair: p that the chosen one is better, over so many orders."""

    p: float | None
    reason: str | None
    orders: int


@dataclass(frozen=True)
class PairView:
    """A preference as it was trained on. `prompt` is None for a pair of an offline set."""

    pair_id: str
    rounds: tuple[int, ...]
    """The rounds that trained on it."""
    prompt: Prompt | None
    prompt_source: str
    chosen: Side
    rejected: Side
    margin: float
    p: float
    origin: str
    comparison: Comparisons | None


def find_pair(run_dir: Path, pair_id: str) -> PairView:
    """The pair of this id, or of the only id that begins so. Raises ConfigError naming near ids."""
    run = RunDir(run_dir)
    places: dict[str, list[int]] = {}
    for round_dir in _with_pairs(run):
        for row in _rows(_pairs_table(round_dir), columns=["pair_id"]):
            places.setdefault(row["pair_id"], []).append(round_dir.number)
    known = _resolve(run_dir, pair_id, list(places))
    first = run.round(places[known][0])
    (row,) = _rows(_pairs_table(first), filters=[("pair_id", "=", known)])
    return _view(run, row, tuple(places[known]), _prompts(run))


def example_pairs(run_dir: Path, number: int, count: int) -> list[PairView]:
    """Up to `count` pairs of a round, spread evenly from the widest to the narrowest margin."""
    run = RunDir(run_dir)
    round_dir = run.round(number)
    if not round_dir.has("pairs") or count < 1:
        return []
    ranked = _rows(_pairs_table(round_dir), columns=list(_PLAIN_COLUMNS))
    ranked.sort(key=lambda row: (-row["margin"], row["pair_id"]))
    wanted = [ranked[index]["pair_id"] for index in spread(len(ranked), count)]
    found = _rows(_pairs_table(round_dir), filters=[("pair_id", "in", wanted)])
    prompts = _prompts(run)
    views = [_view(run, row, (number,), prompts) for row in found]
    return sorted(views, key=lambda view: wanted.index(view.pair_id))


def spread(length: int, count: int) -> list[int]:
    """`count` indices of a sequence, first and last among them, as far apart as can be."""
    if count >= length:
        return list(range(length))
    if count == 1:
        return [0]
    return [round(k * (length - 1) / (count - 1)) for k in range(count)]


def _with_pairs(run: RunDir) -> list[RoundDir]:
    return [round_dir for round_dir in run.rounds() if round_dir.has("pairs")]


def _pairs_table(round_dir: RoundDir) -> Path:
    return round_dir.artifact("pairs") / "pairs.parquet"


def _rows(
    path: Path,
    *,
    columns: Sequence[str] | None = None,
    filters: list[tuple[str, str, Any]] | None = None,
) -> list[Row]:
    """A part of a table; whole ones hold every token of a round."""
    import pyarrow.parquet as pq

    wanted = None if columns is None else list(columns)
    rows: list[Row] = pq.read_table(path, columns=wanted, filters=filters).to_pylist()
    return rows


def _resolve(run_dir: Path, pair_id: str, known: Sequence[str]) -> str:
    if pair_id in known:
        return pair_id
    begins = [name for name in known if name.startswith(pair_id)]
    if len(begins) == 1 and len(pair_id) >= _MIN_PREFIX:
        return begins[0]
    if not known:
        unpaired = any(round_dir.has("unpaired") for round_dir in RunDir(run_dir).rounds())
        why = "no pairs: it trains on good and bad responses" if unpaired else "no pairs yet"
        raise ConfigError(f"{run_dir} has {why}.")
    near = begins[:5] or difflib.get_close_matches(pair_id, known, n=3, cutoff=0.5) or known[:3]
    what = "begins" if len(begins) > 1 else "is"
    names = ", ".join(visible(name) for name in near)
    more = " more than one pair's id" if len(begins) > 1 else " no pair's id"
    raise ConfigError(
        f"{visible(pair_id)!r} {what}{more} in {run_dir} ({len(known)} pairs). Near: {names}."
    )


def _prompts(run: RunDir) -> Mapping[str, Prompt]:
    return read_prompts(run).by_id


def _view(
    run: RunDir, row: Row, rounds: tuple[int, ...], prompts: Mapping[str, Prompt]
) -> PairView:
    labels = _labels(run, row)
    return PairView(
        pair_id=row["pair_id"],
        rounds=rounds,
        prompt=prompts.get(row["prompt_id"]),
        prompt_source=row["prompt_source"],
        chosen=_side(row, "chosen", labels),
        rejected=_side(row, "rejected", labels),
        margin=row["margin"],
        p=row["p"],
        origin=row["origin"],
        comparison=_comparison(row, labels),
    )


def _labels(run: RunDir, row: Row) -> list[Row]:
    """What the judge said on the pair's prompt, in the round that made the pair."""
    kind, _, number = str(row["origin"]).partition("-")
    if kind != "round" or not number.isdigit():
        return []
    round_dir = run.round(int(number))
    found: list[Row] = []
    for name in round_dir.children("labels"):
        table = round_dir.path / name / "labels.parquet"
        found += _rows(table, filters=[("prompt_id", "=", row["prompt_id"])])
    return found


def _side(row: Row, side: str, labels: Sequence[Row]) -> Side:
    own = [
        label
        for label in labels
        if label["first_id"] == row[f"{side}_id"] and label["second_id"] is None
    ]
    return Side(
        response_id=row[f"{side}_id"],
        text=row[f"{side}_text"],
        num_tokens=len(row[f"{side}_token_ids"]),
        truncated=row[f"{side}_truncated"],
        score=own[0]["score"] if own else None,
        reason=own[0]["reason"] if own else None,
    )


def _comparison(row: Row, labels: Sequence[Row]) -> Comparisons | None:
    chosen, rejected = row["chosen_id"], row["rejected_id"]
    for label in labels:
        shown = (label["first_id"], label["second_id"])
        if shown == (chosen, rejected):
            return Comparisons(label["p"], label["reason"], label["orders"])
        if shown == (rejected, chosen):
            p = None if label["p"] is None else 1.0 - label["p"]
            return Comparisons(p, label["reason"], label["orders"])
    return None
