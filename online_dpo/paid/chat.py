"""A chat completion as request, reply, price and fault; no I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from online_dpo.errors import JudgeError
from online_dpo.records import Message

PICO = 10**12
"""Picodollars in a dollar: prices per token are whole numbers of them, so that sums are exact."""

Price = tuple[float, float]
"""Dollars per million tokens, in and out."""

Fate = Literal["failed", "unknown"]
"""failed: it costs nothing; unknown: it may have been paid for."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One chat completion. The content is part of the ledger's key; where it is sent to is not."""

    model: str
    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float | None = 0.0
    """None leaves it out, for models that refuse it."""
    response_format: Mapping[str, Any] | None = None
    extra_body: Mapping[str, Any] | None = None
    top_logprobs: int | None = None
    """Ask for the log-probs of the reply's tokens, with those of so many likeliest ones beside."""
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"

    @property
    def content(self) -> dict[str, Any]:
        """What the model's answer depends on."""
        content = {
            "model": self.model,
            "messages": [{"role": m.role, "content": m.content} for m in self.messages],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "response_format": self.response_format,
            "extra_body": self.extra_body,
        }
        if self.top_logprobs is not None:
            content["top_logprobs"] = self.top_logprobs
        return content


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token of a reply: its text, its log-prob in nats, and the likeliest tokens' in its place.

    `top` holds (text, log-prob), as the server orders them; the token itself may be among them.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


NUM_LOGPROBS = 32
"""The last tokens of a reply of which log-probs are kept: a verdict stands at the end."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a reply says that it used: tokens, those read from a cache, and the service tier."""

    tokens_in: int | None
    tokens_out: int | None
    tokens_cached: int | None = None
    """Part of `tokens_in`."""
    tier: str | None = None


@dataclass(frozen=True, slots=True)
class ChatReply:
    """The model's words. `cached`: they came from the ledger; `refused`: it declined to answer."""

    text: str
    finish_reason: str
    model: str
    tokens_in: int | None
    tokens_out: int | None
    refused: bool = False
    cached: bool = False
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """Of the last NUM_LOGPROBS tokens, where they were asked for and the server gives them."""
    tokens_cached: int | None = None
    tier: str | None = None
    key: str = ""
    """Of its row in the ledger."""

    @property
    def usage(self) -> Usage:
        return Usage(self.tokens_in, self.tokens_out, self.tokens_cached, self.tier)


@dataclass(frozen=True, slots=True)
class Estimate:
    """The most that a request may use.

    `price_per_million` None leaves the price to the price file; what is not in there either is
    unknown, which is not free.
    """

    tokens_in: int
    tokens_out: int
    price_per_million: Price | None

    @classmethod
    def at_most(cls, request: ChatRequest, price_per_million: Price | None) -> Estimate:
        """A safe bound: a token is at least a byte, and a message adds a few of the template's."""
        sent = json.dumps(request.content["messages"], ensure_ascii=False)
        extra = json.dumps([request.response_format, request.extra_body])
        tokens_in = len(sent.encode(errors="replace")) + len(extra) + 64 * len(request.messages)
        return cls(tokens_in, request.max_tokens, price_per_million)

    @property
    def tokens(self) -> int:
        return self.tokens_in + self.tokens_out


class CallFault(Exception):
    """An attempt that gave no usable reply, and whether it may have been paid for all the same.

    `usage` is what it is known to have used.
    """

    def __init__(
        self,
        message: str,
        *,
        retryable: bool,
        fate: Fate,
        usage: Usage | None = None,
        retry_after_s: float | None = None,
        refused: bool = False,
        code: str | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retryable = retryable
        self.fate: Fate = fate
        self.usage = usage
        self.retry_after_s = retry_after_s
        self.refused = refused
        self.code = code


class RequestRefused(JudgeError):
    """The server understood the request and will not serve it (400, 422): ask in another way."""

    def __init__(self, message: str, *, code: str | None) -> None:
        super().__init__(message)
        self.code = code


def logprobs_to_json(tokens: tuple[TokenLogprobs, ...] | None) -> str | None:
    """Log-probs as the ledger keeps them: [[text, log-prob, [[text, log-prob], ...]], ...]."""
    if tokens is None:
        return None
    return json.dumps([[t.text, t.logprob, t.top] for t in tokens], separators=(",", ":"))


def logprobs_from_json(text: str | None) -> tuple[TokenLogprobs, ...] | None:
    """The inverse of `logprobs_to_json`."""
    if text is None:
        return None
    return tuple(
        TokenLogprobs(token, logprob, tuple((other, value) for other, value in top))
        for token, logprob, top in json.loads(text)
    )


def missing_key(name: str) -> str:
    """What to say where an API's key is needed and the environment has none."""
    return (
        f"The environment variable {name} is not set; the judge's API needs a key. Set it, or name "
        "another variable in judge.options.api_key_env."
    )
