"""The three samplers are interchangeable: the offline vLLM, its server, and transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from conftest import start_vllm_worker
from safetensors.torch import load_file, save_file
from test_canary import another_policy, write_canary
from vllm_processes import VllmServer

from online_dpo.errors import ConfigError, EngineError
from online_dpo.samplers.handler import SamplerHandler
from online_dpo.tables import read_table
from online_dpo.workers import ChildWorker, InlineWorker, Worker

PROMPTS = [
    {"id": f"p{i}", "source": "set", "token_ids": [2 + (7 * i + j) % 300 for j in range(3 + i % 5)]}
    for i in range(8)
]
CONTEXT = 384


def settings(sampler: str, **sampling: Any) -> dict[str, Any]:
    return {
        "sampler": sampler,
        "device": "cpu",
        "threads": 1,
        "model": {"path": "tiny"},
        "sampling": {"sampler": sampler, **sampling},
    }


def loaded(worker: Worker, folder: Path) -> Worker:
    worker.call("load", model={"path": str(folder), "sha256": str(folder)})
    return worker


@pytest.fixture(scope="module")
def transformers_worker(tiny_qwen2: Path) -> Worker:
    return loaded(InlineWorker(lambda: SamplerHandler(settings("transformers"))), tiny_qwen2)


def test_an_engine_argument_that_vllm_does_not_have_is_named(
    tiny_qwen2: Path, tmp_path: Path
) -> None:
    engine = {"gpu_memory_utilisation": 0.5}
    worker = start_vllm_worker(tmp_path, sampling={"sampler": "vllm", "engine": engine})
    try:
        with pytest.raises(ConfigError, match=r"no such .*did you mean 'gpu_memory_utilization'"):
            loaded(worker, tiny_qwen2)
    finally:
        worker.close()


@pytest.fixture
def vllm(vllm_worker: ChildWorker, tiny_qwen2: Path) -> Worker:
    return loaded(vllm_worker, tiny_qwen2)


def served(server: VllmServer, command: str = "true") -> Worker:
    sampling = {
        "endpoints": [{"url": server.base_url, "model": server.model}] * 2,
        "reload_command": command,
    }
    return InlineWorker(lambda: SamplerHandler(settings("openai_server", **sampling)))


@pytest.fixture(scope="module")
def server_worker(vllm_server: VllmServer, tiny_qwen2: Path) -> Worker:
    return loaded(served(vllm_server), tiny_qwen2)


Answer = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def answer(tmp_path: Path) -> Answer:
    numbers = count()

    def answer(worker: Worker, prompts: list[dict[str, Any]] = PROMPTS, n: int = 1, **changes: Any):
        params = {
            "n": n, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 24, "stop": [],
            **changes,
        }  # fmt: skip
        seeds = {row["id"]: [1000 * int(row["id"][1:]) + k for k in range(n)] for row in prompts}
        out = tmp_path / f"{next(numbers)}.parquet"
        worker.call("generate", prompts=prompts, seeds=seeds, params=params, out=str(out))
        return read_table(out)

    return answer


def without_logprobs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "logprobs"} for row in rows]


def test_greedy_decoding_gives_the_same_tokens_from_all_three(
    answer: Answer, transformers_worker: Worker, vllm: Worker, server_worker: Worker
) -> None:
    expected = answer(transformers_worker)
    assert len({tuple(row["token_ids"]) for row in expected}) == len(PROMPTS)
    for worker in (vllm, server_worker):
        rows = answer(worker)
        assert without_logprobs(rows) == without_logprobs(expected)
        for row, other in zip(rows, expected, strict=True):
            assert row["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)


def test_stop_strings_end_a_response_alike(
    answer: Answer, transformers_worker: Worker, vllm: Worker, server_worker: Worker
) -> None:
    texts = [row["text"] for row in answer(transformers_worker)]
    ascii_runs = [t[i : i + 2] for t in texts for i in range(len(t) - 1) if t[i : i + 2].isascii()]
    stop = [ascii_runs[0], ascii_runs[-1]]
    expected = answer(transformers_worker, stop=stop)
    assert {"stop", "length"} <= {row["finish_reason"] for row in expected}
    for worker in (vllm, server_worker):
        assert without_logprobs(answer(worker, stop=stop)) == without_logprobs(expected)


def test_sampled_logprobs_are_raw_and_responses_end_with_the_eos(
    answer: Answer, transformers_worker: Worker, vllm: Worker, server_worker: Worker
) -> None:
    for worker in (vllm, server_worker):
        rows = answer(worker, n=12, temperature=0.7, top_k=40, top_p=0.9, max_new_tokens=60)
        sequences = [
            {
                "prompt": PROMPTS[int(row["prompt_id"][1:])]["token_ids"],
                "response": row["token_ids"],
            }
            for row in rows
        ]
        expected = transformers_worker.call("score", sequences=sequences)["logps"]
        own = worker.call("score", sequences=sequences)["logps"]
        for row, logps, scored in zip(rows, expected, own, strict=True):
            assert row["logprobs"] == pytest.approx(logps, abs=1e-4)
            assert scored == pytest.approx(logps, abs=1e-4)
            ended = row["token_ids"][-1] == 0
            assert row["finish_reason"] == ("eos" if ended else "length")
            assert 0 not in row["token_ids"][:-1] and "<eos>" not in row["text"]
        assert any(row["finish_reason"] == "eos" for row in rows)


def test_a_response_depends_on_its_seed_not_on_its_neighbours(
    answer: Answer, vllm: Worker, server_worker: Worker
) -> None:
    for worker in (vllm, server_worker):
        together = answer(worker, n=4, temperature=1.0)
        alone = answer(worker, prompts=PROMPTS[3:4], n=4, temperature=1.0)
        assert [row["token_ids"] for row in together[12:16]] == [row["token_ids"] for row in alone]
        assert len({tuple(row["token_ids"]) for row in together}) == len(together)


def test_a_sequence_may_fill_the_context(
    answer: Answer, transformers_worker: Worker, vllm: Worker, server_worker: Worker
) -> None:
    ids = [2 + i % 300 for i in range(CONTEXT)]
    sequences = [{"prompt": ids[:300], "response": ids[300:]}, {"prompt": ids[:1], "response": [7]}]
    expected = transformers_worker.call("score", sequences=sequences)["logps"]
    for worker in (vllm, server_worker):
        for got, logps in zip(
            worker.call("score", sequences=sequences)["logps"], expected, strict=True
        ):
            assert got == pytest.approx(logps, abs=1e-4)
    prompts = [{"id": "p0", "source": "set", "token_ids": ids[: CONTEXT - 4]}]
    for worker in (transformers_worker, vllm, server_worker):
        row = answer(worker, prompts=prompts)[0]
        assert (len(row["token_ids"]), row["finish_reason"]) == (4, "length")


RELOAD = """python3 - {{policy}} <<'END'
import json, sys, urllib.request
def post(path, **body):
    headers = {{"Content-Type": "application/json"}}
    data = json.dumps(body).encode()
    urllib.request.urlopen(urllib.request.Request("{root}" + path, data, headers)).read()
post("/collective_rpc", method="reload_weights", kwargs={{"weights_path": sys.argv[1]}})
post("/reset_prefix_cache")
END"""


def test_a_servers_policy_is_reloaded_by_command_and_checked(
    answer: Answer, vllm_server: VllmServer, tiny_qwen2: Path, tmp_path: Path
) -> None:
    second = another_policy(tiny_qwen2, tmp_path / "second", step=0.05)
    canaries = [write_canary(f, tmp_path / f"{f.name}.json") for f in (tiny_qwen2, second)]
    command = RELOAD.format(root=vllm_server.root)
    try:
        worker = served(vllm_server, command)
        # The file has the tied weights once, and vLLM's own reload then keeps the old projection.
        with pytest.raises(EngineError, match="does not serve the weights in .*second"):
            worker.call("load", model={"path": str(second), "sha256": "2"}, canary=canaries[1])
        whole = with_own_head(second, tmp_path / "whole")
        result = worker.call("load", model={"path": str(whole), "sha256": "3"}, canary=canaries[1])
        assert result["how"] == "reloaded" and result["canary"]["max_error"] < 1e-4
        forgotten = served(vllm_server, "true")
        with pytest.raises(EngineError, match="does not serve the weights"):
            forgotten.call(
                "load", model={"path": str(tiny_qwen2), "sha256": "1"}, canary=canaries[0]
            )
    finally:
        whole = with_own_head(tiny_qwen2, tmp_path / "first")
        loaded(served(vllm_server, command), whole)


def with_own_head(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_failing_reload_command_is_an_engine_error_with_its_output(
    vllm_server: VllmServer, tiny_qwen2: Path
) -> None:
    worker = served(vllm_server, "echo no room on gpu3; exit 7")
    with pytest.raises(EngineError, match=r"status 7: .*\n.*no room on gpu3"):
        loaded(worker, tiny_qwen2)


def test_an_unknown_model_is_named(vllm_server: VllmServer, tiny_qwen2: Path) -> None:
    wrong = VllmServer(vllm_server.base_url, "other", vllm_server.folder)
    with pytest.raises(EngineError, match="no model named 'other'; it serves policy"):
        loaded(served(wrong), tiny_qwen2)


def test_the_server_fills_a_schema_without_white_space(vllm_server: VllmServer) -> None:
    """What the LLM judge's tests rely on."""
    import openai

    schema = {
        "type": "object",
        "properties": {"winner": {"enum": ["A", "B", "tie"]}},
        "required": ["winner"],
        "additionalProperties": False,
    }
    with openai.OpenAI(base_url=vllm_server.base_url, api_key="none") as client:
        reply = client.chat.completions.create(
            model=vllm_server.model,
            messages=[{"role": "user", "content": "Which is better?"}],
            max_tokens=32,
            temperature=0.0,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "verdict", "schema": schema, "strict": True},
            },
        )
    assert json.loads(reply.choices[0].message.content or "")["winner"] in ("A", "B", "tie")
