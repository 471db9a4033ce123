"""The proof that an engine takes new weights in place: all, and nothing stays of the old."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from online_dpo.samplers.canary import TOLERANCES, TokenPair, deviation, make_sequences
from online_dpo.samplers.responses import TokenPairs
from online_dpo.samplers.weights import NamedWeights, WeightSource, perturbed_weights


class Probed(Protocol):
    """An engine that tells the log-probs of given sequences by the path that sampling takes."""

    @property
    def dtype(self) -> str: ...

    def probe(self, sequences: TokenPairs) -> list[list[list[float]]]: ...


class Reloadable(Probed, Protocol):
    """One whose weights can be replaced while it runs."""

    def replace_weights(self, folder: Path, weights: WeightSource) -> None: ...


def prove_reload(
    engine: Reloadable, folder: Path, *, trust_remote_code: bool = False
) -> str | None:
    """Give a running engine perturbed weights, compare with transformers; the problem, if any.

    One small optimizer step moves log-probs by less than bfloat16's rounding, so that with true
    weights a tensor left behind, or old keys and values in the cache, could not be seen. The engine
    keeps the perturbed weights.
    """
    return difference(
        engine,
        folder,
        perturbed_weights(folder),
        lambda: engine.replace_weights(folder, perturbed_weights),
        trust_remote_code=trust_remote_code,
    )


def difference(
    engine: Probed,
    folder: Path,
    weights: NamedWeights,
    change: Callable[[], None],
    *,
    trust_remote_code: bool,
) -> str | None:
    """What is wrong with an engine after a change that is to give it these weights, if anything.

    `folder` holds the config of the model that the weights are of.
    """
    tolerance = TOLERANCES[engine.dtype]
    model = _make_model(folder, weights, dtype=engine.dtype, trust_remote_code=trust_remote_code)
    sequences = _sequences(model)
    expected = [_logprobs(model, prompt, response) for prompt, response in sequences]
    before = engine.probe(sequences)[0]
    if deviation(before, expected).within(tolerance):
        return "perturbing this model's weights does not change its log-probs"
    change()
    after = deviation(expected, engine.probe(sequences)[0])
    if not after.within(tolerance):
        return f"log-probs differ from transformers' by {after}"
    return None


def _make_model(
    folder: Path, weights: NamedWeights, *, dtype: str, trust_remote_code: bool
) -> PreTrainedModel:
    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True
    )
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model: Any = type(empty).from_pretrained(
        None,
        config=config,
        state_dict=dict(weights),
        dtype=getattr(torch, dtype),
    )
    loaded: PreTrainedModel = model.eval()
    return loaded


def _sequences(model: PreTrainedModel) -> list[TokenPair]:
    """Tokens from all over the vocabulary; one sequence fills several blocks of a prefix cache."""
    text = model.config.get_text_config()
    prompts = [
        [(7919 * (i + 1) + 104729 * row) % text.vocab_size for i in range(24)] for row in range(12)
    ]
    return make_sequences(prompts, max_length=getattr(text, "max_position_embeddings", None))


@torch.no_grad()
def _logprobs(
    model: PreTrainedModel, prompt: tuple[int, ...], response: tuple[int, ...]
) -> list[float]:
    ids = torch.tensor([[*prompt, *response]])
    logits = model(ids, logits_to_keep=len(response) + 1).logits[0, -len(response) - 1 : -1]
    logps = logits.float().log_softmax(-1).gather(1, torch.tensor(response)[:, None])
    values: list[float] = logps[:, 0].tolist()
    return values
