"""Step checkpoints and carried optimizer states: safetensors and JSON, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from online_dpo.errors import CorruptError, DriftError

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
METRICS_FILE = "metrics.jsonl"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training run stands: optimizer steps taken, samples seen, metrics of every step.

    `settings` is what the run must have in common with the one that goes on from here.
    """

    step: int
    cursor: int
    epoch: int
    settings: Mapping[str, Any]
    metrics: list[dict[str, Any]]


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write the full float32 state; the folder is new, and whoever asked for it commits it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_weights(model), folder / MODEL_FILE)
    save_optimizer(folder, model, optimizer)
    state = {
        "step": progress.step,
        "cursor": progress.cursor,
        "epoch": progress.epoch,
        "settings": dict(progress.settings),
    }
    (folder / STATE_FILE).write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")
    write_jsonl(folder / METRICS_FILE, progress.metrics)


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    settings: Mapping[str, Any],
) -> Progress:
    """Put the weights and the optimizer's state in place.

    Raises DriftError where the checkpoint belongs to a run with other settings or data,
    CorruptError where its tensors are not those of the model.
    """
    state = json.loads((folder / STATE_FILE).read_text())
    recorded = state["settings"]
    # Through JSON, as the recorded ones went: tuples are lists there.
    current = json.loads(json.dumps(dict(settings)))
    if recorded != current:
        changed = sorted(k for k in {*recorded, *current} if recorded.get(k) != current.get(k))
        raise DriftError(
            f"The checkpoint {folder} was made with other settings: "
            + "; ".join(f"{k} was {recorded.get(k)}, is {current.get(k)}" for k in changed)
        )
    weights = _weights(model)
    _copy_into(weights, load_file(folder / MODEL_FILE), folder / MODEL_FILE)
    load_optimizer(folder, model, optimizer)
    lines = (folder / METRICS_FILE).read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    return Progress(state["step"], state["cursor"], state["epoch"], recorded, metrics)


def save_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write AdamW's moments and step counts by parameter name."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{moment}": optimizer.state[parameter][moment].detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in MOMENTS
    }
    save_file(tensors, folder / OPTIMIZER_FILE)


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The inverse of `save_optimizer`. Raises CorruptError where it is another model's state."""
    tensors = load_file(folder / OPTIMIZER_FILE)
    for name, parameter in model.named_parameters():
        state = {moment: tensors.pop(f"{name}.{moment}", None) for moment in MOMENTS}
        exp_avg = state["exp_avg"]
        if exp_avg is None or exp_avg.shape != parameter.shape:
            raise CorruptError(
                f"{folder / OPTIMIZER_FILE} holds no state of the right shape for {name}: it "
                "belongs to another model."
            )
        optimizer.state[parameter] = {
            moment: value.to(parameter.device)
            for moment, value in state.items()
            if value is not None
        }
    if tensors:
        raise CorruptError(
            f"{folder / OPTIMIZER_FILE} holds {min(tensors)}, which the model does not have."
        )


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name; a tied one appears once."""
    saved = model.state_dict()
    named = [*model.named_parameters(), *(b for b in model.named_buffers() if b[0] in saved)]
    return {name: tensor.detach() for name, tensor in named}


def _copy_into(weights: Mapping[str, Tensor], loaded: Mapping[str, Tensor], path: Path) -> None:
    if weights.keys() != loaded.keys():
        odd = min(weights.keys() ^ loaded.keys())
        raise CorruptError(f"{path} does not hold the model's weights: {odd} is on one side only.")
    for name, weight in weights.items():
        weight.copy_(loaded[name])
