"""The trainer's models under LoRA: one frozen base, and the adapter that is wanted in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from online_dpo.models.adapter_files import base_of, is_adapter
from online_dpo.models.loading import Dtype, enable_gradient_checkpointing, load_model
from online_dpo.models.lora import AdaptedModel, lora_config
from online_dpo.models.pinning import base_folder
from online_dpo.records import ModelRef
from online_dpo.training.logprobs import LogProbModel, Precision


class AdapterCache:
    """Policy and reference are the same weights with another adapter, or with none (policy 0).

    The base stays on the device in `dtype` or in 4 bits; to exchange adapters takes milliseconds.
    """

    def __init__(
        self,
        lora: Mapping[str, Any],
        *,
        device: torch.device,
        dtype: Dtype,
        attention: str,
        precision: Precision,
        trust_remote_code: bool,
        gradient_checkpointing: bool,
        activation_offload: bool,
    ) -> None:
        """`lora`: the fields of AdapterConfig."""
        self.lora = lora
        self.device = device
        self.precision = precision
        self.gradient_checkpointing = gradient_checkpointing
        self.activation_offload = activation_offload
        self._how: dict[str, Any] = {
            "dtype": dtype,
            "attention": attention,
            "trust_remote_code": trust_remote_code,
            "device": str(device),
            "quantize": lora["quantization"] == "nf4",
        }
        self._model: LogProbModel | None = None
        self._adapted: AdaptedModel | None = None
        self._base: Path | None = None
        self._base_sha256: str | None = None
        self._adapter_sha256: str | None = None

    @property
    def adapted(self) -> AdaptedModel:
        """The base with its adapter, once a model was asked for."""
        assert self._adapted is not None
        return self._adapted

    def get(self, folder: Path, sha256: str) -> LogProbModel:
        """The model of this hash, to score with: an adapter's folder, or a whole model's."""
        if sha256 == self._adapter_sha256:
            self.adapted.switch(on=True)
        elif sha256 == self._base_sha256 or not is_adapter(folder):
            self._hold(folder, sha256)
            self.adapted.switch(on=False)
        else:
            self._hold(base_folder(folder), base_of(folder).sha256)
            self.adapted.load(folder)
            self._adapter_sha256 = sha256
        self.adapted.set_dropout(on=False)
        assert self._model is not None
        return self._model.to(self.device)

    def take(self, folder: Path, sha256: str, *, seed: int) -> LogProbModel:
        """The model of this hash, to train its adapter: no hash names it until `adopt`.

        A whole model gets a new adapter, drawn from `seed`.
        """
        model = self.get(folder, sha256)
        if sha256 == self._base_sha256:
            self.adapted.reset(seed)
        self._adapter_sha256 = None
        self.adapted.set_dropout(on=True)
        if self.gradient_checkpointing:
            enable_gradient_checkpointing(model.model, offload=self.activation_offload)
        return model

    def adopt(self, sha256: str) -> None:
        """Name the adapter trained last by the hash that its saved folder got."""
        self._adapter_sha256 = sha256

    def save(self, out: Path, base: ModelRef | None) -> None:
        """Write the adapter. `base` is how it names its base; None names the place it came from."""
        assert self._base is not None and self._base_sha256 is not None
        given = ModelRef(str(self._base.absolute()), self._base_sha256)
        self.adapted.save(out, base or given, self._base)

    def release(self) -> None:
        """Free the device: the base moves to the CPU's memory."""
        if self._model is not None and self.device.type != "cpu":
            self._model.to("cpu")
            torch.cuda.empty_cache()

    def clear(self) -> None:
        """Drop everything."""
        self._model = self._adapted = None
        self._base = self._base_sha256 = self._adapter_sha256 = None
        if self.device.type != "cpu":
            torch.cuda.empty_cache()

    def _hold(self, base: Path, sha256: str) -> None:
        """Have this base in memory."""
        if sha256 == self._base_sha256:
            return
        self.clear()
        model = load_model(base, **self._how)
        self._model = LogProbModel(
            model, precision=self.precision, rounds=not self.gradient_checkpointing
        )
        self._adapted = AdaptedModel(model, lora_config(self.lora))
        self._base, self._base_sha256 = base, sha256
