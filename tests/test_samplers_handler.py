"""The sampler's worker-side object: what it loads, writes, reports and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from online_dpo.errors import ConfigError, EngineError
from online_dpo.models.loading import load_model
from online_dpo.samplers.handler import SamplerHandler
from online_dpo.tables import read_table, responses_by_prompt

PARAMS = {
    "n": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 8, "stop": []
}  # fmt: skip
PROMPTS = [{"id": f"p{i}", "source": "set", "token_ids": list(range(5, 9 + i))} for i in range(4)]
SEEDS = {f"p{i}": [2 * i, 2 * i + 1] for i in range(4)}


def settings(**sampling: Any) -> dict[str, Any]:
    return {
        "sampler": "transformers",
        "device": "cpu",
        "threads": 1,
        "model": {"path": "tiny"},
        "sampling": sampling,
    }


def model(folder: Path, sha256: str = "a") -> dict[str, str]:
    return {"path": str(folder), "sha256": sha256}


def quiet(event: dict[str, Any]) -> None:
    pass


@pytest.fixture(scope="module")
def handler(tiny_llama: Path) -> SamplerHandler:
    handler = SamplerHandler(settings())
    handler.load(emit=quiet, model=model(tiny_llama))
    return handler


def test_a_policy_is_loaded_once(tiny_llama: Path, tiny_qwen2: Path) -> None:
    handler = SamplerHandler(settings())
    first = handler.load(emit=quiet, model=model(tiny_llama))
    assert first["how"] == "fresh" and first["deterministic"] and first["canary"] is None
    assert handler.load(emit=quiet, model=model(tiny_llama))["how"] == "cached"
    assert handler.load(emit=quiet, model=model(tiny_qwen2, "b"))["how"] == "fresh"


def test_the_table_holds_every_response_in_order(handler: SamplerHandler, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    out = tmp_path / "samples.parquet"
    result = handler.generate(
        emit=events.append, prompts=PROMPTS, seeds=SEEDS, params=PARAMS, out=str(out)
    )
    rows = read_table(out)
    assert [row["id"] for row in rows] == [f"p{i}:{k:02d}" for i in range(4) for k in range(2)]
    assert result["rows"] == 8 and sum(result["finish"].values()) == 8
    assert result["tokens"] == sum(len(row["token_ids"]) for row in rows)
    assert result["batch_size"] == 256
    assert events[-1] == {"event": "progress", "done": 8, "of": 8}
    scored = handler.score(
        emit=quiet,
        sequences=[
            {"prompt": PROMPTS[i // 2]["token_ids"], "response": row["token_ids"]}
            for i, row in enumerate(rows)
        ],
    )["logps"]
    for row, logps in zip(rows, scored, strict=True):
        assert row["source"] == "policy"
        assert row["logprobs"] == pytest.approx(logps, abs=1e-5)
    assert [len(r) for r in responses_by_prompt(rows).values()] == [2] * 4


def test_prompts_may_come_as_a_table_and_the_bytes_repeat(
    handler: SamplerHandler, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = tmp_path / "prompts.parquet"
    pq.write_table(pa.Table.from_pylist(PROMPTS), table)
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, prompts in zip(paths, (str(table), PROMPTS), strict=True):
        handler.generate(emit=quiet, prompts=prompts, seeds=SEEDS, params=PARAMS, out=str(path))
    assert paths[0].read_bytes() == paths[1].read_bytes()


def canary_file(handler: SamplerHandler, path: Path, *, off: float) -> str:
    sequences = [{"prompt": [3, 4, 5], "response": [6, 7]}, {"prompt": [9], "response": [8]}]
    logps = handler.score(emit=quiet, sequences=sequences)["logps"]
    logps[0][1] += off
    path.write_text(json.dumps({"sequences": sequences, "logps": logps}))
    return str(path)


def test_the_canary_is_reported_or_ends_the_run(
    handler: SamplerHandler, tiny_llama: Path, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    good = canary_file(handler, tmp_path / "good.json", off=0.0)
    other = SamplerHandler(settings())
    result = other.load(emit=events.append, model=model(tiny_llama), canary=good)
    assert result["canary"]["max_error"] < 1e-5 and events == []
    bad = canary_file(handler, tmp_path / "bad.json", off=0.01)
    with pytest.raises(EngineError, match=r"does not serve the weights in .*0\.01 nats"):
        other.load(emit=events.append, model=model(tiny_llama, "b"), canary=bad)
    assert [event["event"] for event in events] == ["canary_failed"]
    with pytest.raises(EngineError):
        other.load(emit=quiet, model=model(tiny_llama, "b"), canary=bad)


def test_inline_the_trainers_model_answers(tiny_llama: Path, tmp_path: Path) -> None:
    shared = load_model(tiny_llama)
    handler = SamplerHandler(settings(), model_source=lambda policy, folder: shared)
    handler.load(emit=quiet, model=model(tiny_llama))
    before = handler.score(emit=quiet, sequences=[{"prompt": [3], "response": [4, 5]}])
    for parameter in shared.parameters():
        parameter.data.mul_(1.1)
    after = handler.score(emit=quiet, sequences=[{"prompt": [3], "response": [4, 5]}])
    assert before != after


def test_sleeping_and_waking_change_nothing(handler: SamplerHandler) -> None:
    sequences = [{"prompt": [3], "response": [4, 5]}]
    before = handler.score(emit=quiet, sequences=sequences)
    handler.sleep(emit=quiet)
    handler.wake(emit=quiet)
    assert handler.score(emit=quiet, sequences=sequences) == before


def test_engine_arguments_that_are_decided_elsewhere_are_refused() -> None:
    engine = {"logprobs_mode": "processed_logits"}
    with pytest.raises(ConfigError, match="logprobs_mode cannot be set"):
        SamplerHandler({**settings(engine=engine), "sampler": "vllm"})
