"""The worker-side object of a sampler: policies in, tables of responses out, the canary between."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from online_dpo.config import ModelConfig, SamplingConfig
from online_dpo.errors import EngineError
from online_dpo.files import read_json
from online_dpo.records import (
    Message,
    ModelRef,
    Prompt,
    Response,
    SamplingParams,
    SamplingRequest,
    to_dict,
)
from online_dpo.samplers.canary import TOLERANCES, Deviation, deviation
from online_dpo.samplers.responses import TokenPairs
from online_dpo.tables import read_table, write_table
from online_dpo.tokenization import encode_answer, tokenize_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Emit = Callable[[dict[str, Any]], None]

_PROGRESS_S = 0.5
"""Least time between two progress events."""


class Engine(Protocol):
    """A `plugins.Sampler` with what the handler asks of the built-in ones beside."""

    @property
    def deterministic(self) -> bool: ...

    @property
    def batch_size(self) -> int | None:
        """Sequences at once, where the sampler fixes it."""

    @property
    def dtype(self) -> str:
        """What the engine computes in: a key of `canary.TOLERANCES`."""

    @property
    def context(self) -> int | None:
        """Most tokens of a prompt and its response together, once a policy is loaded."""

    @property
    def how(self) -> str:
        """How the last policy was loaded: fresh, adapter, reloaded or restarted."""

    def load(self, policy: ModelRef, folder: Path) -> None: ...

    def restart(self, policy: ModelRef, folder: Path) -> None:
        """Load a policy by the slowest and surest way."""

    def generate(
        self,
        requests: Sequence[SamplingRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[list[Response]]: ...

    def score(self, sequences: TokenPairs) -> list[list[float]]: ...

    def probe(self, sequences: TokenPairs) -> list[list[list[float]]]:
        """What `score` gives, from every engine that answers, by the path that sampling takes."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


class SamplerHandler:
    """Answers the orchestrator's calls; every argument and result is of JSON types.

    `settings` holds "sampler" (transformers, vllm or openai_server), "device" (cpu or cuda),
    "threads" (or None), "model" and "sampling" as their config sections, and "adapter_rank" where
    policies are adapters. `model_source` gives the transformers sampler its models where it shares
    a process with the trainer.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        *,
        model_source: Callable[[ModelRef, Path], PreTrainedModel] | None = None,
    ) -> None:
        self._engine = make_engine(settings, model_source=model_source)
        self._loaded: str | None = None
        self._model = ModelConfig(**settings["model"])
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def load(
        self, *, emit: Emit, model: Mapping[str, str], canary: str | None = None
    ) -> dict[str, Any]:
        """Make a policy the one that answers, and check it by its canary.

        Nothing happens where the policy of this sha256 is loaded already. Where the canary finds
        other log-probs than the trainer's, a fresh engine is tried once; then EngineError.
        """
        start = time.monotonic()
        how, found = "cached", None
        if model["sha256"] != self._loaded:
            self._loaded = None
            policy, folder = ModelRef(model["path"], model["sha256"]), Path(model["path"])
            self._engine.load(policy, folder)
            found = self._checked(policy, folder, canary, emit)
            how = self._engine.how
            self._loaded = policy.sha256
        return {
            "seconds": time.monotonic() - start,
            "how": how,
            "canary": None if found is None else {"max_error": found.max_error},
            "deterministic": self._engine.deterministic,
        }

    def generate(
        self,
        *,
        emit: Emit,
        prompts: str | Sequence[Mapping[str, Any]],
        seeds: Mapping[str, Sequence[int]],
        params: Mapping[str, Any],
        out: str,
    ) -> dict[str, Any]:
        """Answer prompts (rows, or a parquet file of them) and write the responses as a table.

        A row has "id", "source" and "token_ids".
        """
        rows = read_table(Path(prompts)) if isinstance(prompts, str) else prompts
        requests = [
            SamplingRequest(
                Prompt(row["id"], row["source"], token_ids=tuple(row["token_ids"])),
                tuple(seeds[row["id"]]),
            )
            for row in rows
        ]
        wanted = SamplingParams(**{**params, "stop": tuple(params["stop"])})
        progress = _Progress(emit, total=sum(len(request.seeds) for request in requests))
        groups = self._engine.generate(requests, wanted, progress=progress)
        answered = [
            (r, request.prompt)
            for request, group in zip(requests, groups, strict=True)
            for r in group
        ]
        table = [{**to_dict(r), "prompt_source": prompt.source} for r, prompt in answered]
        write_table(Path(out), "samples", table)
        responses = [response for response, _ in answered]
        return {
            "rows": len(responses),
            "tokens": sum(len(response.token_ids) for response in responses),
            "batch_size": self._engine.batch_size,
            "finish": dict(Counter(response.finish_reason for response in responses)),
        }

    def score(self, *, emit: Emit, sequences: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Raw log-probs of each response token, for rows with "prompt" and "response" ids."""
        return {"logps": self._engine.score(_pairs(sequences))}

    def encode(
        self, *, emit: Emit, model: Mapping[str, str], answers: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The policy's token ids of texts by others, rows with "text" and "append_eos"."""
        tokenizer = self._tokenizer_of(model)
        return {
            "ids": [
                list(encode_answer(tokenizer, row["text"], append_eos=row["append_eos"]))
                for row in answers
            ]
        }

    def encode_chats(
        self,
        *,
        emit: Emit,
        model: Mapping[str, str],
        chats: Sequence[Sequence[Mapping[str, str]]],
    ) -> dict[str, Any]:
        """The token ids of chats, rows with "role" and "content", as prompts of the model.

        "context" is the number of tokens that prompt and reply may have together, or None: a
        policy must have been loaded. Raises ConfigError where the tokenizer has no chat template.
        """
        tokenizer = self._tokenizer_of(model)
        prompts = [
            Prompt("", "judge", messages=tuple(Message(m["role"], m["content"]) for m in chat))
            for chat in chats
        ]
        return {
            "ids": [list(tokenize_prompt(tokenizer, prompt)) for prompt in prompts],
            "context": self._engine.context,
        }

    def sleep(self, *, emit: Emit) -> dict[str, Any]:
        """Hand the GPU's memory back for a while."""
        self._engine.sleep()
        return {}

    def wake(self, *, emit: Emit) -> dict[str, Any]:
        """Take the memory again; the policy is as it was."""
        self._engine.wake()
        return {}

    def close(self) -> None:
        self._loaded = None
        self._engine.close()

    def _tokenizer_of(self, model: Mapping[str, str]) -> PreTrainedTokenizerBase:
        from online_dpo.models.loading import load_tokenizer

        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(
                Path(model["path"]), trust_remote_code=self._model.trust_remote_code
            )
        return self._tokenizer

    def _checked(
        self, policy: ModelRef, folder: Path, canary: str | None, emit: Emit
    ) -> Deviation | None:
        if canary is None:
            return None
        expected = read_json(Path(canary))
        found = self._probe(expected)
        if found.within(TOLERANCES[self._engine.dtype]):
            return found
        emit({"event": "canary_failed", "how": self._engine.how, "error": str(found)})
        first = self._engine.how
        self._engine.restart(policy, folder)
        again = self._probe(expected)
        if again.within(TOLERANCES[self._engine.dtype]):
            return again
        raise EngineError(
            f"The sampler does not serve the weights in {folder}: its log-probs of the canary are "
            f"off by {found} after loading ({first}), and by {again} with a fresh engine. Allowed "
            f"in {self._engine.dtype}: {TOLERANCES[self._engine.dtype]}. The engine may compute "
            "this architecture differently from transformers: try sampling.sampler: transformers."
        )

    def _probe(self, expected: Mapping[str, Any]) -> Deviation:
        """The largest deviation of any engine that answers."""
        answers = self._engine.probe(_pairs(expected["sequences"]))
        return max(
            (deviation(expected["logps"], actual) for actual in answers),
            key=lambda found: found.max_error,
        )


def make_engine(
    settings: Mapping[str, Any],
    *,
    model_source: Callable[[ModelRef, Path], PreTrainedModel] | None = None,
) -> Engine:
    """The sampler that the settings name. Raises ConfigError for options that it does not have."""
    model, sampling = ModelConfig(**settings["model"]), SamplingConfig(**settings["sampling"])
    kind, device, threads = settings["sampler"], settings["device"], settings["threads"]
    if kind == "vllm":
        from online_dpo.samplers.vllm import VllmSampler

        return VllmSampler(
            model,
            sampling,
            device=device,
            threads=threads,
            adapter_rank=settings.get("adapter_rank"),
        )
    if kind == "openai_server":
        from online_dpo.samplers.openai_server import OpenAIServerSampler

        return OpenAIServerSampler(model, sampling)
    import torch

    from online_dpo.models.loading import load_model, load_tokenizer
    from online_dpo.samplers.transformers import TransformersSampler

    if threads is not None:
        torch.set_num_threads(threads)

    def load(policy: ModelRef, folder: Path) -> PreTrainedModel:
        return load_model(
            folder,
            dtype=model.dtype if device == "cpu" else "bfloat16",
            attention=model.attention,
            trust_remote_code=model.trust_remote_code,
            device=device,
        )

    return TransformersSampler(
        model_source=model_source or load,
        tokenizer_source=lambda folder: load_tokenizer(
            folder, trust_remote_code=model.trust_remote_code
        ),
        batch_size=sampling.batch_size,
        strip_thinking=sampling.strip_thinking,
    )


def _pairs(rows: Sequence[Mapping[str, Any]]) -> list[tuple[list[int], list[int]]]:
    return [(row["prompt"], row["response"]) for row in rows]


class _Progress:
    """Emits how many responses are finished, now and then and at the end."""

    def __init__(self, emit: Emit, *, total: int) -> None:
        self._emit = emit
        self._total = total
        self._last = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._last >= _PROGRESS_S or done == self._total:
            self._last = now
            self._emit({"event": "progress", "done": done, "of": self._total})
