"""The shipped quickstart itself: convincing over three seeds, and unchanged by kills. Slow."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import digests

from online_dpo import Campaign
from online_dpo.store import RunDir

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from make_quickstart_data import is_well_formed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def command(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "online_dpo.cli", *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Finished quickstart campaigns by seed, each run once."""
    folder = tmp_path_factory.mktemp("quickstart")

    def run(seed: int) -> Path:
        path = folder / f"seed-{seed}"
        if not path.exists():
            seeded = ["--set", f"campaign.seed={seed}", "--run-dir", str(path)]
            assert command("run", "quickstart.yaml", *seeded).wait() == 0
        return path

    return run


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_quickstart_convinces(finished: Callable[[int], Path], seed: int) -> None:
    campaign = Campaign(finished(seed))
    first, *_, last = campaign.rounds()
    assert first.evaluation is not None and last.evaluation is not None
    answers = campaign.answers(last.round)
    formed = [is_well_formed(a["text"]) and a["finish_reason"] == "eos" for a in answers]
    assert last.evaluation["win_rate_policy0"]["low"] > 0.8
    assert sum(formed) / len(formed) >= 0.8
    assert last.evaluation["distinct_2"] >= 0.5 * first.evaluation["distinct_2"]


MOMENTS = {
    "origin": "rounds/000/prompts",
    "sample": "rounds/001/samples/part-00000.partial",
    "label": "rounds/002/samples/part-00000",
    "pair": "rounds/003/labels/part-00000",
    "train": "rounds/004/reference",
    "evaluate": "rounds/005/canary",
    "promote": "rounds/006/evaluation",
}
"""What lies on the disk when a stage has begun."""


def test_a_kill_in_each_stage_changes_nothing(
    finished: Callable[[int], Path], tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    process = command("run", "quickstart.yaml", "--run-dir", str(run))
    for stage, sign in MOMENTS.items():
        while not (run / sign).exists():
            assert process.poll() is None, f"ended before {stage}"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = command("resume", str(run))
    assert process.wait() == 0
    assert digests(run) == digests(finished(0))
    assert len([e for e in RunDir(run).events() if e["event"] == "campaign started"]) >= 8
