"""Calls by the batch: gathered, handed in once, looked after until they end, by any later process.

The order of commits is what makes a crash cheap. The rows of a batch are reserved; the file is
uploaded; the ledger notes that the batch is about to be handed in; it is; the ledger notes the
endpoint's id. A process that finds the note without the id asks the endpoint for a batch with our
own id in its metadata, so that nothing is handed in a second time.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from online_dpo.config import BatchConfig, JudgeConfig
from online_dpo.errors import ConfigError, JudgeError
from online_dpo.paid.chat import CallFault, ChatReply, ChatRequest
from online_dpo.paid.ledger import Ledger
from online_dpo.paid.ledger_rows import GATHERING, Batch, Entry
from online_dpo.paid.reservations import committed

if TYPE_CHECKING:
    from online_dpo.paid.openai_batches import Look, OpenAIBatches, Outcome

GATHER_S = 1.0
"""A batch is handed in once no further call has come for so long."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A call that waits for its line."""

    entry: Entry
    request: ChatRequest
    reply: asyncio.Future[ChatReply]

    @property
    def custom_id(self) -> str:
        return f"{self.entry.key[:40]}-{self.entry.attempt}"


class Batches:
    """The batches of one door, for one event loop."""

    def __init__(
        self, ledger: Ledger, config: JudgeConfig, on_event: Callable[[dict[str, Any]], None]
    ) -> None:
        self._ledger = ledger
        self._settings = config.batch or BatchConfig()
        self._timeout_s = config.timeout_s
        self._retries = config.retries
        self._on_event = on_event
        self._clients: dict[tuple[str | None, str], OpenAIBatches] = {}
        self._gathered: dict[tuple[str | None, str, str], list[_Waiting]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._joined: dict[str, list[_Waiting]] = {}
        """By batch, the calls that wait for one that was handed in before."""
        self._tasks: dict[asyncio.Task[None], Sequence[_Waiting]] = {}
        self._submissions: set[asyncio.Task[str]] = set()

    async def answer(self, request: ChatRequest, entry: Entry) -> ChatReply:
        """The reply to a call that is reserved for a batch, or that is in one already.

        Raises CallFault for its own line, JudgeError where the batch itself cannot be had (the row
        then waits for another process), and whatever `leave` was given.
        """
        waiting = _Waiting(entry, request, asyncio.get_running_loop().create_future())
        if entry.batch == GATHERING:
            self._gather(waiting)
        else:
            self._join(waiting)
        return await waiting.reply

    def leave(self, error: Exception) -> None:
        """Let nobody wait any longer. Batches that were handed in run on at the endpoint."""
        if self._timer is not None:
            self._timer.cancel()
        for group in (*self._gathered.values(), *self._tasks.values()):
            _fail(group, error)
        self._gathered.clear()
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Close connections; batches that were handed in run on at the endpoint."""
        self.leave(JudgeError("The judge is closed."))
        if under_way := [*self._tasks, *self._submissions]:
            await asyncio.wait(under_way)
        for client in self._clients.values():
            await client.close()

    def _gather(self, waiting: _Waiting) -> None:
        request = waiting.request
        group = self._gathered.setdefault(
            (request.base_url, request.api_key_env, request.model), []
        )
        group.append(waiting)
        if self._timer is not None:
            self._timer.cancel()
        later = 0.0 if len(group) >= self._settings.max_requests else GATHER_S
        self._timer = asyncio.get_running_loop().call_later(later, self._hand_in_all)

    def _hand_in_all(self) -> None:
        for (base_url, api_key_env, _), group in self._gathered.items():
            batch = Batch(uuid.uuid4().hex, base_url, api_key_env)
            self._start(self._hand_in(batch, group), group)
        self._gathered.clear()

    def _join(self, waiting: _Waiting) -> None:
        id = waiting.entry.batch
        assert id is not None
        if id in self._joined:
            self._joined[id].append(waiting)
        else:
            group = self._joined[id] = [waiting]
            self._start(self._take_up(id, group), group)

    def _start(self, work: Coroutine[Any, Any, None], group: Sequence[_Waiting]) -> None:
        """Do work for calls that wait; what it raises, they raise."""

        async def run() -> None:
            try:
                await work
            except Exception as error:
                _fail(group, error)

        task = asyncio.create_task(run())
        self._tasks[task] = group
        task.add_done_callback(lambda done: self._tasks.pop(done))

    async def _hand_in(self, batch: Batch, group: Sequence[_Waiting]) -> None:
        submission = asyncio.create_task(self._submit(batch, group))
        self._submissions.add(submission)
        submission.add_done_callback(self._submissions.discard)
        # Who leaves in the midst of it lets it finish: half of it would have to be guessed at.
        remote = await asyncio.shield(submission)
        self._settle(group, *await self._see_through(self._client(batch), remote))

    async def _submit(self, batch: Batch, group: Sequence[_Waiting]) -> str:
        """The endpoint's id of a batch, once the ledger has it. Raises CallFault or JudgeError."""
        client = self._client(batch)
        try:
            file = await client.upload({w.custom_id: w.request for w in group})
        except CallFault as fault:
            hint = "; judge.batch is for endpoints with a batch API" if fault.status == 404 else ""
            raise CallFault(
                f"the upload of a batch failed: {fault}{hint}",
                retryable=fault.retryable,
                fate="failed",
            ) from fault
        await committed(self._ledger.hand_in(batch, [w.entry for w in group]))
        try:
            remote: str | None = await client.create(file, batch.id)
        except CallFault as fault:
            if fault.fate == "failed":
                raise
            remote = await self._find(client, batch)
            if remote is None:
                raise JudgeError(
                    f"A batch of {len(group)} calls was handed in without a reply ({fault}), and "
                    "the endpoint does not list it yet."
                ) from fault
        assert remote is not None
        await committed(self._ledger.handed_in(batch, remote))
        self._tell(remote, "handed in", calls=len(group))
        return remote

    async def _take_up(self, id: str, group: list[_Waiting]) -> None:
        """See a batch through that was handed in before, perhaps by another process."""
        batch = await committed(self._ledger.batch(id))
        asked = group[0].request
        if (batch.base_url, batch.api_key_env) != (asked.base_url, asked.api_key_env):
            # A ledger may come from somebody else: its addresses are sent no key.
            raise ConfigError(
                f"The batch {batch.remote or batch.id} was handed in at {batch.base_url} with the "
                f"key in {batch.api_key_env}; the config asks {asked.base_url} with the key in "
                f"{asked.api_key_env}. Ask as it was handed in, until the batch is done."
            )
        client, remote = self._client(batch), batch.remote
        try:
            if remote is None and (remote := await self._find(client, batch)) is not None:
                await committed(self._ledger.handed_in(batch, remote))
            if remote is None:
                gone = "the process ended while handing in its batch, which the endpoint never had"
                outcomes: dict[str, Outcome] = {}
                missing = CallFault(gone, retryable=True, fate="unknown")
            else:
                outcomes, missing = await self._see_through(client, remote)
        finally:
            del self._joined[id]
        self._settle(group, outcomes, missing)

    async def _find(self, client: OpenAIBatches, batch: Batch) -> str | None:
        """The endpoint's id of a batch. Raises JudgeError where it does not say."""
        for attempt in range(1 + self._retries):
            try:
                return await client.find(batch.id)
            except CallFault as fault:
                if not fault.retryable or attempt == self._retries:
                    raise JudgeError(f"The endpoint does not list its batches: {fault}.") from fault
                await asyncio.sleep(self._settings.poll_s)
        raise AssertionError("the last attempt returns or raises")

    async def _see_through(
        self, client: OpenAIBatches, remote: str
    ) -> tuple[dict[str, Outcome], CallFault]:
        """Wait until a batch has ended; what its lines say, and what stands for a missing one.

        Raises JudgeError where the endpoint says nothing of it `retries` times in a row.
        """
        faults, shown = 0, (-1, "")
        while True:
            try:
                look = await client.look(remote)
                if (look.num_done, look.status) != shown:
                    shown = look.num_done, look.status
                    self._tell(remote, look.status, done=look.num_done)
                if look.ended:
                    return await client.outcomes(look.files), _missing(look, remote)
                faults = 0
            except CallFault as fault:
                if fault.status == 404:
                    gone = f"the endpoint no longer knows the batch {remote}"
                    return {}, CallFault(gone, retryable=True, fate="unknown")
                faults += 1
                if not fault.retryable or faults > self._retries:
                    raise JudgeError(
                        f"The batch {remote} cannot be looked at: {fault}. It runs on meanwhile."
                    ) from fault
            await asyncio.sleep(self._settings.poll_s)

    def _settle(
        self, group: Sequence[_Waiting], outcomes: dict[str, Outcome], missing: CallFault
    ) -> None:
        for waiting in group:
            outcome = outcomes.get(waiting.custom_id, missing)
            if waiting.reply.done():
                continue
            if isinstance(outcome, CallFault):
                waiting.reply.set_exception(outcome)
            else:
                waiting.reply.set_result(outcome)

    def _tell(self, remote: str, status: str, **facts: int) -> None:
        self._on_event({"event": "judge_batch", "batch": remote, "status": status, **facts})

    def _client(self, batch: Batch) -> OpenAIBatches:
        from online_dpo.paid.openai_batches import OpenAIBatches

        place = (batch.base_url, batch.api_key_env)
        if place not in self._clients:
            self._clients[place] = OpenAIBatches(*place, timeout_s=self._timeout_s)
        return self._clients[place]


def _fail(group: Sequence[_Waiting], error: Exception) -> None:
    for waiting in group:
        if not waiting.reply.done():
            waiting.reply.set_exception(error)


def _missing(look: Look, remote: str) -> CallFault:
    """What stands for a call without a line in what an ended batch gave."""
    if look.status == "completed":
        message = f"the batch {remote} is complete and has no line for it"
        return CallFault(message, retryable=True, fate="unknown")
    message = f"the batch {remote} is {look.status}{f': {look.errors}' if look.errors else ''}"
    return CallFault(message, retryable=look.status == "expired", fate="failed")
