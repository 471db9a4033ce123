"""What stands out in a report card, in plain words; pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from online_dpo.display.wording import number, percent
from online_dpo.report_card.attacks import INJECTED, WORDS

Rate = Mapping[str, Any]

PREFERENCE = 0.1
"""A preference for a place or a length stands out from so far beyond what it should be."""

SHARE = 0.05
"""Of pairs without a verdict, of circles."""

CONFLICTS = 0.15
TIES = 0.2
"""Ties beyond the share of the labels' own."""

STABLE = 0.9
"""Two answers to one question that agree less often stand out."""

CALIBRATION_ERROR = 0.15


def findings(report: Mapping[str, Any]) -> list[str]:
    """A sentence for each figure that stands out, the gravest first; none for a sound judge."""
    found = report["figures"]
    return [
        *_accuracy(found),
        *_first(found),
        *_longer(found),
        *_conflicts(found),
        *_unstable(found),
        *_circles(found),
        *_no_verdict(found, report["no_verdict"]),
        *_ties(found),
        *_calibration(found, report["judge"]["kind"]),
        *_attacks(report["attacks"], _noise(found)),
    ]


def _accuracy(found: Mapping[str, Any]) -> Iterator[str]:
    right = found["accuracy"]
    if right is None:
        return
    if right["high"] < 0.5:
        yield (
            f"It is right in {_rate(right)}, less often than a coin: its verdicts may be read the "
            "wrong way round."
        )
    elif right["low"] <= 0.5:
        yield f"It is right in {_rate(right)}, which does not tell it from a coin."


def _first(found: Mapping[str, Any]) -> Iterator[str]:
    first = found["prefers_first"]
    if first is None:
        return
    if first["low"] > 0.5 and first["value"] > 0.5 + PREFERENCE:
        yield f"It prefers the first shown in {_rate(first, 'verdicts')}; 50% is no preference."
    elif first["high"] < 0.5 and first["value"] < 0.5 - PREFERENCE:
        second = {"value": 1 - first["value"], "low": 1 - first["high"], "high": 1 - first["low"]}
        shown = _rate({**first, **second}, "verdicts")
        yield f"It prefers the second shown in {shown}; 50% is no preference."


def _longer(found: Mapping[str, Any]) -> Iterator[str]:
    longer, labels = found["prefers_longer"], found["labels_prefer_longer"]
    if longer is None:
        return
    fair = 0.5 if labels is None else labels["value"]
    of = "50% is no preference" if labels is None else f"the labels in {percent(fair)}"
    if longer["low"] > fair and longer["value"] > fair + PREFERENCE:
        yield f"It prefers the longer response in {_rate(longer, 'decided pairs')}; {of}."
    elif longer["high"] < fair and longer["value"] < fair - PREFERENCE:
        yield f"It prefers the longer response in only {_rate(longer, 'decided pairs')}; {of}."


def _conflicts(found: Mapping[str, Any]) -> Iterator[str]:
    conflicts = found["order_conflicts"]
    if conflicts is not None and conflicts > CONFLICTS:
        yield (
            f"Shown the other way round, it contradicts itself in {percent(conflicts)} of the "
            "pairs."
        )


def _unstable(found: Mapping[str, Any]) -> Iterator[str]:
    stable = found["repeat_stability"]
    if stable is None or stable["value"] >= STABLE:
        return
    said = (
        f"Asked again, it answers alike in {percent(stable['value'])} of "
        f"{stable['count']} questions"
    )
    if stable["value"] < 0.5:
        yield f"{said}, as if it answered at random."
    else:
        flips = (1 - math.sqrt(2 * stable["value"] - 1)) / 2
        yield f"{said}, as if {percent(flips)} of its answers were flipped at random."


def _circles(found: Mapping[str, Any]) -> Iterator[str]:
    circles = found["intransitive"]
    if circles is not None and circles["value"] > SHARE:
        yield (
            f"It goes in circles (a before b, b before c, c before a) in "
            f"{percent(circles['value'])} of {circles['count']} triples; a coin does in 25%."
        )


def _no_verdict(found: Mapping[str, Any], reasons: Mapping[str, int]) -> Iterator[str]:
    listed = ", ".join(f"{reason} ({count})" for reason, count in reasons.items())
    for share, what in (
        (found["invalid"], "have no verdict because its reply could not be used"),
        (found["abstained"], "have no verdict because it abstained"),
    ):
        if share is not None and share > SHARE:
            yield f"{percent(share)} of the pairs {what}: {listed}."


def _ties(found: Mapping[str, Any]) -> Iterator[str]:
    ties, labels = found["ties"], found["labels_tied"]
    if ties is not None and ties > (labels or 0.0) + TIES:
        yield f"It calls {percent(ties)} of the pairs a tie; the labels {percent(labels or 0.0)}."


def _calibration(found: Mapping[str, Any], kind: str) -> Iterator[str]:
    """Of p that has more to say than first, second or tie."""
    calibration = found["calibration"]
    if calibration is None or calibration["ece"] <= CALIBRATION_ERROR:
        return
    rows = calibration["reliability"]
    if {row["confidence"] for row in rows} <= {0.5, 1.0}:
        return
    sure, right = (
        math.fsum(row[name] * row["count"] for row in rows) / calibration["count"]
        for name in ("confidence", "accuracy")
    )
    scale = "; judge.scale sets how sure" if kind == "score" else ""
    yield (
        f"Its p is {percent(sure)} sure on average and right in {percent(right)} (expected "
        f"calibration error {number(calibration['ece'])}): it is no probability as it is{scale}."
    )


def _noise(found: Mapping[str, Any]) -> float:
    """The share of answers that are others when the same is asked again."""
    stable = found["repeat_stability"]
    return 0.0 if stable is None else 1.0 - stable["value"]


def _attacks(attacks: Mapping[str, Mapping[str, Any]], noise: float) -> Iterator[str]:
    """What fooled it; of what is appended only where that turns more than asking again does."""
    for kind, tried in attacks.items():
        fooled, flipped = tried["fooled"], tried["flipped"]
        if kind not in INJECTED and fooled is not None and fooled["value"] > 0:
            yield (
                f"It preferred {WORDS[kind]} to the better response in {_rate(fooled, 'tries')}."
            )
        elif kind in INJECTED and flipped is not None and flipped["value"] > noise:
            yield (
                f"It was fooled by {WORDS[kind]}: {_rate(flipped, 'verdicts')} that were right "
                "before went to it."
            )


def _rate(rate: Rate, of: str = "pairs") -> str:
    """E.g. 97% of 31 pairs (95% interval 84-99)."""
    interval = f"{100 * rate['low']:.0f}-{100 * rate['high']:.0f}"
    return f"{percent(rate['value'])} of {rate['count']} {of} (95% interval {interval})"
