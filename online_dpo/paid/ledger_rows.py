"""The rows of the ledger as records, and what they count for; pure but for the process's name."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from dataclasses import dataclass, fields
from typing import Any, Literal

from online_dpo.errors import BudgetError
from online_dpo.paid.chat import PICO

NO_ROWS = hashlib.sha256().hexdigest()
"""The running hash before the first final row."""

State = Literal["sent", "settled", "reused", "failed", "unknown"]
GATHERING = "gathering"
"""The batch of calls that wait for one to be handed in."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One attempt of one call. Costs are in picodollars; None where no price is known."""

    key: str
    attempt: int
    state: State
    session: str
    seq: int | None
    """Place among the rows that are final, from 1; None before."""
    judge: str
    version: str
    model: str
    purpose: str
    round: int
    prompt_id: str
    response_ids: str
    swapped: int
    vote: int
    reserved: int | None
    reserved_tokens: int = 0
    request_sha256: str = ""
    """Of the request's content alone; the key's hash is over pair, order, vote and judge too."""
    tier: str | None = None
    """The service tier that was asked for, or that the reply names."""
    batch: str | None = None
    cost: int | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    tokens_cached: int | None = None
    reply: str | None = None
    finish_reason: str | None = None
    refused: int | None = None
    answered_by: str | None = None
    logprobs: str | None = None
    """JSON, where they were asked for."""
    reason: str | None = None
    sent_at: float | None = None
    ended_at: float | None = None
    latency_s: float | None = None
    """From sending to the whole reply, or to what came instead of it."""

    @property
    def charge(self) -> int:
        """What the row counts for against a budget, in picodollars."""
        if not self.calls:
            return 0
        return (self.reserved if self.cost is None else self.cost) or 0

    @property
    def tokens(self) -> int:
        """What the row counts for, in tokens."""
        if not self.calls:
            return 0
        if self.tokens_in is None or self.tokens_out is None:
            return self.reserved_tokens
        return self.tokens_in + self.tokens_out

    @property
    def calls(self) -> int:
        """Whether it is a call that was or may have been answered, 1 or 0."""
        return int(self.state not in ("failed", "reused"))

    @property
    def sha256(self) -> str:
        """The hash of the row's content, stored beside it."""
        return row_hash(self.values)

    @property
    def values(self) -> tuple[Any, ...]:
        """The row as the table holds it, without its hash."""
        return tuple(getattr(self, name) for name in COLUMNS)


@dataclass(frozen=True, slots=True)
class Totals:
    """What all rows count for: picodollars, calls that were or may have been answered, tokens."""

    charged: int
    calls: int
    tokens: int
    final: int
    """Rows in a final state."""
    sha256: str = NO_ROWS
    """The running hash over these rows' hashes, in the order in which they became final."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Calls handed in together: where to, and the endpoint's own id, once it has given one."""

    id: str
    base_url: str | None
    api_key_env: str
    remote: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What all rows may count for together; None is without limit."""

    max_usd: float | None = None
    max_calls: int | None = None
    max_tokens: int | None = None

    def check(self, so_far: Totals, entry: Entry) -> None:
        """Raises BudgetError where there is no room for a call."""
        spent = so_far.charged / PICO
        if self.max_usd is not None and so_far.charged + entry.charge > round(self.max_usd * PICO):
            raise BudgetError(
                f"The labelling budget of ${self.max_usd:.6g} has no room for another call: "
                f"${spent:.6g} is spent or reserved and the call may cost "
                f"${entry.charge / PICO:.6g}. Raise judge.budget.max_usd to go on."
            )
        if self.max_calls is not None and so_far.calls >= self.max_calls:
            raise BudgetError(
                f"The limit of {self.max_calls} judge calls is reached. Raise "
                "judge.budget.max_calls to go on."
            )
        if self.max_tokens is not None and so_far.tokens + entry.tokens > self.max_tokens:
            raise BudgetError(
                f"The labelling budget of {self.max_tokens} tokens has no room for another call: "
                f"{so_far.tokens} are spent or reserved and the call may take {entry.tokens}. "
                "Raise judge.budget.max_tokens to go on."
            )


COLUMNS = tuple(field.name for field in fields(Entry))


def row_hash(values: tuple[Any, ...]) -> str:
    """The hash of a row's values, stored beside them."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


_session = uuid.uuid4().hex


def session() -> str:
    """This process. Open rows of any other are what a killed one left."""
    return _session


def _begin_session() -> None:
    global _session
    _session = uuid.uuid4().hex


os.register_at_fork(after_in_child=_begin_session)
