"""The language model that a judge asks: its endpoint, its settings, and by schema or in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from online_dpo.errors import ConfigError
from online_dpo.judging import Calls, ChatReply, ChatRequest, Estimate, RequestRefused
from online_dpo.records import Message

Ask = Callable[[bool], tuple[Message, ...]]
"""The messages, given whether the server holds the reply to the schema."""


class ModelOptions(TypedDict, total=False):
    """What every LLM judge takes beside the model's name; see ChatModel."""

    base_url: str | None
    api_key_env: str
    temperature: float | None
    max_tokens: int
    structured: bool
    price_per_million: Sequence[float] | None
    extra_body: Mapping[str, Any] | None


class ChatModel:
    """A model behind an OpenAI-compatible API.

    `price_per_million` is in dollars for tokens in and out; unset it is unknown, [0, 0] is free.
    `extra_body` goes into every request, e.g. {"chat_template_kwargs": {"enable_thinking": false}}.
    `structured` asks by JSON schema, until a server has refused that and answered without.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        temperature: float | None = 0.0,
        max_tokens: int = 512,
        structured: bool = True,
        price_per_million: Sequence[float] | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises ConfigError where the price is none."""
        self.name = model
        self.base_url = base_url
        self.api_key_env = api_key_env
        self.price = _price(price_per_million)
        self.temperature = temperature
        self._max_tokens = max_tokens
        self._structured = structured
        self._extra_body = dict(extra_body) if extra_body else None

    async def ask(
        self, messages: Ask, schema: Mapping[str, Any], calls: Calls, *, top: int | None = None
    ) -> ChatReply:
        """One reply, with the log-probs of the `top` likeliest tokens where that is not None.

        Raises RequestRefused where the server will have it neither by schema nor in words.
        """

        async def ask(structured: bool) -> ChatReply:
            request = self._request(messages(structured), schema if structured else None, top)
            return await calls.complete(request, estimate=Estimate.at_most(request, self.price))

        if not self._structured:
            return await ask(False)
        try:
            return await ask(True)
        except RequestRefused as refusal:
            if is_too_long(refusal):
                raise
        # Refusals cost nothing, so calls under way at the same time may find out by themselves.
        reply = await ask(False)
        self._structured = False
        return reply

    def _request(
        self, messages: tuple[Message, ...], schema: Mapping[str, Any] | None, top: int | None
    ) -> ChatRequest:
        return ChatRequest(
            model=self.name,
            messages=messages,
            max_tokens=self._max_tokens,
            temperature=self.temperature,
            response_format=schema,
            extra_body=self._extra_body,
            top_logprobs=top,
            base_url=self.base_url,
            api_key_env=self.api_key_env,
        )


def json_schema(name: str, properties: Mapping[str, Any]) -> dict[str, Any]:
    """A `response_format` for an object with exactly these properties."""
    schema = {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }
    return {
        "type": "json_schema",
        "json_schema": {"name": name, "strict": True, "schema": schema},
    }


def is_too_long(refusal: RequestRefused) -> bool:
    """Whether a server refused a request for its length."""
    text = str(refusal).lower()
    return (
        refusal.code == "context_length_exceeded"
        or "context length" in text
        or "maximum context" in text
        or "http 413" in text
    )


def _price(price: Any) -> tuple[float, float] | None:
    if price is None:
        return None
    try:
        tokens_in, tokens_out = (float(dollars) for dollars in price)
    except (TypeError, ValueError):
        tokens_in = tokens_out = -1.0
    if not (0 <= tokens_in < float("inf") and 0 <= tokens_out < float("inf")):
        raise ConfigError(
            f"judge.options.price_per_million is [IN, OUT] in dollars a million tokens, not {price}"
        )
    return tokens_in, tokens_out
