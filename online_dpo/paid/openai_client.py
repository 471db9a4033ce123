"""One chat completion over an OpenAI-compatible API: one attempt, a reply or a named fault."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

import openai
from openai.types.chat import ChatCompletion

from online_dpo.endpoints import connect
from online_dpo.errors import ConfigError
from online_dpo.paid.chat import (
    NUM_LOGPROBS,
    CallFault,
    ChatReply,
    ChatRequest,
    TokenLogprobs,
    Usage,
    missing_key,
)
from online_dpo.paid.model_names import UNNAMED

EXHAUSTED = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
"""Codes of a quota that is used up, which waiting does not mend."""


class OpenAIChat:
    """A connection pool to one endpoint, for one event loop."""

    def __init__(self, base_url: str | None, api_key_env: str) -> None:
        """Raises ConfigError where a key is needed and there is none, or would not be safe."""
        key = os.environ.get(api_key_env)
        if not key and base_url is None:
            raise ConfigError(missing_key(api_key_env))
        self.own = base_url is None
        unset = f"the environment variable {api_key_env} is not set"
        self._key_hint = f" (the key in {api_key_env})" if key else f" ({unset})"
        # Retries are the caller's: the client's own would try an exhausted quota again.
        self.client = connect(base_url, key, key_env=api_key_env)

    async def chat(
        self, request: ChatRequest, *, timeout_s: float, service_tier: str | None = None
    ) -> ChatReply:
        """One attempt within `timeout_s`, a slow drip included. Raises CallFault."""
        body = body_of(request, own=self.own)
        if service_tier is not None:
            body["service_tier"] = service_tier
        async with self.faults(timeout_s):
            # `chat.completions.create` takes a millisecond to walk through what is plain JSON.
            completion: object = await self.client.post(
                "/chat/completions", body=body, cast_to=ChatCompletion
            )
        return reply_of(completion)

    @contextlib.asynccontextmanager
    async def faults(self, timeout_s: float) -> AsyncIterator[None]:
        """Cut off what takes longer; whatever the API does wrong becomes a CallFault."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            message = f"no whole reply within {timeout_s:g} s"
            raise CallFault(message, retryable=True, fate="unknown") from None
        except openai.APIStatusError as error:
            raise self._status_fault(error) from error
        except openai.APIConnectionError as error:
            raise _connection_fault(error) from error
        except (openai.OpenAIError, ValueError, RecursionError) as error:
            message = f"the reply is no chat completion: {error}"
            raise CallFault(message, retryable=True, fate="unknown") from error

    async def close(self) -> None:
        await self.client.close()

    def _status_fault(self, error: openai.APIStatusError) -> CallFault:
        status = error.status_code
        said = error.message.removeprefix(f"Error code: {status}").removeprefix(" - ")
        return status_fault(
            status,
            said,
            code=error.code or error.type,
            key_hint=self._key_hint,
            retry_after_s=_retry_after(error.response.headers),
        )


def status_fault(
    status: int,
    said: str,
    *,
    code: str | None,
    key_hint: str = "",
    retry_after_s: float | None = None,
) -> CallFault:
    """The fault that an HTTP status other than success stands for, with the API's code for it."""
    message = f"HTTP {status}: {_shown(said)}" if said else f"HTTP {status}"
    exhausted = status == 402 or code in EXHAUSTED
    if status in (401, 403):
        message += key_hint
    if exhausted:
        message += ". The account's quota is used up: add to it, then go on"
    return CallFault(
        message,
        retryable=not exhausted and (status in (408, 409, 425, 429) or status >= 500),
        # A gateway gave up waiting: what stands behind it may have answered.
        fate="unknown" if status in (408, 502, 504) else "failed",
        retry_after_s=retry_after_s,
        refused=status in (400, 413, 422) and not exhausted,
        code=code,
        status=status,
    )


def body_of(request: ChatRequest, *, own: bool) -> dict[str, Any]:
    """What is sent: OpenAI's newer models know only max_completion_tokens, others max_tokens."""
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [{"role": m.role, "content": m.content} for m in request.messages],
        "max_completion_tokens" if own else "max_tokens": request.max_tokens,
    }
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.response_format is not None:
        body["response_format"] = request.response_format
    if request.top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    return body | dict(request.extra_body or {})


def reply_of(completion: object) -> ChatReply:
    """The client does not check what it is sent. Raises CallFault for what is no completion."""
    try:
        return _reply_of(completion)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        message = f"the reply is no chat completion: {type(error).__name__}: {_shown(str(error))}"
        raise CallFault(message, retryable=True, fate="unknown") from error


def _reply_of(completion: object) -> ChatReply:
    """An error page comes as str, fields may be None or of any type."""
    if not isinstance(completion, ChatCompletion):
        fault = f"the reply is no chat completion: {_shown(str(completion))}"
        raise CallFault(fault, retryable=True, fate="unknown")
    usage = _usage(completion)
    choice: Any = completion.choices[0] if completion.choices else None
    message = getattr(choice, "message", None)
    if message is None:
        fault = f"the reply holds no message: {_shown(str(completion))}"
        raise CallFault(fault, retryable=True, fate="unknown", usage=usage)
    refusal = message.refusal
    return ChatReply(
        text=_storable(refusal or message.content or ""),
        finish_reason=_storable(choice.finish_reason or "unknown"),
        model=_storable(completion.model or UNNAMED),
        tokens_in=usage.tokens_in,
        tokens_out=usage.tokens_out,
        refused=bool(refusal),
        logprobs=_logprobs(getattr(choice.logprobs, "content", None)),
        tokens_cached=usage.tokens_cached,
        tier=usage.tier,
    )


def _usage(completion: ChatCompletion) -> Usage:
    counts: Any = completion.usage
    details = getattr(counts, "prompt_tokens_details", None)
    return Usage(
        _count(getattr(counts, "prompt_tokens", None)),
        _count(getattr(counts, "completion_tokens", None)),
        _count(getattr(details, "cached_tokens", None)),
        completion.service_tier if isinstance(completion.service_tier, str) else None,
    )


def _count(value: object) -> int | None:
    """A number of tokens; None for anything else, which is then paid for by its reservation."""
    return value if type(value) is int and 0 <= value < 1 << 40 else None


def _logprobs(content: Sequence[Any] | None) -> tuple[TokenLogprobs, ...] | None:
    """What the reply says of its last tokens; None where it says nothing."""
    if content is None:
        return None
    return tuple(
        TokenLogprobs(
            _storable(token.token),
            _logprob(token.logprob),
            tuple((_storable(t.token), _logprob(t.logprob)) for t in token.top_logprobs or ()),
        )
        for token in content[-NUM_LOGPROBS:]
    )


def _logprob(value: float) -> float:
    """A log-prob as it came; NaN, which JSON does not have, is none."""
    if math.isnan(value):
        raise ValueError("a log-prob is NaN")
    return value


def _connection_fault(error: openai.APIConnectionError) -> CallFault:
    """Without a connection nothing was sent; a broken one may have been paid for."""
    cause = error.__cause__
    unsent = type(cause).__name__ in ("ConnectError", "ConnectTimeout", "UnsupportedProtocol")
    message = f"connection failed: {type(cause).__name__}: {_shown(str(cause))}"
    return CallFault(message, retryable=True, fate="failed" if unsent else "unknown")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from retry-after-ms or Retry-After in seconds or as a date."""
    if (value := headers.get("retry-after-ms")) is not None:
        scale = 1e-3
    elif (value := headers.get("retry-after")) is not None:
        scale = 1.0
    else:
        return None
    try:
        return max(0.0, float(value) * scale)
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."


def _storable(text: str) -> str:
    """JSON may carry halves of surrogate pairs, which are no text."""
    return text.encode("utf-8", "replace").decode("utf-8")
