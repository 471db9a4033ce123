"""The estimate of the disk that a campaign's weights need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from online_dpo.config import Config
from online_dpo.space import still_needed
from online_dpo.store import RunDir


def config(model: Path, **sections: dict[str, object]) -> Config:
    given: dict[str, object] = {
        "model": {"path": str(model)},
        "prompts": {"train": [{"path": "p.jsonl"}], "holdout": 4},
        "judge": {"name": "scripted"},
        "train": {"checkpoint_every": 0},
        "campaign": {"rounds": 2, "retention": "all"},
        **sections,
    }
    return Config.model_validate(given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_counted_whatever_their_type(tmp_path: Path, dtype: torch.dtype) -> None:
    """Two policies of 37 parameters in float32; with checkpoints, 12 bytes a parameter more."""
    tensors = {"a": torch.zeros(10, 3, dtype=dtype), "b": torch.zeros(7, dtype=dtype)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    run = RunDir(tmp_path / "run")
    assert still_needed(run, config(tmp_path)) == 2 * 37 * 4
    with_checkpoints = config(tmp_path, train={"checkpoint_every": 10})
    assert still_needed(run, with_checkpoints) == 2 * 37 * 4 + 37 * 12


def test_a_model_that_is_not_here_yet_or_cannot_be_read_counts_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert still_needed(run, config(tmp_path)) == 0
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    assert still_needed(run, config(tmp_path)) == 0
