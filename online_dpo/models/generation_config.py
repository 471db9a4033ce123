"""A neutral generation config: a model's special tokens, and no sampling parameter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


def save_generation_config(model: PreTrainedModel, out: Path) -> None:
    """Write a model's neutral generation config into a folder."""
    neutral_generation_config(model).save_pretrained(out)


def neutral_generation_config(model: PreTrainedModel) -> GenerationConfig:
    """The special tokens of a model, from its generation config or its config."""
    from transformers import GenerationConfig

    given = model.generation_config
    return GenerationConfig(
        bos_token_id=_token_id(model, given, "bos_token_id"),
        eos_token_id=_token_id(model, given, "eos_token_id"),
        pad_token_id=_token_id(model, given, "pad_token_id"),
    )


def _token_id(model: PreTrainedModel, given: Any, name: str) -> Any:
    value = getattr(given, name, None)
    return value if value is not None else getattr(model.config, name, None)
