"""What an interrupted campaign has on disk, and the exact command that goes on with it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from online_dpo.annotation.board import FOLDER
from online_dpo.config import Config
from online_dpo.errors import (
    BudgetError,
    CampaignError,
    ConfigError,
    CorruptError,
    DivergedError,
    JudgeError,
    NoPairsError,
    SignalError,
    StoppedError,
    WaitingError,
)
from online_dpo.store import RoundDir, RunDir
from online_dpo.trust import trust_flags

ARTIFACTS = (
    "samples",
    "scores",
    "labels",
    "judge_check",
    "pairs",
    "unpaired",
    "reference",
    "checkpoints",
    "training",
    "optimizer",
    "policy",
    "canary",
    "rescored",
    "evaluation",
)
"""What a round commits, in order: each rests on those before it."""

IN_PARTS = ("samples", "scores", "labels", "rescored")
"""Those of them that are made shard by shard."""

PLAN = "round.json"


def safe_on_disk(folder: RunDir) -> str | None:
    """The finished rounds, and what there is of the one under way; None where there is nothing."""
    rounds = folder.rounds()
    done = [r.number for r in rounds if r.finished]
    parts = []
    if done:
        parts.append("round 0" if len(done) == 1 else f"rounds {done[0]} to {done[-1]}")
    if rounds and not rounds[-1].finished and (names := _committed(rounds[-1])):
        parts.append(f"of round {rounds[-1].number}: {', '.join(names)}")
    return f"{'; '.join(parts)}." if parts else None


def remedy_for(error: CampaignError | SignalError, folder: RunDir, config: Config) -> str | None:
    """The command that goes on after an error; plain `resume` would end some in the same way."""
    resume = resume_command(folder, config)
    last = folder.rounds()[-1] if folder.rounds() else None
    if isinstance(error, ConfigError) or last is None:
        return resume if folder.round(0).finished else None
    if isinstance(error, WaitingError):
        return f"{label_command(folder)}; {resume}"
    if isinstance(error, BudgetError):
        return f"{resume} {_raised_limit(error, config)}"
    if isinstance(error, JudgeError) and (field := _invalid_share(error)) is not None:
        return f"{resume} --set {field}=1"
    if isinstance(error, StoppedError):
        return f"{resume} {_only_warned(error)}"
    if isinstance(error, NoPairsError):
        return _for_more_pairs(error, last, config, resume)
    if isinstance(error, DivergedError):
        return _for_smaller_steps(folder, last, config, resume)
    if isinstance(error, CorruptError):
        return _without_damage(error, last, resume)
    return resume


def resume_command(folder: RunDir, config: Config) -> str:
    """The exact command that goes on with a campaign, with the trust that it needs."""
    return " ".join(("online-dpo resume", shlex.quote(str(folder.path)), *trust_flags(config)))


def label_command(folder: RunDir) -> str:
    """The command that opens the labelling page; everybody puts their own name in."""
    return f"online-dpo label {shlex.quote(str(folder.path))} --annotator NAME"


def redo_command(round_dir: RoundDir, first: str, *, replan: bool = False) -> str:
    """The command that makes a round do its part from an artifact on again.

    Samples, labels and paid judgements before it stay. `replan` takes the plan away too, which is
    then made anew from the config.
    """
    later = ARTIFACTS[ARTIFACTS.index(first) :]
    paths = [round_dir.path / name for name in later if (round_dir.path / name).exists()]
    if replan:
        paths.append(round_dir.path / PLAN)
    if ARTIFACTS.index(first) <= ARTIFACTS.index("labels"):
        paths += asked_of_people(round_dir)
    return " ".join(("rm -r", *(shlex.quote(str(path)) for path in paths)))


def asked_of_people(round_dir: RoundDir) -> list[Path]:
    """What a round has posted for people, which goes with its labels; their verdicts stay."""
    posted = round_dir.run.path / FOLDER / "items" / f"round-{round_dir.number:03d}"
    return [posted] if posted.is_dir() else []


def _committed(round_dir: RoundDir) -> list[str]:
    """The artifacts of an unfinished round, in order, those in parts with their number."""
    names = []
    for name in ("model", "prompts", "offline", "base", *ARTIFACTS):
        if parts := len(round_dir.children(name)):
            names.append(f"{name} ({parts} {'part' if parts == 1 else 'parts'})")
        elif round_dir.has(name):
            names.append(name)
    return names


def _raised_limit(error: BudgetError, config: Config) -> str:
    """Twice of what was reached; the user sees the figure and may take another."""
    limits = config.judge.budget.model_dump()
    name = next(name for name in limits if f"judge.budget.{name}" in error.message)
    return f"--set judge.budget.{name}={2 * (limits[name] or 1):.15g}"


def _invalid_share(error: JudgeError) -> str | None:
    """The setting that stopped a round for its share of invalid replies, where one did."""
    found = re.search(r"(?:evaluation\.)?judge\.max_invalid\b", error.message)
    return None if found is None else found[0]


def _only_warned(error: StoppedError) -> str:
    """The settings that have the alarms that stopped a campaign only warn from now on."""
    fields = dict.fromkeys(re.findall(r"alarms\.actions\.\w+", error.message))
    return " ".join(f"--set {field}=warn" for field in fields)


def _for_more_pairs(error: NoPairsError, last: RoundDir, config: Config, resume: str) -> str:
    if config.pairs.min_margin > 0 and "below_margin" in error.message:
        return f"{resume} --accept-change --set pairs.min_margin=0"
    more = config.sampling.n * 2
    whole = " ".join(shlex.quote(str(path)) for path in (last.path, *asked_of_people(last)))
    return f"rm -r {whole}; {resume} --accept-change --set sampling.n={more}"


def _for_smaller_steps(folder: RunDir, last: RoundDir, config: Config, resume: str) -> str:
    """Train again at half the learning rate, on the pairs that are there."""
    if last.number == 0:
        return _start_over(folder, config)
    less = f"train.learning_rate={config.train.learning_rate / 2:g}"
    redo = redo_command(last, "reference", replan=True)
    return f"{redo}; {resume} --accept-change --set {less}"


def _start_over(folder: RunDir, config: Config) -> str:
    """Fine-tuning is what all rounds rest on: the same campaign again, at half its rate."""
    assert config.sft is not None
    place, kept = (shlex.quote(f"{folder.path}{suffix}") for suffix in ("", "-again.yaml"))
    less = f"sft.learning_rate={config.sft.learning_rate / 2:g}"
    return (
        f"mv {place}/campaign.yaml {kept}; rm -r {place}; "
        f"online-dpo run {kept} --run-dir {place} --set {less}"
    )


def _without_damage(error: CorruptError, last: RoundDir, resume: str) -> str:
    """Do again what the round under way lost; of a finished round nothing can be made again."""
    place = f"{last.path}/"
    if last.finished or place not in error.message:
        return f"bring the file back from a copy, then: {resume}"
    inside = Path(error.message.partition(place)[2].split()[0].rstrip(".,;:"))
    if inside.parts[0] not in ARTIFACTS:
        return f"rm -r {shlex.quote(str(last.path))}; {resume}"
    first = inside.parts[0]
    if first not in IN_PARTS:
        return f"{redo_command(last, first)}; {resume}"
    later = IN_PARTS[IN_PARTS.index(first) :]
    part = [last.path / name / inside.parts[1] for name in later]
    damaged = " ".join(shlex.quote(str(path)) for path in part if path.exists())
    return f"rm -r {damaged}; {resume}"
