"""p from the probabilities of the verdict's tokens (G-Eval's weighting, 2303.16634, for pairs)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from judges.llm_replies import P_OF_LABEL
from online_dpo.asking.unusable_replies import NO_LOGPROBS
from online_dpo.judging import TokenLogprobs

LITTLE_MASS = "verdict tokens hold too little probability"

_CONTEXT = 12
"""Characters before the verdict by which it is found among the tokens."""

_LABEL = re.compile(rf"({'|'.join(P_OF_LABEL)}|ti?)\W*", re.IGNORECASE)
"""What is left of a token that begins a verdict; `t` and `ti` begin a tie."""


def soft_p(
    text: str, at: int, label: str, tokens: Sequence[TokenLogprobs], *, min_mass: float
) -> tuple[float | None, str | None]:
    """p at the verdict that stands in `text` at `at`, or None with the reason.

    Of the tokens that might have stood there, those that begin a verdict count by their
    probability: p = (P(A) + P(tie) / 2) / (P(A) + P(B) + P(tie)). A sum below `min_mass` says that
    the model would rather have said something else: it abstains.
    """
    place = _place(text, at, label, tokens)
    if place is None:
        return None, NO_LOGPROBS
    token, offset = place
    prefix = token.text[:offset].lstrip()
    mass = weighted = 0.0
    for other, logprob in {**dict(token.top), token.text: token.logprob}.items():
        begun = other.lstrip()
        match = _LABEL.fullmatch(begun, len(prefix)) if begun.startswith(prefix) else None
        if match is not None:
            probability = math.exp(logprob)
            mass += probability
            weighted += probability * P_OF_LABEL.get(match[1].lower(), 0.5)
    if mass < min_mass or mass == 0.0:
        return None, LITTLE_MASS
    return min(weighted / mass, 1.0), None


def _place(
    text: str, at: int, label: str, tokens: Sequence[TokenLogprobs]
) -> tuple[TokenLogprobs, int] | None:
    """The token that holds the verdict's first letter, and where in it that stands."""
    start = max(0, at - _CONTEXT)
    whole = "".join(token.text for token in tokens)
    found = whole.rfind(text[start : at + len(label)])
    if found < 0:
        return None
    left = found + at - start
    for token in tokens:
        if left < len(token.text):
            return token, left
        left -= len(token.text)
    return None
