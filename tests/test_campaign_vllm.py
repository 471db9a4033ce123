"""A campaign of two rounds whose responses come from the real vLLM, in processes of their own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny import in_child, tiny_config

from online_dpo.files import read_json
from online_dpo.store import RunDir, read_lines
from online_dpo.tables import read_table

VLLM_SECTIONS: dict[str, dict[str, Any]] = {
    "sampling": {"sampler": "vllm", "engine": {"max_model_len": 128}},
    "compute": {"workers": "processes"},
}


def run_it(config: dict[str, Any]) -> None:
    import online_dpo

    online_dpo.run(config)


@pytest.mark.timeout(400)
def test_two_rounds_with_vllm(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", **VLLM_SECTIONS)
    # vLLM wants heads of 32 on a CPU.
    config["model"]["init"] |= {"num_heads": 1, "max_length": 128}
    assert in_child(run_it, config, timeout_s=380) == 0, _logs(tmp_path / "run")
    run = RunDir(tmp_path / "run")
    loads = [event for event in run.events() if event["event"] == "policy loaded"]
    assert [load["round"] for load in loads] == [0, 1, 2]
    assert [load["how"] for load in loads] == ["fresh", "reloaded", "reloaded"]
    assert all(load["canary"]["max_error"] < 1e-3 for load in loads)
    for number in (1, 2):
        first = json.loads(
            (run.path / f"rounds/{number:03d}/training/steps.jsonl").read_text().splitlines()[0]
        )
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert first["margin"] == pytest.approx(0.0, abs=1e-5)
        facts = run.round(number).manifest("samples/part-00000")
        assert facts["made_with"]["sampler"] == "vllm"
    hashes = {run.round(n).manifest()["policy"]["sha256"] for n in (0, 1, 2)}
    assert len(hashes) == 3
    _check_logprobs(run)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_replicas_of_vllm_sample_together(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", **VLLM_SECTIONS)
    config["model"]["init"] |= {"num_heads": 1, "max_length": 128}
    config["sampling"]["engine"]["data_parallel_size"] = 2
    config["campaign"]["rounds"] = 1
    assert in_child(run_it, config, timeout_s=850) == 0, _logs(tmp_path / "run")
    run = RunDir(tmp_path / "run")
    rows = read_table(run.path / "rounds/001/samples/part-00000/samples.parquet")
    assert [row["prompt_id"] for row in rows[::4]] == list(run.round(1).plan().prompt_ids[:4])
    assert {path.name for path in (run.path / "logs").glob("sampler-*.log")} == {
        "sampler-0.log",
        "sampler-1.log",
    }


def _check_logprobs(run: RunDir) -> None:
    """vLLM's sampled log-probs are those of the policy that the plan names."""
    from online_dpo.training.handler import Trainer

    config = read_json(run.path / "rounds/002/round.json")
    rows = read_table(run.path / "rounds/002/samples/part-00000/samples.parquet")
    prompts = {
        row["id"]: row["token_ids"]
        for row in read_table(run.path / "rounds/000/prompts/prompts.parquet")
    }
    from online_dpo import Campaign

    settings = Campaign(run.path).config
    trainer = Trainer(
        {
            "device": "cpu",
            "threads": 1,
            "num_processes": 1,
            "train": settings.train.model_dump(mode="json"),
            "model": settings.model.model_dump(mode="json"),
        }
    )
    policy = config["policy"]
    found = trainer.score(
        emit=lambda event: None,
        model={"path": str(run.path / policy["path"]), "sha256": policy["sha256"]},
        sequences=[
            {"prompt": prompts[row["prompt_id"]], "response": row["token_ids"]} for row in rows
        ],
    )
    for row, expected in zip(rows, found["logps"], strict=True):
        assert row["logprobs"] == pytest.approx(expected, abs=1e-3)


def _logs(run: Path) -> str:
    texts = [path.read_text(errors="replace")[-3000:] for path in run.glob("logs/*.log")]
    return "\n".join([*texts, str(read_lines(run / "events.jsonl")[-5:])])
