"""What `generate` is told at each step: which token each row takes, and which rows have ended."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from online_dpo.records import FinishReason, SamplingParams
from online_dpo.samplers.responses import StopStrings


def seeded_uniforms(seeds: Sequence[int], num_steps: int) -> Tensor:
    """Uniform numbers in [0, 1), (rows, steps): a row's depend on its own seed and nothing else.

    A counter-based generator (Philox) with the seed as its key: a longer row begins with the same
    numbers, and all 63 bits of the seed count, unlike with torch's CPU generator.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=seed)).random(num_steps, dtype=np.float32)
        for seed in seeds
    ]
    return torch.from_numpy(np.stack(rows))


class SeededChoice(LogitsProcessor):
    """Draws each row's next token by inverse CDF from the row's own uniform number of the step.

    `generate` takes no random generator; so it decodes greedily from scores that leave one token.
    """

    def __init__(self, uniforms: Tensor, params: SamplingParams) -> None:
        self._uniforms = uniforms  # (B, T)
        self._params = params
        self._step = 0
        self.logprobs = torch.zeros_like(uniforms)
        """Raw log-probs (nats, temperature 1) of the chosen tokens, (B, T)."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) that are 0 for the chosen token and -inf elsewhere."""
        chosen = self._choose(scores, self._uniforms[:, self._step, None])  # (B, 1)
        raw = scores.gather(1, chosen) - scores.logsumexp(1, keepdim=True)
        self.logprobs[:, self._step] = raw[:, 0]
        self._step += 1
        return scores.fill_(-torch.inf).scatter_(1, chosen, 0.0)

    def _choose(self, scores: Tensor, uniform: Tensor) -> Tensor:
        if self._params.temperature == 0:
            return scores.argmax(1, keepdim=True)
        scores = scores / self._params.temperature
        if self._params.top_k == 0 and self._params.top_p == 1.0:
            last = scores.new_full((len(scores), 1), scores.shape[1] - 1, dtype=torch.long)
            return _inverse_cdf(scores.softmax(1), uniform, last)
        kept = min(self._params.top_k or scores.shape[1], scores.shape[1])
        scores, order = scores.topk(kept, dim=1)
        probs = scores.softmax(1)
        # The smallest set with a mass of at least top_p: whatever has less than that before it.
        before = probs.cumsum(1) - probs
        last = (before < self._params.top_p).sum(1, keepdim=True).clamp_(min=1) - 1
        return order.gather(1, _inverse_cdf(probs, uniform, last))


def _inverse_cdf(probs: Tensor, uniform: Tensor, last: Tensor) -> Tensor:
    """For each row the first index whose cumulative mass passes `uniform` of the mass up to `last`.

    probs (B, V), uniform (B, 1) in [0, 1), last (B, 1): the largest index allowed. Returns (B, 1).
    """
    mass = probs.cumsum(1)
    target = uniform * mass.gather(1, last)
    return torch.searchsorted(mass, target, right=True).minimum(last)


class Ending(StoppingCriteria):
    """Ends each row at an EOS, at a completed stop string or at its own limit, and keeps where."""

    def __init__(
        self, *, limits: Sequence[int], eos: Sequence[int], stop: StopStrings, device: torch.device
    ) -> None:
        # `generate` pads rows that have ended where a criterion has this attribute.
        self.eos_token_id = torch.tensor(eos, device=device)
        self._limits = torch.tensor(limits, device=device)
        self._stop = stop
        self._step = 0
        self._stopped = [False] * len(limits)
        self._lengths = torch.zeros(len(limits), dtype=torch.long, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: object) -> Tensor:
        """Whether each row has ended, (B,). `input_ids` (B, P + step) holds the prompts too."""
        self._step += 1
        done = torch.isin(input_ids[:, -1], self.eos_token_id)
        if self._stop:
            done |= self._find_stops(input_ids[:, -self._step :], done)
        done |= self._limits <= self._step
        self._lengths = torch.where(done & (self._lengths == 0), self._step, self._lengths)
        return self._lengths > 0

    def _find_stops(self, responses: Tensor, at_eos: Tensor) -> Tensor:
        running = ((self._lengths == 0) & ~at_eos).nonzero()[:, 0].tolist()
        for row, token_ids in zip(running, responses[running].tolist(), strict=True):
            self._stopped[row] = self._stop.just_completed(token_ids)
        return torch.tensor(self._stopped, device=responses.device)

    def lengths(self) -> list[int]:
        """Tokens of each response, the one that ended it included."""
        return self._lengths.tolist()

    def reason(self, row: int, last_token: int) -> FinishReason:
        """Why a row ended, given its last token."""
        if self._stopped[row]:
            return "stop"
        return "eos" if last_token in self.eos_token_id else "length"
