"""Which config a run directory goes by, and which changes to it are safe."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from online_dpo.config import Config
from online_dpo.config_file import differences, load_config
from online_dpo.errors import (
    BudgetError,
    CampaignError,
    ConfigError,
    CorruptError,
    DivergedError,
    DriftError,
    NoPairsError,
    SignalError,
)
from online_dpo.store import RoundDir, RunDir
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
    "train.listen",
    "train.launch.main_process_ip",
    "train.launch.main_process_port",
)
"""Settings that may change between starts: they do not change what is committed."""

ROUNDING = (
    "train.num_processes",
    "train.parallel",
    "train.gradient_sync",
    "train.devices",
    "train.launch",
)
"""Settings that change results by rounding alone, and that a step checkpoint does not depend on."""

FROZEN = (
    "model",
    "sft",
    "prompts",
    "campaign.seed",
    "campaign.run_dir",
    "pairs.offline",
    "evaluation.temperature",
    "evaluation.max_new_tokens",
    "evaluation.max_prompts",
    "train.lora",
)
"""Settings that round 0, whose evaluation every later one is compared with, rests on, and those
that give every policy its form."""

PLANNED = ("train.beta", "train.learning_rate", "train.optimizer", "evaluation.every")
"""Settings that a round's plan has written down."""

_ARTIFACTS = {
    "sampling": ("samples",),
    "judge": ("labels",),
    "pairs": ("pairs",),
    "train": ("reference", "checkpoints", "training"),
    "evaluation": ("evaluation",),
}
"""The first artifacts of a round that a section has a part in; other sections enter its plan."""


def current_config(folder: RunDir) -> Config:
    """The campaign's config with its accepted changes."""
    folder.require()
    return _amended(folder, load_config(folder.path / "campaign.yaml", resolved=True).config)


def is_finished(folder: RunDir, config: Config) -> bool:
    """Whether every round is done."""
    return folder.round(config.campaign.rounds).finished


def remedy_for(error: CampaignError | SignalError, folder: RunDir, config: Config) -> str | None:
    """The command that goes on after an error; plain `resume` would end some in the same way."""
    resume = resume_command(folder, config)
    last = folder.rounds()[-1].path if folder.rounds() else folder.path
    if isinstance(error, ConfigError):
        return None
    if isinstance(error, BudgetError):
        return f"{resume} --set judge.budget=MORE  # or judge.max_calls, whichever was reached"
    if isinstance(error, NoPairsError):
        more = config.sampling.n * 2
        return f"rm -r {last}; {resume} --accept-change --set sampling.n={more}"
    if isinstance(error, DivergedError):
        less = config.train.learning_rate / 2
        return f"rm -r {last}; {resume} --accept-change --set train.learning_rate={less:g}"
    return resume


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
    """Raise DriftError unless the changes leave alone what is committed, and are accepted."""
    fixed = {k: v for k, v in changes.items() if not k.startswith(OPERATIONAL)}
    frozen = {k: v for k, v in fixed.items() if k.startswith(FROZEN)}
    if frozen:
        raise DriftError(
            f"What is committed in {folder.path} depends on these; they cannot change:\n"
            f"{_diff(frozen)}\nStart another campaign with them instead."
        )
    for round_dir in folder.rounds():
        rest = {k: v for k, v in fixed.items() if not k.startswith(ROUNDING)}
        late = {k: v for k, v in rest.items() if _is_late(round_dir, k)}
        if late:
            raise DriftError(
                f"Round {round_dir.number} has come past the point where these count:\n"
                f"{_diff(late)}\nResume it as it is; or give the round up (judgements stay in the "
                f"ledger): rm -r {round_dir.path}",
                remedy=f"online-dpo resume {shlex.quote(str(folder.path))}",
            )
    if fixed and not accept_change:
        values = [shlex.quote(f"{key}={json.dumps(new)}") for key, (_, new) in changes.items()]
        sets = " ".join(f"--set {value}" for value in values)
        raise DriftError(
            f"This changes what later rounds of {folder.path} do:\n{_diff(fixed)}",
            remedy=f"online-dpo resume {shlex.quote(str(folder.path))} --accept-change {sets}",
        )


def _is_late(round_dir: RoundDir, key: str) -> bool:
    """Whether an unfinished round has committed something that a setting had a part in."""
    if round_dir.finished or round_dir.number == 0:
        return False
    section = key.split(".")[0]
    if key in PLANNED or section not in _ARTIFACTS:
        return round_dir.planned
    return any(round_dir.has(name) or round_dir.children(name) for name in _ARTIFACTS[section])


def record_change(folder: RunDir, config: Config, changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Write a numbered amendment: what changed, from which round on, and the config it makes."""
    number = len(_amendments(folder)) + 1
    first = next((r.number for r in folder.rounds() if not r.finished), None)
    facts = {
        "from_round": first,
        "changes": {key: list(values) for key, values in changes.items()},
        "config": config.model_dump(mode="json"),
    }
    folder.write_text(f"amendment-{number:03d}.json", json.dumps(facts, indent=2) + "\n")


def _amended(folder: RunDir, config: Config) -> Config:
    """The config of the last amendment, or as the campaign started."""
    files = _amendments(folder)
    if not files:
        return config
    try:
        return Config.model_validate(json.loads(files[-1].read_text())["config"])
    except (ValueError, KeyError) as error:
        raise CorruptError(f"{files[-1]} is not a valid amendment: {error}") from error


def _amendments(folder: RunDir) -> list[Path]:
    return sorted(folder.path.glob("amendment-[0-9][0-9][0-9].json"))


def _diff(changes: Mapping[str, tuple[Any, Any]]) -> str:
    return "\n".join(f"  {key}: {old!r} -> {new!r}" for key, (old, new) in changes.items())
