"""What labelling by implicit reward margins needs: the reference's log-probs of the samples."""

from __future__ import annotations

from collections.abc import Iterator
from math import fsum

from online_dpo.stages.context import Context
from online_dpo.stages.sample import sample
from online_dpo.tables import read_table, write_table


def ready_shards(context: Context) -> Iterator[str]:
    """Commit what is missing of the samples and, where `judge.schedule` asks, of their scores.

    Yields each shard's name when it can be labelled. With scores that is after all are sampled, so
    that sampler and trainer take turns once.
    """
    plan = context.inputs
    margins = context.config.judge.schedule == "reward_margin"
    if not margins or plan.policy == plan.reference:
        yield from sample(context)
        return
    for shard in list(sample(context)):
        _score_shard(context, shard)
        yield shard


def reference_logps(context: Context, shard: str) -> dict[str, float] | None:
    """The reference's log-prob of each response of a shard, in nats; None where none was scored."""
    name = _name(shard)
    if not context.round.has(name):
        return None
    rows = read_table(context.round.verify(name) / "scores.parquet")
    return {row["response_id"]: row["reference_logp"] for row in rows}


def _score_shard(context: Context, shard: str) -> None:
    name, reference = _name(shard), context.inputs.reference
    if context.round.has(name):
        return
    samples = read_table(context.round.verify(shard) / "samples.parquet")
    prompts = context.load_prompts().by_id
    inputs = {"samples": context.round.manifest(shard)["sha256"], "reference": reference.sha256}
    with context.working("label"), context.round.commit(name, inputs=inputs) as draft:
        result = context.crew.trainer().call(
            "score",
            model=context.model_params(reference),
            sequences=[
                {"prompt": list(prompts[r["prompt_id"]].token_ids), "response": r["token_ids"]}
                for r in samples
            ],
        )
        table = [
            {"response_id": row["id"], "reference_logp": fsum(logps)}
            for row, logps in zip(samples, result["logps"], strict=True)
        ]
        write_table(draft.path / "scores.parquet", "scores", table)
        draft.rows = len(table)


def _name(shard: str) -> str:
    return shard.replace("samples/", "scores/")
