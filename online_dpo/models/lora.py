"""LoRA by PEFT: a frozen model with one adapter in it, which is exchanged and switched off."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from online_dpo.errors import ConfigError, CorruptError
from online_dpo.models.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, write_base
from online_dpo.models.generation_config import save_generation_config
from online_dpo.records import ModelRef

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedModel

_SLOT = "default"


class AdaptedModel:
    """A causal language model whose weights are frozen, with one adapter of float32 weights in it.

    The model is changed in place and keeps its class: only its adapted layers are wrapped.

    Raises ConfigError where it has no layer of a name that is asked for.
    """

    def __init__(self, model: PreTrainedModel, config: peft.LoraConfig) -> None:
        self.model = model
        self.config = config
        _inject(config, model)
        # PEFT gives adapters the type of the base's weights; small updates vanish in bfloat16.
        for parameter in self._parameters().values():
            parameter.data = parameter.data.float()

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """A new adapter, switched on: A drawn from `seed`, B zero, so that nothing changes yet."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self._parameters().items():
            values = torch.zeros(parameter.shape)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
            parameter.copy_(values)
        self.switch(on=True)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take the weights of the adapter in a folder, and switch it on.

        Raises CorruptError where they do not fit the layers that are adapted here.
        """
        stored = load_file(folder / ADAPTER_WEIGHTS)
        own = self._parameters()
        if {name: t.shape for name, t in stored.items()} != {n: p.shape for n, p in own.items()}:
            raise CorruptError(
                f"{folder / ADAPTER_WEIGHTS} does not hold an adapter of this model with rank "
                f"{self.config.r} on {', '.join(sorted(self.config.target_modules or ()))}."
            )
        for name, parameter in own.items():
            parameter.copy_(stored[name])
        self.switch(on=True)

    def switch(self, *, on: bool) -> None:
        """Off, the model is the base, to the bit."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(on)

    def set_dropout(self, *, on: bool) -> None:
        """Switch the adapter's dropout; all other dropout stays off."""
        for name, module in self.model.named_modules():
            if ".lora_dropout." in name:
                module.train(on)

    def save(self, folder: Path, base: ModelRef, base_folder: Path) -> None:
        """Write the adapter as PEFT and vLLM read it, the name of its base, and the base's config.

        `base.path` is recorded as it is given.
        """
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: p.detach().cpu().contiguous() for name, p in self._parameters().items()}
        save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config = self.config.to_dict() | {"inference_mode": True, **_named(base)}
        text = json.dumps(config, indent=1, sort_keys=True, default=sorted) + "\n"
        (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        write_base(folder, base)
        shutil.copyfile(base_folder / "config.json", folder / "config.json")
        save_generation_config(self.model, folder)

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's weights by the names that its file has for them."""
        return {
            PREFIX + name.replace(f".{_SLOT}.", "."): parameter
            for name, parameter in self.model.named_parameters()
            if ".lora_" in name
        }


def lora_config(settings: Mapping[str, Any]) -> peft.LoraConfig:
    """PEFT's config from the fields of `config.AdapterConfig`."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        use_rslora=settings["rslora"],
        target_modules=settings["target_modules"],
        bias="none",
        task_type="CAUSAL_LM",
    )


def stored_config(folder: Path) -> peft.LoraConfig:
    """PEFT's config of the adapter in a folder."""
    from peft import LoraConfig

    config: LoraConfig = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    return config


def _inject(config: peft.LoraConfig, model: PreTrainedModel) -> None:
    """Wrap the layers asked for, and name them in the config as people do: q_proj."""
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    asked = config.target_modules
    try:
        inject_adapter_in_model(config, model, _SLOT)
    except ValueError as error:
        raise ConfigError(f"train.lora.target_modules: {error}") from error
    adapted = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    if asked == "all-linear":
        config.target_modules = {name.rpartition(".")[2] for name in adapted}
        return
    for wanted in asked or ():
        if not any(name == wanted or name.endswith(f".{wanted}") for name in adapted):
            raise ConfigError(
                f"train.lora.target_modules: {type(model).__name__} has no layer {wanted}."
            )


def _named(base: ModelRef) -> dict[str, Any]:
    """How PEFT's config names the base: a hub model by name and commit, a folder by its path."""
    if not base.path.startswith("hub:"):
        return {"base_model_name_or_path": base.path, "revision": None}
    name, _, commit = base.path.removeprefix("hub:").partition("@")
    return {"base_model_name_or_path": name, "revision": commit}
