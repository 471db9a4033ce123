"""Whether a text has a form: JSON, bullet points, a numbered list, one line, without Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable

from judges.verifiers_text import NOT_JSON, read_json

_BULLET = re.compile(r"\s*[-*+]\s+\S")
_NUMBERED = re.compile(r"\s*(\d{1,6})[.)]\s+\S")
_MARKDOWN = re.compile(
    r"^\s{0,3}(?:#{1,6}\s|[-*+]\s|\d+[.)]\s|>|```|~~~|\|)|\*\*\S|__\S|`[^`\n]+`|\[[^\]\n]+\]\(",
    re.MULTILINE,
)


def is_json(text: str) -> bool:
    """Whether a text is JSON as a whole, in a code fence or not."""
    return read_json(text) is not NOT_JSON


def is_numbered(text: str) -> bool:
    """Whether the lines that are not blank are numbered from 1, without a gap."""
    numbers = [_NUMBERED.match(line) for line in text.splitlines() if line.strip()]
    found = [int(match[1]) for match in numbers if match is not None]
    return bool(found) and len(found) == len(numbers) and found == list(range(1, len(found) + 1))


def is_bulleted(text: str) -> bool:
    """Whether every line that is not blank is a bullet point."""
    lines = [line for line in text.splitlines() if line.strip()]
    return bool(lines) and all(_BULLET.match(line) for line in lines)


def is_one_line(text: str) -> bool:
    """Whether a text is one line, and not none."""
    return len(text.splitlines()) == 1


def is_plain(text: str) -> bool:
    """Whether a text is without Markdown, and not empty."""
    return bool(text) and _MARKDOWN.search(text) is None


FORMS: dict[str, Callable[[str], bool]] = {
    "json": is_json,
    "bullets": is_bulleted,
    "numbered": is_numbered,
    "one_line": is_one_line,
    "plain": is_plain,
}
"""What tells the forms of `Format`, given a text without blanks around it."""
