"""Log-probs of response tokens, without logits at any other position."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from online_dpo.errors import ConfigError
from online_dpo.training.batching import Sequences, pad_sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Precision = Literal["float32", "bfloat16"]

LOGITS_PER_CHUNK = 2**22
"""Logits in memory at once: 16 MB in float32."""

SELF_TEST_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1}
"""Largest difference of a log-prob, in nats, that rounding explains."""


class LogProbModel(nn.Module):
    """A causal language model that answers with the log-probs of response tokens.

    Runs the trunk, and projects to the vocabulary only the positions that predict a response token.
    Models whose logits are more than that projection (soft-capped, scaled) are found by a numeric
    test when the wrapper is made, and then run whole.

    Raises ConfigError where padding changes the model's log-probs, or the attention cannot run in
    this precision.
    """

    def __init__(self, model: PreTrainedModel, *, precision: Precision = "float32") -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self.projects = True
        flash = model.config._attn_implementation == "flash_attention_2"
        if flash and precision == "float32":
            raise ConfigError(
                "model.attention: flash_attention_2 computes in bfloat16 only. Set "
                "train.precision: bfloat16, or model.attention: sdpa."
            )
        self._test_precision: Precision = "bfloat16" if flash else "float32"
        if not self._matches_whole_model():
            self.projects = False
            if not self._matches_whole_model():
                raise ConfigError(
                    f"The log-probs of {type(model).__name__} depend on padding at the right of a "
                    "sequence, so this model cannot be trained in batches here."
                )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def forward(
        self, input_ids: Tensor, rows: Tensor, positions: Tensor, targets: Tensor
    ) -> Tensor:
        """(N,) float32 log-probs of `targets` (N,), predicted at (rows, positions) of (B, T)."""
        with self._autocast():
            if not self.projects:
                logits = self.model(input_ids=input_ids, use_cache=False).logits
                return _token_logps(logits[rows, positions], None, targets)
            trunk = self.model.base_model
            hidden = trunk(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, H)
            head: nn.Module = self.model.get_output_embeddings()
            return _chunked_logps(hidden[rows, positions], head, targets)

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Without autocast, where the attention allows it: for figures compared across engines."""
        precision, self.precision = self.precision, self._test_precision
        try:
            yield
        finally:
            self.precision = precision

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"
        )

    @torch.no_grad()
    def _matches_whole_model(self) -> bool:
        """Whether padded rows scored our way agree with each row alone, run through everything."""
        if self.projects and self.model.get_output_embeddings() is None:
            return False
        vocab_size = self.model.config.get_text_config().vocab_size
        ids = [[(17 * i + 5 * row) % vocab_size for i in range(n)] for row, n in enumerate((6, 11))]
        batch = pad_sequences([row[:3] for row in ids], [row[3:] for row in ids]).to(self.device)
        with self.full_precision():
            ours = token_logps(self, batch)
            expected = [
                self._whole_model(batch.input_ids[row, : len(t)]) for row, t in enumerate(ids)
            ]
        difference = float((ours - torch.cat(expected)).abs().max())
        return difference < SELF_TEST_TOLERANCE[self._test_precision]

    def _whole_model(self, tokens: Tensor) -> Tensor:
        """Log-probs of the tokens (T,) from the fourth on."""
        with self._autocast():
            logits = self.model(input_ids=tokens[None], use_cache=False).logits
        return _token_logps(logits[0, 2:-1], None, tokens[3:])


def token_logps(model: nn.Module, batch: Sequences) -> Tensor:
    """(N,) log-probs of all response tokens of the batch, row after row."""
    logps: Tensor = model(batch.input_ids, batch.rows, batch.positions, batch.targets)
    return logps


def sum_rows(values: Tensor, batch: Sequences) -> Tensor:
    """(B,) sums over each row's response tokens of `values` (N,), in float64.

    A sum of some hundred nats has few digits left in float32, and margins are differences of sums.
    """
    shape = (len(batch.lengths), max(batch.lengths))
    padded = values.new_zeros(shape, dtype=torch.float64)
    # (B, R); an index occurs once, so that this is deterministic on a GPU too.
    padded = padded.index_put((batch.rows, batch.columns), values.double())
    return padded.sum(dim=1)


def _chunked_logps(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """(N,) log-probs from hidden states (N, H); logits of one chunk at a time are in memory."""
    weight: Any = head.weight
    vocab_size = int(weight.shape[0])
    size = max(1, LOGITS_PER_CHUNK // vocab_size)
    if len(targets) <= size:
        return _token_logps(hidden, head, targets)
    parts = [
        checkpoint(
            _token_logps, hidden[i : i + size], head, targets[i : i + size], use_reentrant=False
        )
        for i in range(0, len(targets), size)
    ]
    return torch.cat(parts)


def _token_logps(values: Tensor, head: nn.Module | None, targets: Tensor) -> Tensor:
    """(N,) float32 log-probs of the targets, from logits (N, V) or hidden states (N, H) + head."""
    logits = values if head is None else head(values)
    return -cross_entropy(logits.float(), targets, reduction="none")
