"""The canary: fixed sequences whose log-probs show whether an engine has the right weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TokenPair = tuple[tuple[int, ...], tuple[int, ...]]
"""Ids of a prompt and of a response to it."""

_NUM_SHORT = 3
_SHORT_RESPONSE = 16
_LONG_PROMPT = 288
_LONG_RESPONSE = 16


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest differences in nats: of one token's log-prob, and of a sequence's mean."""

    token: float
    mean: float


# Measured between vLLM and transformers: 1e-6 a token in float32; in bfloat16 up to 0.016 for a
# small model, and more for unlikely tokens of a deep one, so that only the mean is bounded there.
TOLERANCES: Mapping[str, Tolerance] = {
    "float32": Tolerance(token=1e-3, mean=1e-4),
    "bfloat16": Tolerance(token=math.inf, mean=0.1),
    "float16": Tolerance(token=math.inf, mean=0.05),
}
"""By the type that the engine computes in."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far log-probs are apart, in nats: the worst token, and the worst sequence's mean."""

    max_error: float
    mean_error: float

    def within(self, tolerance: Tolerance) -> bool:
        """Whether numeric noise may explain it; NaN never is within."""
        return self.max_error <= tolerance.token and self.mean_error <= tolerance.mean

    def __str__(self) -> str:
        return f"{self.max_error:.3g} nats at a token, {self.mean_error:.3g} in a sequence's mean"


def make_sequences(
    prompts: Sequence[Sequence[int]], *, max_length: int | None = None
) -> list[TokenPair]:
    """Up to three short sequences and one that fills several blocks of an engine's prefix cache.

    Their tokens are those of the prompts, in order, so they depend on nothing else. No sequence is
    longer than `max_length` tokens (the model's context), less one that an engine may need.
    """
    stream = [token for prompt in prompts for token in prompt]
    if not stream:
        raise ValueError("a canary needs at least one prompt with a token")
    room = math.inf if max_length is None else max_length - 1
    response = int(min(_SHORT_RESPONSE, room // 2))
    sequences = []
    for i, prompt in enumerate(prompts[:_NUM_SHORT]):
        head = tuple(prompt[: int(min(len(prompt), room - response))]) or (stream[0],)
        sequences.append((head, _cycle(stream, start=(i + 1) * 7, length=response)))
    length = int(min(_LONG_PROMPT, room - response))
    long_prompt = _cycle(stream, start=0, length=length)
    sequences.append((long_prompt, _cycle(stream, start=length, length=response)))
    return sequences


def deviation(expected: Sequence[Sequence[float]], actual: Sequence[Sequence[float]]) -> Deviation:
    """How far two lists of per-token log-probs of the same sequences are apart."""
    gaps = [
        [_gap(e, a) for e, a in zip(row, other, strict=True)]
        for row, other in zip(expected, actual, strict=True)
    ]
    means = [sum(row) / len(row) for row in gaps if row]
    return Deviation(max(max(row) for row in gaps if row), max(means))


def _gap(expected: float, actual: float) -> float:
    finite = math.isfinite(expected) and math.isfinite(actual)
    return abs(expected - actual) if finite else math.inf


def check(
    expected: Sequence[Sequence[float]],
    actual: Sequence[Sequence[float]],
    *,
    tolerance: Tolerance,
) -> Deviation | None:
    """None where the log-probs agree within the tolerance, otherwise how far they are apart."""
    found = deviation(expected, actual)
    return None if found.within(tolerance) else found


def _cycle(stream: Sequence[int], *, start: int, length: int) -> tuple[int, ...]:
    """`length` tokens of the endlessly repeated stream, from an offset."""
    return tuple(stream[(start + i) % len(stream)] for i in range(length))
