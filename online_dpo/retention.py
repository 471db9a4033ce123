"""Which finished rounds' policies may be deleted; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from online_dpo.config import Config


@dataclass(frozen=True)
class KeptRound:
    """A finished round as retention sees it."""

    round: int
    promoted: bool


def deletable(config: Config, finished: Sequence[KeptRound]) -> list[int]:
    """Rounds whose policy (and carried optimizer) nothing needs any more.

    Kept whatever the rule: policy 0, the newest policy, the reference in use, and promoted ones
    that a later round may name.
    """
    if not finished:
        return []
    newest = finished[-1].round
    reference = max((r.round for r in finished if r.promoted), default=0)
    needed = {0, newest, reference}
    return [r.round for r in finished if r.round not in needed and not _kept(config, r, newest)]


def _kept(config: Config, past: KeptRound, newest: int) -> bool:
    retention = config.campaign.retention
    scheduled = past.round % config.campaign.save_policy_every == 0
    if retention == "all":
        return scheduled or past.promoted
    if retention == "promoted":
        return past.promoted
    assert isinstance(retention, dict)
    return past.round > newest - retention["last"]
