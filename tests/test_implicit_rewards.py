"""Labelling where the policy's implicit reward margins are widest, in a campaign that is killed."""

from __future__ import annotations

import os
import signal
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from tiny import digests, in_child, tiny_config

import online_dpo
from online_dpo import Campaign
from online_dpo.store import RunDir
from online_dpo.tables import read_table

JUDGE = Path(__file__).parent / "judge_cases.py"


def active_config(run: Path) -> dict[str, Any]:
    return tiny_config(
        run,
        judge={
            "name": f"{JUDGE}:longer",
            "options": {},
            "schedule": "reward_margin",
            "comparisons": 2,
        },
        pairs={"selector": "all"},
        reference={"promote": "never"},
    )


def run_it(config: dict[str, Any]) -> None:
    online_dpo.run(config)


def run_and_die(config: dict[str, Any], artifact: str) -> None:
    """Run, and end by SIGKILL before the named artifact is committed."""
    from online_dpo.store import RoundDir

    finish = RoundDir.finish

    def finish_or_die(self: RoundDir, name: str, *args: Any, **kwargs: Any) -> Any:
        if f"{self.number:03d}/{name}" == artifact:
            os.kill(os.getpid(), signal.SIGKILL)
        return finish(self, name, *args, **kwargs)

    RoundDir.finish = finish_or_die  # type: ignore[method-assign]
    online_dpo.run(config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("active") / "run"
    assert in_child(run_it, active_config(run)) == 0
    return run


def test_the_widest_margins_are_labelled(finished: Path) -> None:
    run = RunDir(finished)
    assert not run.round(1).children("scores")  # the policy is the reference: all margins are 0
    second = run.round(2)
    prompts = {r["id"]: r for r in read_table(finished / "rounds/000/prompts/prompts.parquet")}
    assert second.children("scores") == ["scores/part-00000", "scores/part-00001"]
    for part in ("part-00000", "part-00001"):
        samples = read_table(second.path / "samples" / part / "samples.parquet")
        labels = read_table(second.path / "labels" / part / "labels.parquet")
        reference = online_dpo.sequence_logps(
            Campaign(finished).policy(0),
            [prompts[row["prompt_id"]]["token_ids"] for row in samples],
            [row["token_ids"] for row in samples],
        )
        rewards = {
            row["id"]: sum(row["logprobs"]) - float(logp)
            for row, logp in zip(samples, reference, strict=True)
        }
        for prompt in {row["prompt_id"] for row in samples}:
            own = [row for row in samples if row["prompt_id"] == prompt]
            widths = {
                frozenset((a["id"], b["id"])): abs(rewards[a["id"]] - rewards[b["id"]])
                for a, b in combinations(own, 2)
                if a["text"] != b["text"]
            }
            asked = {
                frozenset((r["first_id"], r["second_id"]))
                for r in labels
                if r["prompt_id"] == prompt
            }
            assert len(asked) == min(2, len(widths))
            left = [width for pair, width in widths.items() if pair not in asked]
            assert min(widths[pair] for pair in asked) >= max(left, default=0.0) - 1e-4


def test_a_kill_changes_nothing(finished: Path, tmp_path: Path) -> None:
    config = active_config(tmp_path / "run")
    assert in_child(run_and_die, config, "002/scores/part-00001") == -signal.SIGKILL
    assert in_child(run_it, config) == 0
    assert digests(tmp_path / "run") == digests(finished)


def budget_config(run: Path) -> dict[str, Any]:
    judge = {"name": f"{JUDGE}:longer", "options": {}, "schedule": "uncertainty"}
    return tiny_config(
        run,
        judge={**judge, "comparisons_per_round": 5},
        pairs={"selector": "all"},
        campaign={"rounds": 1},
    )


def test_a_rounds_budget_is_split_by_prompts_and_survives_a_kill(tmp_path: Path) -> None:
    """Eight prompts in two shards share five comparisons: three and two."""
    config = budget_config(tmp_path / "run")
    assert in_child(run_and_die, config, "001/labels/part-00001") == -signal.SIGKILL
    assert in_child(run_it, config) == 0
    first = RunDir(tmp_path / "run").round(1)
    tables = [read_table(first.path / n / "labels.parquet") for n in first.children("labels")]
    assert [len(table) for table in tables] == [3, 2]
    whole = budget_config(tmp_path / "whole" / "run")
    assert in_child(run_it, whole) == 0
    labels = [name for name in digests(tmp_path / "run") if "/labels/" in name]
    mine, theirs = digests(tmp_path / "run"), digests(tmp_path / "whole" / "run")
    assert labels and all(mine[name] == theirs[name] for name in labels)
