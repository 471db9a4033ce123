"""What a model folder may hold where its author is not trusted: weights and data, no code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from online_dpo.errors import ConfigError
from online_dpo.files import read_json

PICKLES = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")
"""Endings of files whose usual readers run what is in them."""

_WAY_OUT = (
    "Remove it, or, if you know it and where it comes from, set model.trust_remote_code: true."
)


def refuse_code(folder: Path) -> None:
    """Raise ConfigError where a folder's files bring code along or point out of the folder."""
    for path in _files(folder, (".py",)):
        raise ConfigError(f"The model in {folder} holds Python code: {path.name}. {_WAY_OUT}")
    for path in _files(folder, (".json",)):
        data = read_json(path)
        if not isinstance(data, Mapping):
            continue
        if "auto_map" in data:
            raise ConfigError(
                f"The model in {folder} names code to import: auto_map in {path.name}. {_WAY_OUT}"
            )
        for place, target in _targets(path.name, data):
            if _leads_out(target):
                raise ConfigError(
                    f"The model in {folder} points out of its folder: {place} in {path.name} is "
                    f"{target!r}. {_WAY_OUT}"
                )


def refuse_pickles(folder: Path) -> None:
    """Raise ConfigError where a folder holds a pickle, beside safetensors weights too."""
    for path in _files(folder, PICKLES):
        raise ConfigError(
            f"The model in {folder} holds a file that is or may be a pickle, which runs code when "
            f"it is read: {path.name}. {_WAY_OUT}"
        )


def _files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    return sorted(p for p in folder.glob("*") if p.suffix.lower() in endings and p.is_file())


def _targets(name: str, data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The paths in a file that a loader would follow: shards of weights, a tokenizer's files."""
    if name.endswith(".index.json") and isinstance(data.get("weight_map"), Mapping):
        yield from (("weight_map", str(target)) for target in data["weight_map"].values())
    yield from (
        (key, value)
        for key, value in data.items()
        if key.endswith("_file") and isinstance(value, str)
    )


def _leads_out(target: str) -> bool:
    """Whether a path leaves the folder that it is relative to, on any system."""
    paths = (PurePosixPath(target), PureWindowsPath(target))
    return any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)
