"""Answers of a second model, bought through the ledger's door: each is paid for once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.config import AnswerSource, BudgetConfig, JudgeConfig
from online_dpo.errors import CampaignError, EngineError, JudgeError
from online_dpo.paid.calls import CallContext
from online_dpo.paid.chat import ChatReply, ChatRequest, Estimate
from online_dpo.paid.door import Door
from online_dpo.records import Message, Prompt, SamplingParams

_CONCURRENCY = 16
_TIMEOUT_S = 120.0
_RETRIES = 4


@dataclass(frozen=True)
class Answer:
    """One text for one prompt; `finished` says that the model ended it by itself."""

    prompt_id: str
    index: int
    text: str
    finished: bool


def buy_answers(
    prompts: Sequence[Prompt],
    source: AnswerSource,
    *,
    params: SamplingParams,
    budget: BudgetConfig,
    prices: str | None,
    ledger_path: Path,
    seed: int,
    round_number: int,
    on_event: Callable[[dict[str, Any]], None],
) -> list[Answer]:
    """`source.n` answers for each prompt, in the order of the prompts, drawn as `params` say.

    top_k is the policy's alone: the API does not have it.

    `budget` and `prices` are the campaign's, as in `judge:`. Answers that the ledger holds are not
    bought again. Raises EngineError where the server gives
    none; what was bought before is kept.
    """
    settings = JudgeConfig(
        name="sampling.also",
        concurrency=_CONCURRENCY,
        timeout_s=_TIMEOUT_S,
        retries=_RETRIES,
        budget=budget,
        prices=prices,
    )
    door = Door(ledger_path, settings, version="1", seed=seed, on_event=on_event)

    async def ask(prompt: Prompt, index: int) -> Answer:
        request = _request(prompt, source, params)
        context = CallContext(prompt.id, (), False, index, "also", round_number)
        estimate = Estimate.at_most(request, source.price_per_million)
        reply = await door.complete(request, estimate, context)
        return _answer(prompt, index, reply)

    async def ask_all() -> list[Answer]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(ask(p, k)) for p in prompts for k in range(source.n)]
            return [task.result() for task in tasks]
        finally:
            await door.close()

    try:
        return asyncio.run(ask_all())
    except* Exception as errors:
        first = errors.exceptions[0]
        if isinstance(first, CampaignError) and not isinstance(first, JudgeError):
            raise first from None
        raise EngineError(f"sampling.also: {source.model} at {source.url}: {first}") from first


def _request(prompt: Prompt, source: AnswerSource, params: SamplingParams) -> ChatRequest:
    messages = prompt.messages or (Message("user", prompt.text or ""),)
    further: dict[str, Any] = {} if params.top_p == 1.0 else {"top_p": params.top_p}
    further |= {"stop": list(params.stop)} if params.stop else {}
    return ChatRequest(
        model=source.model,
        messages=messages,
        max_tokens=params.max_new_tokens,
        temperature=params.temperature,
        extra_body=further or None,
        base_url=source.url,
        api_key_env=source.api_key_env,
    )


def _answer(prompt: Prompt, index: int, reply: ChatReply) -> Answer:
    return Answer(prompt.id, index, reply.text, reply.finish_reason == "stop")
