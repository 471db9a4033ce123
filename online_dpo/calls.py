"""The only paid door: a request is answered from the ledger, or reserved, sent and settled."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from online_dpo.chat import (
    PICO,
    CallFault,
    ChatReply,
    ChatRequest,
    Estimate,
    RequestRefused,
    logprobs_from_json,
    logprobs_to_json,
)
from online_dpo.deadline import Deadline
from online_dpo.errors import BudgetError, CampaignError, ConfigError, JudgeError
from online_dpo.ledger import Ledger
from online_dpo.ledger_table import SESSION, Entry
from online_dpo.records import derive_seed
from online_dpo.verdicts import Question

if TYPE_CHECKING:
    from online_dpo.openai_client import OpenAIChat

T = TypeVar("T")

MAX_PAUSE_S = 60.0
"""The longest wait before another attempt, whatever a server's Retry-After asks for."""


@dataclass(frozen=True, slots=True)
class CallContext:
    """What a call is for: part of its key, apart from purpose and round."""

    prompt_id: str
    response_ids: tuple[str, ...]
    swapped: bool
    vote: int
    purpose: str
    round: int

    @classmethod
    def of(cls, question: Question, purpose: str, round: int) -> CallContext:
        """The context of a question; a pair's ids stand in the pair's order, not as shown."""
        ids = tuple(response.id for response in question.responses)
        ids = ids[::-1] if question.swapped else ids
        return cls(question.prompt.id, ids, question.swapped, question.vote, purpose, round)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a campaign may spend on labels: dollars and calls; None is without limit."""

    max_usd: float | None = None
    max_calls: int | None = None


class DoorClosed(Exception):
    """Another call has failed for good; no more are sent."""


class Calls:
    """The door as one judgement sees it. `seed` is the judgement's own, for what must repeat."""

    def __init__(self, door: Door, context: CallContext, deadline: Deadline, seed: int) -> None:
        self._door = door
        self._context = context
        self._deadline = deadline
        self.seed = seed

    async def complete(self, request: ChatRequest, *, estimate: Estimate) -> ChatReply:
        """The reply to a request, from the ledger or paid for within the budget.

        Raises RequestRefused where the server will not serve it as it is, JudgeError where it
        fails for good, BudgetError where the budget has no room.
        """
        with self._deadline.paused():
            return await self._door.complete(request, estimate, self._context)


class Door:
    """What all calls of a judge share: ledger, limits, connections, retries. For one event loop."""

    def __init__(
        self,
        ledger_path: Path,
        *,
        judge: str,
        version: str,
        seed: int,
        limits: Limits,
        concurrency: int,
        timeout_s: float,
        retries: int,
        on_event: Callable[[dict[str, Any]], None],
        backoff_s: float = 0.5,
    ) -> None:
        self.fatal: CampaignError | None = None
        """What ended all calls, even if a judge has caught it."""
        self._ledger_path = ledger_path
        self._judge = judge
        self._version = version
        self._seed = seed
        self._limits = limits
        self._slots = asyncio.Semaphore(concurrency)
        self._timeout_s = timeout_s
        self._retries = retries
        self._on_event = on_event
        self._backoff_s = backoff_s
        self._jitter = random.Random()
        self._ledger: Ledger | None = None
        self._clients: dict[tuple[str | None, str], OpenAIChat] = {}
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._closed = asyncio.Event()
        self._in_flight = 0
        self._num_ended = 0
        self._waiting: list[asyncio.Future[None]] = []
        self._counts: Counter[str] = Counter()

    def calls(self, context: CallContext, deadline: Deadline) -> Calls:
        """The door for one judgement."""
        seed = derive_seed(
            self._seed, "judge", context.prompt_id, *context.response_ids,
            int(context.swapped), context.vote,
        )  # fmt: skip
        return Calls(self, context, deadline, seed)

    def open(self) -> None:
        """Take calls again after `refuse`, and count anew."""
        self.fatal = None
        self._closed.clear()
        self._counts.clear()

    def refuse(self) -> None:
        """Send nothing more: waits and retries end, calls in flight may still settle."""
        self._closed.set()

    def summary(self) -> dict[str, Any] | None:
        """An event with what the door has done since it was opened, if anything."""
        if not self._counts:
            return None
        counts = dict(self._counts)
        cost = counts.pop("cost_pico", 0)
        return {"event": "judge_calls", "judge": self._judge, **counts, "cost_usd": cost / PICO}

    async def close(self) -> None:
        """Close connections and the ledger."""
        for client in self._clients.values():
            await client.close()
        self._clients.clear()
        if self._ledger is not None:
            await asyncio.to_thread(self._ledger.close)
            self._ledger = None

    async def complete(
        self, request: ChatRequest, estimate: Estimate, context: CallContext
    ) -> ChatReply:
        """See `Calls.complete`."""
        key = self._key(request, context)
        lock = self._locks.setdefault(key, asyncio.Lock())
        try:
            if self._ledger is None:
                self._ledger = Ledger(self._ledger_path)
            async with lock:
                known = await _committed(self._ledger.settled(key))
                if known is not None:
                    self._counts["from_ledger"] += 1
                    return _reply(known, cached=True)
                entry = self._entry(key, request, estimate, context)
                return await self._buy(request, estimate, entry, self._ledger)
        except RequestRefused:
            raise
        except CampaignError as error:
            self.fatal = self.fatal or error
            raise

    async def _buy(
        self, request: ChatRequest, estimate: Estimate, entry: Entry, ledger: Ledger
    ) -> ChatReply:
        """Attempt until there is a reply, or a fault that another attempt will not mend."""
        for attempt in range(1 + self._retries):
            try:
                async with self._slots:
                    return await self._attempt(request, estimate, entry, ledger)
            except CallFault as fault:
                where = "" if request.base_url is None else f" at {request.base_url}"
                message = (
                    f"The judge {self._judge!r} got no answer for prompt {entry.prompt_id!r} from "
                    f"{request.model!r}{where}, attempt {attempt + 1}: {fault}"
                )
                if fault.refused:
                    raise RequestRefused(message, code=fault.code) from None
                if not fault.retryable or attempt == self._retries:
                    raise JudgeError(message) from None
                await self._pause(attempt, fault, message)
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(
        self, request: ChatRequest, estimate: Estimate, entry: Entry, ledger: Ledger
    ) -> ChatReply:
        if self._closed.is_set():
            raise DoorClosed
        client = self._client(request)
        entry = await self._send(entry, ledger)
        try:
            self._counts["requests"] += 1
            reply = await client.chat(request, timeout_s=self._timeout_s)
            entry = await _committed(ledger.settle(entry, **_settlement(reply, estimate)))
        except CallFault as fault:
            self._counts["faults"] += 1
            await _committed((ledger.lose if fault.charged else ledger.fail)(entry, str(fault)))
            raise
        except BaseException as error:
            ledger.lose(entry, f"abandoned: {type(error).__name__}")
            raise
        finally:
            self._wake()
        self._counts["cost_pico"] += entry.cost or 0
        return _reply(entry, cached=False)

    async def _send(self, entry: Entry, ledger: Ledger) -> Entry:
        """Reserve; where the budget has no room, first let what is in flight settle for less."""
        max_usd, max_calls = self._limits.max_usd, self._limits.max_calls
        if max_usd is not None and entry.reserved is None:
            raise ConfigError(
                f"judge.budget cannot be kept without a price for {entry.model!r}: set "
                "judge.options.price_per_million: [IN, OUT] in dollars, [0, 0] where it is free."
            )
        max_charge = None if max_usd is None else round(max_usd * PICO)
        while True:
            ended = self._num_ended
            sending = ledger.send(entry, max_charge=max_charge, max_calls=max_calls)
            try:
                sent = await _committed(sending)
            except BudgetError:
                if self._num_ended == ended and self._in_flight == 0:
                    raise
            except asyncio.CancelledError:
                sending.add_done_callback(lambda done: _release(ledger, done))
                raise
            else:
                self._in_flight += 1
                return sent
            if self._num_ended == ended:
                self._waiting.append(asyncio.get_running_loop().create_future())
                await self._waiting[-1]

    def _wake(self) -> None:
        """A reservation has ended: whoever waits for room in the budget may try again."""
        self._in_flight -= 1
        self._num_ended += 1
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()

    async def _pause(self, attempt: int, fault: CallFault, message: str) -> None:
        """Wait twice as long each time, with jitter, or as long as the server asks."""
        pause_s = self._backoff_s * 2**attempt * self._jitter.uniform(0.5, 1.0)
        if fault.retry_after_s is not None:
            pause_s = fault.retry_after_s
        pause_s = min(pause_s, MAX_PAUSE_S)
        self._on_event({"event": "judge_retry", "message": message, "pause_s": pause_s})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), pause_s)

    def _client(self, request: ChatRequest) -> OpenAIChat:
        from online_dpo.openai_client import OpenAIChat

        place = (request.base_url, request.api_key_env)
        if place not in self._clients:
            self._clients[place] = OpenAIChat(*place)
        return self._clients[place]

    def _key(self, request: ChatRequest, context: CallContext) -> str:
        """The sha256 over everything that an answer is an answer to."""
        facts = {
            "judge": self._judge,
            "version": self._version,
            "request": request.content,
            "prompt_id": context.prompt_id,
            "response_ids": context.response_ids,
            "swapped": context.swapped,
            "vote": context.vote,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _entry(
        self, key: str, request: ChatRequest, estimate: Estimate, context: CallContext
    ) -> Entry:
        return Entry(
            key=key,
            attempt=0,
            state="sent",
            session=SESSION,
            seq=None,
            judge=self._judge,
            version=self._version,
            model=request.model,
            purpose=context.purpose,
            round=context.round,
            prompt_id=context.prompt_id,
            response_ids=json.dumps(context.response_ids),
            swapped=int(context.swapped),
            vote=context.vote,
            reserved=estimate.reservation,
        )


async def _committed(future: Future[T]) -> T:
    """The result of a ledger operation; cancelling the wait does not cancel the operation."""
    return await asyncio.shield(asyncio.wrap_future(future))


def _release(ledger: Ledger, reserved: Future[Entry]) -> None:
    if reserved.exception() is None:
        ledger.fail(reserved.result(), "cancelled before it was sent")


def _settlement(reply: ChatReply, estimate: Estimate) -> dict[str, Any]:
    """A reply as the ledger keeps it; without a count of tokens it costs its reservation."""
    if reply.tokens_in is None or reply.tokens_out is None:
        cost = estimate.reservation
    else:
        cost = estimate.cost(reply.tokens_in, reply.tokens_out)
    return {
        "cost": cost,
        "tokens_in": reply.tokens_in,
        "tokens_out": reply.tokens_out,
        "reply": reply.text,
        "finish_reason": reply.finish_reason,
        "refused": int(reply.refused),
        "answered_by": reply.model,
        "logprobs": logprobs_to_json(reply.logprobs),
    }


def _reply(entry: Entry, *, cached: bool) -> ChatReply:
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
    )
