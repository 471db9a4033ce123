"""Stage 1: the policy answers the round's prompts, shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from online_dpo.asking.answers import buy_answers
from online_dpo.asking.comparison_schedules import part_of_budget
from online_dpo.paid.ledger import LEDGER
from online_dpo.progress import Bar
from online_dpo.records import ModelRef, Prompt, Response, SamplingParams, derive_seed, to_dict
from online_dpo.stages.canary import canary_file
from online_dpo.stages.context import Context
from online_dpo.tables import read_table, write_table
from online_dpo.tokenization import ANSWER_KEY, without_thinking


def sample(context: Context) -> Iterator[str]:
    """Commit every shard that is missing; yields each shard's name, committed before or now."""
    shards = _shards(context)
    total = len(context.inputs.prompt_ids)
    done = 0
    with context.progress.stage("sample", total=total, unit="prompts") as bar:
        for name, prompt_ids in shards.items():
            if not context.round.has(name):
                listener = progress_listener(bar, done, context.config.sampling.n)
                with context.crew.sampler_turn:
                    _sample_shard(context, name, prompt_ids, listener)
            done += len(prompt_ids)
            bar.set(done)
            yield name


def shard_names(context: Context) -> list[str]:
    """The shards of the round, whether or not they are there yet."""
    return list(_shards(context))


def budget_of_shard(context: Context, name: str) -> int | None:
    """A shard's part of `judge.comparisons_per_round`, by the round's plan alone; None without."""
    total = context.config.judge.comparisons_per_round
    if total is None:
        return None
    shards = _shards(context)
    sizes = [len(prompt_ids) for prompt_ids in shards.values()]
    return part_of_budget(sizes, list(shards).index(name), total=total)


def load_policy(context: Context, policy: ModelRef) -> dict[str, Any]:
    """Make a policy the one that the sampler serves; nothing happens where it is already."""
    canary = canary_file(context.run, policy)
    number = context.round.number
    result = context.crew.sampler().call(
        "load",
        on_event=lambda event: context.run.event("sampler", round=number, **event),
        model=context.model_params(policy),
        canary=None if canary is None else str(canary),
    )
    if result["how"] != "cached":
        context.run.event("policy loaded", round=number, **result)
    return result


def prompt_request(prompt: Prompt) -> dict[str, Any]:
    """A prompt as samplers are given it."""
    return {"id": prompt.id, "source": prompt.source, "token_ids": list(prompt.token_ids)}


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
        with context.working("sample"):
            result = context.crew.sampler().call(
                "generate",
                on_event=on_event,
                prompts=[prompt_request(table[i]) for i in prompt_ids],
                seeds={
                    i: [derive_seed(plan.seed, "sample", i, k) for k in range(params.n)]
                    for i in prompt_ids
                },
                params=to_dict(params),
                out=str(draft.path / "samples.parquet"),
            )
        others = _other_answers(context, prompt_ids)
        if others:
            _add(draft.path / "samples.parquet", others, prompt_ids)
        facts = {key: result[key] for key in ("rows", "tokens", "finish")}
        facts["other_answers"] = len(others)
        (draft.path / "metrics.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
        draft.rows = result["rows"] + len(others)
        draft.facts = {
            "made_with": context.crew.facts,
            "batch_size": result["batch_size"],
            "deterministic": loaded["deterministic"],
        }
    context.run.event("shard sampled", round=context.round.number, shard=name, **facts)


def _other_answers(context: Context, prompt_ids: Sequence[str]) -> list[Response]:
    """Candidates from a column of the prompt set and from a second model, marked by source."""
    prompts = [context.load_prompts().by_id[i] for i in prompt_ids]
    texts = [
        (prompt.id, f"{prompt.id}:given", str(prompt.metadata[ANSWER_KEY]), "given", True)
        for prompt in prompts
        if ANSWER_KEY in prompt.metadata
    ]
    also = context.config.sampling.also
    if also is not None:
        bought = buy_answers(
            prompts,
            also,
            params=sampling_params(context),
            budget=context.config.judge.budget,
            prices=context.config.judge.prices,
            ledger_path=context.run.path / LEDGER,
            seed=context.config.campaign.seed,
            round_number=context.round.number,
            on_event=lambda event: context.run.event("second model", **event),
        )
        texts += [
            (a.prompt_id, f"{a.prompt_id}:also-{a.index:02d}", a.text, also.model, a.finished)
            for a in bought
        ]
    texts = [text for text in texts if text[2].strip()]
    if not texts:
        return []
    encoded = context.crew.sampler().call(
        "encode",
        model=context.model_params(context.inputs.policy),
        answers=[{"text": text, "append_eos": done} for _, _, text, _, done in texts],
    )
    seen = without_thinking if context.config.sampling.strip_thinking else str
    return [
        Response(name, prompt_id, seen(text), tuple(ids), "eos" if done else "length", source)
        for (prompt_id, name, text, source, done), ids in zip(texts, encoded["ids"], strict=True)
    ]


def _add(table: Path, others: Sequence[Response], prompt_ids: Sequence[str]) -> None:
    """Put other answers behind the policy's, prompt by prompt."""
    rows = read_table(table)
    sources = {row["prompt_id"]: row["prompt_source"] for row in rows}
    rows += [{**to_dict(r), "prompt_source": sources[r.prompt_id]} for r in others]
    place = {prompt_id: index for index, prompt_id in enumerate(prompt_ids)}
    write_table(table, "samples", sorted(rows, key=lambda row: place[row["prompt_id"]]))


def progress_listener(bar: Bar, base: int, num_responses: int) -> Callable[[dict[str, Any]], None]:
    """Moves the stage's bar, which counts prompts, by the responses a worker reports."""

    def listen(event: dict[str, Any]) -> None:
        if event.get("event") == "progress":
            bar.set(base + int(event["done"]) // num_responses)

    return listen
