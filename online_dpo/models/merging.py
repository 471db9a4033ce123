"""An adapter's update added into its base's weights: W + scale B A, in float32."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from online_dpo.errors import CorruptError
from online_dpo.files import read_json, remove_tree
from online_dpo.models.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_FILE, PREFIX
from online_dpo.models.loading import Dtype, copy_tokenizer, load_model, save_model
from online_dpo.models.pinning import base_folder
from online_dpo.samplers.weights import stored_weights

A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
"""How PEFT's files name the factors of a layer's update."""


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter adds to one weight (out, in): scale * B (out, r) @ A (r, in)."""

    a: Tensor
    b: Tensor
    scale: float

    def added_to(self, weight: Tensor) -> Tensor:
        """The sum, in the weight's type; computed in float32."""
        change = self.scale * (self.b.float() @ self.a.float())
        return (weight.float() + change.to(weight.device)).to(weight.dtype)


def read_updates(adapter: Path) -> dict[str, Update]:
    """The updates of the adapter in a folder, by the names of the base's weights."""
    scale = _scale(read_json(adapter / ADAPTER_CONFIG))
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    return {
        name.removeprefix(PREFIX).removesuffix(A_SUFFIX) + ".weight": Update(
            tensor, tensors[name.removesuffix(A_SUFFIX) + B_SUFFIX], scale
        )
        for name, tensor in tensors.items()
        if name.endswith(A_SUFFIX)
    }


def merged_weights(adapter: Path) -> Iterator[tuple[str, Tensor]]:
    """The base's stored tensors, one at a time, with the updates of the adapter in a folder added.

    Raises CorruptError where the base's files hold no weight that the adapter changes.
    """
    updates = read_updates(adapter)
    for name, tensor in stored_weights(base_folder(adapter)):
        update = updates.pop(name, None)
        yield name, tensor if update is None else update.added_to(tensor)
    _refuse_leftovers(adapter, updates)


@torch.no_grad()
def write_merged(
    adapter: Path, out: Path, *, dtype: Dtype, trust_remote_code: bool = False
) -> None:
    """Write the policy of an adapter's folder as a plain model with its tokenizer into `out`."""
    updates = read_updates(adapter)
    model = load_model(base_folder(adapter), trust_remote_code=trust_remote_code)
    for name, parameter in model.named_parameters():
        update = updates.pop(name, None)
        if update is not None:
            parameter.copy_(update.added_to(parameter))
    _refuse_leftovers(adapter, updates)
    save_model(model, out, dtype=dtype)
    copy_tokenizer(adapter, out, trust_remote_code=trust_remote_code)


def merge_in_place(
    folder: Path, *, dtype: Dtype, trust_remote_code: bool = False, keep_adapter: bool
) -> None:
    """Put the whole policy in the place of the adapter in `folder`; PEFT's files go to `adapter/`.

    Without `keep_adapter` they go.
    """
    whole = folder / "whole"
    write_merged(folder, whole, dtype=dtype, trust_remote_code=trust_remote_code)
    (folder / BASE_FILE).unlink()
    if keep_adapter:
        (folder / "adapter").mkdir()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if keep_adapter:
            (folder / name).rename(folder / "adapter" / name)
        else:
            (folder / name).unlink()
    for path in list(whole.iterdir()):
        remove_tree(folder / path.name)
        path.rename(folder / path.name)
    whole.rmdir()


def _scale(config: Mapping[str, Any]) -> float:
    rank = int(config["r"])
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config["use_rslora"] else rank)


def _refuse_leftovers(adapter: Path, updates: Mapping[str, Update]) -> None:
    if updates:
        raise CorruptError(
            f"{adapter} changes {min(updates)}, which its base in {base_folder(adapter)} does not "
            "hold under this name."
        )
