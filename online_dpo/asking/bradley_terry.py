"""How well verdicts so far foretell the next one: a Bayesian Bradley-Terry model of one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_NEWTON_STEPS = 50
_TOLERANCE = 1e-10


class Posterior:
    """Strengths s (n,) of a prompt's responses: the first of (i, j) wins with σ(s_i - s_j).

    Bradley and Terry 1952, with a prior N(0, 1) on each strength; the posterior is Laplace's
    approximation, a normal distribution around its mode.
    """

    def __init__(self, n: int, verdicts: Mapping[tuple[int, int], float | None]) -> None:
        """`verdicts` has p of the first for each pair; None says nothing."""
        valid = {pair: p for pair, p in verdicts.items() if p is not None}
        design = np.zeros((len(valid), n))
        for row, (i, j) in enumerate(valid):
            design[row, i], design[row, j] = 1.0, -1.0
        self.mode, self.covariance = _laplace(design, np.array(list(valid.values())))

    def most_informative(self, pairs: Sequence[tuple[int, int]]) -> tuple[float, tuple[int, int]]:
        """The pair whose verdict would tell most, the first among equals, and how much, in nats.

        The expected gain of information is log(1 + w v) / 2, with w = σ'(s_i - s_j) and v the
        variance of s_i - s_j (D-optimal design).
        """
        i, j = np.array(pairs).T
        gains = 0.5 * np.log1p(self._weight(i, j) * self._variance(i, j))
        best = int(gains.argmax())
        return float(gains[best]), pairs[best]

    def expect(self, pair: tuple[int, int]) -> None:
        """Narrow the posterior as a verdict on this pair will, whichever way it turns out."""
        i, j = pair
        weight = float(self._weight(i, j))
        spread = self.covariance[i] - self.covariance[j]  # (n,)
        shrink = weight / (1.0 + weight * (spread[i] - spread[j]))
        self.covariance = self.covariance - shrink * np.outer(spread, spread)

    def _weight(self, i: int | Vector, j: int | Vector) -> Vector:
        p = _sigmoid(self.mode[i] - self.mode[j])
        weight: Vector = p * (1.0 - p)
        return weight

    def _variance(self, i: Vector, j: Vector) -> Vector:
        c = self.covariance
        variance: Vector = c[i, i] + c[j, j] - 2.0 * c[i, j]
        return variance


def _laplace(design: Vector, p: Vector) -> tuple[Vector, Vector]:
    """The mode (n,) and the covariance (n, n) at it, by Newton's method; the problem is convex."""
    strengths = np.zeros(design.shape[1])
    for _ in range(_NEWTON_STEPS):
        won = _sigmoid(design @ strengths)
        gradient = design.T @ (p - won) - strengths
        precision = np.eye(len(strengths)) + (design.T * (won * (1.0 - won))) @ design
        step = np.linalg.solve(precision, gradient)
        strengths = strengths + step
        if np.abs(step).max() < _TOLERANCE:
            break
    covariance = np.linalg.inv(precision).astype(np.float64)
    return strengths, covariance


def _sigmoid(x: Vector) -> Vector:
    y: Vector = 0.5 * (1.0 + np.tanh(0.5 * x))
    return y
