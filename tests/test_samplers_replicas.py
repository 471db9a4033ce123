"""Data parallel sampling: several workers answer as one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from online_dpo.errors import EngineError
from online_dpo.samplers.handler import SamplerHandler
from online_dpo.samplers.replicas import ReplicatedSampler
from online_dpo.tables import read_table
from online_dpo.workers import InlineWorker

PARAMS = {
    "n": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 6, "stop": []
}  # fmt: skip
PROMPTS = [
    {"id": f"p{9 - i}", "source": "set", "token_ids": list(range(5, 9 + i))} for i in range(7)
]
SEEDS = {row["id"]: [3 * i, 3 * i + 1] for i, row in enumerate(PROMPTS)}


class OneAtATime(InlineWorker):
    """Replicas have processes of their own; two loads in one process break transformers' tying."""

    _lock = threading.Lock()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        with self._lock:
            return super().call(method, **params)


def one() -> InlineWorker:
    settings: dict[str, Any] = {
        "sampler": "transformers",
        "device": "cpu",
        "threads": 1,
        "model": {"path": "tiny"},
        "sampling": {},
    }
    return OneAtATime(lambda: SamplerHandler(settings))


def test_replicas_answer_as_one_sampler_does(tiny_llama: Path, tmp_path: Path) -> None:
    model = {"path": str(tiny_llama), "sha256": "a"}
    tables, results, scores = [], [], []
    events: list[dict[str, Any]] = []
    for worker in (one(), ReplicatedSampler([one() for _ in range(3)])):
        loaded = worker.call("load", model=model)
        assert loaded["how"] == "fresh" and loaded["deterministic"] and loaded["canary"] is None
        out = str(tmp_path / "samples.parquet")
        results.append(
            worker.call(
                "generate", on_event=events.append,
                prompts=PROMPTS, seeds=SEEDS, params=PARAMS, out=out,
            )
        )  # fmt: skip
        tables.append(read_table(Path(out)))
        sequences = [
            {"prompt": row["token_ids"], "response": [7] * (i + 1)} for i, row in enumerate(PROMPTS)
        ]
        scores.append(worker.call("score", sequences=sequences)["logps"])
        worker.close()
    for row, other in zip(*tables, strict=True):
        assert row["logprobs"] == pytest.approx(other["logprobs"], abs=1e-5)
        del row["logprobs"], other["logprobs"]
    assert tables[0] == tables[1]
    assert results[0] == results[1]
    for row, other in zip(*scores, strict=True):
        assert row == pytest.approx(other, abs=1e-5)
    assert events[-1] == {"event": "progress", "done": 14, "of": 14}


def test_fewer_prompts_than_replicas(tiny_llama: Path, tmp_path: Path) -> None:
    worker = ReplicatedSampler([one(), one(), one()])
    worker.call("load", model={"path": str(tiny_llama), "sha256": "a"})
    out = str(tmp_path / "samples.parquet")
    result = worker.call("generate", prompts=PROMPTS[:1], seeds=SEEDS, params=PARAMS, out=out)
    assert result["rows"] == 2 and len(read_table(Path(out))) == 2


class Failing(InlineWorker):
    def __init__(self) -> None:
        super().__init__(lambda: None)
        self.closed = False

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        raise EngineError("the third GPU is gone")

    def close(self) -> None:
        self.closed = True


def test_the_failure_of_one_ends_all(tiny_llama: Path) -> None:
    failing = [Failing(), Failing()]
    worker = ReplicatedSampler([one(), *failing])
    with pytest.raises(EngineError, match="third GPU"):
        worker.call("load", model={"path": str(tiny_llama), "sha256": "a"})
    assert all(worker.closed for worker in failing)
