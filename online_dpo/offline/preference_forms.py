"""The forms in which a data set states what is better: two answers to a prompt, or one's label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from online_dpo.records import Message
from online_dpo.rows import kind_of
from online_dpo.tokenization import parse_prompt


@dataclass(frozen=True, slots=True)
class StatedPreference:
    """A prompt, as text or as messages, and the texts of its two answers."""

    text: str | None
    messages: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class StatedLabel:
    """A prompt, as text or as messages, the text of an answer, and whether it is good."""

    text: str | None
    messages: tuple[Message, ...]
    completion: str
    label: bool


class UnusableError(Exception):
    """Why a row is no preference."""


def parse_preference(values: Mapping[str, Any]) -> StatedPreference:
    """What a row with `chosen`, `rejected` and mostly `prompt` states.

    An answer is a text, or a conversation that ends with the assistant's turn. What stands before
    that turn is the prompt (the implicit form of TRL), goes on from the messages of `prompt`, or
    repeats them; it is the same on both sides. Raises UnusableError with the reason.
    """
    chosen, before = _answer(values, "chosen")
    rejected, before_rejected = _answer(values, "rejected")
    if before != before_rejected:
        raise UnusableError("chosen and rejected answer different messages")
    text, messages = _prompt(values.get("prompt"), before)
    return StatedPreference(text, messages, chosen, rejected)


def parse_label(values: Mapping[str, Any]) -> StatedLabel:
    """What a row with `completion`, `label` and mostly `prompt` states.

    The answer has the forms of `parse_preference`; the label is true or false, 1 or 0. Raises
    UnusableError with the reason.
    """
    completion, before = _answer(values, "completion")
    text, messages = _prompt(values.get("prompt"), before)
    label = values.get("label")
    if not (isinstance(label, bool) or (isinstance(label, int) and label in (0, 1))):
        raise UnusableError(f"'label' is {kind_of(label)}, not true or false")
    return StatedLabel(text, messages, completion, bool(label))


def _answer(values: Mapping[str, Any], side: str) -> tuple[str, tuple[Message, ...]]:
    """A side's answer, and the messages before it."""
    value = values.get(side)
    if isinstance(value, list) and value:
        *before, last = _messages(value, side)
        if last.role != "assistant":
            raise UnusableError(f"{side!r} ends with a turn of {last.role!r}, not the assistant's")
        value = last.content
    else:
        before = []
    if not isinstance(value, str) or not value:
        raise UnusableError(f"{side!r} is {kind_of(value)}, not an answer")
    return value, tuple(before)


def _prompt(value: Any, before: tuple[Message, ...]) -> tuple[str | None, tuple[Message, ...]]:
    """The prompt's text or messages, from its column and from the messages before the answers."""
    if before:
        value = _joined(value, before)
    elif value is None:
        raise UnusableError("no 'prompt', and no messages before the answers")
    text, messages, reason = parse_prompt(value)
    if reason:
        raise UnusableError(reason)
    return text, messages


def _joined(value: Any, before: tuple[Message, ...]) -> list[dict[str, str]]:
    """`before`, after the messages of the prompt's column where it does not repeat them."""
    given: tuple[Message, ...] = ()
    if isinstance(value, str):
        if value.strip() not in [message.content.strip() for message in before]:
            raise UnusableError("the prompt is none of the messages before the answers")
    elif value is not None:
        given = _messages(value, "prompt")
    if before[: len(given)] == given:
        given = ()
    return [{"role": m.role, "content": m.content} for m in (*given, *before)]


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UnusableError(f"{name!r} is {kind_of(value)}, not a list of messages")
    messages = []
    for message in value:
        role, content = (
            (message.get("role"), message.get("content"))
            if isinstance(message, Mapping)
            else (None, None)
        )
        if not (isinstance(role, str) and isinstance(content, str)):
            raise UnusableError(f"{name!r}: a message is not an object with a role and a content")
        messages.append(Message(role, content))
    return tuple(messages)
