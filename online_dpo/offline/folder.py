"""The folder that offline training writes: whose it is, and whether it is finished."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from online_dpo.config_file import data_differences
from online_dpo.errors import (
    CampaignError,
    ConfigError,
    CorruptError,
    DivergedError,
    DriftError,
    LockedError,
    SignalError,
)
from online_dpo.files import PARTIAL, fsync_path, read_json, remove_tree, to_json
from online_dpo.locks import LOCK, WORKERS_LOCK, RunLock
from online_dpo.store import MANIFEST, RoundDir, RunDir

ARGUMENTS = "arguments.json"
"""What an unfinished training was started with."""


class OfflineFolder:
    """`path` holds a finished policy or nothing; beside it `work` is there while it is trained.

    `arguments` is what the training is known by: nested mappings of JSON values.
    """

    def __init__(self, out: str | Path, arguments: Mapping[str, Any]) -> None:
        self.path = Path(os.path.abspath(out))
        self.work = RunDir(self.path.with_name(self.path.name + PARTIAL))
        self.arguments = dict(arguments)

    @property
    def round(self) -> RoundDir:
        """The one round whose artifacts the training commits."""
        return self.work.round(1)

    @property
    def finished(self) -> bool:
        """Whether the policy of these arguments is there; False where the path is free.

        Raises DriftError where other arguments made it, ConfigError where it is something else.
        """
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return False
        manifest = self.path / MANIFEST
        recorded = read_json(manifest).get("arguments") if manifest.is_file() else None
        if recorded is None:
            raise ConfigError(f"{self.path} holds something else; choose another folder (--out).")
        changes = data_differences(recorded, self.arguments)
        if changes:
            raise DriftError(
                f"{self.path} holds a policy that was trained with other arguments:\n"
                f"{_lines(changes)}\nChoose another folder (--out)."
            )
        return True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold `work`, which is made where it is missing. Raises LockedError."""
        self.work.path.mkdir(parents=True, exist_ok=True)
        try:
            lock = RunLock(self.work.path)
        except LockedError as error:
            error.remedy = None
            raise
        try:
            yield
        finally:
            lock.release()

    def claim(self) -> None:
        """Make `work` this training's. Raises DriftError or ConfigError where it is another's."""
        file = self.work.path / ARGUMENTS
        if not file.is_file():
            if any(path.name not in (LOCK, WORKERS_LOCK) for path in self.work.path.iterdir()):
                raise ConfigError(
                    f"{self.work.path} holds something else; choose another folder (--out)."
                )
            self.work.write_text(ARGUMENTS, to_json(self.arguments))
            return
        changes = data_differences(read_json(file), self.arguments)
        if changes:
            raise DriftError(
                f"{self.work.path} holds an unfinished training with other arguments:\n"
                f"{_lines(changes)}\nRepeat its arguments to go on with it, choose another folder "
                f"(--out), or give it up: rm -r {self.work.path}"
            )

    def hand_over(self) -> None:
        """Put the committed policy in its place."""
        (self.round.path / "policy").rename(self.path)
        fsync_path(self.path.parent)

    def clear(self) -> None:
        """Remove `work`."""
        remove_tree(self.work.path)

    def explain(
        self, error: CampaignError | SignalError, command: str | None, learning_rate: float
    ) -> None:
        """Say what is safe and how to go on (by `command`), where the error does not."""
        checkpoints = self.round.children("checkpoints")
        if checkpoints and error.safe is None:
            error.safe = f"{self.round.path / checkpoints[-1]}; training goes on from there."
        known = isinstance(error, ConfigError | DriftError | LockedError)
        if command is None or known or error.remedy:
            return
        if isinstance(error, DivergedError):
            command += f" --set train.learning_rate={learning_rate / 2:g}"
        anew = isinstance(error, DivergedError | CorruptError) and self.work.path.exists()
        error.remedy = f"rm -r {self.work.path}; {command}" if anew else command


def _lines(changes: Mapping[str, tuple[Any, Any]]) -> str:
    return "\n".join(f"  {key}: {old!r} -> {new!r}" for key, (old, new) in changes.items())
