"""Log-probs and gradients of whole batches against transformers' own logits, one row at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from online_dpo.errors import ConfigError
from online_dpo.models.loading import load_model
from online_dpo.training import shared_attention, vocabulary
from online_dpo.training.logprobs import LogProbModel
from online_dpo.training.packing import Part, TokenPair, pack
from online_dpo.training.vocabulary import Terms

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
GPT2_SIZES = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
WINDOW = {"sliding_window": 4}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES)),  # a bias in its output head
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, initializer_range=0.2)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, **WINDOW)),
    "qwen2-window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, **WINDOW, use_sliding_window=True, max_window_layers=1)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, **WINDOW, head_dim=8, final_logit_softcapping=0.5)
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES)),  # scales its logits
}
ALIKE = ("mistral", "qwen2-window", "gemma2")
"""Models that cannot share a prompt's row."""

Items = list[list[TokenPair]]


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def items(*, seed: int = 0, vocab_size: int = 64) -> Items:
    """Seven pairs: two share a prompt and a response, two a prompt alone."""
    rng = np.random.default_rng(seed)

    def ids(count: int) -> list[int]:
        return [int(i) for i in rng.integers(1, vocab_size, count)]

    found: Items = []
    for prompt, chosen, rejected in ((1, 2, 7), (9, 1, 3), (4, 5, 5), (12, 3, 1), (2, 8, 2)):
        tokens = ids(prompt)
        found.append([(tokens, ids(chosen)), (tokens, ids(rejected))])
    (prompt, chosen), _ = found[1]
    found.append([(prompt, chosen), (prompt, ids(6))])
    found.append([(prompt, ids(4)), (prompt, ids(9))])
    return found


def dpo_terms(logps: torch.Tensor, part: Part, squares: torch.Tensor | None) -> Terms:
    assert squares is None
    chosen, rejected = part.sums(logps).chunk(2)
    margins = chosen - rejected
    return Terms(-logsigmoid(0.1 * margins).sum(), {"margin": margins.detach().sum()})


def naive(model: PreTrainedModel, dtype: torch.dtype, pairs: Items) -> tuple[float, dict[str, Any]]:
    """The summed loss and its gradient: all logits, each sequence alone."""
    model = copy.deepcopy(model).to(dtype)
    losses = []
    for pair in pairs:
        chosen, rejected = (textbook_logps(model, *sequence).sum() for sequence in pair)
        losses.append(-logsigmoid(0.1 * (chosen - rejected)))
    loss = torch.stack(losses).sum()
    loss.backward()
    return loss.item(), {n: p.grad.double() for n, p in model.named_parameters()}


def textbook_logps(
    model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]
) -> torch.Tensor:
    logps = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
    return logps[range(len(prompt) - 1, len(prompt) + len(response) - 1), list(response)]


def ours(
    model: PreTrainedModel, pairs: Items, batches: Sequence[Sequence[int]], **options: Any
) -> tuple[float, dict[str, Any]]:
    """The same through batches of items."""
    wrapped = LogProbModel(copy.deepcopy(model), **options)
    total = 0.0
    for batch in batches:
        packed = wrapped.pack(batch, [pairs[item] for item in batch])
        loss, _ = wrapped(packed, dpo_terms)
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.double() for n, p in wrapped.model.named_parameters()}


def error(found: dict[str, Any], exact: dict[str, Any]) -> float:
    return max(float((found[name] - exact[name]).abs().max()) for name in exact)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_as_exact_as_the_naive_step(name: str) -> None:
    model, pairs = make(name), items()
    loss, exact = naive(model, torch.float64, pairs)
    naive_loss, rounded = naive(model, torch.float32, pairs)
    found_loss, found = ours(model, pairs, [range(len(pairs))])
    assert found.keys() == exact.keys()
    assert error(found, exact) <= 2 * error(rounded, exact)
    assert abs(found_loss - loss) <= max(2 * abs(naive_loss - loss), 1e-6)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mistral", "gemma2", "cohere"])
def test_order_and_micro_batches_change_nothing(name: str) -> None:
    model, pairs = make(name).double(), items()
    loss, expected = ours(model, pairs, [range(7)])
    for batches in ([[i] for i in range(7)], [[6, 0, 3], [5, 2], [4, 1]], [[*reversed(range(7))]]):
        other, found = ours(model, pairs, batches)
        assert other == pytest.approx(loss, abs=1e-6)
        assert error(found, expected) < 1e-6  # norms compute in float32


@pytest.mark.parametrize("name", ["phi", "qwen2", "mistral", "gemma2"])
def test_parts_and_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = make(name).double(), items()
    loss, expected = ours(model, pairs, [range(7)])
    for tokens, kept in ((1, True), (5, False), (5, True), (12, False)):
        monkeypatch.setitem(vocabulary.CHUNK_BYTES, "cpu", tokens * 4 * 64)
        monkeypatch.setitem(vocabulary.KEPT_BYTES, "cpu", 2**30 if kept else 0)
        other, found = ours(model, pairs, [range(7)])
        assert other == pytest.approx(loss, abs=1e-6)
        assert error(found, expected) < 1e-6  # norms compute in float32


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_scoring_equals_all_logits(name: str) -> None:
    model, pairs = make(name), items()
    wrapped = LogProbModel(copy.deepcopy(model))
    batch = wrapped.pack(range(7), pairs)
    values = wrapped(batch)
    for part in batch.parts:
        sums = part.sums(values[part.start : part.stop]).unflatten(0, (2, -1))
        for place, item in enumerate(part.items):
            for side, sequence in enumerate(pairs[item]):
                expected = textbook_logps(model, *sequence).double().sum()
                assert float(sums[side, place]) == pytest.approx(float(expected), abs=2e-5)


def test_which_models_share_and_project() -> None:
    found = {name: LogProbModel(make(name)) for name in MODELS}
    assert [name for name, wrapped in found.items() if not wrapped.shares] == list(ALIKE)
    assert all("local window" in found[name].why_not_shared for name in ALIKE)
    assert [name for name, wrapped in found.items() if not wrapped.projects] == ["gemma2", "cohere"]


def test_a_prompt_is_encoded_once_and_a_response_is_projected_once(tiny_llama: Path) -> None:
    wrapped = LogProbModel(load_model(tiny_llama))
    pairs = items()
    batch = wrapped.pack(range(7), pairs)
    prompts = {tuple(prompt) for pair in pairs for prompt, _ in pair}
    sequences = {(tuple(p), tuple(r)) for pair in pairs for p, r in pair}
    responses = sum(len(response) for _, response in sequences)
    assert len(sequences) == 13
    assert batch.input_ids.shape == (1, sum(map(len, prompts)) + responses)
    assert batch.targets.shape == (responses,)


@pytest.mark.parametrize("uniform", [True, False])
def test_the_attention_of_other_devices_is_the_cpus(uniform: bool) -> None:
    """Off the CPU the shared layout runs through masks: outputs and gradients are the same."""
    pairs = [[([7, 8], [1, 2, 3]), ([7, 8], [4, 5, 6])]] * 2 if uniform else items()
    batch = pack(range(len(pairs)), pairs, shared=True, part_tokens=99, device=torch.device("cpu"))
    assert batch.sharing is not None and (batch.sharing.prompt_padding is None) == uniform
    generator = torch.Generator().manual_seed(0)
    shape = (batch.input_ids.shape[1], 4, 8)  # (T, H, D)
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for _ in range(3)]
    weights = torch.randn(shape, generator=generator)
    found = []
    for attend in (shared_attention._Flash.apply, shared_attention._masked):
        out = attend(*inputs, batch.sharing, 0.3)
        found.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    for ours, masked in zip(*found, strict=True):
        torch.testing.assert_close(ours, masked, atol=1e-5, rtol=1e-4)


def test_another_attention_runs_on_padded_rows(tiny_llama: Path) -> None:
    eager = LogProbModel(load_model(tiny_llama, attention="eager"))
    assert not eager.shares and eager.why_not_shared == "model.attention is eager"


@torch.no_grad()
def test_bfloat16_autocast_is_close_and_float32_outside(tiny_llama: Path) -> None:
    exact, rounded = (
        LogProbModel(load_model(tiny_llama), precision=precision)
        for precision in ("float32", "bfloat16")
    )
    pairs = items(vocab_size=320)
    difference = rounded(rounded.pack(range(7), pairs)) - exact(exact.pack(range(7), pairs))
    assert difference.dtype == torch.float32
    assert 0 < float(difference.abs().max()) < 0.3


def test_bfloat16_gradients_are_close(tiny_llama: Path) -> None:
    model, pairs = load_model(tiny_llama), items(vocab_size=320)
    _, exact = ours(model, pairs, [range(7)])
    _, found = ours(model, pairs, [range(7)], precision="bfloat16")
    for name, gradient in exact.items():
        cosine = torch.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0)
        assert float(cosine) > 0.99, name


def test_bfloat16_goes_by_the_weights_as_they_are(tiny_llama: Path) -> None:
    """Rounded copies follow every change of a weight: a load, a move to another device."""
    model = LogProbModel(load_model(tiny_llama), precision="bfloat16")
    batch = model.pack(range(7), items(vocab_size=320))
    with torch.no_grad():
        before = model(batch)
        next(model.parameters()).mul_(1.5)
        changed = model(batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    loss, _ = model(batch, lambda logps, part, _: Terms(logps.sum(), {}))
    loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    optimizer.step()
    model.rounded.forget()
    with torch.no_grad():
        stepped = model(batch)
        other = load_model(tiny_llama)
        other.load_state_dict(model.model.state_dict())
        fresh = LogProbModel(other, precision="bfloat16")(batch)
        assert torch.equal(model.to("cpu")(batch), stepped)
    assert not torch.equal(before, changed) and not torch.equal(changed, stepped)
    assert torch.equal(stepped, fresh)


class Leaky(LlamaForCausalLM):
    """Each position sees the whole row: padding changes the result."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + output.logits.mean(dim=1, keepdim=True)
        return output


def test_a_bfloat16_head_adds_its_gradient_up_in_float32() -> None:
    """64 parts with five tokens each many times: in bfloat16 the error would be 1.2%."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4096, 64).bfloat16(), torch.randn(50, 64).mul(0.1).bfloat16()
    targets, shares = torch.randint(0, 5, (4096,)), torch.randn(4096).sign() + 0.2
    zeros, columns, index = torch.zeros(64, dtype=torch.long), torch.arange(64), torch.tensor([0])
    parts = [Part((i,), 64 * i, 64 * i + 64, zeros, columns, index, (64,)) for i in range(64)]

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        head = torch.nn.Linear(64, 50, bias=False).to(dtype)
        head.weight.data = weight.to(dtype)

        def part_loss(logps: torch.Tensor, part: Part, squares: torch.Tensor | None) -> Terms:
            return Terms((logps.double() * shares[part.start : part.stop]).sum(), {})

        vocabulary.fused_terms(hidden.to(dtype), head, targets, parts, part_loss).loss.backward()
        assert head.weight.grad is not None and head.weight.grad.dtype == dtype
        return head.weight.grad.double()

    exact = gradient(torch.float64)
    assert (gradient(torch.bfloat16) - exact).norm() < 0.006 * exact.norm()


def test_a_model_that_sees_padding_is_refused(tiny_llama: Path) -> None:
    model = Leaky.from_pretrained(tiny_llama)
    with pytest.raises(ConfigError, match="Leaky depend on padding"):
        LogProbModel(model)


def test_flash_attention_needs_bfloat16(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="train.precision: bfloat16"):
        LogProbModel(model)
