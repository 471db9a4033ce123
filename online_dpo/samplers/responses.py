"""What a finished response is, the same for every sampler: where it ends, why, and its text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from online_dpo.errors import EngineError
from online_dpo.files import read_json
from online_dpo.records import FinishReason, Prompt, Response
from online_dpo.tokenization import decode_response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenPairs = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Ids of prompts and of responses to them."""


@dataclass(frozen=True, slots=True)
class Output:
    """What an engine emitted for one response, before it has a text."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


def eos_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a response, sorted: by the model's two config files and the tokenizer.

    A chat model often has two (its turn's end and its text's end), and not every file names both.
    """
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            found.update(_as_ids(read_json(folder / name).get("eos_token_id")))
    found.update(_as_ids(tokenizer.eos_token_id))
    if not found:
        raise EngineError(
            f"Neither the config files in {folder} nor its tokenizer name an EOS token; a response "
            "could end at the token limit only. Set eos_token in the tokenizer's config."
        )
    return tuple(sorted(found))


def _as_ids(value: Any) -> Iterable[int]:
    if value is None:
        return ()
    return value if isinstance(value, list) else (value,)


def response_limit(prompt: Prompt, *, max_new_tokens: int, context: int | None) -> int:
    """Most tokens a response to this prompt may have. Raises EngineError where none fits."""
    if not prompt.token_ids:
        raise EngineError(f"The prompt {prompt.id} has no token ids; it was never tokenized.")
    if context is None:
        return max_new_tokens
    room = context - len(prompt.token_ids)
    if room < 1:
        raise EngineError(
            f"The prompt {prompt.id} has {len(prompt.token_ids)} tokens and the model's context "
            f"holds {context}: nothing can be generated. Lower prompts.max_tokens below {context}."
        )
    return min(max_new_tokens, room)


class StopStrings:
    """Finds stop strings in a response's text as it grows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # A token adds a byte or more, except special ones: the slack is for them.
        self._window = max((len(s.encode()) for s in stop), default=0) + 8

    def __bool__(self) -> bool:
        return bool(self._stop)

    def just_completed(self, token_ids: Sequence[int]) -> bool:
        """Whether the last token of a growing response completes a stop string."""
        return self._found(token_ids[-self._window :]) and self._found(token_ids)

    def length_through(self, token_ids: Sequence[int]) -> int | None:
        """The number of tokens up to and including the one that completes a stop string, if any."""
        if not self._stop or not self._found(token_ids):
            return None
        length = len(token_ids)
        while length > 1 and self._found(token_ids[: length - 1]):
            length -= 1
        return length

    def _found(self, token_ids: Sequence[int]) -> bool:
        text = decode_response(self._tokenizer, token_ids)
        return any(stop in text for stop in self._stop)


def trim(
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    *,
    eos: Sequence[int],
    stop: StopStrings,
    stopped: bool,
) -> Output:
    """A server's or engine's output as every sampler reports it.

    It ends with its first EOS, or with the token that completes a stop string. `stopped` is what
    the engine says: that it ended before the token limit.
    """
    ends = set(eos)
    eos_at = next((i for i, token in enumerate(token_ids) if token in ends), None)
    through = stop.length_through(token_ids[:eos_at])
    reason: FinishReason = "stop" if stopped else "length"
    if through is not None:
        reason = "stop"
    elif eos_at is not None:
        through, reason = eos_at + 1, "eos"
    return Output(tuple(token_ids[:through]), tuple(logprobs[:through]), reason)


def build_response(
    prompt: Prompt,
    k: int,
    output: Output,
    *,
    tokenizer: PreTrainedTokenizerBase,
    stop: Sequence[str],
    strip_thinking: bool,
) -> Response:
    """The k-th response to a prompt, with the text that the judge sees.

    Raises EngineError where the model gave no numbers.
    """
    if not all(math.isfinite(logprob) for logprob in output.logprobs):
        raise EngineError(
            "The model gives log-probabilities that are not finite: its weights hold NaN or "
            "infinity, or its precision is too low."
        )
    return Response(
        id=f"{prompt.id}:{k:02d}",
        prompt_id=prompt.id,
        text=decode_response(tokenizer, output.token_ids, stop=stop, strip_thinking=strip_thinking),
        token_ids=output.token_ids,
        finish_reason=output.finish_reason,
        logprobs=output.logprobs,
    )
