"""Judges with one fault each, and a sound one, named by tests as `file.py:attr`."""

from __future__ import annotations

import hashlib

from online_dpo.records import Prompt, Response, Verdict

CONSTANT = "I'm not sure, but I hope this helps."


def quality(text: str) -> int:
    """What a sound judge goes by: as good as drawn, and nothing for words that say nothing."""
    return -1 if text == CONSTANT else hashlib.sha256(f"3 {text}".encode()).digest()[0]


class Sound:
    inline = True

    def compare(self, prompt: Prompt, first: Response, second: Response) -> Verdict:
        one, other = quality(first.text), quality(second.text)
        return Verdict(0.5 if one == other else 0.9 if one > other else 0.1)


class Longer(Sound):
    def compare(self, prompt: Prompt, first: Response, second: Response) -> Verdict:
        one, other = len(first.token_ids), len(second.token_ids)
        return Verdict(0.5 if one == other else 0.9 if one > other else 0.1)


class First(Sound):
    """Takes what it is shown first, in three of four pairs."""

    def compare(self, prompt: Prompt, first: Response, second: Response) -> Verdict:
        if (quality(first.text) + quality(second.text)) % 4 == 0:
            return super().compare(prompt, first, second)
        return Verdict(0.8)


class Unreadable(Sound):
    """Says nothing that could be read in one pair of ten."""

    def compare(self, prompt: Prompt, first: Response, second: Response) -> Verdict:
        if (quality(first.text) + quality(second.text)) % 10 == 0:
            return Verdict(None, "no verdict in the reply", raw="They are both nice.")
        return super().compare(prompt, first, second)


class EmptyWords(Sound):
    """Likes to hear that somebody hopes to help."""

    def compare(self, prompt: Prompt, first: Response, second: Response) -> Verdict:
        if "hope this helps" in first.text + second.text:
            return Verdict(1.0 if "hope this helps" in first.text else 0.0)
        return super().compare(prompt, first, second)


def empty_words(prompt: Prompt, response: Response) -> float:
    """The same as a score."""
    return 1000.0 if "hope this helps" in response.text else float(quality(response.text))


def long_words(prompt: Prompt, response: Response) -> float:
    return float(len(response.token_ids))
