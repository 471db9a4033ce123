"""Multi-round online and iterative DPO: sample, judge, pair, train, evaluate, promote, resume."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from online_dpo.campaign import run
    from online_dpo.errors import CampaignError
    from online_dpo.records import (
        Message,
        Preference,
        Prompt,
        Response,
        Score,
        Verdict,
    )
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
    "run",
]

_HOMES = {"Campaign": "views", "run": "campaign", "CampaignError": "errors"}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used."""
    if name not in __all__:
        raise AttributeError(f"module 'online_dpo' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"online_dpo.{_HOMES.get(name, 'records')}"), name)
