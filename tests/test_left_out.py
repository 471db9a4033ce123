"""Negative controls: a resume that leaves out part of the state is noticed by the comparison."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kills import assert_same, kill_config, message, start

SECTIONS: dict[str, dict[str, Any]] = {
    "compute": {"threads": 1, "workers": "inline"},
    "reference": {"promote": "never"},
    "campaign": {"rounds": 2, "prompts_per_round": 12},
}


def die_after(artifact: str, *, number: int = 2) -> None:
    """SIGKILL once a round has committed this."""
    from online_dpo.store import RoundDir

    finish = RoundDir.finish

    def finish_and_die(self: RoundDir, name: str, *args: Any, **kwargs: Any) -> Any:
        info = finish(self, name, *args, **kwargs)
        if (self.number, name) == (number, artifact):
            os.kill(os.getpid(), signal.SIGKILL)
        return info

    RoundDir.finish = finish_and_die  # type: ignore[method-assign]


def without_optimizer() -> None:
    from online_dpo.training import checkpoints

    checkpoints.load_optimizer = lambda *_: None


def without_cursor() -> None:
    from online_dpo.training import loop

    load = loop.load_checkpoint

    def from_the_start(*args: Any, **kwargs: Any) -> Any:
        return replace(load(*args, **kwargs), step=0, cursor=0)

    loop.load_checkpoint = from_the_start


def without_reference() -> None:
    """The reference is taken to be the newest policy, not the one that the plan names."""
    from online_dpo.store import RoundDir

    plan = RoundDir.plan
    RoundDir.plan = lambda self: (  # type: ignore[method-assign]
        replace(plan(self), reference=plan(self).policy)
    )


def with_dropout() -> None:
    """Training that draws random numbers: some of the hidden states are dropped in every step."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaMLP

    from online_dpo.training import loop

    take, forward, training = loop._take_step, LlamaMLP.forward, [False]

    def take_step(*args: Any, **kwargs: Any) -> Any:
        training[0] = True
        try:
            return take(*args, **kwargs)
        finally:
            training[0] = False

    def dropping(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(forward(self, x), 0.1, training=training[0])

    loop._take_step = take_step
    LlamaMLP.forward = dropping  # type: ignore[method-assign]


def without_rng() -> None:
    """The generator starts where the process does, as if its state had not been kept."""
    import torch

    with_dropout()
    torch.manual_seed(1)
    torch.manual_seed = lambda *_: None  # type: ignore[assignment]


def _die_after_pairs() -> None:
    die_after("pairs")


def _die_after_a_step() -> None:
    die_after("checkpoints/step-000002")


def _drop_and_die() -> None:
    with_dropout()
    _die_after_a_step()


def _drop_without_rng_and_die() -> None:
    without_rng()
    _die_after_a_step()


CASES = {
    # name: (what all runs have, what kills the first, what the resume has, are they equal)
    "nothing": (None, _die_after_a_step, None, True),
    "nothing, with dropout": (with_dropout, _drop_and_die, with_dropout, True),
    "optimizer state": (None, _die_after_a_step, without_optimizer, False),
    "RNG": (without_rng, _drop_without_rng_and_die, without_rng, False),
    "data cursor": (None, _die_after_a_step, without_cursor, False),
    "recorded reference": (None, _die_after_pairs, without_reference, False),
}


@pytest.mark.parametrize("left_out", CASES)
def test_what_is_left_out_of_a_resume_is_noticed(tmp_path: Path, left_out: str) -> None:
    always, dies, resumed, equal = CASES[left_out]
    whole = kill_config(tmp_path / "whole/run", **SECTIONS)
    killed = kill_config(tmp_path / "killed/run", **SECTIONS)
    assert start(whole, before=always) == 0, message(whole)
    assert start(killed, before=dies) == -signal.SIGKILL
    assert start(killed, before=resumed) in ((0,) if equal else (0, 1, 9)), message(killed)
    if equal:
        assert_same(tmp_path / "killed/run", tmp_path / "whole/run", left_out)
    else:
        with pytest.raises(AssertionError, match="differ"):
            assert_same(tmp_path / "killed/run", tmp_path / "whole/run", left_out)
