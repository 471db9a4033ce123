"""A call as a row of the ledger, and back; pure."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from online_dpo.paid.calls import CallContext
from online_dpo.paid.chat import (
    ChatReply,
    ChatRequest,
    Estimate,
    Usage,
    logprobs_from_json,
    logprobs_to_json,
)
from online_dpo.paid.ledger_rows import Entry, session
from online_dpo.paid.prices import Tariff


def new_entry(
    judge: str,
    version: str,
    request: ChatRequest,
    context: CallContext,
    estimate: Estimate,
    tariff: Tariff | None,
    *,
    tier: str | None,
    batch: str | None,
) -> Entry:
    """The row that reserves for a call; its key hashes everything that an answer is an answer to.

    The service tier and the endpoint's address are no part of that.
    """
    content = request.content
    facts = {
        "judge": judge,
        "version": version,
        "request": content,
        "prompt_id": context.prompt_id,
        "response_ids": context.response_ids,
        "swapped": context.swapped,
        "vote": context.vote,
    }
    return Entry(
        key=_hash(facts),
        attempt=0,
        state="sent",
        session=session(),
        seq=None,
        judge=judge,
        version=version,
        model=request.model,
        purpose=context.purpose,
        round=context.round,
        prompt_id=context.prompt_id,
        response_ids=json.dumps(context.response_ids),
        swapped=int(context.swapped),
        vote=context.vote,
        reserved=None if tariff is None else tariff.at_most(estimate),
        reserved_tokens=estimate.tokens,
        request_sha256=_hash(content),
        tier=tier,
        batch=batch,
    )


def usage_columns(usage: Usage, tariff: Tariff | None) -> dict[str, Any]:
    """What a reply used, with its cost; None where it has no counts or nobody knows the price."""
    return {
        "cost": None if tariff is None else tariff.cost(usage),
        "tokens_in": usage.tokens_in,
        "tokens_out": usage.tokens_out,
        "tokens_cached": usage.tokens_cached,
    }


def reply_columns(reply: ChatReply, entry: Entry, tariff: Tariff | None) -> dict[str, Any]:
    """A reply as the ledger keeps it; without a count of tokens it costs its reservation."""
    columns = usage_columns(reply.usage, tariff)
    if columns["cost"] is None:
        columns["cost"] = entry.reserved
    return columns | {
        "reply": reply.text,
        "finish_reason": reply.finish_reason,
        "refused": int(reply.refused),
        "answered_by": reply.model,
        "tier": entry.tier if entry.batch else reply.tier or entry.tier,
        "logprobs": logprobs_to_json(reply.logprobs),
    }


def reply_from(entry: Entry, *, cached: bool) -> ChatReply:
    """The reply that a settled row holds; `cached` says that it was not paid for just now."""
    assert entry.reply is not None and entry.finish_reason and entry.answered_by is not None
    return ChatReply(
        entry.reply,
        entry.finish_reason,
        entry.answered_by,
        entry.tokens_in,
        entry.tokens_out,
        bool(entry.refused),
        cached,
        logprobs_from_json(entry.logprobs),
        entry.tokens_cached,
        entry.tier,
        entry.key,
    )


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
