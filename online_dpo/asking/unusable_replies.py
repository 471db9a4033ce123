"""Why a language model's reply holds no verdict, in the words that labels keep; pure."""

from __future__ import annotations

NO_VERDICT = "no verdict in the reply"
NO_SCORE = "no score in the reply"
NO_SUCH_SCORE = "a score that the rubric does not have"
NO_LOGPROBS = "no log-probs at the verdict"
CUT_OFF = "reply cut off at max_tokens"
EMPTY = "empty reply"
TOO_LONG = "too long for the judge"

_ALL = (NO_VERDICT, NO_SCORE, NO_SUCH_SCORE, NO_LOGPROBS, CUT_OFF, EMPTY, TOO_LONG)


def is_unusable(reason: str | None) -> bool:
    """Whether this is the reason of a reply that could not be used, rather than of an abstention.

    A judge abstains where it gives none of its own accord: a function's None, a reason that is the
    judge's own, a model that refuses, a panel whose members abstain, a response that cannot be
    checked.
    """
    return reason is not None and reason.startswith(_ALL)
