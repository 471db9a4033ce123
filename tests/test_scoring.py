"""Log-probs of given responses, as a library function."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import online_dpo
from online_dpo.errors import ConfigError

Ids = list[list[int]]


@pytest.fixture(scope="module")
def sequences() -> tuple[Ids, Ids]:
    """Seven prompts and responses of different lengths; one response is empty."""
    rng = np.random.default_rng(0)

    def ids(low: int) -> list[int]:
        return [int(i) for i in rng.integers(2, 320, rng.integers(low, 12))]

    prompts, responses = [ids(1) for _ in range(7)], [ids(2) for _ in range(6)]
    return prompts, [*responses, []]


def textbook(folder: Path, prompts: Ids, responses: Ids) -> list[torch.Tensor]:
    """All logits in float64, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            logps = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
        at = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        found.append(logps[list(at), response])
    return found


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
@pytest.mark.parametrize("architecture", ["tiny_llama", "tiny_qwen2"])
def test_sums_are_those_of_the_response_tokens(
    sequences: tuple[Ids, Ids], architecture: str, batch_tokens: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(architecture)
    expected = textbook(folder, *sequences)
    sums = online_dpo.sequence_logps(folder, *sequences, batch_tokens=batch_tokens)
    tokens = online_dpo.per_token_logps(str(folder), *sequences, batch_tokens=batch_tokens)
    assert sums.shape == (7,) and sums.dtype == torch.float64
    torch.testing.assert_close(sums, torch.stack([t.sum() for t in expected]), atol=2e-5, rtol=0)
    for found, wanted in zip(tokens, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert sums[-1] == 0.0


def test_a_padding_token_in_a_response_counts(tiny_llama: Path) -> None:
    eos, pad = 0, 1
    sums = online_dpo.sequence_logps(tiny_llama, [[5], [5]], [[6, 7], [6, 7, eos]])
    (last,) = online_dpo.per_token_logps(tiny_llama, [[5, 6, 7]], [[eos]])
    assert float(sums[1] - sums[0]) == pytest.approx(float(last), abs=1e-5)
    (first, second) = online_dpo.per_token_logps(tiny_llama, [[5], [pad, 5]], [[pad, pad], [6]])
    assert len(first) == 2 and (first < 0).all() and len(second) == 1


def test_a_loaded_model_is_left_as_it_was(sequences: tuple[Ids, Ids], tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(tokens).logits
    attention = model.config._attn_implementation
    found = online_dpo.sequence_logps(model, *sequences)
    torch.testing.assert_close(found, online_dpo.sequence_logps(tiny_llama, *sequences))
    assert model.config._attn_implementation == attention and not model.training
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_be_scored_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 responses"):
        online_dpo.sequence_logps(tiny_llama, [[1], [2]], [[3]])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        online_dpo.sequence_logps(tiny_llama, [[1], []], [[3], [4]])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        online_dpo.sequence_logps(tmp_path, [[1]], [[3]])
    half = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"torch\.bfloat16.*dtype=torch\.float32"):
        online_dpo.sequence_logps(half, [[1]], [[3]])
    assert online_dpo.sequence_logps(tiny_llama, [], []).shape == (0,)
