"""The optimizer loop that SFT and DPO share: exact averages, clipping, schedule, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from online_dpo.training.batching import Step, deal, plan_steps
from online_dpo.training.checkpoints import (
    Progress,
    load_checkpoint,
    load_optimizer,
    save_checkpoint,
)
from online_dpo.training.coupling import couple
from online_dpo.training.divergence import diverged
from online_dpo.training.learning_rate import lr_multiplier
from online_dpo.training.logprobs import LogProbModel
from online_dpo.training.objective import Emit, LoopSettings, Objective
from online_dpo.training.optimizers import make_optimizer
from online_dpo.training.packing import Pack
from online_dpo.training.sharding import clip_gradients, gradient_norm, sync_gradients
from online_dpo.training.vocabulary import PartLoss

if TYPE_CHECKING:
    from accelerate import Accelerator

    from online_dpo.training.moving_reference import MovingReference

CLIP_EPS = 1e-6
"""What torch adds to a norm before it divides by it; below the limit by this, nothing is scaled."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run: metrics of every step, and the optimizer with its state."""

    metrics: list[dict[str, Any]]
    optimizer: torch.optim.Optimizer
    steps: int


def train(
    model: LogProbModel,
    objective: Objective,
    settings: LoopSettings,
    *,
    accelerator: Accelerator,
    emit: Emit,
    checkpoints: Path,
    resume_from: Path | None = None,
    optimizer_from: Path | None = None,
    moving: MovingReference | None = None,
) -> Trained:
    """Train `model` in place, against a reference that moves with it where one is given.

    The gradient of a step is that of the mean over the step's items, however these are divided into
    micro-batches and processes. Raises DivergedError before a step that is not finite.
    """
    steps = plan_steps(
        len(objective.sizes),
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        seed=settings.seed,
    )
    if isinstance(model, FSDPModule):
        model.reshard()  # Scoring leaves some weights whole, which is not what is trained.
    inner = make_optimizer(
        model.model,
        learning_rate=settings.learning_rate,
        betas=settings.adam_betas,
        weight_decay=settings.weight_decay,
        moments=settings.adam_moments,
    )
    inner.register_step_post_hook(lambda *_: model.rounded.forget())
    same = _must_agree(objective, settings) | (moving.settings if moving is not None else {})
    if isinstance(model, FSDPModule):
        wrapped, optimizer = model, inner
    else:
        # Before a state is loaded: what Accelerate moves about would not be the optimizer's own.
        wrapped, optimizer = accelerator.prepare(model, inner)
    metrics: list[dict[str, Any]] = []
    taken = 0
    if resume_from is not None:
        progress = load_checkpoint(resume_from, model.model, inner, settings=same)
        metrics, taken = progress.metrics, progress.step
        assert steps[taken].cursor == progress.cursor
        if moving is not None:
            moving.load(resume_from)
    elif optimizer_from is not None:
        load_optimizer(optimizer_from, model.model, inner)
    try:
        for number, step in enumerate(steps[taken:], start=taken + 1):
            rate = settings.learning_rate * lr_multiplier(
                settings.stretch * len(steps) + number - 1,
                steps=settings.stretches * len(steps),
                warmup=settings.warmup,
                schedule=settings.schedule,
            )
            # What dropout there is draws from the seed and the step alone, resumed or not.
            torch.manual_seed(_step_seed(settings.seed, number, accelerator.process_index))
            if moving is not None:
                moving.before_step(step.items)
            row = _take_step(
                wrapped, model.pack, optimizer, objective, step, settings, accelerator, number, rate
            )
            if moving is not None:
                moving.after_step(number, model.model)
            metrics.append({"step": number, **row})
            first = accelerator.is_main_process
            if first:
                tokens = sum(objective.sizes[item].tokens for item in step.items)
                event = {"step": number, "of": len(steps), "metrics": row, "tokens": tokens}
                emit({"event": "step", **event})
            if number < len(steps) and _checkpoint_due(number, settings):
                folder = checkpoints / f"step-{number:06d}.partial"
                following = steps[number]
                progress = Progress(number, following.cursor, following.epoch, same, metrics)
                save_checkpoint(folder, model.model, inner, progress, write=first)
                if first:
                    if moving is not None:
                        moving.save(folder)
                    emit({"event": "checkpoint", "path": str(folder), "step": number})
    finally:
        # Accelerate holds on to what it prepared; its own way to let go collects garbage for 0.1 s.
        accelerator._models.clear()
        accelerator._optimizers.clear()
    return Trained(metrics, inner, len(steps))


def _take_step(
    model: nn.Module,
    pack: Pack,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    step: Step,
    settings: LoopSettings,
    accelerator: Accelerator,
    number: int,
    learning_rate: float,
) -> dict[str, float]:
    """One optimizer step; returns the means of its metrics. The device is waited for once."""
    batches = deal(
        step.items,
        objective.sizes,
        tokens=settings.micro_batch_tokens,
        most=settings.micro_batch_size,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    total = sum(objective.weights[item] for item in step.items)
    sums: dict[str, Tensor] = {}
    terms: PartLoss = objective.terms
    if objective.coupled:
        terms, sums = couple(model, pack, objective, step.items, batches, accelerator)
    for index, micro in enumerate(batches):
        last = index == len(batches) - 1
        with sync_gradients(model, accelerator, last=last, every=settings.gradient_sync):
            batch = pack(micro.items, [objective.sequences(item) for item in micro.items])
            loss, metrics = model(batch, terms, squares=objective.needs_squares)
            # Data parallelism averages over processes; the mean wanted is over the step's items.
            scale = accelerator.num_processes / total if micro.real else 0.0
            accelerator.backward(loss * scale)
        if objective.coupled:
            continue  # its figures are those of the step
        for name, value in {"loss": loss.detach(), **metrics}.items():
            counted = value.double() * micro.real
            sums[name] = sums[name] + counted if name in sums else counted
    grad_norm = gradient_norm(model)
    means = {**_means(sums, total, grad_norm, accelerator), "learning_rate": learning_rate}
    if not (math.isfinite(means["loss"]) and math.isfinite(means["grad_norm"])):
        optimizer.zero_grad()
        raise diverged(number, means, model, pack, objective, step.items, accelerator)
    if means["grad_norm"] + CLIP_EPS > settings.max_grad_norm:
        clip_gradients(model, settings.max_grad_norm, grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return means


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def _checkpoint_due(number: int, settings: LoopSettings) -> bool:
    every = settings.checkpoint_every
    return every > 0 and number % every == 0


def _means(
    sums: Mapping[str, Tensor], total: int, grad_norm: Tensor, accelerator: Accelerator
) -> dict[str, float]:
    """Means over the step's items from one process's sums, and the norm, which all share."""
    reduced = accelerator.reduce(torch.stack(list(sums.values())), reduction="sum") / total
    values = torch.cat([reduced, grad_norm.detach().to(reduced)[None]]).tolist()
    return dict(zip([*sums, "grad_norm"], values, strict=True))


def _must_agree(objective: Objective, settings: LoopSettings) -> dict[str, Any]:
    """What a resumed run shares with the one that wrote the checkpoint."""
    return {
        "data": objective.fingerprint,
        "num_items": len(objective.sizes),
        "learning_rate": settings.learning_rate,
        "schedule": settings.schedule,
        "warmup": settings.warmup,
        "batch_size": settings.batch_size,
        "epochs": settings.epochs,
        "weight_decay": settings.weight_decay,
        "adam_betas": settings.adam_betas,
        "adam_moments": settings.adam_moments,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "stretch": settings.stretch,
        "stretches": settings.stretches,
    }
