"""The batch API of an OpenAI-compatible endpoint: hand in, look, fetch; each line a reply or fault.

A batch is a file of requests, one JSON object a line, that the endpoint works through within a day;
what it gives back are files of the same form, their lines in any order, told apart by `custom_id`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from openai.types import Batch as RemoteBatch
from openai.types.chat import ChatCompletion

from online_dpo.paid.chat import CallFault, ChatReply, ChatRequest
from online_dpo.paid.openai_client import EXHAUSTED, OpenAIChat, body_of, reply_of, status_fault

T = TypeVar("T")

OURS = "online_dpo_batch"
"""The metadata that holds our own id of a batch, by which one is found whose id never arrived."""

ENDED = ("completed", "expired", "cancelled", "failed")

Outcome = ChatReply | CallFault


@dataclass(frozen=True, slots=True)
class Look:
    """A batch as it stands: its status, how many lines are done, and why it failed, if it did."""

    status: str
    num_done: int
    errors: str
    files: tuple[str, ...]
    """Of results, then of faults; there may be none of either."""

    @property
    def ended(self) -> bool:
        return self.status in ENDED


class OpenAIBatches:
    """The batches of one endpoint, for one event loop. Every method raises CallFault."""

    def __init__(self, base_url: str | None, api_key_env: str, *, timeout_s: float) -> None:
        """Raises ConfigError where a key is needed and the environment has none."""
        self._chat = OpenAIChat(base_url, api_key_env)
        self._timeout_s = timeout_s

    async def upload(self, requests: Mapping[str, ChatRequest]) -> str:
        """Upload requests by their custom ids; the file's id. Nothing is paid for yet."""
        lines = [
            {
                "custom_id": name,
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body_of(request, own=self._chat.own),
            }
            for name, request in requests.items()
        ]
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        files = self._chat.client.files
        file = await self._tried(files.create(file=("calls.jsonl", data), purpose="batch"))
        return file.id

    async def create(self, file: str, ours: str) -> str:
        """Hand a file in as a batch; the endpoint's id for it."""
        batch = await self._tried(
            self._chat.client.batches.create(
                input_file_id=file,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={OURS: ours},
            )
        )
        return batch.id

    async def find(self, ours: str) -> str | None:
        """The endpoint's id of a batch by our own, or None where it lists none such."""

        async def search() -> str | None:
            async for batch in self._chat.client.batches.list(limit=100):
                if (batch.metadata or {}).get(OURS) == ours:
                    return batch.id
            return None

        return await self._tried(search())

    async def look(self, remote: str) -> Look:
        """How far a batch has come."""
        batch = await self._tried(self._chat.client.batches.retrieve(remote))
        return _look(batch)

    async def outcomes(self, files: Sequence[str]) -> dict[str, Outcome]:
        """What each line of a batch's files says, by custom id."""
        found: dict[str, Outcome] = {}
        for file in files:
            content = await self._tried(self._chat.client.files.content(file))
            for line in content.text.splitlines():
                if line.strip():
                    row = json.loads(line)
                    found[row["custom_id"]] = _outcome(row)
        return found

    async def close(self) -> None:
        await self._chat.close()

    async def _tried(self, work: Awaitable[T]) -> T:
        async with self._chat.faults(self._timeout_s):
            return await work


def _look(batch: RemoteBatch) -> Look:
    errors = [error.message or "" for error in (batch.errors and batch.errors.data) or ()]
    done = batch.request_counts
    files = tuple(file for file in (batch.output_file_id, batch.error_file_id) if file)
    return Look(batch.status, 0 if done is None else done.completed, "; ".join(errors[:3]), files)


def _outcome(row: Mapping[str, Any]) -> Outcome:
    """A line's reply or fault. What did not get its turn costs nothing and may have another."""
    error, response = row.get("error"), row.get("response")
    if response is None:
        error = error or {"message": "neither a response nor an error"}
        code = error.get("code")
        message = f"in a batch: {code or 'error'}: {error.get('message')}"
        return CallFault(message, retryable=code not in EXHAUSTED, fate="failed", code=code)
    body = response.get("body") or {}
    if response.get("status_code") != 200:
        inner = body.get("error") or {}
        return status_fault(
            int(response.get("status_code") or 500),
            str(inner.get("message") or ""),
            code=inner.get("code") or inner.get("type"),
        )
    try:
        return reply_of(ChatCompletion.construct(**body))
    except CallFault as fault:
        return fault
