"""Two training processes give what one gives, the model whole in each (DDP) or sharded (FSDP2).

One pair of processes makes all the calls; the tests compare what it left with one process's work.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import make_tiny_model, make_tokenizer
from safetensors.torch import load_file
from test_training import (
    contents,
    dpo_arguments,
    ignore,
    plan,
    ref,
    sft_arguments,
    write_demonstrations,
    write_pairs,
)
from torch.distributed.device_mesh import DeviceMesh
from trainer_calls import run_pair, settings
from transformers import Gemma2Config, Gemma2ForCausalLM

from online_dpo.errors import ConfigError
from online_dpo.models.loading import load_model
from online_dpo.training.handler import Trainer
from online_dpo.training.logprobs import LogProbModel
from online_dpo.training.sharding import shard

COMMON = {"batch_size": 5, "micro_batch_size": 2, "checkpoint_every": 1, "epochs": 2}
"""Seven pairs in steps of five, micro-batches of two: uneven everywhere, and four steps."""

ROUNDING = 3e-6
"""Weights move by 1e-3 and more, and by this at most where float32 adds in another order."""

SEQUENCES = [{"prompt": [5], "response": [6, 7]}]
"""For one of the two processes there is nothing to score."""


def make_windowed_model(folder: Path) -> Path:
    """A Gemma 2: its attention takes no shared prompts, its logits are capped, it is tied."""
    config = Gemma2Config(
        vocab_size=321,
        hidden_size=16,
        intermediate_size=33,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        final_logit_softcapping=2.0,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


class Work:
    """A folder that one process and two have written into, and what they returned."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Of 321 and 129 rows the first of two processes holds one more than the second.
        sizes = {"vocab_size": 321, "intermediate_size": 129}
        self.llama = make_tiny_model(path / "llama", "llama", **sizes)
        self.tied = make_tiny_model(path / "qwen2", "qwen2", **sizes)
        self.windowed = make_windowed_model(path / "gemma2")
        write_pairs(path / "pairs.parquet", 7)
        write_demonstrations(path / "demonstrations.jsonl", 11)
        self.one: dict[str, list[Any]] = {}
        self.two: dict[str, dict[str, Any]] = {}

    def reference(self, model: Path, name: str) -> list[Any]:
        pairs, out = str(self.path / "pairs.parquet"), str(self.path / f"{name}-reference")
        return ["score_reference", {"model": ref(model), "pairs": pairs, "out": out}]

    def dpo(self, start: Path, name: str, reference: str = "one", **changes: Any) -> list[Any]:
        changes["reference_logps"] = str(self.path / f"{reference}-reference")
        return ["dpo", {**dpo_arguments(self.path, start, name), **changes}]

    def all_calls(self, name: str) -> list[list[Any]]:
        """Scoring for training and for comparison, supervised training, a round of DPO."""
        return [
            self.reference(self.llama, name),
            ["score", {"model": ref(self.llama), "sequences": SEQUENCES}],
            ["sft", sft_arguments(self.path, self.llama, f"{name}-sft", checkpoint_every=1)],
            self.dpo(self.llama, name, name),
        ]

    def checkpoint(self, name: str, step: int = 2) -> str:
        return str(self.path / f"{name}-checkpoints" / f"step-{step:06d}.partial")

    def alone(self, name: str, *calls: list[Any], **train: Any) -> None:
        trainer = Trainer(settings(**{**COMMON, **train}))
        self.one[name] = [getattr(trainer, m)(emit=ignore, **arguments) for m, arguments in calls]

    def together(self, **jobs: tuple[list[list[Any]], dict[str, Any]]) -> None:
        given = [
            {"settings": settings(num_processes=2, **{**COMMON, **train}), "calls": calls}
            for calls, train in jobs.values()
        ]
        run_pair(given, self.path / "results.json")
        results = json.loads((self.path / "results.json").read_text())
        self.two = dict(zip(jobs, results, strict=True))

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.path / name / "model.safetensors")

    def optimizer(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.path / f"{name}-optimizer" / "optimizer.safetensors")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    work = Work(tmp_path_factory.mktemp("parallel"))
    fsdp = {"parallel": "fsdp"}
    half = {"precision": "bfloat16"}
    thrifty = {"gradient_sync": "micro_batch", "gradient_checkpointing": True}
    second = {
        "plan": plan(round=2, optimizer_step=4),
        "optimizer": str(work.path / "one-optimizer"),
    }
    kept = ref(work.path / "rounded", "adopted")
    scores = {"sequences": SEQUENCES}

    def resumed(how: str) -> list[list[Any]]:
        return [
            work.dpo(
                work.llama, f"{origin}-then-{how}", origin, resume_from=work.checkpoint(origin)
            )
            for origin in ("one", "ddp", "fsdp")
        ]

    work.alone("one", *work.all_calls("one"))
    work.alone("tied", work.reference(work.tied, "tied"), work.dpo(work.tied, "tied", "tied"))
    odd = [work.reference(work.windowed, "odd"), work.dpo(work.windowed, "odd", "odd")]
    work.alone("odd", *odd)
    work.alone("coupled", work.dpo(work.llama, "coupled"), loss="aot")
    work.alone("carried", work.dpo(work.path / "one", "carried", **second), optimizer="carry")
    work.alone("half", work.dpo(work.llama, "half"), **half)
    work.together(
        ddp=(work.all_calls("ddp"), {}),
        fsdp=(work.all_calls("fsdp"), fsdp),
        tied=(
            [work.reference(work.tied, "fsdp-tied"), work.dpo(work.tied, "fsdp-tied", "tied")],
            {**fsdp, **thrifty},
        ),
        odd=(
            [work.reference(work.windowed, "fsdp-odd"), work.dpo(work.windowed, "fsdp-odd", "odd")],
            fsdp,
        ),
        coupled=([work.dpo(work.llama, "fsdp-coupled")], {**fsdp, "loss": "aot"}),
        carried=(
            [work.dpo(work.path / "one", "fsdp-carried", **second)],
            {**fsdp, "optimizer": "carry"},
        ),
        half=([work.dpo(work.llama, "fsdp-half")], {**fsdp, **half}),
        half_thrifty=([work.dpo(work.llama, "fsdp-half-thrifty")], {**fsdp, **half, **thrifty}),
        rounded=(
            [
                work.dpo(work.llama, "rounded"),
                ["adopt", {"sha256": "adopted"}],
                ["release", {}],
                ["score", {"model": kept, **scores}],
                work.dpo(work.path / "rounded", "rounded-kept", model=kept),
                ["score", {"model": ref(work.path / "rounded"), **scores}],
                work.dpo(work.path / "rounded", "rounded-loaded"),
            ],
            {**fsdp, "dtype": "bfloat16"},
        ),
        resumed_by_fsdp=(resumed("fsdp"), fsdp),
        resumed_by_ddp=(resumed("ddp"), {}),
    )
    for origin in ("ddp", "fsdp"):
        checkpoint = work.checkpoint(origin)
        work.alone(
            origin, work.dpo(work.llama, f"{origin}-then-one", origin, resume_from=checkpoint)
        )
    return work


def assert_equal(work: Work, left: str, right: str, *, moments: bool = True) -> None:
    """The same policies, and optimizers, but for the order in which float32 numbers are added."""
    tensors = [(work.weights(left), work.weights(right))]
    if moments:
        tensors.append((work.optimizer(left), work.optimizer(right)))
    for ours, theirs in tensors:
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=ROUNDING, rtol=0, msg=name)


def test_there_are_two_processes_and_each_holds_half(work: Work) -> None:
    assert {job["layout"]["world_size"] for job in work.two.values()} == {2}
    assert work.two["ddp"]["layout"]["shares"] == {}
    for name in ("fsdp", "tied", "half", "rounded"):
        weights = work.weights("tied" if name == "tied" else "one")
        shares = work.two[name]["layout"]["shares"]
        assert shares.keys() == weights.keys()
        for weight, share in shares.items():
            rows = len(weights[weight])
            assert share == (rows + 1) // 2 / rows, weight


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_are_as_one(work: Work, how: str) -> None:
    one, two = work.one["one"], work.two[how]["results"]
    for ours, theirs in zip(one[1]["logps"], two[1]["logps"], strict=True):
        assert theirs == pytest.approx(ours, abs=ROUNDING)
    assert two[3]["steps"] == 4
    for call in (2, 3):
        assert two[call].keys() == one[call].keys()
        # A first accuracy counts the signs of margins that are nought.
        noise = ("first_accuracy", "mean_accuracy")
        figures = {k: v for k, v in one[call].items() if isinstance(v, float) and k not in noise}
        assert {k: two[call][k] for k in figures} == pytest.approx(figures, abs=ROUNDING)
    assert_equal(work, "one", how)
    assert_equal(work, "one-sft", f"{how}-sft", moments=False)
    steps = [e["step"] for e in work.two[how]["events"] if e["event"] == "checkpoint"]
    assert steps == [1, 1, 2, 3]
    start, weights = load_file(work.llama / "model.safetensors"), work.weights(how)
    moved = max(float((weights[k] - t).abs().max()) for k, t in start.items())
    assert moved > 100 * ROUNDING, "the tolerance would accept untrained weights"


def test_sharded_tied_embeddings_recomputation_and_sums_for_every_micro_batch(work: Work) -> None:
    assert "lm_head.weight" not in work.weights("fsdp-tied")
    assert_equal(work, "tied", "fsdp-tied")


def test_a_sharded_model_that_takes_no_shortcut(work: Work) -> None:
    """The self-test's failures, one of them in the middle of a forward pass, leave no trace."""
    assert_equal(work, "odd", "fsdp-odd")


def test_a_sharded_model_trains_on_a_loss_of_the_whole_step(work: Work) -> None:
    assert_equal(work, "coupled", "fsdp-coupled")


def test_a_sharded_policy_is_saved_with_the_files_of_a_whole_one(work: Work) -> None:
    for one, two in (("one", "fsdp"), ("tied", "fsdp-tied")):
        ours, theirs = contents(work.path / one), contents(work.path / two)
        assert ours.keys() == theirs.keys()
        for name in ("config.json", "generation_config.json", "tokenizer.json"):
            assert ours[name] == theirs[name]


def test_a_sharded_optimizer_is_carried(work: Work) -> None:
    assert work.two["carried"]["results"][0]["optimizer_step"] == 8
    assert_equal(work, "carried", "fsdp-carried")


@pytest.mark.parametrize(
    ("origin", "how"),
    [("one", "ddp"), ("one", "fsdp"), *product(("ddp", "fsdp"), ("one", "ddp", "fsdp"))],
)
def test_a_checkpoint_is_resumed_by_any(work: Work, origin: str, how: str) -> None:
    """As it was, that is byte-equal; otherwise to rounding."""
    assert_equal(work, origin, f"{origin}-then-{how}")
    if origin == how:
        assert contents(work.path / origin) == contents(work.path / f"{origin}-then-{how}")


def test_bfloat16_shards_have_float32_masters(work: Work) -> None:
    one = work.one["half"][0]
    for name in ("half", "half_thrifty"):
        two = work.two[name]["results"][0]
        for figure in ("first_loss", "last_loss", "last_margin"):
            assert two[figure] == pytest.approx(one[figure], abs=2e-2)
    for name in ("fsdp-half", "fsdp-half-thrifty"):
        tensors = {**work.weights(name), **work.optimizer(name)}
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        lost = [t.bfloat16().float() != t for t in work.weights(name).values()]
        assert torch.cat([t.flatten() for t in lost]).float().mean() > 0.9


def test_adopted_shards_are_those_of_the_file(work: Work) -> None:
    """Weights saved in bfloat16 go on rounded, also after they made room for a sampler."""
    results = work.two["rounded"]["results"]
    assert results[3] == results[5]
    assert {tensor.dtype for tensor in work.weights("rounded").values()} == {torch.bfloat16}
    assert contents(work.path / "rounded-kept") == contents(work.path / "rounded-loaded")


def test_layers_must_be_named(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    model._no_split_modules = set()
    with pytest.raises(ConfigError, match="LlamaForCausalLM does not name its layers"):
        shard(LogProbModel(model), cast(DeviceMesh, None))
