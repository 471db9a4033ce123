"""The canary: log-probs of a few fixed texts by the trainer, for samplers to be checked against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from online_dpo.records import ModelRef, derive_seed
from online_dpo.stages.context import Context
from online_dpo.store import RunDir

_SHORT, _LONG = 8, 48


def write_canary(context: Context, policy: ModelRef) -> None:
    """Commit what the trainer's weights give for the campaign's canary sequences."""
    if context.round.has("canary"):
        return
    sequences = _sequences(context)
    inputs = {"policy": policy.sha256}
    with context.round.commit("canary", inputs=inputs) as draft:
        result = context.crew.trainer().call(
            "score", model=context.model_params(policy), sequences=sequences
        )
        data = {"sequences": sequences, "logps": result["logps"]}
        (draft.path / "canary.json").write_text(json.dumps(data))
        draft.rows = len(sequences)


def canary_file(run: RunDir, policy: ModelRef) -> Path | None:
    """The canary of a policy: in the round that made it, or in round 0 for a given model."""
    parts = Path(policy.path).parts
    number = int(parts[1]) if len(parts) == 3 and parts[0] == "rounds" else 0
    origin = run.round(number)
    if not origin.has("canary"):
        return None
    if origin.manifest("canary")["inputs"].get("policy") != policy.sha256:
        return None
    return origin.artifact("canary") / "canary.json"


def _sequences(context: Context) -> list[dict[str, Any]]:
    """Two short sequences and one that fills several cache blocks, from the campaign's prompts.

    The responses are prompt tokens in a seeded order: any tokens serve, and these always exist.
    """
    table = context.load_prompts()
    prompts = [list(p.token_ids) for p in list(table.by_id.values())[:16]]
    pool = [token for ids in prompts for token in ids]
    sequences = []
    for index, length in enumerate((_SHORT, _SHORT, _LONG)):
        start = derive_seed(context.config.campaign.seed, "canary", index) % len(pool)
        looped = [pool[(start + step) % len(pool)] for step in range(2 * length)]
        sequences.append({"prompt": looped[:length], "response": looped[length:]})
    return sequences
