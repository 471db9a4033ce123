"""Kills at counted moments: a campaign in forked processes, ended where a seed says, then resumed.

A moment is the n-th call made by the package's own code in a stage of a round, counted by a profile
hook in the process that makes it. It needs no clock, so a seed's case fails again as it failed.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tiny import digests, in_child, tiny_config

PACKAGE = str(Path(__file__).parent.parent / "online_dpo")
STAGES = ("origin", "sample", "label", "pair", "train", "evaluate", "promote")
VICTIMS = ("orchestrator", "worker", "group")
SIGNALS = {"sigint": signal.SIGINT, "sigterm": signal.SIGTERM}
"""Other victims of a moment: the orchestrator, by a signal that it may answer."""
_UNCOUNTED = ("workers.py", "worker_main.py", "progress.py", "signals.py")
"""Files whose calls depend on how long something took."""


@dataclass(frozen=True)
class Moment:
    """The `count`-th call of one kind of process in a stage, and whom SIGKILL meets there."""

    process: str
    round: int
    stage: str
    count: int
    victim: str = "orchestrator"


def kill_config(run: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Three rounds over few prompts, in worker processes; every round changes the weights."""
    sizes: dict[str, dict[str, Any]] = {
        "campaign": {"rounds": 3, "prompts_per_round": 4},
        "sampling": {"prompts_per_shard": 2},
        "prompts": {"holdout": 4},
        "sft": {"epochs": 1},
        "train": {"batch_size": 1, "micro_batch_size": 1},
        "compute": {"threads": 1, "workers": "processes"},
    }
    names = {*sizes, *sections}
    merged = {name: {**sizes.get(name, {}), **sections.get(name, {})} for name in names}
    return tiny_config(run, **merged)


def run_campaign(
    config: dict[str, Any],
    moment: dict[str, Any] | None,
    out: str | None,
    before: Callable[[], None] | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Run or resume, in a process of its own; die at a moment, or write the calls counted.

    `before` is called first and may break something.
    """
    from online_dpo.errors import CampaignError, SignalError

    fork_workers()
    if before is not None:
        before()
    clock = _Clock(None if moment is None else Moment(**moment), out)
    if moment is not None or out is not None:
        clock.start()
    try:
        run_or_resume(config, overrides)
    except (CampaignError, SignalError) as error:
        log = Path(config["campaign"]["run_dir"]).with_suffix(".txt")
        log.write_text(f"{error}\nsafe: {error.safe}\nto go on: {error.remedy}\n")
        raise SystemExit(error.exit_code) from None
    finally:
        clock.stop()


def run_or_resume(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    """What a user does: start a campaign, or go on with the one that is there."""
    import online_dpo
    from online_dpo.campaign import resume

    run = Path(config["campaign"]["run_dir"])
    if (run / "campaign.yaml").is_file():
        resume(run, overrides=overrides)
    else:
        online_dpo.run(config, overrides=overrides)


def start(
    config: dict[str, Any],
    moment: Moment | None = None,
    out: Path | None = None,
    before: Callable[[], None] | None = None,
    overrides: Sequence[str] = (),
) -> int:
    """The exit code of a run in a forked process; negative for a signal."""
    dying = None if moment is None else asdict(moment)
    counts = None if out is None else str(out)
    return in_child(run_campaign, config, dying, counts, before, overrides)


def counted(config: dict[str, Any], out: Path) -> dict[tuple[str, int, str], int]:
    """Run a campaign unharmed; the calls made by each kind of process in each stage."""
    assert start(config, out=out) == 0, message(config)
    counts: Counter[tuple[str, int, str]] = Counter()
    for line in out.read_text().splitlines():
        process, number, stage, count = json.loads(line)
        counts[process, number, stage] += count
    return dict(counts)


def message(config: Mapping[str, Any]) -> str:
    """What a failed run said."""
    log = Path(config["campaign"]["run_dir"]).with_suffix(".txt")
    return log.read_text() if log.is_file() else "(nothing)"


def draw_moment(
    counts: Mapping[tuple[str, int, str], int], stage: str, rng: random.Random
) -> Moment:
    """A moment of a stage, of those counted in a clean run; the victim is drawn too."""
    places = sorted(place for place in counts if place[2] == stage and place[1] > 0)
    process, number, _ = rng.choice(places)
    count = rng.randint(1, counts[process, number, stage])
    return Moment(process, number, stage, count, rng.choice(VICTIMS))


def copy_until(clean: Path, run: Path, rounds: int) -> None:
    """A campaign that has so many rounds behind it (round 0 is one), copied from a finished one."""
    skipped = ("*.partial", "logs", "lock", "workers.lock")
    shutil.copytree(clean, run, ignore=shutil.ignore_patterns(*skipped))
    for folder in (run / "rounds").iterdir():
        if int(folder.name) >= rounds:
            shutil.rmtree(folder)


def leftovers(run: Path) -> list[str]:
    """Temporary files and folders that a resumed campaign should have done away with."""
    return sorted(str(path.relative_to(run)) for path in run.rglob("*.partial"))


def assert_same(run: Path, clean: Path, case: str) -> None:
    """Every committed byte is that of the uninterrupted campaign, and nothing is left over."""
    found, expected = digests(run), digests(clean)
    other = sorted(k for k in {*found, *expected} if found.get(k) != expected.get(k))
    assert not other, f"{case}: differ: {other[:5]}"
    assert not leftovers(run), f"{case}: left over: {leftovers(run)}"


class _Clock:
    """Counts the package's calls in each stage, in this process and in the workers it forks."""

    def __init__(self, moment: Moment | None, out: str | None) -> None:
        self.moment = moment
        self.out = out
        self.process = "orchestrator"
        self.counts: Counter[tuple[int, str]] = Counter()
        self._local = threading.local()
        self._shared = mmap.mmap(-1, 16)
        self._stages: dict[CodeType, str] = {}
        self._ours: dict[CodeType, bool] = {}

    def start(self) -> None:
        from online_dpo.stages import evaluate, label, origin, pair, promote, sample, train

        functions: dict[str, Callable[..., Any]] = {
            "origin": origin.make_origin,
            "sample": sample._sample_shard,
            "label": label.label_shard,
            "pair": pair.pair,
            "train": train.train,
            "evaluate": evaluate.evaluate,
            "promote": promote.promote,
        }
        self._stages = {function.__code__: name for name, function in functions.items()}
        _Fork.clock = self
        threading.setprofile(self._hook)
        sys.setprofile(self._hook)

    def stop(self) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        self.write()

    def start_in_worker(self, role: str) -> None:
        """After a fork: count this worker's calls, in the stage that the orchestrator is in."""
        self.process = role
        self.counts.clear()
        sys.setprofile(self._hook_of_worker)

    def write(self) -> None:
        """Add what was counted since the last time to the file of counts."""
        if self.out is not None:
            with open(self.out, "a", encoding="utf-8") as file:
                for (number, stage), count in self.counts.items():
                    file.write(json.dumps([self.process, number, stage, count]) + "\n")
            self.counts.clear()

    def _hook(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        stage = self._stages.get(code)
        if stage is not None and event == "call":
            number = frame.f_locals["context"].round.number
            self._enter((number, stage))
        place = getattr(self._local, "place", None)
        if place is None:
            return
        if stage is not None and event == "return":
            if self._is_due(place, at_end=True):
                self._kill()
            self._enter(None)
        elif self._counts(code, event):
            self.counts[place] += 1
            if self._is_due(place):
                self._kill()

    def _enter(self, place: tuple[int, str] | None) -> None:
        self._local.place = place
        if threading.current_thread() is threading.main_thread():
            number, stage = place or (0, "origin")
            self._shared[:16] = struct.pack("qq", number, STAGES.index(stage))

    def _hook_of_worker(self, frame: FrameType, event: str, argument: object) -> None:
        if not self._counts(frame.f_code, event):
            return
        number, index = struct.unpack("qq", self._shared[:16])
        place = (number, STAGES[index])
        self.counts[place] += 1
        if self._is_due(place):
            self._kill_from_worker()

    def _counts(self, code: CodeType, event: str) -> bool:
        if event not in ("call", "c_call"):
            return False
        ours = self._ours.get(code)
        if ours is None:
            name = code.co_filename
            ours = name.startswith(PACKAGE) and os.path.basename(name) not in _UNCOUNTED
            self._ours[code] = ours
        return ours

    def _is_due(self, place: tuple[int, str], *, at_end: bool = False) -> bool:
        m = self.moment
        if m is None or m.process != self.process or (m.round, m.stage) != place:
            return False
        return self.counts[place] >= m.count or at_end

    def _kill(self) -> None:
        assert self.moment is not None
        victim, self.moment = self.moment.victim, None
        if victim in SIGNALS:
            os.kill(os.getpid(), SIGNALS[victim])
            return
        if victim != "orchestrator":
            for pid in _Fork.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        if victim != "worker":
            os.kill(os.getpid(), signal.SIGKILL)

    def _kill_from_worker(self) -> None:
        assert self.moment is not None
        victim = self.moment.victim
        if victim in SIGNALS:
            self.moment = None
            os.kill(os.getppid(), SIGNALS[victim])
            return
        if victim != "worker":
            os.kill(os.getppid(), signal.SIGKILL)
        os.killpg(os.getpgid(0), signal.SIGKILL)


class _Fork:
    """What `subprocess.Popen` is to a worker, for one that was forked with its imports done."""

    pids: list[int] = []
    clock: _Clock | None = None

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.pids.append(pid)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                self.pids.remove(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout or 0.0)
            time.sleep(0.005)
        return code


def worker_groups(run: Path) -> Path:
    """The file beside a run with the process group of every worker that was ever forked for it."""
    return run.with_suffix(".groups")


def living_groups(run: Path) -> list[int]:
    """The process groups of workers that are still there."""
    file = worker_groups(run)
    groups = [int(line) for line in file.read_text().split()] if file.is_file() else []
    return [group for group in groups if _is_there(group)]


def _is_there(group: int) -> bool:
    """Whether a process of the group lives; zombies, which somebody has yet to wait for, do not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False


def fork_workers() -> None:
    """Make workers start as forks of this process: all else about them is as it is shipped."""
    from online_dpo.workers import RUN_ENV, SOCKET_ENV, TOKEN_ENV, ChildWorker

    def spawn(self: ChildWorker, address: str, token: str) -> Any:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        pid = os.fork()
        if pid:
            with worker_groups(self._run).open("a") as file:
                file.write(f"{pid}\n")
            return _Fork(pid)
        try:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
            os.setsid()
            os.closerange(3, 4096)
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            own = {SOCKET_ENV: address, TOKEN_ENV: token, RUN_ENV: str(self._run)}
            os.environ.update({**self._env, **own})
            _serve(self.role)
        finally:
            os._exit(70)

    ChildWorker._spawn = spawn  # type: ignore[method-assign]


def _serve(role: str) -> None:
    from online_dpo import worker_main

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    clock = _Fork.clock
    if clock is not None:
        clock.start_in_worker(role)
        send = worker_main._Sender.__call__

        def count_and_send(self: Any, message: dict[str, Any]) -> None:
            if "result" in message:
                clock.write()
            send(self, message)

        worker_main._Sender.__call__ = count_and_send  # type: ignore[method-assign]
    worker_main.main()
