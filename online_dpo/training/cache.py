"""The models that a trainer keeps in memory, each known by the hash of its folder."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from online_dpo.models.loading import enable_gradient_checkpointing, load_model
from online_dpo.training.logprobs import LogProbModel, Precision
from online_dpo.training.sharding import load_sharded

SMALL_BYTES = 200_000_000
"""On a CPU, models below this (50M float32 parameters) stay in memory beside the policy."""

NUM_SMALL = 2
"""How many of these: the reference and policy 0."""


class ModelCache:
    """One model of any size, the policy; on a CPU a few small ones beside it.

    Weights are float32 in memory whatever their folder holds.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        attention: str,
        precision: Precision,
        trust_remote_code: bool,
        gradient_checkpointing: bool,
        activation_offload: bool,
        mesh: DeviceMesh | None = None,
    ) -> None:
        """With a mesh, every model is sharded over its processes, which make the same calls."""
        self.device = device
        self.attention = attention
        self.precision = precision
        self.trust_remote_code = trust_remote_code
        self.gradient_checkpointing = gradient_checkpointing
        self.activation_offload = activation_offload
        self.mesh = mesh
        self._policy: LogProbModel | None = None
        self._policy_sha256: str | None = None
        self._small: dict[str, LogProbModel] = {}

    def get(self, folder: Path, sha256: str) -> LogProbModel:
        """The model of this hash, to score with. Loads it where it is not in memory."""
        if sha256 == self._policy_sha256 and self._policy is not None:
            return self._policy.to(self.device)
        if sha256 in self._small:
            self._small[sha256] = self._small.pop(sha256)  # the latest used is the last to go
            return self._small[sha256]
        if self.mesh is None and self.device.type == "cpu" and _weight_bytes(folder) < SMALL_BYTES:
            while len(self._small) >= NUM_SMALL:
                del self._small[next(iter(self._small))]
            self._small[sha256] = self._load(folder)
            return self._small[sha256]
        self._drop_policy()
        self._policy, self._policy_sha256 = self._load(folder), sha256
        return self._policy

    def take(self, folder: Path, sha256: str) -> LogProbModel:
        """The model of this hash, to train in place: no hash names it until `adopt`."""
        if sha256 != self._policy_sha256 or self._policy is None:
            self._drop_policy()
            small = self._small.get(sha256)
            self._policy = self._load(folder) if small is None else copy.deepcopy(small)
        self._policy_sha256 = None
        if self.gradient_checkpointing:
            enable_gradient_checkpointing(self._policy.model, offload=self.activation_offload)
        return self._policy.to(self.device)

    def load(self, folder: Path) -> LogProbModel:
        """A model of the caller's own, whatever is in memory."""
        return self._load(folder)

    def adopt(self, sha256: str) -> None:
        """Name the model trained last by the hash that its saved folder got."""
        self._policy_sha256 = sha256

    def release(self) -> None:
        """Free the device: the policy moves to the CPU's memory, the others are dropped."""
        self._small.clear()
        if self._policy is not None:
            self._policy.to("cpu")
        _collect()

    def clear(self) -> None:
        """Drop every model."""
        self._small.clear()
        self._drop_policy()

    def _drop_policy(self) -> None:
        if self._policy is not None:
            self._policy = self._policy_sha256 = None
            _collect()

    def _load(self, folder: Path) -> LogProbModel:
        if self.mesh is not None:
            return load_sharded(
                folder,
                mesh=self.mesh,
                attention=self.attention,
                trust_remote_code=self.trust_remote_code,
                precision=self.precision,
            )
        model = load_model(
            folder,
            attention=self.attention,
            trust_remote_code=self.trust_remote_code,
            device=str(self.device),
        )
        return LogProbModel(model, precision=self.precision, rounds=not self.gradient_checkpointing)


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _collect() -> None:
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
