"""TR-DPO: the reference follows the policy inside a round, by hard and by soft updates."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import contents, dpo_arguments, ignore, ref, write_pairs
from tiny import tiny_config
from trainer_calls import settings

from online_dpo.campaign import start
from online_dpo.config import ReferenceUpdate, TrainConfig
from online_dpo.config_file import config_from_dict
from online_dpo.errors import ConfigError
from online_dpo.training.handler import Trainer


def moving(*, every: int, mix: float = 1.0, **changes: Any) -> dict[str, Any]:
    update = ReferenceUpdate(every=every, mix=mix)
    return settings(
        batch_size=4, micro_batch_size=2, checkpoint_every=1, reference_update=update, **changes
    )


def train(folder: Path, model: Path, name: str, given: dict[str, Any], **changes: Any) -> None:
    arguments = dpo_arguments(
        folder, model, name, reference_logps=None, reference=ref(model), **changes
    )
    Trainer(given).dpo(emit=ignore, **arguments)


def losses(policy: Path) -> list[float]:
    lines = (policy / "train_metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "pairs.parquet", 10)
    return tmp_path


def test_a_hard_update_after_each_step_gives_ln_2_at_each(folder: Path, tiny_llama: Path) -> None:
    train(folder, tiny_llama, "hard", moving(every=1, epochs=2))
    assert losses(folder / "hard") == pytest.approx([math.log(2)] * 6, abs=1e-6)
    train(folder, tiny_llama, "late", moving(every=2, epochs=2))
    late = losses(folder / "late")
    assert late[::2] == pytest.approx([math.log(2)] * 3, abs=1e-6)
    assert min(abs(loss - math.log(2)) for loss in late[1::2]) > 1e-4


def test_a_soft_update_is_the_mean_by_hand(folder: Path, tiny_qwen2: Path) -> None:
    """After steps 1 and 2: r1 = 0.25 p1 + 0.75 r0, r2 = 0.25 p2 + 0.75 r1; tied weights once."""
    train(folder, tiny_qwen2, "soft", moving(every=1, mix=0.25))
    first, second = (folder / f"soft-checkpoints/step-00000{n}.partial" for n in (1, 2))
    expected = load_file(tiny_qwen2 / "model.safetensors")
    for checkpoint in (first, second):
        policy = load_file(checkpoint / "model.safetensors")
        found = load_file(checkpoint / "reference.safetensors")
        expected = {name: 0.25 * policy[name] + 0.75 * old for name, old in expected.items()}
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-7, rtol=1e-6)
    assert losses(folder / "soft")[1] != pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.5}, {"loss": "aot"}])
def test_a_reference_that_never_moves_is_the_scored_one(
    folder: Path, tiny_llama: Path, options: dict[str, Any]
) -> None:
    given = moving(every=1000, **options)
    train(folder, tiny_llama, "still", given)
    plain = settings(batch_size=4, micro_batch_size=2, **options)
    trainer = Trainer(plain)
    reference = {"model": ref(tiny_llama), "pairs": str(folder / "pairs.parquet")}
    trainer.score_reference(emit=ignore, **reference, out=str(folder / "reference.parquet"))
    trainer.dpo(emit=ignore, **dpo_arguments(folder, tiny_llama, "scored"))
    assert losses(folder / "still") == pytest.approx(losses(folder / "scored"), abs=1e-6)


def test_resumed_it_moves_on_from_where_it_was(folder: Path, tiny_llama: Path) -> None:
    given = moving(every=2, mix=0.6, epochs=2)
    train(folder, tiny_llama, "whole", given)
    for step in (3, 4):
        checkpoint = folder / f"whole-checkpoints/step-00000{step}.partial"
        train(folder, tiny_llama, f"from-{step}", given, resume_from=str(checkpoint))
        assert contents(folder / "whole") == contents(folder / f"from-{step}")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora": {"rank": 4}}, "reference_update and lora exclude each other"),
        ({"loss": "simpo"}, "the loss has none"),
        ({"loss": "kto"}, "responses after other prompts"),
    ],
)
def test_what_a_moving_reference_cannot_serve_is_refused(
    options: dict[str, Any], reason: str
) -> None:
    beta = {"beta": 2.0} if options.get("loss") == "simpo" else {}
    with pytest.raises(ValueError, match=reason):
        TrainConfig(**options, **beta, reference_update={"every": 2})


def test_cached_log_probs_are_refused_beside_it(tmp_path: Path) -> None:
    given = {"train": {"reference_update": {"every": 2}}, "reference": {"logps": "sampled"}}
    with pytest.raises(ConfigError, match="scores the reference anew in every step"):
        config_from_dict(tiny_config(tmp_path / "run", **given))


def test_a_round_with_a_moving_reference_scores_none_before(tmp_path: Path) -> None:
    run = tmp_path / "run"
    update = {"reference_update": {"every": 1}}
    config = tiny_config(run, train=update, campaign={"rounds": 1})
    start(config_from_dict(config))
    assert not (run / "rounds/001/reference").exists()
    steps = (run / "rounds/001/training/steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in steps] == pytest.approx(
        [math.log(2)] * len(steps), abs=1e-6
    )
    manifest = json.loads((run / "rounds/001/policy/manifest.json").read_text())
    plan = json.loads((run / "rounds/001/round.json").read_text())
    assert manifest["inputs"]["reference"] == plan["reference"]["sha256"]
