"""What a training loop is given: the objective that it minimises, and its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from online_dpo.training.batching import Size
from online_dpo.training.packing import Part, TokenPair
from online_dpo.training.sharding import GradientSync
from online_dpo.training.vocabulary import Terms

Emit = Callable[[dict[str, Any]], None]


class Objective(Protocol):
    """What is minimised: over a step's items, the sum of losses / the sum of weights."""

    @property
    def sizes(self) -> Sequence[Size]:
        """The tokens of each item, for micro-batches of like cost."""

    @property
    def weights(self) -> Sequence[int]:
        """What each item counts: 1 for a pair, its response tokens for a demonstration."""

    @property
    def fingerprint(self) -> str:
        """A hash of the data; a checkpoint made with other data is refused."""

    def item_id(self, item: int) -> str:
        """The name by which the data know an item."""

    def sequences(self, item: int) -> Sequence[TokenPair]:
        """What is scored of an item: sequences of one prompt, for every item equally many."""

    @property
    def needs_squares(self) -> bool:
        """Whether `terms` takes log sum_v p(v)^2 of each token too."""

    def terms(self, logps: Tensor, part: Part, squares: Tensor | None = None) -> Terms:
        """Sums over a part's items, from the (n,) log-probs of its response tokens."""

    @property
    def coupled(self) -> bool:
        """Whether an item's loss depends on the step's other items; it is then a StepObjective."""


class StepObjective(Protocol):
    """An objective whose loss is one of a whole step."""

    def step_sequences(self, item: int) -> Sequence[TokenPair]:
        """What the step's loss needs of an item: its `sequences`, and others after them that take
        no gradient."""

    def step_terms(self, logps: Tensor, items: Sequence[int]) -> Terms:
        """The terms of a step from (K, n) float64 log-probs of n items' K sequences."""


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """The optimizer's settings; counts of items are over all processes, but for the micro-batch."""

    learning_rate: float
    schedule: str
    warmup: float
    batch_size: int
    micro_batch_tokens: int
    micro_batch_size: int | None
    epochs: float
    weight_decay: float
    adam_betas: tuple[float, float]
    adam_moments: str
    max_grad_norm: float
    checkpoint_every: int
    seed: int
    gradient_sync: GradientSync = "step"
    """When a sharded model's gradients are summed over processes."""
    stretch: int = 0
    """Which of `stretches` equal parts of the schedule this run is, from 0."""
    stretches: int = 1
