"""The canary's sequences and tolerances, and that it catches what a real engine can get wrong."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_adapter, start_vllm_worker
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from online_dpo.models.adapter_files import is_adapter
from online_dpo.models.pinning import base_folder
from online_dpo.samplers.canary import TOLERANCES, check, deviation, make_sequences
from online_dpo.workers import ChildWorker

PROMPTS = [[(7 * i + 31 * row) % 320 for i in range(20)] for row in range(10)]


def test_sequences_depend_on_the_prompts_alone_and_one_is_long() -> None:
    sequences = make_sequences(PROMPTS)
    assert sequences == make_sequences(PROMPTS)
    assert [prompt for prompt, _ in sequences[:3]] == [tuple(p) for p in PROMPTS[:3]]
    lengths = [len(prompt) for prompt, _ in sequences]
    # Two blocks of the 128 positions that vLLM's cache has on a CPU; more of the GPU's 16.
    assert max(lengths) > 2 * 128
    assert len({response for _, response in sequences}) == 4


@given(
    st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=40), min_size=1, max_size=6),
    st.integers(4, 600),
)
def test_sequences_fit_the_context_and_are_made_of_prompt_tokens(
    prompts: list[list[int]], context: int
) -> None:
    known = {token for prompt in prompts for token in prompt}
    for prompt, response in make_sequences(prompts, max_length=context):
        assert prompt and response
        assert len(prompt) + len(response) < context
        assert known >= {*prompt, *response}


def test_no_token_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        make_sequences([[]])


@pytest.mark.parametrize(
    ("dtype", "shift", "agrees"),
    [
        ("float32", [1e-6, -1e-6], True),
        ("float32", [2e-3, 0.0], False),
        ("float32", [3e-4, 3e-4], False),
        ("bfloat16", [0.016, -0.016], True),
        ("bfloat16", [0.5, 0.01], False),
    ],
)
def test_the_tolerance_covers_numeric_noise_only(
    dtype: str, shift: list[float], agrees: bool
) -> None:
    expected = [[-1.0, -2.0], [-3.0, -0.5, -0.25]]
    actual = [[e + s for e, s in zip(expected[0], shift, strict=True)], list(expected[1])]
    found = check(expected, actual, tolerance=TOLERANCES[dtype])
    assert (found is None) is agrees
    if found is not None:
        assert found.max_error == pytest.approx(max(map(abs, shift)))
        assert found.mean_error == pytest.approx(sum(map(abs, shift)) / 2)


def test_an_error_in_one_sequence_is_not_averaged_away() -> None:
    zeros = [[0.0] * 16 for _ in range(9)]
    assert deviation(zeros, [*zeros[:8], [0.2] * 16]).mean_error == pytest.approx(0.2)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_not_finite_never_agrees(value: float) -> None:
    assert check([[0.0, -1.0]], [[0.0, value]], tolerance=TOLERANCES["bfloat16"]) is not None


def another_policy(folder: Path, target: Path, *, step: float) -> Path:
    """The policy after a training step: the same folder with weights moved a little."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    torch.manual_seed(3)
    moved = {n: (w + step * torch.randn_like(w)).contiguous() for n, w in weights.items()}
    save_file(moved, target / "model.safetensors", metadata={"format": "pt"})
    return target


def write_canary(folder: Path, path: Path) -> str:
    """What the trainer stores: log-probs by transformers, each sequence alone, in float32."""
    if is_adapter(folder):
        base = AutoModelForCausalLM.from_pretrained(base_folder(folder))
        model = PeftModel.from_pretrained(base, str(folder)).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    sequences = make_sequences(PROMPTS, max_length=384)
    logps = []
    for prompt, response in sequences:
        with torch.no_grad():
            rows = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
        logps.append([rows[len(prompt) + t - 1, r].item() for t, r in enumerate(response)])
    rows_json = [{"prompt": list(p), "response": list(r)} for p, r in sequences]
    path.write_text(json.dumps({"sequences": rows_json, "logps": logps}))
    return str(path)


class Policies:
    """Two policies of one architecture, their canaries, and the shared engine to load them into."""

    def __init__(self, worker: ChildWorker, first: Path, tmp: Path, *, step: float) -> None:
        self.worker = worker
        self.folders = [first, another_policy(first, tmp / "second", step=step)]
        self.canaries = [write_canary(f, tmp / f"{i}.json") for i, f in enumerate(self.folders)]
        self._id = str(tmp)
        self.events: list[dict[str, Any]] = []

    def load(self, index: int) -> dict[str, Any]:
        return self.worker.call(
            "load",
            model={"path": str(self.folders[index]), "sha256": f"{self._id}/{index}"},
            canary=self.canaries[index],
            on_event=self.events.append,
        )


@pytest.fixture
def policies(vllm_worker: ChildWorker, tiny_qwen2: Path, tmp_path: Path) -> Iterator[Policies]:
    yield Policies(vllm_worker, tiny_qwen2, tmp_path, step=0.01)
    vllm_worker.call("fail", fault=None)


def test_policies_follow_each_other_in_place_and_pass(policies: Policies) -> None:
    policies.load(0)
    for index in (1, 0, 1):
        result = policies.load(index)
        assert result["how"] == "reloaded"
        assert result["canary"]["max_error"] < 1e-4
    assert policies.load(1)["how"] == "cached"
    assert policies.events == []


@pytest.mark.parametrize(
    ("fault", "fresh_engine"), [("no_head", False), ("stale_cache", False), ("no_load", True)]
)
def test_the_canary_catches_what_a_load_left_behind(
    policies: Policies, fault: str, fresh_engine: bool
) -> None:
    policies.load(0)
    policies.worker.call("fail", fault=fault, fresh_engine=fresh_engine)
    result = policies.load(1)
    assert [event["event"] for event in policies.events] == ["canary_failed"]
    assert policies.events[0]["how"] == "reloaded"
    assert result["how"] == "restarted"
    assert result["canary"]["max_error"] < 1e-4


def test_the_proof_finds_what_one_small_step_would_hide(
    vllm_worker: ChildWorker, tiny_qwen2: Path, tmp_path: Path
) -> None:
    tiny = Policies(vllm_worker, tiny_qwen2, tmp_path, step=1e-7)
    tiny.load(0)
    try:
        for fault in ("no_head", "stale_cache", "no_load"):
            vllm_worker.call("fail", fault=fault)
            tiny.load(1)
            assert tiny.events == []
            found = vllm_worker.call("prove", folder=str(tiny_qwen2))["problem"]
            assert found is not None and "differ from transformers" in found
            vllm_worker.call("fail", fault=None)
            tiny.load(0)
        assert vllm_worker.call("prove", folder=str(tiny_qwen2))["problem"] is None
    finally:
        vllm_worker.call("fail", fault=None)


class Adapters:
    """A base and two adapters of it, and an engine to load them into."""

    def __init__(self, worker: ChildWorker, base: Path, tmp: Path) -> None:
        self.worker = worker
        adapters = [make_adapter(base, tmp / f"adapter-{i}", seed=i) for i in (1, 2)]
        self.folders = [base, *adapters]
        self.canaries = [write_canary(f, tmp / f"{i}.json") for i, f in enumerate(self.folders)]
        self._id = str(tmp)
        self.events: list[dict[str, Any]] = []

    def load(self, index: int) -> str:
        """How it was loaded; the canary passed."""
        result = self.worker.call(
            "load",
            model={"path": str(self.folders[index]), "sha256": f"{self._id}/{index}"},
            canary=self.canaries[index],
            on_event=self.events.append,
        )
        assert result["canary"]["max_error"] < 2e-4
        return str(result["how"])


@pytest.fixture(scope="module")
def adapter_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChildWorker]:
    """A vLLM engine that takes adapters of rank 4."""
    worker = start_vllm_worker(tmp_path_factory.mktemp("adapter_worker"), adapter_rank=4)
    yield worker
    worker.close()


def test_adapters_follow_each_other_in_one_engine_and_pass(
    adapter_worker: ChildWorker, tiny_qwen2: Path, tmp_path: Path
) -> None:
    adapters = Adapters(adapter_worker, tiny_qwen2, tmp_path)
    order = (0, 1, 2, 1, 0)
    assert [adapters.load(index) for index in order] == ["fresh", *["adapter"] * 4]
    assert adapters.events == []
    folder = str(adapters.folders[1])
    assert adapter_worker.call("prove_adapter", folder=folder)["problem"] is None
    assert adapters.load(2) == "adapter"  # the proof's own adapter is gone
    adapter_worker.call("fail", fault="no_adapter")
    problem = adapter_worker.call("prove_adapter", folder=folder)["problem"]
    assert "differ from transformers" in problem
    adapter_worker.call("fail", fault=None)


@pytest.mark.slow
def test_an_adapter_that_stays_behind_is_caught_and_merged_weights_take_over(
    adapter_worker: ChildWorker, tiny_qwen2: Path, tmp_path: Path
) -> None:
    """Runs last of those with this engine, which takes no adapters afterwards."""
    adapters = Adapters(adapter_worker, tiny_qwen2, tmp_path)
    for index in (1, 2, 1):  # the proof passes before the fault comes
        adapters.load(index)
    adapter_worker.call("fail", fault="no_adapter", fresh_engine=True)
    assert adapters.load(2) == "restarted"
    assert [event["event"] for event in adapters.events] == ["canary_failed"]
    assert adapters.load(1) == "reloaded"
    assert adapters.load(0) == "reloaded"


def test_merged_adapters_are_loaded_in_place(
    vllm_worker: ChildWorker, tiny_qwen2: Path, tmp_path: Path
) -> None:
    adapters = Adapters(vllm_worker, tiny_qwen2, tmp_path)
    adapters.load(0)
    assert [adapters.load(index) for index in (1, 2, 0)] == ["reloaded"] * 3
    assert adapters.events == []
