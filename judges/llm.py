"""A language model behind an OpenAI-compatible API that says which of two responses is better."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from online_dpo.errors import ConfigError
from online_dpo.judging import Calls, ChatReply, ChatRequest, Estimate, RequestRefused
from online_dpo.records import Message, Prompt, Response, Verdict
from online_dpo.resources import find_data

P_OF_LABEL = {"a": 1.0, "first": 1.0, "b": 0.0, "second": 0.0, "tie": 0.5, "c": 0.5}
"""What each word for a verdict means; c is the tie of the [[A]], [[B]], [[C]] convention."""

RESPONSE_FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"verdict": {"type": "string", "enum": ["A", "B", "tie"]}},
            "required": ["verdict"],
            "additionalProperties": False,
        },
    },
}

NO_VERDICT = "no verdict in the reply"
TOO_LONG = "too long for the judge"


class LLMPairwise:
    """Asks for a verdict by JSON schema, or in words where the server takes no schema.

    `template` is a file with the blocks `system` and `user`; see prompts/pairwise.jinja.
    `price_per_million` is in dollars for tokens in and out; unset it is unknown, [0, 0] is free.
    `extra_body` goes into every request, e.g. {"chat_template_kwargs": {"enable_thinking": false}}.
    """

    name: ClassVar[str] = "llm_pairwise"
    version: ClassVar[str] = "1"

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        template: str = "pairwise.jinja",
        temperature: float | None = 0.0,
        max_tokens: int = 512,
        structured: bool = True,
        price_per_million: Sequence[float] | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises ConfigError where the template or the price cannot be used."""
        self._model = model
        self.base_url = base_url
        self.api_key_env = api_key_env
        self._template = _load(template)
        self._temperature = temperature
        self._max_tokens = max_tokens
        self.price = _price(price_per_million)
        """Dollars per million tokens, in and out; None is unknown, with which no budget goes."""
        self._extra_body = dict(extra_body) if extra_body else None
        self._structured = structured
        """Whether to ask by schema: until a server has refused that and answered without."""

    async def compare(
        self, prompt: Prompt, first: Response, second: Response, *, calls: Calls
    ) -> Verdict:
        """The model's verdict; without a usable one p is None, with the reason and its words."""
        fence = unused_fence(calls.seed, prompt.content, first.text, second.text)
        try:
            reply = await self._ask(prompt, first, second, fence, calls)
        except RequestRefused as refusal:
            if _too_long(refusal):
                return Verdict(None, TOO_LONG, str(refusal))
            raise
        return read_verdict(reply, fence)

    async def _ask(
        self, prompt: Prompt, first: Response, second: Response, fence: str, calls: Calls
    ) -> ChatReply:
        """One reply, by schema unless the server has refused one."""

        async def ask(structured: bool) -> ChatReply:
            request = self._request(prompt, first, second, fence, structured)
            return await calls.complete(request, estimate=Estimate.at_most(request, self.price))

        if not self._structured:
            return await ask(False)
        try:
            return await ask(True)
        except RequestRefused as refusal:
            if _too_long(refusal):
                raise
        # Refusals cost nothing, so calls under way at the same time may find out by themselves.
        reply = await ask(False)
        self._structured = False
        return reply

    def _request(
        self, prompt: Prompt, first: Response, second: Response, fence: str, structured: bool
    ) -> ChatRequest:
        context = self._template.new_context(
            {
                "prompt": prompt.content,
                "metadata": {"answer": None, "rubric": None, **prompt.metadata},
                "first": first.text,
                "second": second.text,
                "fence": fence,
                "structured": structured,
            }
        )
        try:
            messages = [
                Message(role, "".join(self._template.blocks[role](context)).strip())
                for role in ("system", "user")
                if role in self._template.blocks
            ]
        except TemplateError as error:
            raise ConfigError(
                f"The template {self._template.filename} cannot be rendered for prompt "
                f"{prompt.id!r}: {error}"
            ) from error
        return ChatRequest(
            model=self._model,
            messages=tuple(messages),
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            response_format=RESPONSE_FORMAT if structured else None,
            extra_body=self._extra_body,
            base_url=self.base_url,
            api_key_env=self.api_key_env,
        )


def unused_fence(seed: int, *texts: str) -> str:
    """A word of 16 hex digits from the seed that occurs in none of the texts."""
    while True:
        fence = f"{seed:016x}"
        if not any(fence in text for text in texts):
            return fence
        seed += 1


def read_verdict(reply: ChatReply, fence: str) -> Verdict:
    """The verdict in a reply: the JSON object that was asked for, or the last one in words."""
    text = reply.text.rpartition("</think>")[2].strip()
    p = _from_json(text)
    if p is not None:
        return Verdict(p, raw=reply.text)
    if reply.refused:
        return Verdict(None, "the model refused to answer", reply.text)
    if reply.finish_reason == "length":
        return Verdict(None, "reply cut off at max_tokens", reply.text)
    if not text:
        return Verdict(None, f"empty reply ({reply.finish_reason})", reply.text)
    p = last_verdict(text, fence)
    return Verdict(p, NO_VERDICT if p is None else None, reply.text)


_BARE = r"(?:a|b|tie|first|second)"
_QUOTES = (
    re.compile(r"```.*?(?:```|\Z)", re.DOTALL),
    re.compile(r"^[ \t]*>.*$", re.MULTILINE),
    re.compile(rf"`(?!{_BARE}`)[^`\n]*`", re.IGNORECASE),
    re.compile(rf'"(?!{_BARE}")[^"\n]*"', re.IGNORECASE),
    re.compile(rf"\u201c(?!{_BARE}\u201d)[^\u201d]*\u201d", re.IGNORECASE),
)
_MARKERS = re.compile(
    rf"\[\[\s*(?P<marker>{_BARE}|c)\s*\]\]"
    rf"|^\W*(?:(?:my|the|final|overall)\s+)*verdict\W*(?:is\b\W*)?"
    rf"(?:(?:response|answer)\W+)?(?P<line>{_BARE})\b\W*$"
    rf"|\A\W*(?P<all>{_BARE})\W*\Z",
    re.IGNORECASE | re.MULTILINE,
)


def last_verdict(text: str, fence: str) -> float | None:
    """p of the last verdict in words, [[A]] or a line `Verdict: A`; None where there is none.

    What the text quotes (in fences, code, quotation marks or quoted lines) is not its own word.
    """
    word = re.escape(fence)
    text = re.sub(rf"<<<[^<>\n]*{word}>>>.*?(?:<<<end[^<>\n]*{word}>>>|\Z)", "", text, flags=re.S)
    for quote in _QUOTES:
        text = quote.sub("", text)
    found = [match["marker"] or match["line"] or match["all"] for match in _MARKERS.finditer(text)]
    return P_OF_LABEL[found[-1].lower()] if found else None


def _from_json(text: str) -> float | None:
    """p of a reply that is wholly a JSON object with a verdict, within a code fence or not."""
    text = re.sub(r"\A```(?:json)?\s*(.*?)\s*```\Z", r"\1", text, flags=re.DOTALL)
    try:
        reply = json.loads(text)
    except ValueError:
        return None
    verdict = reply.get("verdict") if isinstance(reply, dict) else None
    return P_OF_LABEL.get(verdict.lower()) if isinstance(verdict, str) else None


def _too_long(refusal: RequestRefused) -> bool:
    text = str(refusal).lower()
    return (
        refusal.code == "context_length_exceeded"
        or "context length" in text
        or "maximum context" in text
        or "http 413" in text
    )


def _load(template: str) -> Template:
    """The template in a sandbox; a name that it uses and nobody defines is an error."""
    path = find_data(template)
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
    try:
        loaded = environment.from_string(path.read_text(encoding="utf-8"))
    except (TemplateError, UnicodeDecodeError) as error:
        raise ConfigError(f"The template {path} is no Jinja template: {error}") from error
    loaded.filename = str(path)
    if "user" not in loaded.blocks:
        raise ConfigError(
            f"The template {path} has no block `user`: {{% block user %}}...{{% endblock %}} "
            "becomes the message to the judge, and a block `system`, if there is one, stands first."
        )
    return loaded


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
