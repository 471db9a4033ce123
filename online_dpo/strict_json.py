"""JSON as its standard has it: what Python's reader lets pass besides is refused."""

from __future__ import annotations

import json
import math
from typing import Any


def loads(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for NaN, numbers beyond a float and deep nesting.

    Python's own reader takes NaN and Infinity for numbers, and ends a text that is nested some
    thousand levels deep with a RecursionError, which is no ValueError.
    """
    try:
        return json.loads(text, parse_constant=_refused, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large for a number")
    return value
