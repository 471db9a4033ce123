"""Options of training that save memory: what they need of the machine, asked before any work."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from online_dpo.errors import ConfigError


def check_memory_options(train: Mapping[str, Any], device: str) -> None:
    """Raise ConfigError for options that this machine cannot serve.

    `train` holds TrainConfig's fields, `device` is cpu or cuda.
    """
    lora = train["lora"]
    eight_bit = train["adam_moments"] != "float32"
    needs = {
        "train.lora": ("peft", "lora", lora is not None),
        "train.lora.quantization": ("bitsandbytes", "qlora", bool(lora and lora["quantization"])),
        "train.adam_moments": ("bitsandbytes", "qlora", eight_bit),
    }
    for name, (package, extra, is_set) in needs.items():
        if is_set and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{name} needs {package}, which is not installed.",
                remedy=f"pip install 'online-dpo[{extra}]'",
            )
    if device == "cpu":
        _refuse_on_cpu(train)


def _refuse_on_cpu(train: Mapping[str, Any]) -> None:
    if train["activation_offload"]:
        raise ConfigError(
            "train.activation_offload moves activations to the CPU's memory, and training runs on "
            "the CPU: they are there already. Remove it."
        )
    if train["adam_moments"] == "paged_8bit":
        raise ConfigError(
            "train.adam_moments: paged_8bit keeps pages of GPU memory, and training runs on the "
            "CPU. Set 8bit or float32."
        )
