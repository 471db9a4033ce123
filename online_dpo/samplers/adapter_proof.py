"""The proof that an engine takes a new adapter while it runs, and that nothing stays of the old."""

from __future__ import annotations

import math
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from online_dpo.models.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, write_base
from online_dpo.models.merging import A_SUFFIX, B_SUFFIX, merged_weights, read_updates
from online_dpo.models.pinning import base_folder
from online_dpo.records import ModelRef
from online_dpo.samplers.proof import Probed, difference
from online_dpo.samplers.weights import NOISE, stored_weights


class TakesAdapters(Probed, Protocol):
    """An engine that is given another adapter while it runs."""

    def serve_adapter(self, folder: Path) -> None: ...


def prove_adapter(
    engine: TakesAdapters, folder: Path, *, trust_remote_code: bool = False
) -> str | None:
    """Give a running engine a strong adapter, compare with transformers; the problem, if any.

    It changes the layers that the adapter in `folder` changes. What a true one adds in its first
    steps is less than bfloat16's rounding, so that it could be missing unseen. The engine keeps the
    strong one; the canary of the true one, which comes next, then shows that it went.
    """
    base = base_folder(folder)
    with tempfile.TemporaryDirectory(prefix="online-dpo-") as name:
        strong = Path(name)
        _write_strong_adapter(folder, strong)
        return difference(
            engine,
            base,
            merged_weights(strong),
            lambda: engine.serve_adapter(strong),
            trust_remote_code=trust_remote_code,
        )


def _write_strong_adapter(folder: Path, out: Path) -> None:
    """The adapter in `folder` with other weights: each update a quarter of its weight's size."""
    shutil.copyfile(folder / ADAPTER_CONFIG, out / ADAPTER_CONFIG)
    write_base(out, ModelRef(str(base_folder(folder)), ""))
    updates = read_updates(folder)
    tensors: dict[str, Tensor] = {}
    for name, weight in stored_weights(base_folder(folder)):
        if name not in updates:
            continue
        update = updates[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        size = NOISE * float(weight.float().square().mean().sqrt())
        size /= update.scale * math.sqrt(update.a.shape[0])
        layer = PREFIX + name.removesuffix(".weight")
        tensors[layer + A_SUFFIX] = torch.randn(update.a.shape, generator=generator)
        tensors[layer + B_SUFFIX] = size * torch.randn(update.b.shape, generator=generator)
    save_file(tensors, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
