"""One verdict of a config's judge, with every request as it is sent and the reply as it comes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass
class Exchange:
    """One call: what was asked for whom, and the reply or the error that came instead."""

    context: CallContext
    request: ChatRequest
    outcome: ChatReply | CampaignError

    @property
    def body(self) -> dict[str, Any]:
        """The request's body as the client sends it."""
        from online_dpo.paid.openai_client import body_of

        return body_of(self.request, own=self.request.base_url is None)


@dataclass
class Tried:
    """A judge's word on two responses, and the calls that it rests on."""

    judge: Mapping[str, str]
    kind: str
    answered: Answered
    seconds: float
    cost: dict[str, Any]
    """What `spent.bought` says of it."""
    exchanges: list[Exchange]


def try_judge(
    config: Config,
    *,
    content: str | tuple[Message, ...],
    first: str,
    second: str,
    metadata: Mapping[str, Any],
    out: Path,
    evaluation: bool = False,
    command: str | None = None,
) -> Tried:
    """Ask the config's judge about two responses, in its orders and votes, with `out`'s ledger.

    Raises ConfigError, JudgeError, BudgetError and SignalError as `check_judge` does.
    """
    text, messages = (content, ()) if isinstance(content, str) else (None, content)
    prompt = Prompt(prompt_id("judge check", content), "try", text, messages, metadata)
    pair = prompt, response_of(prompt, first), response_of(prompt, second)
    exchanges: list[Exchange] = []
    with (
        closing(make_progress(quiet=True)) as progress,
        opened(config, out, evaluation=evaluation, command=command) as labeller,
    ):
        labeller.watch(lambda *call: exchanges.append(Exchange(*call)))
        began, events = time.monotonic(), len(RunDir(out).events())
        (answered,) = Answers(labeller, progress).on([pair], purpose="try")
        took_s = time.monotonic() - began
        cost = bought(RunDir(out).events()[events:])
        return Tried(labeller.identity, labeller.kind, answered, took_s, cost, exchanges)
