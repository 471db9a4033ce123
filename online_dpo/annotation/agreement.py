"""How far annotators agree with each other, corrected for chance; pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Votes = Mapping[str, float | None]
"""One item's values by annotator; None (skipped) counts as missing."""


def agreement(items: Sequence[Votes]) -> dict[str, Any]:
    """Figures over the items that at least two annotators have answered.

    `observed` is the share of pairs of verdicts on one item that are equal. `cohen_kappa` stands
    where two annotators have answered, `fleiss_kappa` where every item has equally many verdicts,
    `krippendorff_alpha` always; each is None where it is not defined (all verdicts are equal).
    """
    answered = [
        {name: value for name, value in votes.items() if value is not None} for votes in items
    ]
    units = [list(votes.values()) for votes in answered if len(votes) >= 2]
    figures: dict[str, Any] = {"items": len(items), "items_shared": len(units)}
    if not units:
        return figures
    figures["observed"] = math.fsum(_observed(unit) for unit in units) / len(units)
    names = sorted({name for votes in answered if len(votes) >= 2 for name in votes})
    if len(names) == 2:
        pairs = [(v[names[0]], v[names[1]]) for v in answered if len(v) == 2]
        figures["cohen_kappa"] = cohen_kappa(pairs)
    elif len({len(unit) for unit in units}) == 1:
        figures["fleiss_kappa"] = fleiss_kappa(units)
    figures["krippendorff_alpha"] = krippendorff_alpha(units)
    return figures


def cohen_kappa(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Cohen's kappa (1960) of two annotators, each with frequencies of their own, unweighted."""
    n = len(pairs)
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    observed = sum(a == b for a, b in pairs) / n
    expected = sum(first[value] * second[value] for value in first) / n**2
    return _corrected(observed, expected)


def fleiss_kappa(units: Sequence[Sequence[float]]) -> float | None:
    """Fleiss' kappa (1971): equally many verdicts on each item, whoever gave them."""
    observed = math.fsum(_observed(unit) for unit in units) / len(units)
    counts = Counter(value for unit in units for value in unit)
    total = sum(counts.values())
    expected = sum((count / total) ** 2 for count in counts.values())
    return _corrected(observed, expected)


def krippendorff_alpha(units: Sequence[Sequence[float]]) -> float | None:
    """Krippendorff's alpha for nominal data (2011, "Computing Krippendorff's Alpha-Reliability").

    Items may have different numbers of verdicts, from two on.
    """
    counts = Counter(value for unit in units for value in unit)
    total = sum(counts.values())
    observed = math.fsum(len(unit) * _observed(unit) for unit in units) / total
    expected = sum(count * (count - 1) for count in counts.values()) / (total * (total - 1))
    return _corrected(observed, expected)


def _observed(unit: Sequence[float]) -> float:
    """The share of pairs of verdicts on one item that are equal."""
    n = len(unit)
    return sum(count * (count - 1) for count in Counter(unit).values()) / (n * (n - 1))


def _corrected(observed: float, expected: float) -> float | None:
    return None if expected == 1.0 else (observed - expected) / (1.0 - expected)
