"""Which config a run directory goes by, and which changes to it are safe."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from online_dpo.config import Config
from online_dpo.config_file import differences, load_config, override_config
from online_dpo.errors import CorruptError, DriftError
from online_dpo.store import RunDir
from online_dpo.trust import trust_flags

OPERATIONAL = (
    "judge.budget",
    "judge.max_calls",
    "judge.concurrency",
    "judge.timeout_s",
    "judge.retries",
    "evaluation.judge.budget",
    "evaluation.judge.max_calls",
    "campaign.rounds",
    "campaign.retention",
    "campaign.save_policy_every",
    "train.checkpoint_every",
)
"""Settings that may change between starts: they do not change what is committed."""


def current_config(folder: RunDir) -> Config:
    """The campaign's config with its accepted changes."""
    folder.require()
    return _amended(folder, load_config(folder.path / "campaign.yaml", resolved=True).config)


def is_finished(folder: RunDir, config: Config) -> bool:
    """Whether every round is done."""
    return folder.round(config.campaign.rounds).finished


def resume_command(folder: RunDir, config: Config) -> str:
    """The exact command that goes on with a campaign, with the trust that it needs."""
    return " ".join(("online-dpo resume", shlex.quote(str(folder.path)), *trust_flags(config)))


def check_same(folder: RunDir, recorded: Config, config: Config) -> None:
    changes = differences(recorded, config)
    if changes:
        raise DriftError(
            f"{folder.path} belongs to a campaign with another config:\n{_diff(changes)}\n"
            "To start this one, choose another --run-dir; to go on with that one:",
            remedy=f"online-dpo resume {folder.path}",
        )


def check_changes(
    folder: RunDir, changes: Mapping[str, tuple[Any, Any]], accept_change: bool
) -> None:
    fixed = {k: v for k, v in changes.items() if not k.startswith(OPERATIONAL)}
    frozen = [k for k in fixed if k.split(".")[0] in ("model", "sft", "prompts")]
    if frozen or "campaign.seed" in fixed or "campaign.run_dir" in fixed:
        raise DriftError(
            f"What is committed in {folder.path} depends on these; they cannot change:\n"
            f"{_diff(fixed)}\nStart another campaign with them instead."
        )
    if fixed and not accept_change:
        raise DriftError(
            f"This changes what later rounds of {folder.path} do:\n{_diff(fixed)}",
            remedy=f"online-dpo resume {folder.path} --accept-change with the same --set",
        )
    begun = [r for r in folder.rounds() if r.planned and not r.finished]
    if fixed and begun:
        raise DriftError(
            f"Round {begun[0].number} of {folder.path} has begun under the old settings:\n"
            f"{_diff(fixed)}\nResume without --set to its end first.",
            remedy=f"online-dpo resume {folder.path}",
        )


def record_change(folder: RunDir, changes: Mapping[str, tuple[Any, Any]]) -> None:
    number = len(_amendments(folder)) + 1
    first = next((r.number for r in folder.rounds() if not r.finished), None)
    text = json.dumps({"from_round": first, "changes": dict(changes)}, indent=2) + "\n"
    folder.write_text(f"amendment-{number:03d}.json", text)


def _amended(folder: RunDir, config: Config) -> Config:
    """The config with the numbered amendments of earlier resumes, in order."""
    for file in _amendments(folder):
        try:
            changes = json.loads(file.read_text())["changes"]
        except (ValueError, KeyError) as error:
            raise CorruptError(f"{file} is not a valid amendment: {error}") from error
        overrides = [f"{key}={json.dumps(new)}" for key, (_, new) in changes.items()]
        config = override_config(config, overrides, source=str(file))
    return config


def _amendments(folder: RunDir) -> list[Path]:
    return sorted(folder.path.glob("amendment-[0-9][0-9][0-9].json"))


def _diff(changes: Mapping[str, tuple[Any, Any]]) -> str:
    return "\n".join(f"  {key}: {old!r} -> {new!r}" for key, (old, new) in changes.items())
