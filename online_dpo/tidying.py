"""What a kill leaves undone beside the rounds: pruning, temporaries, spent checkpoints, metrics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from online_dpo.config import Config
from online_dpo.files import PARTIAL, disk_faults, remove_tree
from online_dpo.metrics_log import is_current, rebuild_metrics
from online_dpo.retention import KeptRound, deletable
from online_dpo.store import RoundDir, RunDir

Task = Callable[[], None]


def prune(run: RunDir, config: Config) -> None:
    """Delete the policies and optimizer states that `campaign.retention` lets go; each is noted."""
    for task in _pruning(run, config):
        task()


def tidy(run: RunDir, config: Config) -> None:
    """Do what is left to do; for the holder of the lock."""
    for task in left_undone(run, config):
        task()


def left_undone(run: RunDir, config: Config) -> list[Task]:
    """What `tidy` would do, in order; finding it out writes nothing."""
    tasks: list[Task] = [
        *(partial(round_dir.remove, name) for round_dir, name in _spent_checkpoints(run)),
        *_pruning(run, config),
        *_temporaries(run),
    ]
    if not is_current(run):
        tasks.append(partial(rebuild_metrics, run))
    return tasks


def _pruning(run: RunDir, config: Config) -> list[Task]:
    finished = [r for r in run.rounds() if r.finished]
    kept = [KeptRound(r.number, bool(r.manifest()["promoted"])) for r in finished]
    return [
        partial(_delete, run.round(number), name)
        for number in deletable(config, kept)
        for name in ("policy", "optimizer")
        if run.round(number).has(name)
    ]


def _delete(round_dir: RoundDir, name: str) -> None:
    round_dir.run.event("deleted", round=round_dir.number, artifact=name, why="retention")
    round_dir.remove(name)


def _spent_checkpoints(run: RunDir) -> list[tuple[RoundDir, str]]:
    """Step checkpoints of rounds whose policy is there, or was."""
    return [
        (round_dir, "checkpoints")
        for round_dir in run.rounds()
        if (round_dir.finished or round_dir.has("policy"))
        and (round_dir.path / "checkpoints").is_dir()
    ]


def _temporaries(run: RunDir) -> list[Task]:
    """Half-written and half-deleted files: nothing resumes from them."""
    found = sorted({*run.path.glob(f"*{PARTIAL}"), *(run.path / "rounds").rglob(f"*{PARTIAL}")})
    inside = [path for path in found if not any(parent in found for parent in path.parents)]

    def remove() -> None:
        with disk_faults(run.path):
            for path in inside:
                remove_tree(path)

    return [remove] if inside else []
