"""Multi-round online and iterative DPO: sample, judge, pair, train, evaluate, promote, resume."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from online_dpo.campaign import run
    from online_dpo.errors import CampaignError
    from online_dpo.offline.training import train_preferences
    from online_dpo.records import (
        Message,
        Preference,
        Prompt,
        Response,
        Score,
        Verdict,
    )
    from online_dpo.training.scoring import per_token_logps, sequence_logps
    from online_dpo.views import Campaign

__all__ = [
    "Campaign",
    "CampaignError",
    "Message",
    "Preference",
    "Prompt",
    "Response",
    "Score",
    "Verdict",
    "per_token_logps",
    "run",
    "sequence_logps",
    "train_preferences",
]

_HOMES = {
    "Campaign": "views",
    "CampaignError": "errors",
    "per_token_logps": "training.scoring",
    "run": "campaign",
    "sequence_logps": "training.scoring",
    "train_preferences": "offline.training",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used."""
    if name not in __all__:
        raise AttributeError(f"module 'online_dpo' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"online_dpo.{_HOMES.get(name, 'records')}"), name)
