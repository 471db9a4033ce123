"""Stage 6: whether the policy becomes the next reference; closes the round."""

from __future__ import annotations

from typing import Any

from online_dpo.records import to_dict
from online_dpo.schedule import is_promoted
from online_dpo.stages.context import Context, trained_on
from online_dpo.stages.origin import policy_zero


def promote(context: Context) -> None:
    """Write the round's manifest with the decision and why it was made."""
    number = context.round.number
    policy = policy_zero(context.round) if number == 0 else context.round.ref("policy")
    promoted, why = (True, "policy 0") if number == 0 else is_promoted(context.config, number)
    context.round.close(
        {"policy": to_dict(policy), "promoted": promoted, "why": why, **_outputs(context)}
    )


def _outputs(context: Context) -> dict[str, Any]:
    """The optimizer state to carry on and the counts of the round."""
    round_dir = context.round
    if context.plan is None:
        return {"optimizer": None, "optimizer_step": 0, "counts": {}}
    carried = round_dir.has("optimizer")
    step = int(round_dir.manifest("optimizer")["optimizer_step"]) if carried else 0
    return {
        "optimizer": to_dict(round_dir.ref("optimizer")) if carried else None,
        "optimizer_step": step,
        "counts": round_counts(context),
    }


def round_counts(context: Context) -> dict[str, Any]:
    """Responses by fate, pairs and verdicts: samples = paired + ... reconciles here."""
    from online_dpo.files import read_json

    round_dir = context.round
    name = trained_on(round_dir)
    made = read_json(round_dir.verify(name) / "metrics.json")
    samples = sum(round_dir.manifest(n)["rows"] for n in round_dir.children("samples"))
    assert sum(made["responses"].values()) == samples, "samples do not reconcile"
    return {"samples": samples, "responses": made["responses"], name: made[name]}
