"""Whether the model that a reply names is the one that was asked for; pure."""

from __future__ import annotations

import re

UNNAMED = "unknown"
"""What stands for the model of a reply that names none."""

_VERSION = re.compile(
    r"(?:[-@:](?:v\d+|\d{3,8}(?:-\d{2}){0,2}|latest|(?:preview|exp|beta)(?:-\d{2,4}){0,3}))+"
)
"""A date, a number of three digits or more, `latest`, `preview`: versions of one model."""


def is_same_model(asked: str, answered: str) -> bool:
    """Whether one name is the other's, apart from its version, its folder and capital letters.

    gpt-4o-mini is gpt-4o-mini-2024-07-18 and openai/gpt-4o-mini, and is not gpt-4o. A reply that
    names no model contradicts nothing.
    """
    return answered == UNNAMED or _plain(asked) == _plain(answered)


def _plain(name: str) -> str:
    last = name.casefold().rstrip("/").rpartition("/")[2]
    version = next((m for m in _VERSION.finditer(last) if m.end() == len(last)), None)
    return last if version is None else last[: version.start()]
