"""A config's judge opened outside of a campaign, in a folder with a ledger of its own."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from online_dpo.config import Config, JudgeConfig
from online_dpo.devices import hiding_gpus
from online_dpo.errors import BudgetError, CampaignError, ConfigError, LockedError, SignalError
from online_dpo.files import disk_faults
from online_dpo.judge_clashes import PEOPLE
from online_dpo.judging import Labeller
from online_dpo.locks import RunLock
from online_dpo.paid.ledger import LEDGER
from online_dpo.signals import stop_on_signals
from online_dpo.store import RunDir


def judge_of(config: Config, *, evaluation: bool) -> tuple[JudgeConfig, str]:
    """The judge of training or of evaluation, and the section of the config that it stands in.

    Raises ConfigError for judges that have no one to ask outside of a campaign.
    """
    if evaluation and config.evaluation.judge is None:
        raise ConfigError("--evaluation: the config has no evaluation.judge; leave it out.")
    judge = config.eval_judge if evaluation else config.judge
    section = "evaluation.judge" if evaluation else "judge"
    if judge.name == PEOPLE:
        raise ConfigError(
            f"{section}: people are asked in a campaign, by `online-dpo label`; its options gold "
            "and repeats measure them there."
        )
    if judge.name == "self":
        raise ConfigError(
            f"{section}: 'self' asks the model of a campaign's round, and there is none here. "
            "Serve the model behind an API and check it as llm_pairwise or llm_pointwise."
        )
    _refuse_tokens(judge.name, judge.options, section)
    return judge, section


def _refuse_tokens(name: str, options: dict[str, object], section: str) -> None:
    """Responses from a file have no tokens to count."""
    listed = options.get("scorers" if name == "heuristic" else "members")
    for place, part in enumerate(listed if isinstance(listed, list) else []):
        if not isinstance(part, dict):
            continue
        if name == "heuristic" and part.get("kind") == "tokens":
            raise ConfigError(
                f"{section}.options.scorers[{place}] counts tokens of the policy, and responses "
                "from a file have none. Leave it out here with --set, or count words: kind: length."
            )
        if isinstance(inner := part.get("options"), dict):
            _refuse_tokens(str(part.get("name")), inner, f"{section}.options.members[{place}]")


@contextmanager
def opened(
    config: Config, folder: Path, *, evaluation: bool, command: str | None
) -> Iterator[Labeller]:
    """The judge, whose calls and events are kept in `folder`, which nobody else may use meanwhile.

    No share of replies without a verdict ends it. Interrupted, it says what is bought and that
    `command`, if there is one, goes on.
    """
    judge, section = judge_of(config, evaluation=evaluation)
    try:
        with (
            disk_faults(folder),
            stop_on_signals(),
            _held(folder) as events,
            closing(
                Labeller(
                    judge,
                    base=None,
                    ledger_path=folder / LEDGER,
                    seed=config.campaign.seed,
                    round=0,
                    on_event=lambda event: events.event("judge", **event),
                    section=section,
                    env=hiding_gpus(config.compute.device),
                    max_invalid=1.0,
                )
            ) as labeller,
        ):
            yield labeller
    except (CampaignError, SignalError) as error:
        _explain(error, judge, folder, command)
        raise


@contextmanager
def _held(folder: Path) -> Iterator[RunDir]:
    """The folder, made where it is missing, under its lock."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder)
    try:
        yield RunDir(folder)
    finally:
        lock.release()


def _explain(
    error: CampaignError | SignalError, judge: JudgeConfig, folder: Path, command: str | None
) -> None:
    """Say what is safe and how to go on, where the error does not."""
    if isinstance(error, LockedError):
        error.remedy = None
        return
    if error.safe is None and (folder / LEDGER).is_file():
        error.safe = f"what has been paid for, in {shlex.quote(str(folder / LEDGER))}."
    if command is None or error.remedy or isinstance(error, ConfigError):
        return
    error.remedy = command
    if isinstance(error, BudgetError):
        limits = judge.budget.model_dump()
        name = next(name for name in limits if f"judge.budget.{name}" in error.message)
        error.remedy += f" --set judge.budget.{name}={2 * (limits[name] or 1):.15g}"
