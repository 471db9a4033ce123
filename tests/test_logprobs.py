"""Log-probs of response tokens against transformers' own logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

from online_dpo.errors import ConfigError
from online_dpo.models import load_model
from online_dpo.training import logprobs
from online_dpo.training.batching import Sequences, pad_sequences
from online_dpo.training.logprobs import LogProbModel, sum_rows, token_logps

PROMPTS = [[5, 9, 2], [7], [3, 4, 5, 6, 8, 10]]
RESPONSES = [[11, 12], [13, 14, 15, 16, 0], [17, 18, 19]]


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=64,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def gemma2() -> PreTrainedModel:
    """Its logits are soft-capped after the projection."""
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        final_logit_softcapping=0.5,
        sliding_window=4,
    )
    return Gemma2ForCausalLM(config).eval()


@pytest.fixture(params=["llama", "qwen2", "gpt2", "gemma2"])
def model(request: Any, tiny_llama: Path, tiny_qwen2: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    if request.param in ("llama", "qwen2"):
        return load_model(tiny_llama if request.param == "llama" else tiny_qwen2)
    return gpt2() if request.param == "gpt2" else gemma2()


@torch.no_grad()
def expected_logps(
    model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]
) -> torch.Tensor:
    """The textbook way: all logits of the sequence alone, in float64 from there on."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0].double()
    logps = torch.log_softmax(logits, dim=-1)
    return logps[range(len(prompt) - 1, len(prompt) + len(response) - 1), list(response)]


def batch() -> Sequences:
    return pad_sequences(PROMPTS, RESPONSES)


@torch.no_grad()
def test_equal_to_all_logits(model: PreTrainedModel) -> None:
    values = token_logps(LogProbModel(model), batch())
    expected = torch.cat(
        [expected_logps(model, p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    )
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=0)


def test_models_with_capped_logits_run_whole(tiny_llama: Path) -> None:
    assert LogProbModel(load_model(tiny_llama)).projects
    torch.manual_seed(0)
    assert not LogProbModel(gemma2()).projects


def test_only_response_positions_are_projected(tiny_llama: Path) -> None:
    wrapped = LogProbModel(load_model(tiny_llama))
    rows = []
    wrapped.model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: rows.append(output.shape[0])
    )
    token_logps(wrapped, batch())
    assert rows == [sum(len(response) for response in RESPONSES)]


def test_chunks_change_nothing(tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[torch.Tensor, torch.Tensor]:
        wrapped = LogProbModel(load_model(tiny_qwen2)).double()
        values = token_logps(wrapped, batch())
        values.double().square().sum().backward()
        return values.detach(), wrapped.model.get_input_embeddings().weight.grad

    values, gradient = run()
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", 3 * 320)
    chunked_values, chunked_gradient = run()
    torch.testing.assert_close(chunked_values, values, atol=1e-6, rtol=0)
    torch.testing.assert_close(chunked_gradient, gradient, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_other_rows_and_padding_do_not_matter(model: PreTrainedModel) -> None:
    wrapped = LogProbModel(model)
    together = sum_rows(token_logps(wrapped, batch()), batch())
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        alone = pad_sequences([prompt], [response])
        value = sum_rows(token_logps(wrapped, alone), alone)
        assert float(value) == pytest.approx(float(together[row]), abs=1e-5)


def test_sums_are_of_each_row_in_float64() -> None:
    values = torch.arange(10.0) + 1e-3
    sums = sum_rows(values, batch())
    assert sums.dtype == torch.float64
    parts = values.double().split([2, 5, 3])
    assert sums.tolist() == [float(part.sum()) for part in parts]


@torch.no_grad()
def test_bfloat16_autocast_is_close_and_float32_outside(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    exact = token_logps(LogProbModel(model), batch())
    rounded = token_logps(LogProbModel(model, precision="bfloat16"), batch())
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - exact).abs().max()) < 0.3


class Leaky(LlamaForCausalLM):
    """Each position sees the whole row: padding changes the result."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + output.logits.mean(dim=1, keepdim=True)
        return output


def test_a_model_that_sees_padding_is_refused(tiny_llama: Path) -> None:
    model = Leaky.from_pretrained(tiny_llama)
    with pytest.raises(ConfigError, match="Leaky depend on padding"):
        LogProbModel(model)


def test_flash_attention_needs_bfloat16(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="train.precision: bfloat16"):
        LogProbModel(model)
