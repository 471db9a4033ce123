"""Kills at seeded moments of a campaign: what is resumed is, byte by byte, what was interrupted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judge_server import Answer, JudgeServer, Request, Say
from kills import (
    STAGES,
    VICTIMS,
    Moment,
    assert_same,
    copy_until,
    counted,
    draw_moment,
    kill_config,
    message,
    start,
)
from tiny import digests

from online_dpo.config_file import dump_yaml
from online_dpo.store import RunDir

Figure = Callable[[str, object], None]
REPLAY = "replay: python -m pytest 'tests/test_kills.py::{}'"


class Clean:
    """An uninterrupted campaign, and how many calls each of its stages made in which process."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.counts = counted(kill_config(self.run), folder / "counts")

    def moment(self, seed: int) -> Moment:
        """The moment of a seed; six seeds in a row meet all six stages."""
        return draw_moment(self.counts, STAGES[1 + seed % 6], random.Random(seed))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Clean:
    return Clean(tmp_path_factory.mktemp("clean"))


def kill(config: dict[str, Any], moment: Moment) -> None:
    """Run into the moment; the loss of a worker alone is mended, or named by the exit code."""
    code = start(config, moment)
    assert code in ((0, 10) if moment.victim == "worker" else (-9,)), (moment, message(config))


def resume(config: dict[str, Any], case: str) -> None:
    assert start(config) == 0, f"{case}\n{message(config)}"


def test_every_round_changes_the_weights_and_repeats_itself(clean: Clean, tmp_path: Path) -> None:
    run = RunDir(clean.run)
    assert len({run.round(n).manifest()["policy"]["sha256"] for n in range(4)}) == 4
    places = {(stage, process) for process, number, stage in clean.counts if number > 0}
    assert {stage for stage, _ in places} == set(STAGES[1:])
    assert {process for _, process in places} == {"orchestrator", "sampler", "trainer"}
    config = kill_config(tmp_path / "run")
    resume(config, "uninterrupted")
    assert_same(tmp_path / "run", clean.run, "uninterrupted")


@pytest.mark.parametrize("seed", range(30))
def test_a_kill_at_a_seeded_moment_changes_nothing(clean: Clean, tmp_path: Path, seed: int) -> None:
    moment = clean.moment(seed)
    name = f"test_a_kill_at_a_seeded_moment_changes_nothing[{seed}]"
    case = f"seed {seed}, {moment}; {REPLAY.format(name)}"
    config = kill_config(tmp_path / "run")
    copy_until(clean.run, tmp_path / "run", moment.round)
    kill(config, moment)
    resume(config, case)
    assert_same(tmp_path / "run", clean.run, case)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("hundred", [0, 1])
def test_two_hundred_kills_change_nothing(
    clean: Clean, tmp_path: Path, figure: Figure, hundred: int
) -> None:
    stages = []
    for seed in range(1000 + 102 * hundred, 1000 + 102 * (hundred + 1)):
        moment = clean.moment(seed)
        case = f"seed {seed}, {moment}"
        config = kill_config(tmp_path / str(seed) / "run")
        kill(config, moment)
        resume(config, case)
        assert_same(tmp_path / str(seed) / "run", clean.run, case)
        stages.append(moment.stage)
        shutil.rmtree(tmp_path / str(seed))
    by_stage = ", ".join(f"{stages.count(s)} in {s}" for s in STAGES[1:])
    figure(f"kills resumed byte-equal, half {hundred + 1} of 2", f"{len(stages)}: {by_stage}")


def judged_config(run: Path, url: str) -> dict[str, Any]:
    """The same campaign with a judge that is paid for, in labels and in evaluations."""
    judge = {
        "name": "llm_pairwise",
        "options": {"model": "m", "base_url": url, "price_per_million": [1, 2], "max_tokens": 40},
        "orders": "one",
    }
    return {**kill_config(run), "judge": judge}


def longer_wins(request: Request, number: int) -> Answer:
    """A verdict that depends on the request alone."""
    digest = hashlib.sha256(json.dumps(request["messages"]).encode()).digest()
    return Say(json.dumps({"verdict": "AB"[digest[0] % 2]}))


def unpaid(run: Path) -> dict[str, Any]:
    """What is committed, without the ledger's length and hash: a lost call is a row too."""
    kept: dict[str, Any] = dict(digests(run))
    for manifest in run.glob("rounds/*/labels/*/manifest.json"):
        facts = json.loads(manifest.read_text())
        facts.pop("ledger")
        kept[manifest.relative_to(run).as_posix()] = facts
    return kept


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_killed_twice_it_buys_nothing_twice(tmp_path: Path, figure: Figure) -> None:
    with JudgeServer(longer_wins) as server:
        config = judged_config(tmp_path / "clean/run", server.url)
        counts = counted(config, tmp_path / "counts")
        needed = len(server.requests)
        clean = unpaid(tmp_path / "clean/run")
        lost = 0
        for seed in range(50):
            moments = two_moments(counts, random.Random(seed))
            case = f"seed {seed}, {moments}"
            before = len(server.requests)
            run = tmp_path / f"{seed}/run"
            config = judged_config(run, server.url)
            for moment in moments:
                start(config, moment)
            assert start(config) == 0, f"{case}\n{message(config)}"
            assert unpaid(run) == clean, case
            states = paid_calls(run)
            once = all(s.count("settled") == 1 and s[-1] == "settled" for s in states.values())
            assert once, f"{case}: {states}"
            unknown = sum(s.count("unknown") for s in states.values())
            assert needed <= len(server.requests) - before <= needed + unknown, case
            lost += len(server.requests) - before - needed
    figure("50 x two kills: calls lost in flight, and made again", lost)


def two_moments(
    counts: dict[tuple[str, int, str], int], rng: random.Random
) -> tuple[Moment, Moment]:
    """A kill and one of what resumes it: the second is no earlier in the campaign."""
    drawn = [draw_moment(counts, rng.choice(STAGES[1:]), rng) for _ in range(2)]
    first, second = sorted(drawn, key=lambda m: (m.round, STAGES.index(m.stage), m.count))
    return first, second


def paid_calls(run: Path) -> dict[str, list[str]]:
    """The states of every call's attempts, in their order."""
    states: dict[str, list[str]] = {}
    with contextlib.closing(sqlite3.connect(run / "judgments.sqlite")) as db:
        for key, state in db.execute("SELECT key, state FROM calls ORDER BY key, attempt"):
            states.setdefault(key, []).append(state)
    return states


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_kills_of_the_installed_command_change_nothing(tmp_path: Path, figure: Figure) -> None:
    """Cold: the command itself, its workers as it starts them; killed at its n-th event."""
    config = kill_config(tmp_path / "clean/run", campaign={"rounds": 1})
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config))
    command = [str(Path(sys.executable).parent / "online-dpo")]
    subprocess.run([*command, "run", str(file)], check=True, stdout=subprocess.DEVNULL)
    num_lines = len((tmp_path / "clean/run/events.jsonl").read_text().splitlines())
    for seed in range(20):
        rng = random.Random(seed)
        run, victim, line = tmp_path / f"{seed}/run", rng.choice(VICTIMS), rng.randint(1, num_lines)
        case = f"seed {seed}, {victim} at event {line}"
        started = [*command, "run", str(file), "--run-dir", str(run)]
        log = (tmp_path / "log").open("ab")
        process = subprocess.Popen(started, stdout=log, stderr=log)
        while process.poll() is None and lines_of(run) < line:
            time.sleep(0.002)
        for pid in workers_of(process.pid) if victim != "orchestrator" else []:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        if victim != "worker":
            process.kill()
        assert process.wait() in (0, 10, -9), case
        resumed = [*command, "resume", str(run)]
        assert subprocess.run(resumed, stdout=log, stderr=log, check=False).returncode == 0, case
        log.close()
        assert_same(run, tmp_path / "clean/run", case)
    figure("kills of the installed command resumed byte-equal", 20)


def lines_of(run: Path) -> int:
    file = run / "events.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def workers_of(pid: int) -> list[int]:
    """The children of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    with contextlib.suppress(OSError):
        return [int(child) for child in children.read_text().split()]
    return []
