"""A single verdict as lines for the terminal: requests, replies, what was read off them; pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from online_dpo.asking.verdicts import IDENTICAL
from online_dpo.display.wording import number, seconds, usd
from online_dpo.errors import CampaignError
from online_dpo.report_card.trial import ORDERS, Exchange, Tried


def describe_exchange(exchange: Exchange) -> str:
    """A request as it is sent, its texts as they are, and what came of it."""
    return "\n".join(_exchange(exchange))


def describe(tried: Tried, num_exchanges: int) -> str:
    """The verdict, by order and together, after so many calls."""
    return "\n".join(_verdict(tried, num_exchanges))


def _exchange(exchange: Exchange) -> Iterator[str]:
    outcome = exchange.outcome
    asked = f" by {exchange.judge}" if exchange.judge is not None else ""
    place = exchange.request.base_url or "the API"
    yield f"== request{asked}: {exchange.about}, to {place}"
    body: dict[str, Any] = dict(exchange.body)
    messages = body.pop("messages")
    yield from (f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in body.items())
    for message in messages:
        yield f"-- {message['role']}"
        yield message["content"]
    if isinstance(outcome, CampaignError):
        yield f"== no reply: {outcome.message}"
        return
    source = ", from the ledger" if outcome.cached else ""
    yield f"== reply of {outcome.model} ({outcome.finish_reason}){source}"
    yield outcome.text
    if outcome.tokens_in is not None and outcome.tokens_out is not None:
        yield f"-- {outcome.tokens_in} tokens in, {outcome.tokens_out} out"


def _orders(tried: Tried) -> tuple[bool, ...]:
    """Whether each order that was asked was swapped; a judge that scores sees none."""
    made = tried.answered.comparison
    if tried.kind == "score":
        return ()
    return (False, True) if made.orders == 2 else (bool(tried.answered.swapped),)


def _verdict(tried: Tried, num_exchanges: int) -> Iterator[str]:
    made = tried.answered.comparison
    yield f"{tried.judge['name']} (version {tried.judge['version']})"
    if made.reason == IDENTICAL:
        yield "There was no request: the two responses are identical."
    elif not num_exchanges:
        yield "There was no request: this judge makes no calls."
        yield from (f"in its words: {raw}" for raw in made.raws if tried.kind == "compare")
    if tried.kind == "score":
        yield from (f"scores: {raw}" for raw in made.raws)
    for swapped, votes in zip(_orders(tried), tried.answered.votes, strict=False):
        said = ", ".join("no verdict" if p is None else f"p {number(p, 3)}" for p in votes)
        yield f"{ORDERS[swapped]}: {said}"
    if made.p is None:
        yield f"verdict: none, {made.reason}"
    else:
        better = "a tie" if made.p == 0.5 else f"the {'first' if made.p > 0.5 else 'second'}"
        why = f" ({made.reason})" if made.reason else ""
        yield f"verdict: {better}, p {number(made.p, 3)} that the first is better{why}"
    paid = f", {usd(tried.cost['usd'])}" if num_exchanges else ""
    yield f"took {seconds(tried.seconds)}{paid}"
