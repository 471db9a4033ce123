"""What can end a campaign, as one tree; each says what happened, what is safe and how to go on.

CampaignError (exit 1)
├── ConfigError (2, also a ValueError)
├── LockedError (3)
├── DriftError (3)
├── BudgetError (4)
├── JudgeError (5)
├── NoPairsError (6)
├── DivergedError (7)
├── DiskError (8, also an OSError)
├── CorruptError (9)
├── EngineError (10)
│   └── WorkerError
├── WaitingError (11)
└── StoppedError (12)

SignalError (130 or 143) is a BaseException beside the tree, so that no `except Exception` on its
way takes it for a fault of a file or a model.
"""

from __future__ import annotations


class CampaignError(Exception):
    """One cause in one paragraph. `remedy` is the exact command to go on, where one is known."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None, safe: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.safe = safe


class ConfigError(CampaignError, ValueError):
    """The config, a file it names or a combination of its options cannot be used."""

    exit_code = 2


class LockedError(CampaignError):
    """Another process holds the run directory, or it needs another command."""

    exit_code = 3


class DriftError(CampaignError):
    """The config or the weights differ from what the run was started with."""

    exit_code = 3


class BudgetError(CampaignError):
    """The labelling budget is used up."""

    exit_code = 4


class JudgeError(CampaignError):
    """The judge raises, hangs, or returns what is no verdict."""

    exit_code = 5


class NoPairsError(CampaignError):
    """A round has no pair to train on."""

    exit_code = 6


class DivergedError(CampaignError):
    """The loss or the weights are no longer finite."""

    exit_code = 7


class DiskError(CampaignError, OSError):
    """The disk is full, read-only or failing."""

    exit_code = 8


class CorruptError(CampaignError):
    """A committed file is missing or its hash is not the recorded one."""

    exit_code = 9


class EngineError(CampaignError):
    """A sampler or trainer process failed, or serves other weights than it should."""

    exit_code = 10


class WorkerError(EngineError):
    """A worker's process exited, hung or raised what it has no word for: a fresh one may not."""


class WaitingError(CampaignError):
    """The round waits for people."""

    exit_code = 11


class StoppedError(CampaignError):
    """A rule of the config ended the campaign."""

    exit_code = 12


class SignalError(BaseException):
    """SIGINT or SIGTERM arrived; `exit_code` is 130 or 143."""

    safe: str | None = None

    def __init__(self, message: str, *, exit_code: int, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code
        self.remedy = remedy


BY_NAME: dict[str, type[CampaignError]] = {
    error.__name__: error
    for error in (
        CampaignError,
        ConfigError,
        LockedError,
        DriftError,
        BudgetError,
        JudgeError,
        NoPairsError,
        DivergedError,
        DiskError,
        CorruptError,
        EngineError,
        WorkerError,
        WaitingError,
        StoppedError,
    )
}
"""The errors that a worker may report by name, to be raised again in the orchestrator."""
