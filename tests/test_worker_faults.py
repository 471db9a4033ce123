"""A sampler that exits, hangs, raises or runs out of memory; training that is no longer finite."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kills import assert_same, copy_until, kill_config, living_groups, message, start
from tiny import digests

from online_dpo.store import RunDir
from online_dpo.tables import read_table


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("clean") / "run"
    assert start(kill_config(run)) == 0
    return run


def failing(how: str, times: int, tries: str) -> None:
    """A sampler whose first so many answers, over all its processes, come to nothing."""
    from online_dpo.samplers.handler import SamplerHandler

    generate = SamplerHandler.generate

    def fail_first(self: SamplerHandler, **arguments: Any) -> Any:
        with open(tries, "a+") as file:
            file.write(f"{self._engine.batch_size}\n")
            file.seek(0)
            number = len(file.readlines())
        if number > times:
            return generate(self, **arguments)
        if how == "exits":
            os._exit(77)
        if how == "hangs":
            time.sleep(600)
        raise ValueError("a bug") if how == "raises" else MemoryError("out of memory")

    SamplerHandler.generate = fail_first  # type: ignore[method-assign]


def sizes_tried(tries: Path) -> list[int]:
    """The batch size of each sampler that was asked for answers, in order."""
    return [int(line) for line in tries.read_text().split()]


FAILURES = ("exits", "hangs", "raises", "out of memory")


def last_round(clean: Path, run: Path) -> dict[str, Any]:
    copy_until(clean, run, 3)
    return kill_config(run)


def stalling(how: str) -> list[str]:
    return ["sampling.stall_s=2"] if how == "hangs" else []


@pytest.mark.parametrize("how", FAILURES)
def test_a_sampler_that_fails_once_is_started_anew(clean: Path, tmp_path: Path, how: str) -> None:
    config = last_round(clean, tmp_path / "run")
    broken = partial(failing, how, 1, str(tmp_path / "tries"))
    assert start(config, before=broken, overrides=stalling(how)) == 0, message(config)
    assert sizes_tried(tmp_path / "tries")[:2] == [256, 256]
    assert_same(tmp_path / "run", clean, how)
    assert not living_groups(tmp_path / "run")


@pytest.mark.parametrize("how", FAILURES)
def test_a_sampler_that_goes_on_failing_ends_with_10(clean: Path, tmp_path: Path, how: str) -> None:
    config = last_round(clean, tmp_path / "run")
    tries = tmp_path / "tries"
    broken = partial(failing, how, 3, str(tries))
    assert start(config, before=broken, overrides=stalling(how)) == 10
    assert sizes_tried(tries) == [256, 256, 128]
    said = message(config)
    why = {"exits": "exit code 77", "hangs": "said nothing for 2 s", "raises": "a bug"}
    assert "failed three times" in said and why.get(how, "out of memory") in said
    assert f"to go on: online-dpo resume {tmp_path / 'run'}" in said
    assert not living_groups(tmp_path / "run")
    assert start(config, overrides=stalling(how)) == 0
    assert_same(tmp_path / "run", clean, how)


def test_smaller_batches_are_recorded(clean: Path, tmp_path: Path) -> None:
    config = last_round(clean, tmp_path / "run")
    broken = partial(failing, "out of memory", 2, str(tmp_path / "tries"))
    assert start(config, before=broken) == 0, message(config)
    assert sizes_tried(tmp_path / "tries")[:3] == [256, 256, 128]
    shard = RunDir(tmp_path / "run").round(3).manifest("samples/part-00000")
    assert shard["batch_size"] == 128


def not_finite(what: str, value: float, pair_id: str) -> None:
    """A pair whose loss, or whose gradient alone, is not finite."""
    import torch

    from online_dpo.training.dpo import DpoObjective
    from online_dpo.training.vocabulary import Terms

    terms = DpoObjective.terms

    def poisoned(self: DpoObjective, logps: torch.Tensor, part: Any, squares: Any = None) -> Terms:
        made = terms(self, logps, part, squares)
        if pair_id not in [self.item_id(item) for item in part.items]:
            return made
        if what == "loss":
            return Terms(made.loss * value, made.metrics)
        root = (logps.sum() - logps.sum().detach()).clamp(min=0.0).sqrt()  # 0, its slope infinite
        return Terms(made.loss + root * value, made.metrics)

    DpoObjective.terms = poisoned  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("what", "value"), [("loss", float("nan")), ("loss", float("inf")), ("gradient", 1.0)]
)
def test_what_is_not_finite_ends_with_7_and_names_the_pairs(
    clean: Path, tmp_path: Path, what: str, value: float
) -> None:
    config = kill_config(tmp_path / "run")
    copy_until(clean, tmp_path / "run", 1)
    step, pair_id = 3, order_of_steps(clean)[2]
    broken = partial(not_finite, what, value, pair_id)
    assert start(config, before=broken) == 7, message(config)
    said = message(config)
    assert f"diverged at step {step}:" in said
    assert f"Not finite by themselves: {pair_id}. " in said
    round_dir = RunDir(tmp_path / "run").round(1)
    assert round_dir.children("checkpoints") == [f"checkpoints/step-{step - 1:06d}"]
    assert not round_dir.has("policy") and not round_dir.finished
    assert "Traceback" not in said and "to go on: rm -r" in said
    assert start(config) == 0
    assert_same(tmp_path / "run", clean, what)


def order_of_steps(clean: Path) -> list[str]:
    """The pairs of round 1 in the order in which its steps, of one pair each, take them."""
    from online_dpo.training.batching import plan_steps

    round_dir = RunDir(clean).round(1)
    ids = [row["pair_id"] for row in read_table(round_dir.path / "pairs/pairs.parquet")]
    steps = plan_steps(len(ids), batch_size=1, epochs=1.0, seed=round_dir.plan().seed)
    return [ids[step.items[0]] for step in steps]


JUDGES = """\
def ties(prompt, response):
    return 1.0

def nothing(prompt, response):
    return None

def whole(prompt, response):
    return None if response.truncated else 1.0
"""

NO_PAIRS = {
    "identical": ({"temperature": 1e-4, "top_k": 1}, "ties", "identical"),
    "all tied": ({}, "ties", "tied"),
    "all truncated": ({"max_new_tokens": 1}, "whole", "invalid"),
    "no verdicts": ({}, "nothing", "invalid"),
}


@pytest.mark.parametrize("case", NO_PAIRS)
def test_a_round_without_pairs_ends_with_6_and_leaves_everything_as_it_was(
    tmp_path: Path, case: str
) -> None:
    sampling, function, fate = NO_PAIRS[case]
    (tmp_path / "judges.py").write_text(JUDGES)
    judge = {"name": f"{tmp_path / 'judges.py'}:{function}", "options": {}}
    inline = {"threads": 1, "workers": "inline"}
    config = kill_config(tmp_path / "run", sampling=sampling, compute=inline)
    config["judge"] = judge
    assert start(config) == 6, message(config)
    said = message(config)
    assert f"None of the 16 judged responses can be paired: 16 {fate}." in said
    before = digests(tmp_path / "run")
    assert start(config) == 6
    assert message(config) == said and digests(tmp_path / "run") == before
    assert not RunDir(tmp_path / "run").round(1).has("pairs")
