"""Kills at seeded moments of a campaign: what is resumed is, byte by byte, what was interrupted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from kills import (
    STAGES,
    Moment,
    assert_same,
    copy_until,
    counted,
    draw_moment,
    kill_config,
    message,
    start,
)

from online_dpo.store import RunDir

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
def test_two_hundred_kills_change_nothing(clean: Clean, tmp_path: Path, hundred: int) -> None:
    stages = []
    for seed in range(1000 + 102 * hundred, 1000 + 102 * (hundred + 1)):
        moment = clean.moment(seed)
        case = f"seed {seed}, {moment}"
        config = kill_config(tmp_path / str(seed) / "run")
        kill(config, moment)
        resume(config, case)
        assert_same(tmp_path / str(seed) / "run", clean.run, case)
        stages.append(moment.stage)
    print(f"\n{len(stages)} kills, by stage: { {s: stages.count(s) for s in STAGES[1:]} }")


def draw_two(clean: Clean, seed: int) -> tuple[Moment, Moment]:
    """Two moments in the order in which a campaign comes to them."""
    first, second = (
        clean.moment(2 * seed),
        clean.moment(2 * seed + random.Random(seed).randrange(6)),
    )
    order = sorted((first, second), key=lambda m: (m.round, STAGES.index(m.stage)))
    return order[0], order[1]
