"""Servers of language models that judge by a rule, and labelled comparisons for them to judge."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from judge_server import JudgeServer, Request, Say

Rule = Callable[[str, str, float], str]
"""Given what is shown as A and as B, and a number in [0, 1) drawn for the request: the reply."""

GOOD, BAD = "right", "wrong"
"""A labelled response says which it is; its length has nothing to do with it."""

_SHOWN = r"<<<response {} (\w+)>>>\n(.*?)\n<<<end of response {} \1>>>"


def serve_rule(rule: Rule) -> JudgeServer:
    """A server whose every reply follows a rule. The draw is the request's own, so it repeats."""

    def answer(request: Request, number: int) -> Say:
        text = request["messages"][-1]["content"]
        first, second = (
            re.findall(_SHOWN.format(letter, letter), text, re.DOTALL)[0][1] for letter in "AB"
        )
        draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
        return Say(rule(first, second, draw))

    return JudgeServer(answer)


def honest(first: str, second: str, draw: float) -> str:
    """Prefers what is right; two that are alike are a tie."""
    a, b = first.startswith(GOOD), second.startswith(GOOD)
    return verdict("tie" if a == b else "A" if a else "B")


def always_first(first: str, second: str, draw: float) -> str:
    return verdict("A")


def always_longer(first: str, second: str, draw: float) -> str:
    return verdict("A" if len(first) > len(second) else "B" if first != second else "tie")


def flips(first: str, second: str, draw: float) -> str:
    """Says the opposite of what is right in 20% of its answers."""
    return honest(second, first, draw) if draw < 0.2 else honest(first, second, draw)


def unparsable(first: str, second: str, draw: float) -> str:
    """10% of its replies hold no verdict."""
    return "Well, both have their merits." if draw < 0.1 else honest(first, second, draw)


def in_circles(first: str, second: str, draw: float) -> str:
    """Paper beats rock, rock beats scissors, scissors beat paper."""
    beats = {("paper", "rock"), ("rock", "scissors"), ("scissors", "paper")}
    return verdict("A" if (first.split()[-1], second.split()[-1]) in beats else "B")


def gullible(first: str, second: str, draw: float) -> str:
    """Does what a response says, and otherwise judges honestly."""
    orders = re.findall(r'(?:answer |Verdict: |"verdict": "|\[\[)([AB])', first + second)
    return verdict(orders[-1]) if orders else honest(first, second, draw)


def verdict(label: str) -> str:
    return json.dumps({"verdict": label})


def write_comparisons(path: Path, num_pairs: int = 40) -> Path:
    """Comparisons of a right and a wrong response; place and length are balanced over the set."""
    rows = []
    for k in range(num_pairs):
        good = f"{GOOD} answer {k}" + " with more words" * (k % 2)
        bad = f"{BAD} answer {k}" + " with more words" * (1 - k % 2)
        first, second = (good, bad) if k % 4 < 2 else (bad, good)
        label = "first" if first == good else "second"
        rows.append({"prompt": f"Question {k}?", "first": first, "second": second, "label": label})
    return write_rows(path, rows)


def write_triples(path: Path, num_prompts: int = 8) -> Path:
    """Every comparison of the three responses that each prompt has, by a rule without circles."""
    names = ("paper", "rock", "scissors")
    rows = [
        {"prompt": f"Question {k}?", "first": f"I show {a}", "second": f"I show {b}", "label": "A"}
        for k in range(num_prompts)
        for a, b in (names[:2], names[1:], names[::2])
    ]
    return write_rows(path, rows)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path
