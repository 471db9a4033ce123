"""LoRA and QLoRA: adapters per round over one base, references beside them, exact merges."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_training import (
    contents,
    dpo_arguments,
    ignore,
    plan,
    ref,
    score_reference,
    write_pairs,
)
from tiny import tiny_config
from trainer_calls import run_pair, settings
from transformers import AutoModelForCausalLM

from online_dpo.campaign import resume, start
from online_dpo.config import AdapterConfig
from online_dpo.config_file import config_from_dict
from online_dpo.errors import ConfigError, CorruptError
from online_dpo.export import export_campaign
from online_dpo.models.loading import load_model
from online_dpo.models.merging import merged_weights, write_merged
from online_dpo.training.handler import Trainer
from online_dpo.views import Campaign

SEQUENCES = [{"prompt": [5, 6, 7], "response": [8, 9, 10, 11]}, {"prompt": [40], "response": [3]}]
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


def lora(**changes: Any) -> dict[str, Any]:
    given = {"rank": 4, "alpha": 8.0, **changes.pop("adapter", {})}
    options = {"batch_size": 5, "epochs": 3, **changes}
    return settings(lora=AdapterConfig(**given), **options)


def train(trainer: Trainer, folder: Path, model: Path, name: str, **changes: Any) -> Any:
    arguments = dpo_arguments(folder, model, name, plan=plan(learning_rate=1e-2), **changes)
    return trainer.dpo(emit=ignore, **arguments)


def logps(trainer: Trainer, folder: Path) -> list[float]:
    found = trainer.score(emit=ignore, model=ref(folder), sequences=SEQUENCES)["logps"]
    return [value for row in found for value in row]


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path) -> Path:
    """Ten pairs with the tiny Llama's log-probs as the reference's."""
    write_pairs(tmp_path / "pairs.parquet", 10)
    score_reference(tmp_path, tiny_llama)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with `one`, an adapter of the tiny Llama after a round."""
    folder = tmp_path_factory.mktemp("trained")
    write_pairs(folder / "pairs.parquet", 10)
    score_reference(folder, tiny_llama)
    train(Trainer(lora()), folder, tiny_llama, "one")
    return folder


def test_a_round_writes_the_adapter_alone_and_names_its_base(
    trained: Path, tiny_llama: Path
) -> None:
    policy = trained / "one"
    assert {path.name for path in policy.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "base.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "train_metrics.jsonl",
        "summary.json",
    }
    assert json.loads((policy / "base.json").read_text()) == {
        "path": str(tiny_llama),
        "sha256": str(tiny_llama),
    }
    weights = load_file(policy / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert len(weights) == 2 * 2 * 7 and not any("lm_head" in name for name in weights)
    assert all(float(tensor.abs().max()) > 0 for tensor in weights.values())
    moments = load_file(trained / "one-optimizer" / "optimizer.safetensors")
    assert len(moments) == 3 * len(weights)


def test_merged_weights_equal_the_adapter_as_peft_has_it(
    trained: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        before = base(TOKENS).logits
        peft = PeftModel.from_pretrained(base, str(trained / "one"))
        expected = peft.eval()(TOKENS).logits
        write_merged(trained / "one", tmp_path / "merged", dtype="float32")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(TOKENS).logits
        unmerged = load_model(trained / "one")(TOKENS).logits
    assert float((expected - before).abs().max()) > 0.1
    torch.testing.assert_close(merged, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(unmerged, expected, atol=1e-5, rtol=0)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in merged_weights(trained / "one"):
        assert torch.equal(tensor, stored[name])
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        path.name for path in tiny_llama.iterdir()
    }


def test_the_first_update_is_that_of_the_merged_weights(folder: Path, tiny_llama: Path) -> None:
    """dL/dB = scale * dL/dW A^T at B = 0, dL/dW from a round that trains all weights."""
    Trainer(settings(batch_size=10, max_grad_norm=1e9)).dpo(
        emit=ignore, **dpo_arguments(folder, tiny_llama, "whole")
    )
    Trainer(lora(batch_size=10, max_grad_norm=1e9, epochs=1)).dpo(
        emit=ignore,
        **dpo_arguments(folder, tiny_llama, "adapted", plan=plan(learning_rate=1e-12)),
    )
    whole = load_file(folder / "whole-optimizer" / "optimizer.safetensors")
    adapted = load_file(folder / "adapted-optimizer" / "optimizer.safetensors")
    start = load_file(folder / "adapted" / "adapter_model.safetensors")
    for layer in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        a = start[f"base_model.model.{layer}.lora_A.weight"]
        expected = 8.0 / 4 * whole[f"{layer}.weight.exp_avg"] @ a.T
        found = adapted[f"{layer}.lora_B.default.weight.exp_avg"]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)


def test_after_a_promotion_a_round_starts_at_ln_2(trained: Path, tmp_path: Path) -> None:
    """The promoted adapter is the reference, and the policy goes on from the same adapter."""
    first = json.loads((trained / "one" / "summary.json").read_text())
    assert first["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["last_loss"] < math.log(2) - 0.01
    write_pairs(tmp_path / "pairs.parquet", 10, seed=1)
    trainer = Trainer(lora())
    score_reference(tmp_path, trained / "one", trainer)
    second = train(trainer, tmp_path, trained / "one", "two")
    assert second["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert second["last_loss"] < math.log(2) - 0.01
    assert (tmp_path / "two" / "base.json").read_text() == (
        trained / "one" / "base.json"
    ).read_text()


def test_policy_0_is_the_base_with_the_adapter_off(trained: Path, tiny_llama: Path) -> None:
    """To the bit, before and after an adapter was in it; each model is asked for in turn."""
    trainer = Trainer(lora())
    plain = logps(Trainer(settings()), tiny_llama)
    merged = logps(trainer, trained / "one")
    assert logps(trainer, tiny_llama) == plain != merged
    assert logps(trainer, trained / "one") == merged


def test_memory_and_disk_give_the_same_next_round(folder: Path, tiny_llama: Path) -> None:
    stays = Trainer(lora())
    train(stays, folder, tiny_llama, "one")
    stays.adopt(emit=ignore, sha256=str(folder / "one"))
    logps(stays, tiny_llama)
    train(stays, folder, folder / "one", "two")
    train(Trainer(lora()), folder, folder / "one", "again")
    assert contents(folder / "two") == contents(folder / "again")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter": {"dropout": 0.3, "rslora": True, "target_modules": ["q_proj", "up_proj"]}},
        {"adapter": {"quantization": "nf4"}},
        {"adam_moments": "8bit", "adapter": {"rank": 64}},
    ],
    ids=["plain", "dropout", "nf4", "8bit"],
)
def test_resumed_at_a_step_is_byte_equal(
    folder: Path, tiny_llama: Path, changes: dict[str, Any]
) -> None:
    options = lora(batch_size=4, checkpoint_every=1, **changes)
    train(Trainer(options), folder, tiny_llama, "whole")
    checkpoint = folder / "whole-checkpoints" / "step-000002.partial"
    stored = load_file(checkpoint / "model.safetensors")
    assert stored and all("lora_" in name for name in stored), "the frozen base is not stored"
    train(Trainer(options), folder, tiny_llama, "resumed", resume_from=str(checkpoint))
    assert contents(folder / "whole") == contents(folder / "resumed")
    assert contents(folder / "whole-optimizer") == contents(folder / "resumed-optimizer")


def test_dropout_acts_in_training_alone(folder: Path, tiny_llama: Path) -> None:
    trainer = Trainer(lora(adapter={"dropout": 0.5}))
    train(trainer, folder, tiny_llama, "dropped")
    trainer.adopt(emit=ignore, sha256=str(folder / "dropped"))
    kept = logps(trainer, folder / "dropped")
    assert kept == logps(Trainer(lora()), folder / "dropped")
    train(Trainer(lora()), folder, tiny_llama, "plain")
    assert contents(folder / "dropped") != contents(folder / "plain")


def test_checkpointing_changes_nothing_under_dropout(folder: Path, tiny_llama: Path) -> None:
    for name, on in (("plain", False), ("recomputed", True)):
        options = lora(adapter={"dropout": 0.3}, gradient_checkpointing=on)
        train(Trainer(options), folder, tiny_llama, name)
    assert contents(folder / "plain-optimizer") == contents(folder / "recomputed-optimizer")


def test_layers_that_are_not_there_or_not_inner_are_refused(folder: Path, tiny_llama: Path) -> None:
    options = lora(adapter={"target_modules": ["q_proj", "c_attn"]})
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no layer c_attn"):
        train(Trainer(options), folder, tiny_llama, "none")
    with pytest.raises(ValueError, match="lm_head cannot be adapted"):
        AdapterConfig(target_modules=["lm_head"])


def test_an_adapter_of_another_shape_is_refused(trained: Path) -> None:
    with pytest.raises(CorruptError, match="does not hold an adapter of this model with rank 2"):
        logps(Trainer(lora(adapter={"rank": 2})), trained / "one")


def test_bfloat16_base_keeps_float32_adapters(folder: Path, tiny_llama: Path) -> None:
    options = {**lora(precision="bfloat16")}
    options["model"] = {**options["model"], "dtype": "bfloat16"}
    trainer = Trainer(options)
    score_reference(folder, tiny_llama, trainer)
    result = train(trainer, folder, tiny_llama, "rounded")
    assert result["first_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert result["last_loss"] < result["first_loss"]
    weights = load_file(folder / "rounded" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    held = trainer.adapters.adapted.model if trainer.adapters else None
    assert held is not None and held.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_4_bit_weights_are_those_that_round_0_stores(
    folder: Path, tiny_llama: Path, dtype: str
) -> None:
    """Quantizing what 4 bits amount to gives the same 4 bits, so sampler and trainer agree."""
    options = lora(adapter={"quantization": "nf4"}, precision=dtype)
    options["model"] = {**options["model"], "dtype": dtype}
    trainer = Trainer(options)
    trainer.dequantize(emit=ignore, model=str(tiny_llama), out=str(folder / "base"))
    trainer.dequantize(emit=ignore, model=str(folder / "base"), out=str(folder / "again"))
    assert contents(folder / "base") == contents(folder / "again")
    quantized = logps(trainer, folder / "base")
    held = trainer.adapters.adapted.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert held.dtype == torch.uint8 and held.numel() == 64 * 64 // 2
    plain = settings(precision=dtype)
    plain["model"] = {**plain["model"], "dtype": dtype}
    tolerance = 1e-5 if dtype == "float32" else 0.1
    assert logps(Trainer(plain), folder / "base") == pytest.approx(quantized, abs=tolerance)
    assert logps(Trainer(plain), tiny_llama) != pytest.approx(quantized, abs=0.1)


def test_qlora_trains_and_merges_into_what_round_0_stored(folder: Path, tiny_llama: Path) -> None:
    options = lora(adapter={"quantization": "nf4"})
    trainer = Trainer(options)
    trainer.dequantize(emit=ignore, model=str(tiny_llama), out=str(folder / "base"))
    score_reference(folder, folder / "base", trainer)
    result = train(trainer, folder, folder / "base", "policy")
    assert result["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result["last_loss"] < math.log(2) - 0.01
    trainer.adopt(emit=ignore, sha256=str(folder / "policy"))
    write_merged(folder / "policy", folder / "merged", dtype="float32")
    merged = logps(Trainer(settings()), folder / "merged")
    assert logps(trainer, folder / "policy") == pytest.approx(merged, abs=1e-4)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_campaign_of_adapters(tmp_path: Path, quantization: str | None) -> None:
    """The second round begins from files alone; then the policy is exported, and a damaged base
    noticed."""
    adapter = {"rank": 4, "alpha": 8.0, "quantization": quantization}
    run = tmp_path / "run"
    config = tiny_config(run, train={"lora": adapter}, campaign={"rounds": 1})
    start(config_from_dict(config))
    resume(run, overrides=["campaign.rounds=2"])
    origin = "base" if quantization else "policy"
    for number in (1, 2):
        policy = run / f"rounds/00{number}/policy"
        base = json.loads((policy / "base.json").read_text())
        manifest = json.loads((run / f"rounds/000/{origin}/manifest.json").read_text())
        assert base == {"path": f"../../000/{origin}", "sha256": manifest["sha256"]}
        steps = (run / f"rounds/00{number}/training/steps.jsonl").read_text().splitlines()
        assert json.loads(steps[0])["loss"] == pytest.approx(math.log(2), abs=1e-5)
    written = export_campaign(Campaign(run), tmp_path / "out", adapter=True)
    assert [path.name for path in written[:2]] == ["policy", "adapter"]
    base_model = AutoModelForCausalLM.from_pretrained(run / "rounds/000" / origin)
    tokens = TOKENS % base_model.config.vocab_size
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base_model, str(tmp_path / "out/adapter"))(tokens)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out/policy")(tokens)
    torch.testing.assert_close(exported.logits, expected.logits, atol=2e-5, rtol=0)
    card = (tmp_path / "out/policy/README.md").read_text()
    assert "a LoRA adapter of rank 4 (alpha 8)" in card

    weights = run / "rounds/000" / origin / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CorruptError, match="is not what was committed"):
        export_campaign(Campaign(run), tmp_path / "again")


IN_TWO_PROCESSES: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 4, "alpha": 8.0}},
    "nf4": {"lora": {"rank": 4, "alpha": 8.0, "quantization": "nf4"}},
    "8bit": {"adam_moments": "8bit"},
    "moving": {"reference_update": {"every": 2, "mix": 0.5}},
}


def test_two_processes_are_as_one(tmp_path: Path, tiny_llama: Path) -> None:
    """Seven pairs in steps of five, micro-batches of two, for every option that DDP goes with."""
    write_pairs(tmp_path / "pairs.parquet", 7)
    score_reference(tmp_path, tiny_llama)

    def job(name: str, where: str, num_processes: int) -> dict[str, Any]:
        arguments = dpo_arguments(tmp_path, tiny_llama, f"{name}-{where}")
        if name == "moving":
            arguments |= {"reference_logps": None, "reference": ref(tiny_llama)}
        common = {"batch_size": 5, "micro_batch_size": 2, "epochs": 2, **IN_TWO_PROCESSES[name]}
        return {
            "settings": settings(num_processes=num_processes, **common),
            "calls": [["dpo", arguments]],
        }

    run_pair([job(name, "two", 2) for name in IN_TWO_PROCESSES], tmp_path / "out")
    both = [done["results"][0] for done in json.loads((tmp_path / "out").read_text())]
    for name, two in zip(IN_TWO_PROCESSES, both, strict=True):
        alone = job(name, "one", 1)
        one = Trainer(alone["settings"]).dpo(emit=ignore, **alone["calls"][0][1])
        assert two["steps"] == one["steps"] == 4
        for figure in ("first_loss", "last_loss", "last_margin", "last_grad_norm"):
            assert two[figure] == pytest.approx(one[figure], abs=2e-4), name
