"""The canary: log-probs of a few fixed texts by the trainer, for samplers to be checked against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from online_dpo.files import read_json
from online_dpo.records import ModelRef
from online_dpo.samplers.canary import make_sequences
from online_dpo.stages.context import Context, engine_length
from online_dpo.store import RunDir

_NUM_PROMPTS = 16


def write_canary(context: Context, policy: ModelRef) -> None:
    """Commit what the trainer's weights give for the campaign's canary sequences."""
    if context.round.has("canary"):
        return
    sequences = _sequences(context, policy)
    with context.round.commit("canary", inputs={"policy": policy.sha256}) as draft:
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
    return origin.verify("canary") / "canary.json"


def _sequences(context: Context, policy: ModelRef) -> list[dict[str, Any]]:
    """The same tokens in every round, within what the model and the engine can take."""
    model = read_json(context.folder(policy) / "config.json").get("max_position_embeddings")
    limits = [int(n) for n in (model, engine_length(context.config)) if n is not None]
    prompts = list(context.load_prompts().by_id.values())[:_NUM_PROMPTS]
    pairs = make_sequences(
        [prompt.token_ids for prompt in prompts], max_length=min(limits, default=None)
    )
    return [{"prompt": list(prompt), "response": list(response)} for prompt, response in pairs]
