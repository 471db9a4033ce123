"""Signals, simultaneous starts, finished runs, clocks: who works on a run, and what is left."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from kills import (
    SIGNALS,
    STAGES,
    Moment,
    assert_same,
    copy_until,
    counted,
    kill_config,
    living_groups,
    message,
    run_campaign,
    start,
)
from test_bad_input import cli
from tiny import in_child, start_child

Figure = Callable[[str, object], None]
HANG_S = 10.0
"""A tenfold bound, which tells a hang from a slow machine; the figures say how long it took."""


class Clean:
    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.counts = counted(kill_config(self.run), folder / "counts")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Clean:
    return Clean(tmp_path_factory.mktemp("clean"))


@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_ends_each_stage_in_good_order(
    clean: Clean, tmp_path: Path, stage: str, name: str
) -> None:
    busy = [place for place in clean.counts if place[1:] == (2, stage)]
    process, number, _ = min(busy, key=lambda place: place[0] == "orchestrator")
    moment = Moment(process, number, stage, clean.counts[process, number, stage] // 2, name)
    config = kill_config(tmp_path / "run")
    copy_until(clean.run, tmp_path / "run", number)
    assert start(config, moment) == 128 + SIGNALS[name], message(config)
    assert not living_groups(tmp_path / "run")
    said = message(config)
    assert f"Stopped by {SIGNALS[name].name}." in said
    assert (
        f"to go on: online-dpo resume {tmp_path / 'run'}" in said and "safe: rounds 0 to 1" in said
    )
    assert start(config) == 0, message(config)
    assert_same(tmp_path / "run", clean.run, f"{moment}")


def never_close() -> None:
    """The end that a first signal asks for never comes; the file says when it was asked for."""
    from online_dpo.crew import Crew

    def hang(self: Crew) -> None:
        (self._run / "closing").touch()
        time.sleep(600)

    Crew.close = hang  # type: ignore[method-assign]


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(
    clean: Clean, tmp_path: Path, figure: Figure, second: signal.Signals
) -> None:
    config = kill_config(tmp_path / "run")
    copy_until(clean.run, tmp_path / "run", 1)
    moment = {"process": "trainer", "round": 1, "stage": "train", "count": 9, "victim": "sigterm"}
    process = start_child(run_campaign, config, moment, None, never_close)
    wait_until((tmp_path / "run/closing").exists)
    assert process.pid is not None
    began = time.monotonic()
    os.kill(process.pid, second)
    process.join(HANG_S)
    took = time.monotonic() - began
    assert process.exitcode == -second
    figure(f"second signal, {second.name}: ended after (at most 1 s)", f"{took:.2f} s")
    wait_until(lambda: not living_groups(tmp_path / "run"))


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def everything(run: Path) -> dict[str, tuple[int, str]]:
    """Every file's and folder's time of change and content."""
    return {
        str(path.relative_to(run)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in [run, *run.rglob("*")]
    }


def test_resuming_a_finished_run_does_nothing(clean: Clean, tmp_path: Path, figure: Figure) -> None:
    before = everything(clean.run)
    began = time.monotonic()
    assert in_child(cli, ["resume", str(clean.run)], str(tmp_path / "log")) == 0
    took = time.monotonic() - began
    figure("resume of a finished run (at most 3 s)", f"{took:.2f} s")
    assert took < 10 * 3.0
    assert everything(clean.run) == before


def resume_at_once(run: str, log: str, times: str, barrier: Barrier) -> None:
    """`online-dpo resume` when all are there; the winner waits in its first round for ever."""
    from online_dpo.loop import Loop

    def hold(self: Loop) -> None:
        Path(run, "won").write_text(str(os.getpid()))
        time.sleep(600)

    Loop.run = hold  # type: ignore[method-assign]
    barrier.wait()
    began = time.monotonic()
    try:
        cli(["resume", run], log)
    finally:
        Path(times).write_text(f"{time.monotonic() - began:.3f}")


def test_of_twenty_starts_one_wins(clean: Clean, tmp_path: Path, figure: Figure) -> None:
    run = tmp_path / "run"
    copy_until(clean.run, run, 3)
    barrier = multiprocessing.get_context("forkserver").Barrier(20)
    logs = [tmp_path / f"log-{i}" for i in range(20)]
    times = [tmp_path / f"time-{i}" for i in range(20)]
    starts = [
        start_child(resume_at_once, str(run), str(log), str(at), barrier)
        for log, at in zip(logs, times, strict=True)
    ]
    wait_until(lambda: sum(process.exitcode is not None for process in starts) == 19)
    (winner,) = [process for process in starts if process.exitcode is None]
    wait_until((run / "won").exists)
    wait_until(lambda: (run / "won").read_text() == str(winner.pid))
    for process, log in zip(starts, logs, strict=True):
        if process is not winner:
            assert process.exitcode == 3
            assert f"in use by process {winner.pid} on " in log.read_text()
    slowest = max(float(at.read_text()) for at in times if at.is_file())
    figure("slowest of 19 refused starts (at most 2 s)", f"{slowest:.2f} s")
    assert slowest < 10 * 2.0
    winner.kill()
    winner.join()
    assert in_child(cli, ["resume", str(run)], str(tmp_path / "log")) == 0
    (run / "won").unlink()
    assert_same(run, clean.run, "after the winner was killed")


def set_back(config: dict[str, Any], seconds: float) -> None:
    """Run with a wall clock that jumps by so many seconds at every third look."""
    import online_dpo

    real, looks = time.time, [0]

    def jumping() -> float:
        looks[0] += 1
        return real() + seconds * (looks[0] // 3)

    time.time = jumping
    online_dpo.run(config)


@pytest.mark.parametrize("seconds", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, seconds: float) -> None:
    inline = {"threads": 1, "workers": "inline"}
    still = kill_config(tmp_path / "still/run", compute=inline, campaign={"rounds": 2})
    moving = kill_config(tmp_path / "moving/run", compute=inline, campaign={"rounds": 2})
    assert in_child(set_back, still, 0.0) == in_child(set_back, moving, seconds) == 0
    assert_same(tmp_path / "moving/run", tmp_path / "still/run", f"{seconds} s")
