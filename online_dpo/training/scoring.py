"""Log-probs of given responses under a model, as a library function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from online_dpo.errors import ConfigError
from online_dpo.models.loading import load_model
from online_dpo.training.logprobs import LogProbModel
from online_dpo.training.reference import score_sequences

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

TokenIds = Sequence[int]


def sequence_logps(
    model: str | Path | PreTrainedModel,
    prompts: Sequence[TokenIds],
    responses: Sequence[TokenIds],
    *,
    batch_tokens: int = 4096,
) -> Tensor:
    """(B,) log pi(response | prompt) in nats: float64 sums over each response's tokens.

    `prompts` and `responses` are B lists of token ids; no prompt is empty. What counts is exactly
    the response's ids, an EOS where it is among them: prompt and padding are told apart by where
    they stand, not by an id, so that a padding token may be the EOS. Temperature 1, in the
    precision of the weights, without a gradient.

    `model` is a transformers folder, or a loaded causal language model in evaluation mode, which is
    left as it was. `batch_tokens` bounds the tokens in memory at once. Raises ValueError for lists
    that do not match, ConfigError (a ValueError) for a model that cannot be used.
    """
    logps = per_token_logps(model, prompts, responses, batch_tokens=batch_tokens)
    return torch.stack([values.sum() for values in logps]) if logps else torch.zeros(0).double()


def per_token_logps(
    model: str | Path | PreTrainedModel,
    prompts: Sequence[TokenIds],
    responses: Sequence[TokenIds],
    *,
    batch_tokens: int = 4096,
) -> list[Tensor]:
    """The terms of `sequence_logps`: for each response its tokens' log-probs, (len(response),)."""
    if len(prompts) != len(responses):
        raise ValueError(f"there are {len(prompts)} prompts and {len(responses)} responses")
    empty = next((number for number, prompt in enumerate(prompts) if not len(prompt)), None)
    if empty is not None:
        raise ValueError(
            f"prompt {empty} is empty, and nothing predicts its response's first token"
        )
    asked = [pair for pair in zip(prompts, responses, strict=True) if len(pair[1])]
    with _wrapped(model) as wrapped:
        logps = iter(
            score_sequences(
                wrapped,
                asked,
                batch_tokens=batch_tokens,
                accelerator=cast("Accelerator", _OneProcess),
                emit=_ignore,
            )
        )
    found = [next(logps) if len(response) else [] for response in responses]
    return [torch.tensor(values, dtype=torch.float64) for values in found]


@contextmanager
def _wrapped(model: str | Path | PreTrainedModel) -> Iterator[LogProbModel]:
    """The model as the trainer has it; a given one gets its own attention back at the end."""
    if isinstance(model, str | Path):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        yield LogProbModel(load_model(Path(model), device=device))
        return
    narrow = next((p.dtype for p in model.parameters() if p.dtype.itemsize < 4), None)
    if narrow is not None:
        raise ConfigError(
            f"The model's weights are {narrow}, whose rounding makes log-probs depend on padding. "
            "Load it with dtype=torch.float32, or give its folder."
        )
    attention = str(model.config._attn_implementation)
    try:
        yield LogProbModel(model)
    finally:
        model.set_attn_implementation(attention)


class _OneProcess:
    """This process by itself, whatever process group the caller is in."""

    process_index = 0
    num_processes = 1
    is_main_process = True


def _ignore(event: dict[str, Any]) -> None:
    """Nobody watches."""
