"""One verdict of a config's judge, with every request as it is sent and the reply as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.asking.verdicts import Kind
from online_dpo.config import Config
from online_dpo.errors import CampaignError
from online_dpo.paid.calls import CallContext
from online_dpo.paid.chat import ChatReply, ChatRequest
from online_dpo.progress import make_progress
from online_dpo.records import Message, Prompt, prompt_id
from online_dpo.report_card.answers import Answered, Answers
from online_dpo.report_card.bench import opened
from online_dpo.report_card.comparisons import response_of
from online_dpo.report_card.spent import bought
from online_dpo.store import RunDir

ORDERS = {False: "first shown first", True: "second shown first"}
"""How a pair is shown, by whether it is swapped."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One call: what about (an order or a response), for whom, and what came of it."""

    about: str
    judge: str | None
    """The member of a panel that asked."""
    request: ChatRequest
    service_tier: str | None
    outcome: ChatReply | CampaignError

    @property
    def body(self) -> dict[str, Any]:
        """The request's body as the client sends it."""
        from online_dpo.paid.openai_client import body_of

        body = body_of(self.request, own=self.request.base_url is None)
        return body if self.service_tier is None else {**body, "service_tier": self.service_tier}


@dataclass(frozen=True, slots=True)
class Tried:
    """A judge's word on two responses. `cost` is what `spent.bought` says."""

    judge: Mapping[str, str]
    kind: Kind
    answered: Answered
    seconds: float
    cost: Mapping[str, Any]


def try_judge(
    config: Config,
    *,
    content: str | tuple[Message, ...],
    first: str,
    second: str,
    metadata: Mapping[str, Any],
    out: Path,
    on_exchange: Callable[[Exchange], None],
    evaluation: bool = False,
    command: str | None = None,
) -> Tried:
    """Ask the config's judge about two responses, in its orders and votes, with `out`'s ledger.

    `on_exchange` is told of each call as it ends, on another thread, be it well or not. Raises
    ConfigError, JudgeError, BudgetError and SignalError as `check_judge` does.
    """
    text, messages = (content, ()) if isinstance(content, str) else (None, content)
    prompt = Prompt(prompt_id("judge check", content), "try", text, messages, metadata)
    pair = prompt, response_of(prompt, first), response_of(prompt, second)
    with (
        closing(make_progress(quiet=True)) as progress,
        opened(config, out, evaluation=evaluation, command=command) as labeller,
    ):
        tier = labeller.config.service_tier

        def on_call(
            context: CallContext, request: ChatRequest, outcome: ChatReply | CampaignError
        ) -> None:
            about = _about(context, pair[1].id)
            on_exchange(Exchange(about, context.judge, request, tier, outcome))

        labeller.watch(on_call)
        began, events = time.monotonic(), len(RunDir(out).events())
        (answered,) = Answers(labeller, progress).on([pair], purpose="try")
        took_s = time.monotonic() - began
        cost = bought(RunDir(out).events()[events:])
        return Tried(labeller.identity, labeller.kind, answered, took_s, cost)


def _about(context: CallContext, first_id: str) -> str:
    if len(context.response_ids) == 1:
        about = "the first" if context.response_ids[0] == first_id else "the second"
    else:
        about = ORDERS[context.swapped]
    return f"{about}, vote {context.vote}" if context.vote else about
