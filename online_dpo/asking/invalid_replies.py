"""Stopping a round whose judge gives too few verdicts, with what was seen."""

from __future__ import annotations

from collections import Counter

from online_dpo.asking.judge_forms import Answer
from online_dpo.asking.verdicts import Question
from online_dpo.config import JudgeConfig
from online_dpo.errors import JudgeError
from online_dpo.records import Score, Verdict


class InvalidReplies:
    """Counts what a judge answers without a verdict, by reason, and bears no more than a share.

    The count begins anew with each round and purpose.
    """

    def __init__(self, config: JudgeConfig, section: str) -> None:
        self._config = config
        self._section = section
        self._of: tuple[str, int] | None = None
        self._reasons: Counter[str] = Counter()
        self._answers = 0
        self._last = ""

    def begin(self, purpose: str, round: int) -> None:
        """Questions of this kind come next; those that were counted stay counted."""
        if self._of != (purpose, round):
            self._of = purpose, round
            self._reasons.clear()
            self._answers = 0

    def count(self, question: Question, answer: Answer) -> None:
        """Raises JudgeError once the share is over judge.max_invalid."""
        given = answer if isinstance(answer, tuple) else (answer,)
        self._answers += len(given)
        for judgement in given:
            if not _has_value(judgement):
                self._reasons[judgement.reason or "no reason"] += 1
                self._last = _shown(question, judgement)
        enough = self._answers >= self._config.max_invalid_after
        if enough and self._reasons.total() > self._config.max_invalid * self._answers:
            raise JudgeError(self._message())

    def _message(self) -> str:
        setting = f"{self._section}.max_invalid"
        reasons = ", ".join(f"{reason} ({n})" for reason, n in self._reasons.most_common(5))
        return (
            f"The judge {self._config.name!r} gave no verdict in {self._reasons.total()} of "
            f"{self._answers} answers, and {setting} is {self._config.max_invalid:g}: {reasons}; "
            f"the last for {self._last}. Mend the judge, or raise {setting}."
        )


def _shown(question: Question, judgement: Verdict | Score) -> str:
    words = " ".join((getattr(judgement, "raw", None) or "").split())
    said = f", whose reply was {words[:200]!r}" if words else ""
    return f"prompt {question.prompt.id!r}{said}"


def _has_value(judgement: Verdict | Score) -> bool:
    return (judgement.value if isinstance(judgement, Score) else judgement.p) is not None
