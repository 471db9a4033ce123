"""Step checkpoints and carried optimizer states: safetensors and JSON, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from online_dpo.errors import CorruptError, DriftError
from online_dpo.training.optimizers import empty_state, put_step_count, state_tensors
from online_dpo.training.sharding import gather, local, local_rows, named_tensors

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
METRICS_FILE = "metrics.jsonl"


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
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    *,
    write: bool,
) -> None:
    """Write the full float32 state; the folder is new, and whoever asked for it commits it.

    Every process of a sharded model calls this, and one of them writes.
    """
    weights = gather(_changing(model), keep=write)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / MODEL_FILE)
    del weights
    save_optimizer(folder, model, optimizer, write=write)
    if not write:
        return
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
    _read_into(dict(_changing(model)), folder / MODEL_FILE)
    load_optimizer(folder, model, optimizer)
    lines = (folder / METRICS_FILE).read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    return Progress(state["step"], state["cursor"], state["epoch"], recorded, metrics)


def save_optimizer(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, write: bool
) -> None:
    """Write AdamW's moments and step counts by parameter name.

    Every process of a sharded model calls this, and one of them writes.
    """
    state = (
        (f"{name}.{part}", tensor)
        for name, parameter in model.named_parameters()
        for part, tensor in state_tensors(optimizer, parameter).items()
    )
    tensors = gather(state, keep=write)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / OPTIMIZER_FILE)


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The inverse of `save_optimizer`; a process of a sharded model reads its own rows alone.

    Raises CorruptError where it is another model's state.
    """
    states = {
        name: (parameter, empty_state(optimizer, parameter))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    tensors = {
        f"{name}.{part}": t for name, (_, state) in states.items() for part, t in state.items()
    }
    _read_into(tensors, folder / OPTIMIZER_FILE)
    for parameter, state in states.values():
        put_step_count(optimizer, parameter, state)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _changing(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What training may change: not the frozen weights under an adapter."""
    return [
        (name, tensor)
        for name, tensor in named_tensors(model)
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    ]


def _read_into(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Fill tensors from a file that holds these and no others; of a sharded one its rows here."""
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        if tensors.keys() != names:
            odd = min(tensors.keys() ^ names)
            raise CorruptError(
                f"{path} belongs to another model or optimizer: {odd} is on one side only."
            )
        for name, tensor in tensors.items():
            stored = file.get_slice(name)
            if stored.get_shape() != list(tensor.shape):
                raise CorruptError(
                    f"{path} belongs to another model: {name} has the shape {stored.get_shape()}, "
                    f"here {list(tensor.shape)}."
                )
            rows = file.get_tensor(name) if tensor.ndim == 0 else stored[local_rows(tensor)]
            local(tensor).copy_(rows)
