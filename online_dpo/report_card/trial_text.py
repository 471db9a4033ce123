"""A single verdict as lines for the terminal: requests, replies, what was read off them; pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from online_dpo.display.wording import number, seconds
from online_dpo.errors import CampaignError
from online_dpo.report_card.text import usd
from online_dpo.report_card.trial import Exchange, Tried

_ORDERS = {False: "first shown first", True: "second shown first"}


def describe(tried: Tried) -> str:
    """Every call in the order in which it ended, each order's p, and the verdict."""
    lines = [f"{tried.judge['name']} (version {tried.judge['version']})"]
    for exchange in tried.exchanges:
        lines += ["", *_exchange(exchange)]
    if not tried.exchanges:
        lines += ["", "There was no request: this judge makes no calls."]
    return "\n".join((*lines, "", *_verdict(tried)))


def _exchange(exchange: Exchange) -> Iterator[str]:
    context, outcome = exchange.context, exchange.outcome
    asked = f" by {context.judge}" if context.judge is not None else ""
    vote = f", vote {context.vote}" if context.vote else ""
    place = exchange.request.base_url or "the API"
    yield f"== request{asked}: {_ORDERS[context.swapped]}{vote}, to {place}"
    body: dict[str, Any] = dict(exchange.body)
    messages = body.pop("messages")
    yield from (f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in body.items())
    for message in messages:
        yield f"-- {message['role']}"
        yield message["content"]
    if isinstance(outcome, CampaignError):
        yield f"== refused: {outcome.message}"
        return
    yield f"== reply of {outcome.model} ({outcome.finish_reason}){_source(outcome.cached)}"
    yield outcome.text
    if outcome.tokens_in is not None and outcome.tokens_out is not None:
        yield f"-- {outcome.tokens_in} tokens in, {outcome.tokens_out} out"


def _orders(tried: Tried) -> tuple[bool, ...]:
    """Whether each order that was asked was swapped; a judge that scores sees none."""
    made = tried.answered.comparison
    if tried.kind == "score":
        return ()
    return (False, True) if made.orders == 2 else (bool(tried.answered.swapped),)


def _source(cached: bool) -> str:
    return ", from the ledger" if cached else ""


def _verdict(tried: Tried) -> Iterator[str]:
    made = tried.answered.comparison
    if tried.kind == "score" and made.raws:
        yield f"scores: {made.raws[0]}"
    elif not tried.exchanges:
        yield from (f"in its words: {raw}" for raw in made.raws)
    for swapped, votes in zip(_orders(tried), tried.answered.votes, strict=False):
        said = ", ".join("no verdict" if p is None else f"p {number(p, 3)}" for p in votes)
        yield f"{_ORDERS[swapped]}: {said}"
    if made.p is None:
        yield f"verdict: none, {made.reason}"
    else:
        better = "a tie" if made.p == 0.5 else f"the {'first' if made.p > 0.5 else 'second'}"
        why = f" ({made.reason})" if made.reason else ""
        yield f"verdict: {better}, p {number(made.p, 3)} that the first is better{why}"
    paid = f", {usd(tried.cost['usd'])}" if tried.exchanges else ""
    yield f"took {seconds(tried.seconds)}{paid}"
