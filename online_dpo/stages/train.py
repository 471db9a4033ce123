"""Stage 4: the reference scores what is trained on once, then a round makes the next policy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from online_dpo.files import read_json
from online_dpo.loss_rules import needs_reference
from online_dpo.models.adapter_files import path_from
from online_dpo.records import ModelRef, to_dict
from online_dpo.stages.canary import write_canary
from online_dpo.stages.context import Context, trained_on
from online_dpo.store import Draft

Commit = Callable[[Context, Draft, dict[str, Any], dict[str, str]], None]
"""Makes a trained policy's draft final, given the trainer's summary and the inputs' hashes."""


FROM_SAMPLER = ("pairs_from_sampler", "pairs_checked", "sampled_")
"""What begins the names of figures that `reference.logps: sampled` adds."""


def train(context: Context) -> None:
    """Commit `reference/`, `policy/` (and `optimizer/` where it is carried) and `canary/`."""
    score_reference(context)
    if not context.round.has("policy"):
        train_policy(context)
    for checkpoint in context.round.children("checkpoints"):
        context.round.remove(checkpoint)
    context.round.remove("checkpoints")
    write_canary(context, context.round.ref("policy"))


def latest_checkpoint(context: Context) -> str | None:
    """The committed step checkpoint with the most steps, by its manifest, after its hashes held."""
    names = context.round.children("checkpoints")
    if not names:
        return None
    name = max(names, key=lambda n: int(context.round.manifest(n)["step"]))
    context.round.verify(name)
    return name


def checkpoint_listener(context: Context, bar: Any, inputs: dict[str, str]) -> Any:
    """Commits step checkpoints as the trainer finishes them and shows its steps."""
    number = context.round.number

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            bar.set(int(event["step"]), total=int(event["of"]))
            if event.get("seconds"):
                rate = event["tokens"] / event["seconds"]
                context.run.event("step", round=number, step=event["step"], tokens_per_s=rate)
        elif event["event"] == "checkpoint":
            commit_checkpoint(context, Path(event["path"]), int(event["step"]), inputs)

    return listen


def commit_checkpoint(context: Context, path: Path, step: int, inputs: dict[str, str]) -> None:
    """Make a finished step checkpoint the one to resume from; the one before goes."""
    earlier = context.round.children("checkpoints")
    name = f"checkpoints/step-{step:06d}"
    context.round.finish(name, Draft(path, facts={"step": step}), inputs=inputs)
    for old in earlier:
        if old != name:
            context.round.remove(old)


def score_reference(context: Context) -> None:
    """Commit `reference/`: its log-probs of the round's responses, where the loss asks for them.

    A reference that moves is scored in every step instead.
    """
    config = context.config.train
    moves = config.reference_update is not None
    if context.round.has("reference") or moves or not needs_reference(config.loss):
        return
    plan = context.inputs
    sampled = context.config.reference.logps == "sampled"
    name = trained_on(context.round)
    table = context.round.verify(name) / f"{name}.parquet"
    inputs = {name: context.round.manifest(name)["sha256"], "model": plan.reference.sha256}
    with (
        context.working("train"),
        context.round.commit("reference", inputs=inputs) as draft,
    ):
        result = context.crew.trainer().call(
            "score_reference",
            model=context.model_params(plan.reference),
            pairs=str(table),
            out=str(draft.path / "logps.parquet"),
            sampled=sampled and plan.reference == plan.policy,
        )
        text = json.dumps(result, indent=2, sort_keys=True) + "\n"
        (draft.path / "metrics.json").write_text(text)
        draft.rows = result[name]


def train_policy(context: Context, *, commit: Commit | None = None) -> None:
    """Train on `pairs/` or `unpaired/`, and `reference/`, from the last step checkpoint.

    `commit` ends it; without one the policy is committed as a campaign has it.
    """
    plan, config = context.inputs, context.config
    name = trained_on(context.round)
    carry = config.train.optimizer == "carry"
    inputs = {
        "policy": plan.policy.sha256,
        name: context.round.manifest(name)["sha256"],
    }
    reference = None
    moving = plan.reference if config.train.reference_update is not None else None
    if moving is not None:
        inputs["reference"] = moving.sha256
    elif needs_reference(config.train.loss):
        inputs["reference"] = context.round.manifest("reference")["sha256"]
        reference = str(context.round.verify("reference") / "logps.parquet")
    if plan.optimizer is not None:
        inputs["optimizer"] = plan.optimizer.sha256
    checkpoint = latest_checkpoint(context)
    policy = context.round.begin("policy")
    optimizer = context.round.begin("optimizer") if carry else None
    with (
        context.progress.stage("train", total=0, unit="steps") as bar,
        context.working("train"),
    ):
        result = context.crew.trainer().call(
            "dpo",
            on_event=checkpoint_listener(context, bar, inputs),
            model=context.model_params(plan.policy),
            pairs=str(context.round.verify(name) / f"{name}.parquet"),
            reference_logps=reference,
            reference=None if moving is None else context.model_params(moving),
            plan={
                "beta": plan.beta,
                "learning_rate": plan.learning_rate,
                "seed": plan.seed,
                "round": plan.round,
                "rounds": plan.rounds,
                "optimizer_step": plan.optimizer_step,
            },
            optimizer=_optimizer_folder(context, plan.optimizer),
            out=str(policy.path),
            base=_base(context, policy.path),
            optimizer_out=None if optimizer is None else str(optimizer.path),
            checkpoints=str(context.round.path / "checkpoints"),
            resume_from=None if checkpoint is None else str(context.round.path / checkpoint),
            soft_labels=config.pairs.labels == "soft",
        )
    result |= _from_sampler(context)
    if optimizer is not None:
        optimizer.facts = {"optimizer_step": result["optimizer_step"]}
        context.round.finish("optimizer", optimizer, inputs=inputs)
    (commit or commit_training)(context, policy, result, inputs)


def commit_training(
    context: Context, policy: Draft, result: dict[str, Any], inputs: dict[str, str]
) -> None:
    """Commit `training/` (the steps' metrics, kept when a policy is pruned), then `policy/`."""
    with context.round.commit("training", inputs=inputs) as training:
        steps = policy.path / "train_metrics.jsonl"
        (training.path / "steps.jsonl").write_bytes(steps.read_bytes())
        text = json.dumps(result, indent=2, sort_keys=True) + "\n"
        (training.path / "metrics.json").write_text(text)
        training.rows = result["steps"]
    for name in ("train_metrics.jsonl", "summary.json"):
        (policy.path / name).unlink(missing_ok=True)
    policy.facts = {"made_with": context.crew.facts}
    context.round.finish("policy", policy, inputs=inputs)
    context.crew.trainer().call("adopt", sha256=context.round.manifest("policy")["sha256"])


def _base(context: Context, out: Path) -> dict[str, str] | None:
    """How the adapter in `out` is to name its base; inside the run by the way from there."""
    if context.config.train.lora is None:
        return None
    base = context.base(context.inputs.policy)
    inside = base.path.startswith("rounds/")
    path = path_from(out, context.run.resolve(base.path)) if inside else base.path
    return to_dict(ModelRef(path, base.sha256))


def _from_sampler(context: Context) -> dict[str, Any]:
    """How many pairs have the sampler's log-probs as the reference's, and how far off they are."""
    if not context.round.has("reference"):
        return {}
    scored = read_json(context.round.verify("reference") / "metrics.json")
    return {key: value for key, value in scored.items() if key.startswith(FROM_SAMPLER)}


def _optimizer_folder(context: Context, optimizer: ModelRef | None) -> str | None:
    if optimizer is None:
        return None
    number = int(Path(optimizer.path).parts[1])
    return str(context.run.round(number).verify("optimizer"))
