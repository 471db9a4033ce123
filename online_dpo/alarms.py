"""Figures of a round that leave their bounds, each told in one sentence with its cause; pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from online_dpo.config import AlarmsConfig

AlarmName = Literal["order_conflicts", "invalid", "prefers_longer", "constant_wins"]
"""Each is the field of `AlarmsConfig` that holds its threshold."""

Action = Literal["warn", "stop"]


@dataclass(frozen=True, slots=True)
class Alarm:
    """A figure above its threshold. `action` stop ends the campaign."""

    name: AlarmName
    round: int
    sentence: str
    action: Action


@dataclass(frozen=True, slots=True)
class Observed:
    """A share of `count` observations, what they did, and what may make them do so."""

    share: float
    count: int
    what: str
    cause: str


Figures = Mapping[str, Any]
"""The metrics of a round's judge_check/."""


def judge_alarms(figures: Figures, config: AlarmsConfig, *, round: int) -> list[Alarm]:
    """The alarms that a round's judge raises: shares of enough observations above a threshold."""
    found = []
    for name in get_args(AlarmName):
        seen = _RULES[name](figures)
        threshold: float = getattr(config, name)
        if seen is None or seen.count < config.min_count or seen.share <= threshold:
            continue
        sentence = (
            f"Round {round}: {_percent(seen.share)} of {seen.count} {seen.what} "
            f"(alarms.{name}: {_percent(threshold)}); {seen.cause}."
        )
        found.append(Alarm(name, round, sentence, config.actions.get(name, "warn")))
    return found


def latest(alarms: Sequence[Alarm]) -> list[str]:
    """One sentence an alarm: the last time that it was raised, and in which other rounds it was."""
    by_name: dict[str, list[Alarm]] = {}
    for alarm in alarms:
        by_name.setdefault(alarm.name, []).append(alarm)
    return [raised[-1].sentence + _earlier(raised[:-1]) for raised in by_name.values()]


def _order_conflicts(figures: Figures) -> Observed | None:
    labels = figures["labels"]
    if labels["order_conflicts"] is None:
        return None
    return Observed(
        labels["order_conflicts"],
        labels["agreement"]["count"],
        "pairs had one response preferred in one order and the other in the other",
        "the judge goes by position more than by content",
    )


def _invalid(figures: Figures) -> Observed | None:
    labels = figures["labels"]
    if labels["invalid"] is None:
        return None
    reason = max(figures["unusable"], key=figures["unusable"].__getitem__, default="")
    return Observed(
        labels["invalid"],
        figures["verdicts"],
        f"verdicts could not be read, most of them for “{reason}”",
        "the judge's model does not keep to the form that it is asked for, or has too few tokens",
    )


def _prefers_longer(figures: Figures) -> Observed | None:
    rate = figures["labels"]["prefers_longer"]
    return rate and Observed(
        rate["value"],
        rate["count"],
        "decided pairs were won by the longer response",
        "the judge may take length for quality, and training on it makes answers longer",
    )


def _constant_wins(figures: Figures) -> Observed | None:
    rate = figures["constant"]
    return rate and Observed(
        rate["value"],
        rate["count"],
        "comparisons with the policy's responses were won by the same words for every prompt",
        "the judge rewards an answer that says nothing, or the policy's are no better",
    )


_RULES: dict[AlarmName, Callable[[Figures], Observed | None]] = {
    "order_conflicts": _order_conflicts,
    "invalid": _invalid,
    "prefers_longer": _prefers_longer,
    "constant_wins": _constant_wins,
}


def _percent(share: float) -> str:
    """With a decimal, for a share just above a whole threshold."""
    return f"{100 * share:.3g}%"


def _earlier(alarms: Sequence[Alarm]) -> str:
    rounds = [str(alarm.round) for alarm in alarms]
    if not rounds:
        return ""
    several = f"s {', '.join(rounds[:-1])} and" if rounds[1:] else ""
    return f" So it was in round{several} {rounds[-1]}."
