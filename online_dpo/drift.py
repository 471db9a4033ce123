"""Which config a run directory goes by, and which changes to it are safe."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from online_dpo.config import Config
from online_dpo.config_file import differences, load_config
from online_dpo.endings import ARTIFACTS, asked_of_people, redo_command, resume_command
from online_dpo.errors import CorruptError, DriftError
from online_dpo.files import read_signed_json, to_signed_json
from online_dpo.integrity import check_start
from online_dpo.judge_clashes import CALLING
from online_dpo.store import RoundDir, RunDir

ASKING = (*CALLING, "timeout_s")
"""Settings of a judge that say how it is asked, and not what."""

OPERATIONAL = (
    "judge.budget",
    "judge.prices",
    *(f"judge.{field}" for field in ASKING),
    *(f"evaluation.judge.{field}" for field in ASKING),
    "evaluation.examples",
    "alarms",
    "campaign.name",
    "campaign.rounds",
    "campaign.retention",
    "campaign.save_policy_every",
    "sampling.devices",
    "sampling.endpoints",
    "sampling.reload_command",
    "sampling.stall_s",
    "sampling.update",
    "train.checkpoint_every",
    "train.listen",
    "train.launch.main_process_ip",
    "train.launch.main_process_port",
    "compute.layout",
)
"""Settings that may change between starts: they do not change what is committed."""

ROUNDING = (
    "sampling.batch_size",
    "sampling.engine",
    "sampling.sampler",
    "train.activation_offload",
    "train.devices",
    "train.gradient_checkpointing",
    "train.gradient_sync",
    "train.launch",
    "train.micro_batch_size",
    "train.micro_batch_tokens",
    "train.num_processes",
    "train.parallel",
    "compute.device",
    "compute.threads",
    "compute.workers",
)
"""Settings of how things are computed, accepted within a round too: results change by rounding (and
with another sampler by the draw of samples), and a step checkpoint does not depend on them."""

WHO_LABELS = (
    "judge.options.annotators",
    "judge.options.per_item",
    "judge.options.rubric",
)
"""Settings of the judge `human`, accepted while a round waits: somebody falls ill, and the labels
that are made stay as they are."""

CHECKS = ("judge.gold", "judge.gold_pairs", "judge.probes", "judge.constant")
"""Settings of what a judge is asked to see how good it is, accepted within a round too: one whose
judge_check/ is made keeps it."""

FROZEN = (
    "model",
    "sft",
    "prompts",
    "campaign.seed",
    "campaign.run_dir",
    "pairs.offline",
    "sampling.stop",
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
    "pairs": ("pairs", "unpaired"),
    "train": ("reference", "checkpoints", "training"),
    "evaluation": ("evaluation",),
}
"""The first artifacts of a round that a section has a part in; other sections enter its plan."""

_PLANNED_FIRST = {"reference": "reference"}
"""The same for sections that only a round's plan reads."""


def current_config(folder: RunDir) -> Config:
    """The campaign's config with its accepted changes."""
    check_start(folder)
    folder.require()
    return _amended(folder, load_config(folder.path / "campaign.yaml", resolved=True).config)


def is_finished(folder: RunDir, config: Config) -> bool:
    """Whether every round is done."""
    return folder.round(config.campaign.rounds).finished


def check_same(folder: RunDir, recorded: Config, config: Config) -> None:
    """Raise DriftError where a run directory is another campaign's. It may have been moved."""
    changes = differences(recorded, config)
    changes.pop("campaign.run_dir", None)
    if changes:
        raise DriftError(
            f"{folder.path} belongs to a campaign with another config:\n{_diff(changes)}\n"
            "To start this one, choose another --run-dir. The command goes on with that one.",
            remedy=resume_command(folder, recorded),
        )


def check_changes(
    folder: RunDir, changes: Mapping[str, tuple[Any, Any]], accept_change: bool
) -> None:
    """Raise DriftError unless the changes leave alone what is committed, and are accepted."""
    _check_rounds(folder, changes)
    fixed = {k: v for k, v in changes.items() if not _is_among(k, OPERATIONAL)}
    frozen = {k: v for k, v in fixed.items() if _is_frozen(folder, k)}
    if frozen:
        raise DriftError(
            f"What is committed in {folder.path} depends on these; they cannot change:\n"
            f"{_diff(frozen)}\nStart another campaign with them instead."
        )
    values = [shlex.quote(f"{key}={json.dumps(new)}") for key, (_, new) in changes.items()]
    sets = " ".join(f"--set {value}" for value in values)
    accepted = f"online-dpo resume {shlex.quote(str(folder.path))} --accept-change {sets}"
    for round_dir in folder.rounds():
        late = {k: v for k, v in fixed.items() if _is_late(round_dir, k)}
        if late:
            raise DriftError(
                f"Round {round_dir.number} has come past the point where these count:\n"
                f"{_diff(late)}\nResume it as it is, or have it do that part again.",
                remedy=f"{_redo(round_dir, list(late))}; {accepted}",
            )
    if fixed and not accept_change:
        raise DriftError(
            f"This changes what is still to be done of {folder.path}:\n{_diff(fixed)}",
            remedy=accepted,
        )


def check_used(folder: RunDir, config: Config, changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise DriftError for changes of a campaign that has nothing left to do with them."""
    idle = {k: v for k, v in changes.items() if not _is_among(k, OPERATIONAL)}
    if idle and is_finished(folder, config):
        done = config.campaign.rounds
        raise DriftError(
            f"All {done} rounds of {folder.path} are done; nothing would use this:\n{_diff(idle)}",
            remedy=f"online-dpo resume {shlex.quote(str(folder.path))} --accept-change "
            f"--set campaign.rounds={done + 1} ...",
        )


def _check_rounds(folder: RunDir, changes: Mapping[str, tuple[Any, Any]]) -> None:
    _, wanted = changes.get("campaign.rounds", (None, None))
    begun = max((r.number for r in folder.rounds()), default=0)
    if isinstance(wanted, int) and wanted < begun:
        raise DriftError(
            f"campaign.rounds: {wanted} is fewer than the {begun} that {folder.path} has begun."
        )


def _is_frozen(folder: RunDir, key: str) -> bool:
    if key == "sampling.max_new_tokens":  # of evaluations too, where they have none of their own
        return current_config(folder).evaluation.max_new_tokens is None
    return _is_among(key, FROZEN)


def _is_among(key: str, names: Sequence[str]) -> bool:
    """Whether a dotted key is one of these or lies below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _is_late(round_dir: RoundDir, key: str) -> bool:
    """Whether an unfinished round has committed something that a setting had a part in."""
    free = (*ROUNDING, *WHO_LABELS, *CHECKS)
    if round_dir.finished or round_dir.number == 0 or _is_among(key, free):
        return False
    section = key.split(".")[0]
    if key in PLANNED or section not in _ARTIFACTS:
        return round_dir.planned
    return any(round_dir.has(name) or round_dir.children(name) for name in _ARTIFACTS[section])


def _redo(round_dir: RoundDir, late: Sequence[str]) -> str:
    """The command that undoes what the settings had a part in, and no more."""
    sections = [key.split(".")[0] for key in late]
    made_first = {**{section: names[0] for section, names in _ARTIFACTS.items()}, **_PLANNED_FIRST}
    first = min((made_first.get(name, "samples") for name in sections), key=ARTIFACTS.index)
    if first == "samples":
        paths = (round_dir.path, *asked_of_people(round_dir))
        return f"rm -r {' '.join(shlex.quote(str(path)) for path in paths)}"
    replan = any(key in PLANNED for key in late) or bool({*sections} & {*_PLANNED_FIRST})
    return redo_command(round_dir, first, replan=replan)


def record_change(folder: RunDir, config: Config, changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Write a numbered amendment: what changed, from which round on, and the config it makes."""
    number = len(_amendments(folder)) + 1
    first = next((r.number for r in folder.rounds() if not r.finished), None)
    facts = {
        "from_round": first,
        "changes": {key: list(values) for key, values in changes.items()},
        "config": config.model_dump(mode="json"),
    }
    folder.write_text(f"amendment-{number:03d}.json", to_signed_json(facts))


def _amended(folder: RunDir, config: Config) -> Config:
    """The config of the last amendment, or as the campaign started."""
    files = _amendments(folder)
    if not files:
        return config
    try:
        return Config.model_validate(read_signed_json(files[-1])["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{files[-1]} is not a valid amendment: {error}") from error


def _amendments(folder: RunDir) -> list[Path]:
    return sorted(folder.path.glob("amendment-[0-9][0-9][0-9].json"))


def _diff(changes: Mapping[str, tuple[Any, Any]]) -> str:
    return "\n".join(f"  {key}: {old!r} -> {new!r}" for key, (old, new) in changes.items())
