"""Judges as users write them, sound and broken, named by tests as `file.py:attr`."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from online_dpo.judging import Calls
from online_dpo.paid.chat import ChatRequest, Estimate
from online_dpo.records import Message, Prompt, Response, Score, Verdict


def pair(
    number: int = 0, first: str = "good", second: str = "poor", **metadata: Any
) -> tuple[Prompt, Response, Response]:
    """Two responses to one prompt, with ids and texts of their own for each number."""
    prompt = Prompt(f"p{number}", "test", text="Say hello.", metadata=metadata)
    one = Response(f"{number}-a", prompt.id, f"{first} {number}", (1,), "eos")
    other = Response(f"{number}-b", prompt.id, f"{second} {number}", (2,), "eos")
    return prompt, one, other


def length(prompt: Prompt, response: Response) -> float:
    print("a judge may print")  # its stdout is its log
    return float(len(response.text))


def longer(prompt: Prompt, first: Response, second: Response) -> float | None:
    if "?" in first.text:
        return None
    return 0.9 if len(first.text) > len(second.text) else 0.1


def process_id(prompt: Prompt, response: Response) -> float:
    return float(os.getpid())


async def async_length(prompt: Prompt, response: Response) -> float:
    await asyncio.sleep(0)
    return float(len(response.text))


class Versioned:
    version = "2024-05"

    def __init__(self, bonus: float = 0.0) -> None:
        self.bonus = bonus

    def score(self, prompt: Prompt, responses: Sequence[Response]) -> list[Score]:
        return [Score(prompt.metadata["weight"] * len(r.text) + self.bonus) for r in responses]


def raises(prompt: Prompt, response: Response) -> float:
    raise KeyError(f"no entry for {response.text}")


def not_a_number(prompt: Prompt, response: Response) -> float:
    return float("nan")


def not_a_score(prompt: Prompt, response: Response) -> Any:
    return "good"


def out_of_range(prompt: Prompt, first: Response, second: Response) -> float:
    return 7.0


def hangs(prompt: Prompt, response: Response) -> float:
    if response.text == "hang":
        time.sleep(600)
    return 1.0


def exits(prompt: Prompt, response: Response) -> float:
    sys.exit(3)


def dies(prompt: Prompt, response: Response) -> float:
    os.kill(os.getpid(), 9)
    return 0.0


class WrongCount:
    def score(self, prompt: Prompt, responses: Sequence[Response]) -> list[float]:
        return [1.0]


class CannotBeMade:
    def __init__(self) -> None:
        raise OSError("the weights are gone")

    def score(self, prompt: Prompt, responses: Sequence[Response]) -> list[float]:
        return []


class NeedsTheCpu:
    """Made only where no GPU can be seen."""

    def __init__(self) -> None:
        if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            raise OSError("GPUs are in sight")

    def score(self, prompt: Prompt, responses: Sequence[Response]) -> list[float]:
        return [0.0 for _ in responses]


class Unrelated:
    """No judge at all."""


class Both:
    def score(self, prompt: Prompt, responses: Sequence[Response]) -> list[float]:
        return [0.0 for _ in responses]

    def compare(self, prompt: Prompt, first: Response, second: Response) -> float:
        return 0.5


class AsyncFirst:
    """Always prefers the first, once it has been asked in a sound order."""

    async def compare(self, prompt: Prompt, first: Response, second: Response) -> Verdict:
        await asyncio.sleep(0.001)
        return Verdict(1.0, raw=f"{first.id} beats {second.id}")


class AsyncHangs:
    async def compare(self, prompt: Prompt, first: Response, second: Response) -> float:
        await asyncio.sleep(600)
        return 1.0


class AsyncBlocks:
    async def compare(self, prompt: Prompt, first: Response, second: Response) -> float:
        time.sleep(1.5)
        return 1.0


class AsyncRaises:
    async def compare(self, prompt: Prompt, first: Response, second: Response) -> float:
        raise ZeroDivisionError("by nothing")


class Paying:
    """A user's own scorer over the paid door, with a caller's usual carelessness about errors."""

    version = "1"

    def __init__(self, base_url: str, dollars: float | None = 1.0) -> None:
        self.base_url = base_url
        self.price = None if dollars is None else (dollars, dollars)

    async def score(
        self, prompt: Prompt, responses: Sequence[Response], *, calls: Calls
    ) -> list[Score]:
        return [await self._one(prompt, response, calls) for response in responses]

    async def _one(self, prompt: Prompt, response: Response, calls: Calls) -> Score:
        request = ChatRequest(
            model="grader",
            messages=(Message("user", f"{prompt.content}\n{response.text}"),),
            max_tokens=100,
            base_url=self.base_url,
        )
        try:
            reply = await calls.complete(request, estimate=Estimate.at_most(request, self.price))
            return Score(float(reply.text))
        except Exception as error:
            return Score(None, type(error).__name__)


class SleepsBesidesPaying(Paying):
    """Spends its own time only while no call is under way."""

    async def _one(self, prompt: Prompt, response: Response, calls: Calls) -> Score:
        await asyncio.sleep(0.05)
        return await super()._one(prompt, response, calls)


class Fails:
    """Raises on every prompt whose metadata say so."""

    inline = True

    def compare(self, prompt: Prompt, first: Response, second: Response) -> float:
        if prompt.metadata.get("fails"):
            raise OSError("the disk is gone")
        return 1.0


class Abstains:
    inline = True

    def compare(self, prompt: Prompt, first: Response, second: Response) -> Verdict:
        return Verdict(None, "it depends", raw="who knows")


class Unreadable:
    inline = True

    def compare(self, prompt: Prompt, first: Response, second: Response) -> Verdict:
        return Verdict(None, "no verdict in the reply", raw="Both are nice.")


class Noisy:
    """A number for each order of two texts, as good as drawn, in [0, 1]."""

    inline = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def compare(self, prompt: Prompt, first: Response, second: Response) -> float:
        draw = hashlib.sha256(f"{self.seed}/{first.text}/{second.text}".encode()).digest()
        return draw[0] / 255


class Counted:
    """Scores by length in a worker, and writes down what it was asked."""

    def __init__(self, log: str) -> None:
        self.log = log

    def score(self, prompt: Prompt, responses: Sequence[Response]) -> list[float]:
        with open(self.log, "a") as log:
            log.writelines(f"{response.id}\n" for response in responses)
        return [float(len(response.text)) for response in responses]
