"""What each member of a panel, or each annotator, said of one response or of two."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from online_dpo.annotation.board import Board
from online_dpo.annotation.items import item_of
from online_dpo.annotation.options import people_options
from online_dpo.asking.verdicts import drawn_order
from online_dpo.drift import current_config
from online_dpo.judge_clashes import PEOPLE
from online_dpo.records import Prompt, Response
from online_dpo.store import RunDir

PANEL = "panel"
"""The judge whose labels hold what its members said."""


@dataclass(frozen=True)
class Voice:
    """One of those who were asked. Of two responses p is for the chosen one; of one, 1 is good.

    `ps` has a value for each time it was asked (for each order and vote of a panel), None where it
    gave none; `reasons` says why.
    """

    name: str
    role: Literal["member", "annotator"]
    ps: tuple[float | None, ...]
    reasons: tuple[str, ...] = ()


def agreed(voices: Sequence[Voice]) -> tuple[int, int] | None:
    """How many of those who answered say what most say, and how many answered; None below two."""
    sides = [side for voice in voices if (side := _side(voice)) is not None]
    return (max(map(sides.count, sides)), len(sides)) if len(sides) > 1 else None


class Hearing:
    """Finds voices in a run. What it reads of the annotators is read once."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._votes: Mapping[str, Mapping[str, float | None]] | None = None

    def on_pair(self, judge: str, label: Mapping[str, Any], round_number: int) -> tuple[Voice, ...]:
        """The voices on a pair as its row of labels has it: p is for the row's first response."""
        if judge == PEOPLE:
            return _annotators(label)
        if judge == PANEL:
            return _members(label, self._orders(label, round_number))
        return ()

    def on_response(self, judge: str, prompt: Prompt | None, response: Response) -> list[Voice]:
        """What annotators said of a response by itself."""
        if judge != PEOPLE or prompt is None:
            return []
        if self._votes is None:
            self._votes = self._read_votes()
        votes = self._votes.get(item_of(prompt, (response,))[0].id, {})
        return [Voice(name, "annotator", (value,)) for name, value in sorted(votes.items())]

    def _orders(self, label: Mapping[str, Any], round_number: int) -> tuple[bool, ...]:
        """Whether the pair was shown the other way round, by order."""
        if label["orders"] == 2:
            return (False, True)
        ids = (label["prompt_id"], label["first_id"], label["second_id"])
        seed = current_config(self._run).campaign.seed
        return (drawn_order(*ids, seed=seed, round=round_number),)

    def _read_votes(self) -> Mapping[str, Mapping[str, float | None]]:
        """Of those that the run asked: its judge may be another one by now."""
        config = current_config(self._run)
        if config.judge.name != PEOPLE:
            return {}
        options = people_options(config.judge.options)
        return Board(self._run.path, options, seed=config.campaign.seed).votes()


def _annotators(label: Mapping[str, Any]) -> tuple[Voice, ...]:
    values = {label["first_id"]: 1.0, label["second_id"]: 0.0, "tie": 0.5, "skip": None}
    said = json.loads(label["raws"][0]) if label["raws"] else {}
    return tuple(Voice(name, "annotator", (values[word],)) for name, word in sorted(said.items()))


def _members(label: Mapping[str, Any], orders: Sequence[bool]) -> tuple[Voice, ...]:
    """Each order's votes follow each other; a panel's verdict always has its members' words."""
    votes = len(label["raws"]) // len(orders)
    said: dict[str, list[tuple[float | None, str | None]]] = {}
    for index, raw in enumerate(label["raws"]):
        swapped = orders[index // votes]
        for name, word in json.loads(raw)["members"].items():
            p = word["p"]
            turned = 1.0 - p if swapped and p is not None else p
            said.setdefault(name, []).append((turned, word.get("reason")))
    return tuple(
        Voice(
            name,
            "member",
            tuple(p for p, _ in words),
            tuple(dict.fromkeys(reason for p, reason in words if p is None and reason)),
        )
        for name, words in said.items()
    )


def _side(voice: Voice) -> int | None:
    """1 for, -1 against, 0 for neither; None where nothing was said."""
    given = [p for p in voice.ps if p is not None]
    if not given:
        return None
    mean = sum(given) / len(given)
    return (mean > 0.5) - (mean < 0.5)
