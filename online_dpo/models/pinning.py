"""A model that the campaign did not make: where its files lie, and that they are still the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from online_dpo.errors import ConfigError, CorruptError, DriftError
from online_dpo.files import combined_hash, read_json, sha256_file
from online_dpo.models.adapter_files import base_of, is_adapter
from online_dpo.models.folder_check import refuse_code, refuse_pickles
from online_dpo.records import ModelRef
from online_dpo.store import RunDir

HUB = "hub:"
_MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")


def model_folder(run: RunDir, model: ModelRef) -> Path:
    """Where a model's files lie here; hub models come from the local cache or the hub."""
    return place_of(model.path, root=run.path)


def place_of(path: str, *, root: Path) -> Path:
    """The folder of a recorded path: relative to `root`, absolute, or `hub:NAME@COMMIT`."""
    if not path.startswith(HUB):
        return root / path
    name, _, commit = path.removeprefix(HUB).partition("@")
    return _snapshot(name, commit)[0]


def base_folder(adapter: Path) -> Path:
    """Where the base model of the adapter in a folder lies."""
    return Path(os.path.normpath(place_of(base_of(adapter).path, root=adapter)))


def check_pin(run: RunDir) -> None:
    """Refuse to go on where the given model's files are not those the campaign started from."""
    origin = run.round(0)
    if not origin.has("model") or not (origin.artifact("model") / "pin.json").is_file():
        return
    pin = read_json(origin.artifact("model") / "pin.json")
    folder = model_folder(run, ModelRef(pin["path"], pin["sha256"]))
    if not folder.is_dir():
        raise CorruptError(f"The model {folder} that this campaign started from is gone.")
    hashes = _hashes(folder)
    changed = sorted(n for n in {*pin["files"], *hashes} if pin["files"].get(n) != hashes.get(n))
    if changed:
        raise DriftError(
            f"The model {folder} has changed since the campaign started: {', '.join(changed)}. "
            "Bring the original files back, or start another campaign from the new ones.",
            safe="Everything in the run directory is as it was.",
        )


def pin_model(path: str, revision: str | None, *, trust_remote_code: bool) -> dict[str, Any]:
    """Path, commit and file hashes of a local folder or hub model.

    Raises ConfigError for a model that brings code or pickles along, unless its code is trusted.
    """
    if Path(path).is_dir():
        if revision is not None:
            raise ConfigError(f"model.revision is for hub models; {path} is a local folder.")
        folder, recorded = Path(path), str(Path(path).absolute())
    else:
        folder, commit = _snapshot(path, revision)
        recorded = f"{HUB}{path}@{commit}"
    if is_adapter(folder):
        raise ConfigError(
            f"model.path: {folder} holds an adapter, which is no model by itself. Merge it into "
            "its base first; `online-dpo export` does that with a campaign's policy."
        )
    if not trust_remote_code:
        refuse_code(folder)
        if not recorded.startswith(HUB):  # There the cache holds what others have fetched, too.
            refuse_pickles(folder)
    hashes = _hashes(folder)
    if not any(name.endswith(".safetensors") for name in hashes):
        raise ConfigError(f"{folder} has no .safetensors file; only safetensors weights are read.")
    return {"path": recorded, "sha256": combined_hash(hashes), "files": hashes}


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted({p for pattern in _MODEL_FILES for p in folder.glob(pattern) if p.is_file()})
    return {file.name: sha256_file(file) for file in files}


def _snapshot(name: str, revision: str | None) -> tuple[Path, str]:
    """A hub model's folder in the local cache and its commit, downloaded where it is missing."""
    from huggingface_hub import snapshot_download

    for local in (True, False):
        try:
            folder = Path(
                snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=list(_MODEL_FILES),
                    local_files_only=local,
                )
            )
            return folder, folder.name
        except Exception as error:
            if not local:
                raise ConfigError(
                    f"model.path {name!r} is neither a folder here nor a hub model that can be "
                    f"fetched: {type(error).__name__}: {str(error).splitlines()[0]}"
                ) from error
    raise AssertionError("unreachable")
