"""How much disk a campaign's weights still need, by arithmetic on its config and what is there."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from online_dpo.config import Config, ModelInit
from online_dpo.errors import DiskError
from online_dpo.store import RunDir

CHECKPOINT_BYTES, OPTIMIZER_BYTES = 12, 8
"""Bytes a parameter of a step checkpoint (weights and two moments) and of a carried optimizer."""


def check_space(run: RunDir, config: Config) -> None:
    """Raise DiskError where the weights to come cannot fit on the disk as it is."""
    needed, free = still_needed(run, config), shutil.disk_usage(run.path).free
    if needed > free:
        raise DiskError(f"The disk is too small. {describe(run, config)}")


def describe(run: RunDir, config: Config) -> str:
    """What is still needed, where, and what there is of it."""
    needed, free = still_needed(run, config), shutil.disk_usage(run.path).free
    return (
        f"The weights that {run.path} has yet to write need about {needed / 1e6:,.1f} MB; "
        f"{free / 1e6:,.1f} MB are free there."
    )


def is_full(error: DiskError) -> bool:
    """Whether a disk without space is the fault; a worker's error reaches us as its message."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return any(os.strerror(number) in error.message for number in full)


def still_needed(run: RunDir, config: Config) -> int:
    """Bytes of the policies that will be kept, a step checkpoint and a carried optimizer, less what
    there is. Samples, labels and an adapter's weights, which are small beside them, are left out.
    """
    parameters = _num_parameters(config)
    if parameters == 0 or config.train.lora is not None:
        return 0
    policy = parameters * (2 if config.model.dtype == "bfloat16" else 4)
    total = config.campaign.rounds
    left = total - sum(r.finished for r in run.rounds()) + 1
    ahead = _num_kept(config, min(left, total)) if left else 0
    made = {"model": config.model.init is not None, "policy": config.sft is not None}
    origin = sum(wanted and not run.round(0).has(name) for name, wanted in made.items())
    now = run.rounds()[-1] if run.rounds() else run.round(0)
    under_way = 0
    if ahead and config.train.checkpoint_every and not now.children("checkpoints"):
        under_way = CHECKPOINT_BYTES * parameters
    carried = OPTIMIZER_BYTES * parameters if ahead and config.train.optimizer == "carry" else 0
    done = policy if ahead and now.number > 0 and not now.finished and now.has("policy") else 0
    return (ahead + origin) * policy + under_way + carried - done


def _num_kept(config: Config, rounds: int) -> int:
    """Of so many policies to come, how many stay on the disk at once."""
    retention = config.campaign.retention
    if isinstance(retention, dict):
        return min(rounds, retention["last"] + 1)
    if retention == "promoted" and config.reference.promote == "never":
        return min(rounds, 2)
    return max(1, rounds // config.campaign.save_policy_every) if rounds else 0


def _num_parameters(config: Config) -> int:
    """Of the model by its settings, or by its weight files; 0 where these are not here yet."""
    if config.model.init is not None:
        return _of_init(config.model.init)
    folder = Path(config.model.path or "")
    files: Iterable[Path] = folder.glob("*.safetensors") if folder.is_dir() else ()
    return sum(_in_file(file) for file in files)


def _in_file(path: Path) -> int:
    """The parameters of a safetensors file, by the shapes in its header; 0 where it has none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return 0
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return 0
    tensors = (entry for name, entry in header.items() if name != "__metadata__")
    return sum(math.prod(entry["shape"]) for entry in tensors)


def _of_init(init: ModelInit) -> int:
    """The matrices of a Llama without biases, the embeddings counted twice where they are apart."""
    layer = 4 * init.hidden_size**2 + 3 * init.hidden_size * init.intermediate_size
    return init.vocab_size * init.hidden_size + init.num_layers * layer
