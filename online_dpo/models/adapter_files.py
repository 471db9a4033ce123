"""The files of a policy that is an adapter: PEFT's two, and one that names its base by hash."""

from __future__ import annotations

import json
import os
from pathlib import Path

from online_dpo.files import read_json
from online_dpo.records import ModelRef

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "base.json"
PREFIX = "base_model.model."
"""What PEFT writes before a module's name in an adapter's file."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def base_of(folder: Path) -> ModelRef:
    """The base model that an adapter belongs to.

    Its path is relative to the adapter's folder, absolute, or `hub:NAME@COMMIT`; a run directory
    can so be moved. Raises CorruptError where the adapter does not name its base.
    """
    data = read_json(folder / BASE_FILE)
    return ModelRef(data["path"], data["sha256"])


def write_base(folder: Path, base: ModelRef) -> None:
    """Name the base of the adapter that a folder holds or will hold."""
    text = json.dumps({"path": base.path, "sha256": base.sha256}, indent=1) + "\n"
    (folder / BASE_FILE).write_text(text, encoding="utf-8")


def path_from(folder: Path, target: Path) -> str:
    """`target` as a path relative to an adapter's folder."""
    return Path(os.path.relpath(target, folder)).as_posix()
