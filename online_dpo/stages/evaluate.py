"""Stage 5: the new policy answers the held-out prompts, and is judged and measured on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from online_dpo.files import sha256_text
from online_dpo.metrics import Drift, evaluation_figures, win
from online_dpo.progress import Bar
from online_dpo.records import (
    Comparison,
    ModelRef,
    Prompt,
    Response,
    SamplingParams,
    Score,
    derive_seed,
    to_dict,
)
from online_dpo.stages.context import Context
from online_dpo.stages.origin import policy_zero
from online_dpo.stages.sample import load_policy, progress_listener, prompt_request
from online_dpo.store import RoundDir
from online_dpo.tables import read_table, response_from_answer, responses_by_prompt, write_table

Row = dict[str, Any]
Answers = Sequence[tuple[Prompt, Response]]
"""Held-out prompts, each with a policy's answer."""


def evaluate(context: Context) -> None:
    """Commit `evaluation/` for the round's policy (in round 0: policy 0), if it is missing."""
    if context.round.has("evaluation"):
        return
    policy = policy_zero(context.round) if context.plan is None else context.round.ref("policy")
    with (
        context.working("evaluate"),
        context.progress.stage("evaluate", total=len(_prompts(context)), unit="prompts") as bar,
    ):
        temperature = context.config.evaluation.temperature
        answers = _answer(context, policy, temperature=temperature, bar=bar)
        bar.set(len(answers))
        rows = _judge(context, answers)
        asked = context.plan is not None or context.make_labeller(True).kind == "score"
        metrics = evaluation_figures(rows, _drifts(context, policy, answers), asked=asked)
    with context.round.commit("evaluation", inputs={"policy": policy.sha256}) as draft:
        write_table(draft.path / "answers.parquet", "answers", rows)
        (draft.path / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        draft.rows = len(rows)
        draft.facts = {"judge": _judge_facts(context)}


def _prompts(context: Context) -> list[Prompt]:
    """The held-out prompts, the same ones every round."""
    table = context.load_prompts()
    ids = [prompt_id for source in table.eval.values() for prompt_id in source]
    limit = context.config.evaluation.max_prompts
    if limit is not None and limit < len(ids):
        seed = context.config.campaign.seed
        ids = sorted(ids, key=lambda i: derive_seed(seed, "eval", i))[:limit]
    return [table.by_id[prompt_id] for prompt_id in ids]


def _answer(
    context: Context, policy: ModelRef, *, temperature: float, bar: Bar | None = None
) -> list[tuple[Prompt, Response]]:
    """One answer of a policy to each held-out prompt; the same seeds in every round."""
    sampling = context.config.sampling
    prompts = _prompts(context)
    params = SamplingParams(
        n=1,
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        max_new_tokens=context.config.evaluation.max_new_tokens or sampling.max_new_tokens,
        stop=tuple(sampling.stop),
    )
    load_policy(context, policy)
    seed = context.config.campaign.seed
    scratch = context.round.begin("answers")
    table = scratch.path / "answers.parquet"
    context.crew.sampler().call(
        "generate",
        on_event=None if bar is None else progress_listener(bar, 0, 1),
        prompts=[prompt_request(prompt) for prompt in prompts],
        seeds={p.id: [derive_seed(seed, "eval", p.id)] for p in prompts},
        params=to_dict(params),
        out=str(table),
    )
    responses = responses_by_prompt(read_table(table))
    context.round.remove("answers.partial")
    return [(prompt, responses[prompt.id][0]) for prompt in prompts]


def _judge(context: Context, answers: Answers) -> list[Row]:
    """A row an answer: its score, or its win against the answers of earlier policies."""
    rows = [_row(prompt, response) for prompt, response in answers]
    numbers = [n for n in range(context.round.number) if context.run.round(n).has("evaluation")]
    opponents = {"p_policy0": 0, "p_previous": numbers[-1]} if numbers else {}
    if context.make_labeller(True).kind == "score":
        return _scored(context, answers, rows, opponents)
    return _compared(context, answers, rows, opponents)


def _scored(
    context: Context, answers: Answers, rows: list[Row], opponents: Mapping[str, int]
) -> list[Row]:
    for row, score in zip(rows, _scores(context, answers), strict=True):
        row |= {"score": score.value, "reason": score.reason}
    for field, number in opponents.items():
        others = _scored_answers(context, number)
        for row in rows:
            row[field] = _win(row, others)
    return rows


def _compared(
    context: Context, answers: Answers, rows: list[Row], opponents: Mapping[str, int]
) -> list[Row]:
    by_opponent: dict[int, dict[str, Comparison]] = {}
    for number in sorted(set(opponents.values())):
        others = _answers(context, number)
        met = [(p, r, response_from_answer(others[p.id])) for p, r in answers if p.id in others]
        with _shown(context, len(met)) as on_share:
            verdicts = context.make_labeller(True).compare_pairs(
                met, purpose=_purpose(context), on_share=on_share
            )
        by_opponent[number] = {verdict.prompt_id: verdict for verdict in verdicts}
    for field, number in opponents.items():
        for row in rows:
            verdict = by_opponent[number].get(row["prompt_id"])
            if verdict is not None:
                row[field] = verdict.p
                row["reason"] = row["reason"] or verdict.reason
    return rows


def _scores(context: Context, answers: Answers) -> list[Score]:
    items = [(prompt, [response]) for prompt, response in answers]
    with _shown(context, len(items)) as on_share:
        labels = context.make_labeller(True).label(
            items, purpose=_purpose(context), on_share=on_share
        )
    return [label.scores[0] for label in labels if label.scores is not None]


@contextmanager
def _shown(context: Context, total: int) -> Iterator[Callable[[float], None] | None]:
    """A bar of its own for a judge that takes its time; what is called directly takes none."""
    if context.make_labeller(True).mode == "inline":
        yield None
        return
    with context.progress.stage("judge", total=total, unit="answers") as bar:
        yield lambda share: bar.set(int(share * total))
        bar.set(total)


def _scored_answers(context: Context, number: int) -> dict[str, Row]:
    """An earlier evaluation's answers with their scores by the judge of today.

    Where that was another judge, or had other options, the stored answers are scored again, once
    for all rounds of this judge: two judges' scores do not compare.
    """
    rows = _answers(context, number)
    facts = _judge_facts(context)
    evaluation = context.run.round(number).manifest("evaluation")
    if evaluation.get("judge") == facts:
        return rows
    name = f"rescored/round-{number:03d}-{sha256_text(json.dumps(facts, sort_keys=True))[:16]}"
    inputs = {"evaluation": evaluation["sha256"]}
    holder = _holder(context, name, inputs) or context.round
    if holder is context.round and not holder.has(name):
        _rescore(context, rows, name, inputs=inputs, facts=facts)
    scores = {r["prompt_id"]: r for r in read_table(holder.verify(name) / "rescored.parquet")}
    return {prompt_id: {**row, **scores[prompt_id]} for prompt_id, row in rows.items()}


def _holder(context: Context, name: str, inputs: Mapping[str, str]) -> RoundDir | None:
    """The round so far that holds these scores, of these very answers."""
    rounds = map(context.run.round, range(context.round.number, 0, -1))
    held = (r for r in rounds if r.has(name) and r.manifest(name)["inputs"] == inputs)
    return next(held, None)


def _rescore(
    context: Context, rows: Mapping[str, Row], name: str, *, inputs: Mapping[str, str], facts: Row
) -> None:
    """Commit the scores that the judge of today gives to an earlier evaluation's answers."""
    prompts = context.load_prompts().by_id
    scores = _scores(context, [(prompts[i], response_from_answer(r)) for i, r in rows.items()])
    table = [
        {"prompt_id": prompt_id, "score": score.value, "reason": score.reason}
        for prompt_id, score in zip(rows, scores, strict=True)
    ]
    with context.round.commit(name, inputs=inputs) as draft:
        write_table(draft.path / "rescored.parquet", "rescored", table)
        draft.rows = len(table)
        draft.facts = {"judge": facts}


def _judge_facts(context: Context) -> dict[str, Any]:
    """What scores depend on: the judge, its version, its options."""
    options = json.dumps(context.config.eval_judge.options, sort_keys=True)
    identity = context.make_labeller(True).identity
    return {**identity, "options_sha256": sha256_text(options)}


def _purpose(context: Context) -> str:
    return f"evaluation-{context.round.number:03d}"


def _answers(context: Context, number: int) -> dict[str, Row]:
    table = context.run.round(number).verify("evaluation") / "answers.parquet"
    return {row["prompt_id"]: row for row in read_table(table)}


def _win(row: Row, opponents: dict[str, Row]) -> float | None:
    other = opponents.get(row["prompt_id"])
    if other is None or row["score"] is None or other["score"] is None:
        return None
    return win(row["score"], other["score"])


def _row(prompt: Prompt, response: Response) -> Row:
    return {
        "prompt_id": prompt.id,
        "prompt_source": prompt.source,
        "response_id": response.id,
        "prompt_text": prompt.content,
        "text": response.text,
        "token_ids": list(response.token_ids),
        "finish_reason": response.finish_reason,
        "score": None,
        "reason": None,
        "p_previous": None,
        "p_policy0": None,
    }


def _drifts(context: Context, policy: ModelRef, answers: Answers) -> dict[str, Drift | None]:
    """From the round's reference and from policy 0, on samples of the policy at temperature 1."""
    if context.plan is None:
        return {"kl_reference": None, "kl_policy0": None}
    if context.config.evaluation.temperature != 1.0:
        answers = _answer(context, policy, temperature=1.0)
    origin = policy_zero(context.run.round(0))
    reference = context.plan.reference
    own = _score(context, policy, answers)
    of_reference = _score(context, reference, answers)
    of_origin = of_reference if origin == reference else _score(context, origin, answers)
    return {"kl_reference": Drift(own, of_reference), "kl_policy0": Drift(own, of_origin)}


def _score(context: Context, model: ModelRef, answers: Answers) -> list[list[float]]:
    result = context.crew.trainer().call(
        "score",
        model=context.model_params(model),
        sequences=[
            {"prompt": list(p.token_ids), "response": list(r.token_ids)} for p, r in answers
        ],
    )
    logps: list[list[float]] = result["logps"]
    return logps
