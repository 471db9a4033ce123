"""Options that save memory: 8-bit moments and offloaded activations, exact or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import contents, dpo_arguments, ignore, plan, score_reference, write_pairs
from tiny import tiny_config
from torch.autograd.graph import saved_tensors_hooks
from trainer_calls import settings

from online_dpo.config import TrainConfig
from online_dpo.config_file import config_from_dict
from online_dpo.errors import ConfigError, CorruptError
from online_dpo.models.loading import enable_gradient_checkpointing, load_model
from online_dpo.training.handler import Trainer
from online_dpo.training.optimizers import (
    empty_state,
    make_optimizer,
    put_step_count,
    state_tensors,
)


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path) -> Path:
    write_pairs(tmp_path / "pairs.parquet", 12)
    score_reference(tmp_path, tiny_llama)
    return tmp_path


def test_8_bit_moments_are_small_and_survive_a_stop(folder: Path, tiny_llama: Path) -> None:
    given = settings(adam_moments="8bit", batch_size=4, checkpoint_every=1)
    result = Trainer(given).dpo(emit=ignore, **dpo_arguments(folder, tiny_llama, "whole"))
    assert result["steps"] == 3
    stored = load_file(folder / "whole-optimizer" / "optimizer.safetensors")
    large = {name: t.dtype for name, t in stored.items() if name.endswith("q_proj.weight.state1")}
    assert set(large.values()) == {torch.uint8}
    # Embeddings and tensors below 4096 elements keep float32.
    assert stored["model.embed_tokens.weight.state1"].dtype == torch.float32
    assert stored["model.norm.weight.state2"].dtype == torch.float32
    checkpoint = folder / "whole-checkpoints" / "step-000002.partial"
    arguments = dpo_arguments(folder, tiny_llama, "resumed", resume_from=str(checkpoint))
    Trainer(given).dpo(emit=ignore, **arguments)
    assert contents(folder / "whole") == contents(folder / "resumed")
    assert contents(folder / "whole-optimizer") == contents(folder / "resumed-optimizer")


def test_8_bit_moments_carry_on_in_the_next_round(folder: Path, tiny_llama: Path) -> None:
    """Two rounds of one step on the same pairs are two epochs, as with float32 moments."""
    common = {"adam_moments": "8bit", "schedule": "linear", "batch_size": 12, "warmup": 0.0}
    whole = Trainer(settings(epochs=2, **common))
    whole.dpo(emit=ignore, **dpo_arguments(folder, tiny_llama, "whole"))
    carried = settings(optimizer="carry", **common)
    first = dpo_arguments(folder, tiny_llama, "first", plan=plan(rounds=2))
    Trainer(carried).dpo(emit=ignore, **first)
    second = dpo_arguments(
        folder,
        folder / "first",
        "second",
        plan=plan(round=2, rounds=2, optimizer_step=1),
        optimizer=str(folder / "first-optimizer"),
    )
    Trainer(carried).dpo(emit=ignore, **second)
    assert contents(folder / "whole-optimizer") == contents(folder / "second-optimizer")


def test_moments_of_another_kind_are_refused(folder: Path, tiny_llama: Path) -> None:
    Trainer(settings()).dpo(emit=ignore, **dpo_arguments(folder, tiny_llama, "first"))
    given = settings(adam_moments="8bit", optimizer="carry")
    arguments = dpo_arguments(
        folder, tiny_llama, "second", optimizer=str(folder / "first-optimizer")
    )
    with pytest.raises(CorruptError, match="belongs to another model or optimizer"):
        Trainer(given).dpo(emit=ignore, **arguments)


def test_an_8_bit_step_is_adamw_within_a_byte() -> None:
    """Against torch's AdamW: small tensors agree to rounding, large ones to the code's spacing."""
    torch.manual_seed(0)
    start = [torch.randn(96, 96), torch.randn(40)]
    gradients = [[torch.randn_like(tensor) for tensor in start] for _ in range(4)]
    found = {}
    for moments in ("float32", "8bit"):
        model = torch.nn.ParameterList([tensor.clone() for tensor in start])
        optimizer = make_optimizer(
            model, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1, moments=moments
        )
        for step in gradients:
            for parameter, gradient in zip(model, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        found[moments] = [parameter.detach() for parameter in model]
    large, small = zip(found["float32"], found["8bit"], strict=True)
    torch.testing.assert_close(small[0], small[1], atol=1e-6, rtol=0)
    moved = (large[0] - start[0]).norm()
    assert 0 < (large[0] - large[1]).norm() < 0.05 * moved


def test_state_goes_into_the_tensors_that_are_there() -> None:
    """A paged tensor must stay the one that the driver knows."""
    model = torch.nn.Linear(128, 64)
    optimizer = make_optimizer(
        model, learning_rate=1e-3, betas=(0.9, 0.999), weight_decay=0.0, moments="8bit"
    )
    model.weight.grad = torch.randn_like(model.weight)
    optimizer.step()
    saved = {
        name: tensor.clone() for name, tensor in state_tensors(optimizer, model.weight).items()
    }
    before = optimizer.state[model.weight]["state1"]
    optimizer.step()
    assert not torch.equal(before, saved["state1"])
    slots = empty_state(optimizer, model.weight)
    assert slots.keys() == saved.keys()
    for name, slot in slots.items():
        slot.copy_(saved[name])
    put_step_count(optimizer, model.weight, slots)
    assert optimizer.state[model.weight]["state1"] is before
    assert torch.equal(before, saved["state1"]) and optimizer.state[model.weight]["step"] == 1


def kept_by_layers(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[int, list[torch.Tensor]]:
    """Tensors that checkpointed layers leave for the backward pass, and the gradients."""
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.shape == (*tokens.shape, 64)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    hidden.square().sum().backward()
    return kept, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_offloading_takes_the_layers_inputs_and_changes_no_gradient(tiny_llama: Path) -> None:
    tokens = torch.randint(2, 320, (2, 9), generator=torch.Generator().manual_seed(1))
    found = {}
    for offload in (False, True):
        model = load_model(tiny_llama)
        enable_gradient_checkpointing(model, offload=offload)
        found[offload] = kept_by_layers(model, tokens)
    # The final norm keeps its own; of the two layers' inputs none is left on the device.
    assert found[False][0] - found[True][0] == 2
    for plain, offloaded in zip(found[False][1], found[True][1], strict=True):
        assert torch.equal(plain, offloaded)


def test_what_a_cpu_cannot_do_is_refused_before_any_work(tmp_path: Path) -> None:
    from online_dpo.crew import Crew

    offload = {"activation_offload": True, "gradient_checkpointing": True}
    for options, reason in (
        (offload, "they are there already"),
        ({"adam_moments": "paged_8bit"}, "pages of GPU memory"),
    ):
        with pytest.raises(ConfigError, match=reason):
            Trainer(settings(**options))
        config = config_from_dict(tiny_config(tmp_path / "run", train=options)).config
        with pytest.raises(ConfigError, match=reason):
            Crew(config, run=tmp_path)
    with pytest.raises(ValueError, match="activation_offload needs gradient_checkpointing"):
        TrainConfig(activation_offload=True)


@pytest.mark.parametrize(
    ("model", "train", "reason"),
    [
        ({"dtype": "bfloat16"}, {"lora": {}}, "cannot compute with bfloat16 weights"),
        (
            {"dtype": "float32"},
            {"lora": {"quantization": "nf4"}, "precision": "bfloat16"},
            "the 4-bit layers compute in train.precision",
        ),
    ],
)
def test_types_that_do_not_go_together_are_refused(
    tmp_path: Path, model: dict[str, str], train: dict[str, object], reason: str
) -> None:
    config = tiny_config(tmp_path / "run", model=model, train=train)
    with pytest.raises(ConfigError, match=reason):
        config_from_dict(config)


@pytest.mark.parametrize(
    "options",
    [{"lora": {}}, {"adam_moments": "8bit"}, {"reference_update": {"every": 2}}],
)
def test_sharding_refuses_what_is_whole(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="parallel: fsdp does not go with " + next(iter(options))):
        TrainConfig(**options, parallel="fsdp", num_processes=2)


def test_update_by_adapter_needs_one(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", sampling={"sampler": "vllm", "update": "adapter"})
    with pytest.raises(ConfigError, match="is for train.lora, which is not set"):
        config_from_dict(config)
