"""The only paid door: a request is answered from the ledger, or reserved, sent and settled."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import random
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from online_dpo.asking.deadline import Deadline
from online_dpo.config import JudgeConfig
from online_dpo.errors import CampaignError, ConfigError, JudgeError
from online_dpo.paid.batches import Batches
from online_dpo.paid.call_rows import new_entry, reply_columns, reply_from, usage_columns
from online_dpo.paid.calls import CallContext, Calls
from online_dpo.paid.chat import CallFault, ChatReply, ChatRequest, Estimate, RequestRefused
from online_dpo.paid.ledger import Ledger
from online_dpo.paid.ledger_rows import GATHERING, Entry, Limits
from online_dpo.paid.model_names import is_same_model
from online_dpo.paid.prices import Prices, Tariff, asked_tier
from online_dpo.paid.rates import Rates, Taken, endpoint_of
from online_dpo.paid.reservations import Reservations, committed
from online_dpo.paid.reuse import EarlierLedgers
from online_dpo.paid.tally import Tally
from online_dpo.records import derive_seed

if TYPE_CHECKING:
    from online_dpo.paid.openai_client import OpenAIChat

MAX_PAUSE_S = 60.0
"""The longest wait before another attempt, whatever a server's Retry-After asks for."""

BACKOFF_S = 0.5
"""The longest wait before the second attempt; it doubles with each."""

RATE_POLL_S = 0.25
"""The longest wait before rates are looked at again: calls that end may have used less."""

POOL_SIZE = 16
"""Requests in flight for each pool of connections, which looks at all it has with every request."""


OnCall = Callable[[CallContext, ChatRequest, "ChatReply | CampaignError"], None]
"""Takes a call with what came of it: a reply, or the error that stands in its place."""


class DoorClosed(Exception):
    """Another call has failed for good; no more are sent."""


@dataclass(slots=True)
class _Call:
    """A call under way, with the time that its attempts and pauses have taken."""

    request: ChatRequest
    estimate: Estimate
    tariff: Tariff | None
    entry: Entry
    waiting: Entry | None = None
    """Its row, where a batch that was handed in earlier holds it."""
    spent_s: float = 0.0
    taken: Taken | None = None
    """What the attempt under way has taken of the rates."""

    @property
    def in_batch(self) -> bool:
        return self.waiting is not None or self.entry.batch is not None


class Door:
    """What all calls of a judge share: ledger, limits, connections, retries. For one event loop."""

    def __init__(
        self,
        ledger_path: Path,
        config: JudgeConfig,
        *,
        version: str,
        seed: int,
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        """`config` says how calls are limited, priced and tried again; its name is in each key.

        Raises ConfigError where the price file or a ledger to reuse cannot be read.
        """
        self.fatal: CampaignError | None = None
        """What ended all calls, even if a judge has caught it."""
        self.on_call: OnCall | None = None
        """Told of every call that ends, on the event loop's thread."""
        self._ledger_path = ledger_path
        self._config = config
        self._version = version
        self._seed = seed
        self._on_event = on_event
        self._prices = Prices(config.prices)
        self._tier = asked_tier(config)
        self._earlier = EarlierLedgers(config.reuse_from)
        self._reservations = Reservations(Limits(**config.budget.model_dump()))
        self._slots = asyncio.Semaphore(config.concurrency)
        self._rates: dict[tuple[str | None, str], Rates] = {}
        self._queues: dict[tuple[str | None, str], asyncio.Lock] = {}
        self._jitter = random.Random()
        self._ledger: Ledger | None = None
        self._batches: Batches | None = None
        self._clients: dict[tuple[str | None, str, int], OpenAIChat] = {}
        self._turns = itertools.cycle(range(math.ceil(config.concurrency / POOL_SIZE)))
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._closed = asyncio.Event()
        self._tally = Tally(config.name, on_event)

    def calls(self, context: CallContext, deadline: Deadline) -> Calls:
        """The door for one judgement."""
        seed = derive_seed(
            self._seed, "judge", context.prompt_id, *context.response_ids,
            int(context.swapped), context.vote,
        )  # fmt: skip
        return Calls(self, context, deadline, seed)

    def tell(self, event: dict[str, Any]) -> None:
        """Put an event into the run's record."""
        self._on_event(event)

    def open(self) -> None:
        """Take calls again after `refuse`, and count anew."""
        self.fatal = None
        self._closed.clear()
        self._tally.begin()

    def refuse(self) -> None:
        """Send nothing more: waits and retries end, calls in flight may still settle."""
        self._closed.set()
        if self._batches is not None:
            self._batches.leave(DoorClosed())

    def summary(self) -> dict[str, Any] | None:
        """An event with what the door has done since it was opened, if anything."""
        return self._tally.summary()

    async def close(self) -> None:
        """Close connections and the ledger."""
        if self._batches is not None:
            await self._batches.close()
            self._batches = None
        for client in self._clients.values():
            await client.close()
        self._clients.clear()
        self._earlier.close()
        if self._ledger is not None:
            await asyncio.to_thread(self._ledger.close)
            self._ledger = None

    async def complete(
        self, request: ChatRequest, estimate: Estimate, context: CallContext
    ) -> ChatReply:
        """See `Calls.complete`."""
        try:
            reply = await self._reply(request, estimate, context)
        except CampaignError as error:
            self._tell_of(context, request, error)
            raise
        self._tell_of(context, request, reply)
        return reply

    def _tell_of(
        self, context: CallContext, request: ChatRequest, outcome: ChatReply | CampaignError
    ) -> None:
        if self.on_call is not None:
            self.on_call(context, request, outcome)

    async def _reply(
        self, request: ChatRequest, estimate: Estimate, context: CallContext
    ) -> ChatReply:
        try:
            call = self._call(request, estimate, context)
            async with self._locks.setdefault(call.entry.key, asyncio.Lock()):
                known = await self._known(call.entry)
                if known is None:
                    return await self._buy(call)
                if known.state == "sent":
                    call.waiting, call.tariff = known, self._tariff(request, estimate, known.tier)
                    return await self._buy(call)
                self._tally.add("from_ledger")
                return self._accepted(call, reply_from(known, cached=True))
        except RequestRefused:
            raise
        except CampaignError as error:
            if context.judge is None or not isinstance(error, JudgeError):
                self.fatal = self.fatal or error
            raise

    def conclude(self, keys: Sequence[str], verdict: str) -> None:
        """Keep what a judge made of the answers to some keys."""
        assert self._ledger is not None
        self._ledger.conclude(keys, verdict)

    def _call(self, request: ChatRequest, estimate: Estimate, context: CallContext) -> _Call:
        if "service_tier" in (request.extra_body or {}):
            raise ConfigError(
                "extra_body: the service tier decides the price; set judge.service_tier instead."
            )
        tariff = self._tariff(request, estimate, self._tier)
        if tariff is None and self._reservations.limits.max_usd is not None:
            raise ConfigError(
                f"judge.budget.max_usd cannot be kept without a price for {request.model!r} at "
                f"the service tier {self._tier or 'default'!r}: set judge.options.price_per_million"
                ": [IN, OUT] in dollars ([0, 0] where it is free), or name a price file that has "
                "it in judge.prices."
            )
        self._tally.priced(request.model, self._tier, tariff)
        batch = None if self._config.batch is None else GATHERING
        entry = new_entry(
            context.judge or self._config.name, context.version or self._version,
            request, context, estimate, tariff, tier=self._tier, batch=batch,
        )  # fmt: skip
        return _Call(request, estimate, tariff, entry)

    def _tariff(self, request: ChatRequest, estimate: Estimate, tier: str | None) -> Tariff | None:
        given = estimate.price_per_million
        return self._prices.tariff(request.model, request.base_url, tier, given)

    async def _known(self, entry: Entry) -> Entry | None:
        """The row that answers a key or will, in this ledger or an earlier one."""
        if self._ledger is None:
            self._ledger = Ledger(self._ledger_path)
        known = await committed(self._ledger.find(entry.key))
        if known is not None or (earlier := self._earlier.find(entry)) is None:
            return known
        self._tally.add("reused")
        return await committed(self._ledger.reuse(earlier))

    async def _buy(self, call: _Call) -> ChatReply:
        """Attempt until there is a reply, or a fault that another attempt will not mend."""
        for attempt in range(1 + self._config.retries):
            try:
                if call.in_batch:
                    return await self._attempt(call)
                async with self._slots:
                    await self._keep_pace(call)
                    return await self._attempt(call)
            except CallFault as fault:
                where = f" at {call.request.base_url}" if call.request.base_url else ""
                message = (
                    f"The judge {call.entry.judge!r} got no answer for prompt "
                    f"{call.entry.prompt_id!r} from {call.request.model!r}{where}, attempt "
                    f"{attempt + 1}: {fault}"
                )
                if fault.refused:
                    raise RequestRefused(message, code=fault.code) from None
                if not fault.retryable or attempt == self._config.retries:
                    raise JudgeError(message) from None
                await self._pause(call, attempt, fault, message)
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, call: _Call) -> ChatReply:
        if self._closed.is_set():
            raise DoorClosed
        assert self._ledger is not None
        ledger, entry, call.waiting = self._ledger, call.waiting, None
        if entry is None:
            entry = await self._reservations.reserve(call.entry, ledger)
            if self._closed.is_set():  # while it waited for room in the budget
                self._reservations.end()
                await committed(ledger.fail(entry, "never sent"))
                raise DoorClosed
            self._tally.add("requests")
        else:
            self._reservations.resume()
        began = time.monotonic()
        try:
            reply = await self._answer(call, entry)
            columns = reply_columns(reply, entry, call.tariff)
            latency_s = time.monotonic() - began
            entry = await committed(ledger.settle(entry, **columns, latency_s=latency_s))
        except CallFault as fault:
            columns = usage_columns(fault.usage, call.tariff) if fault.usage else {}
            columns["latency_s"] = time.monotonic() - began
            end = ledger.fail if fault.fate == "failed" else ledger.lose
            self._tally.ended(await committed(end(entry, str(fault), **columns)))
            raise
        except BaseException as error:
            if entry.batch is None:
                ledger.lose(entry, f"abandoned: {type(error).__name__}")
            else:
                ledger.withdraw(entry, "never handed in")
            raise
        finally:
            call.spent_s += time.monotonic() - began
            self._reservations.end()
        self._tally.ended(entry)
        if call.taken is not None:
            self._rates_at(call.request).settle(call.taken, entry.tokens)
        return self._accepted(call, reply_from(entry, cached=False))

    def _accepted(self, call: _Call, reply: ChatReply) -> ChatReply:
        """A reply that is in the ledger; JudgeError where another model's are refused."""
        asked = call.request.model
        self._tally.answered(asked, reply)
        if self._config.model_mismatch == "refuse" and not is_same_model(asked, reply.model):
            raise JudgeError(
                f"The judge {call.entry.judge!r} asked for {asked!r}, and {reply.model!r} answered "
                f"for prompt {call.entry.prompt_id!r}. Name the model that the endpoint serves in "
                "judge.options.model, or set judge.model_mismatch: warn, which takes its replies."
            )
        return reply

    async def _answer(self, call: _Call, entry: Entry) -> ChatReply:
        """One reply, by a request of its own or out of a batch. Raises CallFault."""
        if entry.batch is not None:
            return await self._in_batches().answer(call.request, entry)
        left_s = self._config.deadline_s - call.spent_s
        return await self._client(call.request).chat(
            call.request,
            timeout_s=min(self._config.timeout_s, left_s),
            service_tier=self._config.service_tier,
        )

    async def _keep_pace(self, call: _Call) -> None:
        """Wait until the endpoint's rates allow this request, first come, or the door closes.

        Raises ConfigError for a call that may use more than a minute's tokens.
        """
        tokens, rates = call.estimate.tokens, self._rates_at(call.request)
        async with self._queues.setdefault(_place(call.request), asyncio.Lock()):
            while not self._closed.is_set():
                taken = rates.take(tokens)
                if isinstance(taken, Taken):
                    call.taken = taken
                    return
                if math.isinf(taken):
                    raise ConfigError(
                        f"judge.tokens_per_minute: {self._config.tokens_per_minute} is less than "
                        f"the {tokens} tokens that one call may use. Raise it, or lower "
                        "judge.options.max_tokens."
                    )
                await self._sleep(min(taken, RATE_POLL_S))

    def _rates_at(self, request: ChatRequest) -> Rates:
        """What this door keeps to at a request's endpoint, which other doors may use as well."""
        place = _place(request)
        if place not in self._rates:
            self._rates[place] = Rates(
                endpoint_of(request.base_url, os.environ.get(request.api_key_env)),
                requests_per_minute=self._config.requests_per_minute,
                tokens_per_minute=self._config.tokens_per_minute,
            )
        return self._rates[place]

    async def _pause(self, call: _Call, attempt: int, fault: CallFault, message: str) -> None:
        """Wait twice as long each time, or at least as long as the server asks, with jitter.

        Raises JudgeError where the call's deadline would pass meanwhile.
        """
        pause_s = BACKOFF_S * 2**attempt * self._jitter.uniform(0.5, 1.0)
        if fault.retry_after_s is not None:
            pause_s = fault.retry_after_s * self._jitter.uniform(1.0, 1.25)
        pause_s = min(pause_s, MAX_PAUSE_S)
        call.spent_s += pause_s
        if not call.in_batch:
            if call.spent_s >= self._config.deadline_s:
                raise JudgeError(
                    f"{message}. There is no time for another attempt: judge.deadline_s is "
                    f"{self._config.deadline_s:g}."
                )
            self._tally.retried(message, pause_s)
        await self._sleep(pause_s)

    async def _sleep(self, seconds: float) -> None:
        """Sleep unless the door closes first."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), seconds)

    def _in_batches(self) -> Batches:
        if self._batches is None:
            assert self._ledger is not None
            self._batches = Batches(self._ledger, self._config, self._on_event)
        return self._batches

    def _client(self, request: ChatRequest) -> OpenAIChat:
        from online_dpo.paid.openai_client import OpenAIChat

        place = _place(request)
        pool = (*place, next(self._turns))
        if pool not in self._clients:
            self._clients[pool] = OpenAIChat(*place)
        return self._clients[pool]


def _place(request: ChatRequest) -> tuple[str | None, str]:
    return request.base_url, request.api_key_env
