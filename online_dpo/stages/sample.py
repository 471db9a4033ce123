"""Stage 1: the policy answers the round's prompts, shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from online_dpo.records import ModelRef, SamplingParams, derive_seed, to_dict
from online_dpo.stages.canary import canary_file
from online_dpo.stages.context import Context


def sample(context: Context) -> Iterator[str]:
    """Commit every shard that is missing; yields each shard's name, committed before or now."""
    shards = _shards(context)
    total = len(context.inputs.prompt_ids)
    done = 0
    with context.progress.stage("sample", total=total, unit="prompts") as bar:
        for name, prompt_ids in shards.items():
            if not context.round.has(name):
                with context.working("sample"):
                    _sample_shard(context, name, prompt_ids, _listener(bar, done))
            done += len(prompt_ids)
            bar.set(done)
            yield name


def shard_names(context: Context) -> list[str]:
    """The shards of the round, whether or not they are there yet."""
    return list(_shards(context))


def load_policy(context: Context, policy: ModelRef) -> dict[str, Any]:
    """Make a policy the one that the sampler serves; nothing happens where it is already."""
    canary = canary_file(context.run, policy)
    result = context.crew.sampler().call(
        "load", model=context.model_params(policy), canary=None if canary is None else str(canary)
    )
    if result["how"] != "cached":
        context.run.event("policy loaded", round=context.round.number, **result)
    return result


def _shards(context: Context) -> dict[str, Sequence[str]]:
    ids = context.inputs.prompt_ids
    size = context.config.sampling.prompts_per_shard
    return {
        f"samples/part-{start // size:05d}": ids[start : start + size]
        for start in range(0, len(ids), size)
    }


def sampling_params(context: Context) -> SamplingParams:
    """The round's sampling parameters, every one explicit."""
    c = context.config.sampling
    return SamplingParams(c.n, c.temperature, c.top_p, c.top_k, c.max_new_tokens, tuple(c.stop))


def _sample_shard(
    context: Context,
    name: str,
    prompt_ids: Sequence[str],
    on_event: Callable[[dict[str, Any]], None],
) -> None:
    table = context.load_prompts().by_id
    plan = context.inputs
    params = sampling_params(context)
    loaded = load_policy(context, plan.policy)
    inputs = {"policy": plan.policy.sha256, "prompts": plan.prompts_sha256}
    with context.round.commit(name, inputs=inputs) as draft:
        result = context.crew.sampler().call(
            "generate",
            on_event=on_event,
            prompts=[{"id": i, "token_ids": list(table[i].token_ids)} for i in prompt_ids],
            seeds={
                i: [derive_seed(plan.seed, "sample", i, k) for k in range(params.n)]
                for i in prompt_ids
            },
            params=to_dict(params),
            out=str(draft.path / "samples.parquet"),
        )
        facts = {key: result[key] for key in ("rows", "tokens", "finish")}
        (draft.path / "metrics.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
        draft.rows = result["rows"]
        draft.facts = {
            "made_with": context.crew.facts,
            "batch_size": result["batch_size"],
            "deterministic": loaded["deterministic"],
        }
    context.run.event("shard sampled", round=context.round.number, shard=name, **facts)


def _listener(bar: Any, base: int) -> Callable[[dict[str, Any]], None]:
    """Moves the stage's bar by what a worker reports."""

    def listen(event: dict[str, Any]) -> None:
        if event.get("event") == "progress":
            bar.set(base + int(event["done"]))

    return listen
