"""Single rows that a run trained on, each with what the judge said of its responses."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from online_dpo.display.visible import visible
from online_dpo.display.voices import Hearing, Voice
from online_dpo.errors import ConfigError
from online_dpo.records import Prompt, Response
from online_dpo.stages.context import read_prompts
from online_dpo.store import RoundDir, RunDir

Row = dict[str, Any]

_MIN_PREFIX = 4
_PLAIN_COLUMNS = ("pair_id", "margin")
_IDS = {"pairs": "pair_id", "unpaired": "row_id"}
"""The tables of what rounds train on, with their column of ids."""


@dataclass(frozen=True)
class Side:
    """A response that is trained on. `score` is None where the judge compares or gave none."""

    response_id: str
    text: str
    num_tokens: int
    truncated: bool
    score: float | None
    reason: str | None
    voices: tuple[Voice, ...] = ()
    """What each annotator said of it by itself."""


@dataclass(frozen=True)
class Comparisons:
    """A comparing judge's word on a pair: p that the chosen one is better, over so many orders."""

    p: float | None
    reason: str | None
    orders: int
    voices: tuple[Voice, ...] = ()
    """What each member of a panel, or each annotator, said; p is for the chosen one here too."""


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


@dataclass(frozen=True)
class ResponseView:
    """A good or bad response as it was trained on by itself."""

    row_id: str
    rounds: tuple[int, ...]
    """The rounds that trained on it."""
    prompt: Prompt | None
    prompt_source: str
    response: Side
    good: bool
    margin: float
    """How far its score is from the threshold."""
    origin: str


def find_row(run_dir: Path, row_id: str) -> PairView | ResponseView:
    """The pair, or the good or bad response, of this id or of the only id that begins so.

    Raises ConfigError naming near ids.
    """
    run = RunDir(run_dir)
    places: dict[str, list[tuple[str, int]]] = {}
    for kind, column in _IDS.items():
        for round_dir in run.rounds():
            if round_dir.has(kind):
                for row in _rows(_table(round_dir, kind), columns=[column]):
                    places.setdefault(row[column], []).append((kind, round_dir.number))
    known = _resolve(run_dir, row_id, list(places))
    kind, first = places[known][0]
    (row,) = _rows(_table(run.round(first), kind), filters=[(_IDS[kind], "=", known)])
    rounds = tuple(number for _, number in places[known])
    return (_view if kind == "pairs" else _response_view)(run, row, rounds, _prompts(run))


def example_pairs(run_dir: Path, number: int, count: int) -> list[PairView]:
    """Up to `count` pairs of a round, spread evenly from the widest to the narrowest margin."""
    run = RunDir(run_dir)
    round_dir = run.round(number)
    if not round_dir.has("pairs") or count < 1:
        return []
    ranked = _rows(_table(round_dir, "pairs"), columns=list(_PLAIN_COLUMNS))
    ranked.sort(key=lambda row: (-row["margin"], row["pair_id"]))
    wanted = [ranked[index]["pair_id"] for index in spread(len(ranked), count)]
    found = _rows(_table(round_dir, "pairs"), filters=[("pair_id", "in", wanted)])
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


def _table(round_dir: RoundDir, kind: str) -> Path:
    return round_dir.artifact(kind) / f"{kind}.parquet"


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


def _resolve(run_dir: Path, row_id: str, known: Sequence[str]) -> str:
    if row_id in known:
        return row_id
    begins = [name for name in known if name.startswith(row_id)]
    if len(begins) == 1 and len(row_id) >= _MIN_PREFIX:
        return begins[0]
    if not known:
        raise ConfigError(f"{run_dir} has nothing that a round trains on yet.")
    near = begins[:5] or difflib.get_close_matches(row_id, known, n=3, cutoff=0.5) or known[:3]
    what = "begins more than one" if len(begins) > 1 else "is no"
    names = ", ".join(visible(name) for name in near)
    raise ConfigError(
        f"{visible(row_id)!r} {what} row's id in {run_dir} ({len(known)} rows). Near: {names}."
    )


def _prompts(run: RunDir) -> Mapping[str, Prompt]:
    return read_prompts(run).by_id


def _view(
    run: RunDir, row: Row, rounds: tuple[int, ...], prompts: Mapping[str, Prompt]
) -> PairView:
    labels, prompt, hearing = _labels(run, row), prompts.get(row["prompt_id"]), Hearing(run)
    return PairView(
        pair_id=row["pair_id"],
        rounds=rounds,
        prompt=prompt,
        prompt_source=row["prompt_source"],
        chosen=_side(row, "chosen", labels, prompt, hearing),
        rejected=_side(row, "rejected", labels, prompt, hearing),
        margin=row["margin"],
        p=row["p"],
        origin=row["origin"],
        comparison=_comparison(row, labels, hearing),
    )


def _response_view(
    run: RunDir, row: Row, rounds: tuple[int, ...], prompts: Mapping[str, Prompt]
) -> ResponseView:
    prompt = prompts.get(row["prompt_id"])
    return ResponseView(
        row_id=row["row_id"],
        rounds=rounds,
        prompt=prompt,
        prompt_source=row["prompt_source"],
        response=_side(row, "completion", _labels(run, row), prompt, Hearing(run)),
        good=row["label"],
        margin=row["margin"],
        origin=row["origin"],
    )


def _labels(run: RunDir, row: Row) -> list[Row]:
    """What the judge said on the row's prompt in the round that made it, each with its `judge`."""
    made = _made_in(row)
    if made is None:
        return []
    round_dir = run.round(made)
    found: list[Row] = []
    for name in round_dir.children("labels"):
        table = round_dir.path / name / "labels.parquet"
        judge = round_dir.manifest(name).get("judge", {}).get("name", "")
        for label in _rows(table, filters=[("prompt_id", "=", row["prompt_id"])]):
            found.append({**label, "judge": judge})
    return found


def _made_in(row: Row) -> int | None:
    """The round whose samples a row is made of; None for offline data."""
    kind, _, number = str(row["origin"]).partition("-")
    return int(number) if kind == "round" and number.isdigit() else None


def _side(
    row: Row, side: str, labels: Sequence[Row], prompt: Prompt | None, hearing: Hearing
) -> Side:
    own = [
        label
        for label in labels
        if label["first_id"] == row[f"{side}_id"] and label["second_id"] is None
    ]
    response = Response(
        id=row[f"{side}_id"],
        prompt_id=row["prompt_id"],
        text=row[f"{side}_text"],
        token_ids=tuple(row[f"{side}_token_ids"]),
        finish_reason="length" if row[f"{side}_truncated"] else "eos",
    )
    return Side(
        response_id=response.id,
        text=response.text,
        num_tokens=len(response.token_ids),
        truncated=response.truncated,
        score=own[0]["score"] if own else None,
        reason=own[0]["reason"] if own else None,
        voices=tuple(hearing.on_response(own[0]["judge"], prompt, response)) if own else (),
    )


def _comparison(row: Row, labels: Sequence[Row], hearing: Hearing) -> Comparisons | None:
    chosen, rejected = row["chosen_id"], row["rejected_id"]
    for label in labels:
        shown, made = (label["first_id"], label["second_id"]), _made_in(row)
        if made is None or set(shown) != {chosen, rejected}:
            continue
        voices = hearing.on_pair(label["judge"], label, made)
        if shown == (chosen, rejected):
            return Comparisons(label["p"], label["reason"], label["orders"], voices)
        turned = tuple(replace(voice, ps=tuple(map(_turned, voice.ps))) for voice in voices)
        return Comparisons(_turned(label["p"]), label["reason"], label["orders"], turned)
    return None


def _turned(p: float | None) -> float | None:
    return None if p is None else 1.0 - p
