"""A causal language model that answers with log-probs of response tokens, or a loss of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from online_dpo.errors import ConfigError
from online_dpo.training import shared_attention
from online_dpo.training.packing import Batch, TokenPair, pack
from online_dpo.training.rounding import RoundedWeights
from online_dpo.training.vocabulary import (
    PartLoss,
    Terms,
    chunk_tokens,
    fused_terms,
    token_logps,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Precision = Literal["float32", "bfloat16"]

SELF_TEST_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1}
"""Largest difference of a log-prob, in nats, that rounding explains."""


class LogProbModel(nn.Module):
    """Runs the trunk over a batch and projects to the vocabulary where responses are predicted.

    Two shortcuts are taken where a numeric test, made with the wrapper, shows them to be exact:
    `shares`: the responses of a prompt stand in one row behind it, without padding, so that it is
    encoded once; models with windows or other attention of their own run on padded rows instead.
    `projects`: the output head is applied by us; models whose logits are more than that
    (soft-capped, scaled) run whole.

    Raises ConfigError where padding changes the model's log-probs, or the attention cannot run in
    this precision.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        precision: Precision = "float32",
        rounds: bool = True,
        place: Callable[[LogProbModel], None] | None = None,
    ) -> None:
        """`place` puts the weights where they stay, before the numeric test runs.

        In bfloat16, float32 weights are rounded once for all passes until they change. `rounds` is
        False where layers run again in the backward pass, which autocast alone reaches.
        """
        super().__init__()
        self.model = model
        self.precision = precision
        self.rounded = RoundedWeights()
        self._may_round = rounds
        given = str(model.config._attn_implementation)
        flash = given == "flash_attention_2"
        if flash and precision == "float32":
            raise ConfigError(
                "model.attention: flash_attention_2 computes in bfloat16 only. Set "
                "train.precision: bfloat16, or model.attention: sdpa."
            )
        rounded = flash or model.dtype == torch.bfloat16
        self.finest_precision: Precision = "bfloat16" if rounded else "float32"
        self.shares, self.projects = False, True
        self.why_not_shared = f"model.attention is {given}" if given != "sdpa" else ""
        if place is not None:
            place(self)
        self._choose_path(given)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def layout(self) -> str:
        """How sequences are laid out, for people."""
        if self.shares:
            return "shared: a prompt is encoded once for its responses, without padding"
        return f"padded rows, one for each response: {self.why_not_shared}"

    def pack(self, items: Sequence[int], sequences: Sequence[Sequence[TokenPair]]) -> Batch:
        """The batch of `items`, each with its sequences, as this model takes it."""
        vocab_size = self.model.config.get_text_config().vocab_size
        return pack(
            items,
            sequences,
            shared=self.shares,
            part_tokens=chunk_tokens(vocab_size, self.device),
            device=self.device,
        )

    def forward(
        self, batch: Batch, part_loss: PartLoss | None = None, *, squares: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """(N,) log-probs of all response tokens, or the loss summed over parts and its metrics.

        With `part_loss` the gradient is made beside the loss; without it there is none. `squares`
        says whether it is given log sum_v p(v)^2 too.
        """
        with self._autocast():
            if not self.projects:
                logits = self._logits(batch)
                if part_loss is None:
                    return _logps(logits, batch.targets)
                return _plain(_sum_parts(logits, batch, part_loss, squares))
            hidden = self._hidden(batch)
            head: Any = self.model.get_output_embeddings()
            rounded = self.rounded.copy(head.weight) if self._rounds else None
            if part_loss is None:
                return token_logps(hidden, head, batch.targets, rounded=rounded)
            given = (hidden, head, batch.targets, batch.parts, part_loss)
            return _plain(fused_terms(*given, squares=squares, rounded=rounded))

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Without autocast, where the attention and the weights' place allow it: for figures
        compared across engines."""
        precision, self.precision = self.precision, self.finest_precision
        try:
            yield
        finally:
            self.precision = precision

    def _hidden(self, batch: Batch) -> Tensor:
        """(N, H) hidden states that predict the response tokens."""
        out = self._run(self.model.base_model, _inputs(batch))
        hidden: Tensor = out.last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch.positions)

    def _logits(self, batch: Batch) -> Tensor:
        """(N, V), with a gradient, from the whole model."""
        logits: Tensor
        if batch.sharing is None:
            logits = self._run(self.model, _inputs(batch)).logits.flatten(0, 1)[batch.positions]
        else:
            inputs = {**_inputs(batch), "logits_to_keep": batch.positions}
            logits = self._run(self.model, inputs).logits[0]
        return logits

    def _run(self, module: nn.Module, inputs: Mapping[str, Any]) -> Any:
        return self.rounded.call(module, inputs) if self._rounds else module(**inputs)

    @property
    def _rounds(self) -> bool:
        return (
            self.precision == "bfloat16" and self.finest_precision == "float32" and self._may_round
        )

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Moving the model leaves no copies behind."""
        self.rounded.forget()
        move: Any = super()._apply
        return move(*args, **kwargs)

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"
        )

    def _choose_path(self, given: str) -> None:
        """Take the shortest path that agrees with each sequence alone, run through everything."""
        heads = [True, False] if self.model.get_output_embeddings() is not None else [False]
        with self.full_precision():
            expected = self._expected()
            if not self.why_not_shared:
                shared_attention.register()
                self.model.set_attn_implementation(shared_attention.NAME)
                self.shares = True
                if self._first_that_agrees(heads, expected):
                    self.why_not_shared = ""
                    return
                self.model.set_attn_implementation(given)
                self.shares = False
            if not self._first_that_agrees(heads, expected):
                raise ConfigError(
                    f"The log-probs of {type(self.model).__name__} depend on padding at the right "
                    "of a sequence, so this model cannot be trained in batches here."
                )

    def _first_that_agrees(self, heads: Sequence[bool], expected: Tensor) -> bool:
        for projects in heads:
            self.projects = projects
            if self._agrees(expected):
                return True
        return False

    @torch.no_grad()
    def _agrees(self, expected: Tensor) -> bool:
        try:
            found = self(self._test_batch())
        except shared_attention.UnsupportedAttention as error:
            self.why_not_shared = f"its attention uses {error}"
            return False
        except (TypeError, AttributeError, RuntimeError) as error:
            if not self.shares:
                raise
            self.why_not_shared = f"{type(error).__name__}: {error}"
            return False
        if self.shares:
            self.why_not_shared = "its log-probs differ in the shared layout"
        return float((found - expected).abs().max()) < SELF_TEST_TOLERANCE[self.finest_precision]

    def _test_sequences(self) -> list[list[TokenPair]]:
        """Two prompts with two responses each, all of different lengths."""
        vocab_size = self.model.config.get_text_config().vocab_size

        def ids(start: int, count: int) -> list[int]:
            return [(17 * i + 5 * start) % vocab_size for i in range(count)]

        return [[(ids(0, 3), ids(1, 4)), (ids(0, 3), ids(2, 7))], [(ids(3, 6), ids(4, 5))] * 2]

    def _test_batch(self) -> Batch:
        return self.pack([0, 1], self._test_sequences())

    def logps_alone(self, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        """(n,) log-probs of one response by the model as it is: no layout, no padding, no masks."""
        tokens = torch.tensor([[*prompt, *response]], device=self.device)
        with self._autocast():
            logits = self.model(input_ids=tokens, use_cache=False).logits[0]
        return _logps(logits[len(prompt) - 1 : -1], tokens[0, len(prompt) :])

    @torch.no_grad()
    def _expected(self) -> Tensor:
        """Log-probs of the test's distinct responses, each sequence alone."""
        first, second = self._test_sequences()
        return torch.cat([self.logps_alone(*sequence) for sequence in (*first, second[0])])


def _inputs(batch: Batch) -> dict[str, Any]:
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    return inputs if batch.sharing is None else {**inputs, "sharing": batch.sharing}


def _sum_parts(logits: Tensor, batch: Batch, part_loss: PartLoss, squares: bool) -> Terms:
    """The terms of all parts from logits (N, V) that carry a gradient."""
    logps = _logps(logits, batch.targets)
    log_squares = None
    if squares:
        log_squares = (2.0 * logits.detach().float().log_softmax(1)).logsumexp(1)
    totals: dict[str, Tensor] = {}
    for part in batch.parts:
        own = slice(part.start, part.stop)
        terms = part_loss(logps[own], part, None if log_squares is None else log_squares[own])
        for name, value in {"": terms.loss, **terms.metrics}.items():
            totals[name] = totals[name] + value if name in totals else value
    return Terms(totals.pop(""), totals)


def _plain(terms: Terms) -> tuple[Tensor, dict[str, Tensor]]:
    """What the wrappers of data parallelism find their tensors in."""
    return terms.loss, dict(terms.metrics)


def _logps(logits: Tensor, targets: Tensor) -> Tensor:
    """(N,) log-probs of `targets` from logits (N, V), in float32 at least."""
    wide = logits.float() if logits.element_size() < 4 else logits
    return -cross_entropy(wide, targets, reduction="none")
