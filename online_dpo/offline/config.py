"""The config of offline training: what of a campaign's config training reads, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from online_dpo.config import Config
from online_dpo.config_file import config_from_dict, differences, load_config
from online_dpo.errors import ConfigError
from online_dpo.resources import find_rows

READ = (
    "train.",
    "model.attention",
    "model.chat_template",
    "model.dtype",
    "model.revision",
    "model.trust_remote_code",
    "compute.device",
    "compute.threads",
    "compute.workers",
    "pairs.offline.append_eos",
    "pairs.offline.split",
    "campaign.seed",
)
"""The settings that may be given, by the beginnings of their dotted keys."""

GIVEN_ROWS = ""
"""Stands for the path of pairs that are given as rows."""


def offline_config(
    pairs: str,
    model: str,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """A whole config around one training: crew and stages go by one, and read `READ` of it.

    `pairs` and `model` are a campaign's pairs.offline.path and model.path. `config` has further
    sections, in a YAML file or as a mapping; `train` has fields of the train section. Raises
    ConfigError, for a setting that offline training does not read too.
    """
    given = _given(find_rows(pairs), os.path.abspath(model) if Path(model).is_dir() else model)

    def edit(data: dict[str, Any]) -> dict[str, Any]:
        return _merge(_merge(data, given), {"train": dict(train)} if train else {})

    if isinstance(config, str | Path):
        made = load_config(config, overrides, edit=edit).config
    else:
        made = config_from_dict(edit(dict(config or {})), overrides).config
    _check_read(config_from_dict(given).config, made)
    return made


def arguments_of(config: Config) -> dict[str, Any]:
    """What of a config decides what is trained, in its own sections."""
    data = config.model_dump(mode="json")
    offline = data["pairs"]["offline"]
    return {
        "pairs": {key: offline[key] for key in ("split", "append_eos")},
        "model": {k: v for k, v in data["model"].items() if f"model.{k}" in READ},
        "train": {k: v for k, v in data["train"].items() if k != "checkpoint_every"},
        "compute": {key: data["compute"][key] for key in ("device", "threads")},
        "seed": data["campaign"]["seed"],
    }


def _given(pairs: str, model: str) -> dict[str, Any]:
    """A campaign without a judge that samples nothing: one round on given pairs."""
    return {
        "model": {"path": model},
        "prompts": {"train": [{"path": "none"}], "holdout": 1},
        "sampling": {"sampler": "transformers"},
        "judge": {"name": "none"},
        "pairs": {"offline": {"path": pairs}},
        "campaign": {"name": "offline", "rounds": 1, "run_dir": "offline"},
    }


def _merge(data: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with the values of `added`, section by section."""
    merged = dict(data)
    for key, value in added.items():
        inner = merged.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(inner, value) if both else value  # type: ignore[arg-type]
    return merged


def _check_read(given: Config, config: Config) -> None:
    unread = [key for key in differences(given, config) if not key.startswith(READ)]
    if unread:
        known = ", ".join(f"{key}*" if key.endswith(".") else key for key in READ)
        raise ConfigError(
            f"{unread[0]} has no part in offline training, which reads {known}. Leave it out."
        )
    if config.train.optimizer == "carry":
        raise ConfigError(
            "train.optimizer: carry hands AdamW's state to a next round, and offline training is "
            "one round. Leave it out."
        )
