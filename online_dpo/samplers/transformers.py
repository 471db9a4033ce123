"""The sampler that runs transformers' batched `generate` with a KV cache, reproducible by seed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from online_dpo.errors import EngineError
from online_dpo.models.loading import max_length
from online_dpo.records import ModelRef, Prompt, Response, SamplingParams, SamplingRequest
from online_dpo.samplers.decode_attention import use_decode_attention
from online_dpo.samplers.decoding import Ending, SeededChoice, seeded_uniforms
from online_dpo.samplers.kv_cache import read_prompts_once, roomy_cache
from online_dpo.samplers.responses import (
    Output,
    StopStrings,
    TokenPairs,
    build_response,
    eos_token_ids,
    response_limit,
)

ModelSource = Callable[[ModelRef, Path], PreTrainedModel]
"""Gives the model of a policy whose files lie in a folder; may be one that the trainer holds."""

Item = TypeVar("Item")
Result = TypeVar("Result")

_SCORE_LOGITS = 1 << 26
"""Most logits held at once while scoring: 256 MiB in float32."""


@dataclass(frozen=True, slots=True)
class _Row:
    """One response to generate: the k-th of a request."""

    request: int
    k: int
    prompt: tuple[int, ...]
    seed: int
    limit: int


class TransformersSampler:
    """Generates in batches of `batch_size` sequences, sorted by prompt length.

    A response depends on its seed, not on its neighbours (up to the rounding of a batch); the
    batches depend on the requests of one call alone, so the same call gives the same bytes.
    """

    def __init__(
        self,
        *,
        model_source: ModelSource,
        tokenizer_source: Callable[[Path], PreTrainedTokenizerBase],
        batch_size: int,
        strip_thinking: bool = False,
    ) -> None:
        self._model_source = model_source
        self._tokenizer_source = tokenizer_source
        self._strip_thinking = strip_thinking
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._eos: tuple[int, ...] = ()
        self.context: int | None = None
        """Most tokens of a prompt and its response together."""
        self._device = torch.device("cpu")
        self.batch_size = batch_size
        """Sequences generated at once; smaller than asked for once memory has run out."""
        self.deterministic = False
        self.dtype = "float32"
        self.how = "fresh"

    def load(self, policy: ModelRef, folder: Path) -> None:
        """Make `policy` the model that answers. The tokenizer is the first policy's throughout."""
        self._model = None
        self._model = self._model_source(policy, folder)
        use_decode_attention(self._model)
        if self._tokenizer is None:
            self._tokenizer = self._tokenizer_source(folder)
        self._eos = eos_token_ids(folder, self._tokenizer)
        self.context = max_length(self._model)
        self._device = self._model.device
        self.deterministic = self._device.type == "cpu"
        self.how = "fresh"
        self.dtype = str(self._model.dtype).removeprefix("torch.")

    def restart(self, policy: ModelRef, folder: Path) -> None:
        """Load the policy again; nothing of an earlier one is ever kept."""
        self.load(policy, folder)
        self.how = "restarted"

    def generate(
        self,
        requests: Sequence[SamplingRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[list[Response]]:
        """Yield each request's responses, in order; `progress` gets the number of finished ones."""
        rows = self._rows(requests, params)
        finished: list[dict[int, Response]] = [{} for _ in requests]
        done = num_yielded = 0
        while done < len(rows):
            outputs = self._as_memory_allows(rows[done:], lambda batch: self._decode(batch, params))
            for row, output in zip(rows[done : done + len(outputs)], outputs, strict=True):
                prompt = requests[row.request].prompt
                finished[row.request][row.k] = self._response(prompt, row.k, output, params)
            done += len(outputs)
            if progress is not None:
                progress(done)
            while num_yielded < len(requests):
                group, size = finished[num_yielded], len(requests[num_yielded].seeds)
                if len(group) < size:
                    break
                yield [group[k] for k in range(size)]
                num_yielded += 1

    def score(self, sequences: TokenPairs) -> list[list[float]]:
        """Raw log-probs (nats, temperature 1) of response tokens, for (prompt, response) ids."""
        order = sorted(
            range(len(sequences)), key=lambda i: len(sequences[i][0]) + len(sequences[i][1])
        )
        longest = max((len(response) for _, response in sequences), default=0) + 1
        fits = max(1, _SCORE_LOGITS // (longest * self._loaded.config.get_text_config().vocab_size))
        result: list[list[float]] = [[] for _ in sequences]
        done = 0
        while done < len(order):
            batch = [sequences[i] for i in order[done : done + fits]]
            scored = self._as_memory_allows(batch, self._score)
            for i, logprobs in zip(order[done:], scored, strict=False):
                result[i] = logprobs
            done += len(scored)
        return result

    def probe(self, sequences: TokenPairs) -> list[list[list[float]]]:
        """`score`, of the one model there is."""
        return [self.score(sequences)]

    def sleep(self) -> None:
        """Move the model to the CPU, so that a trainer may have the GPU's memory."""
        if self._model is not None:
            nn.Module.to(self._model, "cpu")
        _free_memory()

    def wake(self) -> None:
        """Move the model back."""
        if self._model is not None:
            nn.Module.to(self._model, self._device)

    def close(self) -> None:
        """Let go of the model and its memory."""
        self._model = None
        _free_memory()

    @property
    def _loaded(self) -> PreTrainedModel:
        assert self._model is not None, "load() comes first"
        return self._model

    def _rows(self, requests: Sequence[SamplingRequest], params: SamplingParams) -> list[_Row]:
        rows = [
            _Row(i, k, request.prompt.token_ids, seed, limit)
            for i, request in enumerate(requests)
            for limit in [
                response_limit(
                    request.prompt, max_new_tokens=params.max_new_tokens, context=self.context
                )
            ]
            for k, seed in enumerate(request.seeds)
        ]
        return sorted(rows, key=lambda row: len(row.prompt))

    def _response(self, prompt: Prompt, k: int, output: Output, params: SamplingParams) -> Response:
        assert self._tokenizer is not None
        return build_response(
            prompt,
            k,
            output,
            tokenizer=self._tokenizer,
            stop=params.stop,
            strip_thinking=self._strip_thinking,
        )

    def _as_memory_allows(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]]
    ) -> list[Result]:
        """Work on the first items, `batch_size` of them or, where memory runs out, half as many."""
        while True:
            batch = items[: self.batch_size]
            try:
                return work(batch)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise EngineError(
                        f"Memory ran out with a single sequence in the batch: {error}. Lower "
                        "sampling.max_new_tokens or prompts.max_tokens, or use a larger device."
                    ) from error
            self.batch_size = len(batch) // 2
            _free_memory()

    @torch.no_grad()
    def _decode(self, rows: Sequence[_Row], params: SamplingParams) -> list[Output]:
        assert self._tokenizer is not None
        device = self._loaded.device
        limits = [row.limit for row in rows]
        uniforms = seeded_uniforms([row.seed for row in rows], max(limits)).to(device)
        choice = SeededChoice(uniforms, params)
        stop = StopStrings(self._tokenizer, params.stop)
        ending = Ending(limits=limits, eos=self._eos, stop=stop, device=device)
        input_ids, attention_mask = _left_padded([row.prompt for row in rows], device)
        with _plain_generation(self._loaded) as model:
            cache = roomy_cache(model, input_ids.shape[1] + max(limits))
            if cache is not None:
                prompts = [row.request for row in rows]
                read_prompts_once(model, cache, input_ids, attention_mask, prompts)
            sequences: Tensor = model.generate(  # type: ignore[operator]
                input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                generation_config=GenerationConfig(
                    max_new_tokens=max(limits), do_sample=False, pad_token_id=0
                ),
                logits_processor=LogitsProcessorList([choice]),
                stopping_criteria=StoppingCriteriaList([ending]),
            )
        return _outputs(sequences[:, input_ids.shape[1] :], choice.logprobs, ending)

    @torch.no_grad()
    def _score(self, sequences: TokenPairs) -> list[list[float]]:
        device = self._loaded.device
        longest = max(len(response) for _, response in sequences)
        input_ids, attention_mask = _left_padded(
            [(*prompt, *response) for prompt, response in sequences], device
        )
        positions = (attention_mask.cumsum(1) - 1).clamp_(min=0)
        with _plain_generation(self._loaded) as model:
            logits = model(
                input_ids,
                attention_mask=attention_mask,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=longest + 1,
            ).logits[:, -longest - 1 : -1]  # (B, longest, V)
        targets = input_ids[:, input_ids.shape[1] - longest :, None]
        logprobs = logits.gather(2, targets)[..., 0].float() - logits.float().logsumexp(2)
        return [
            row[longest - len(response) :].tolist()
            for row, (_, response) in zip(logprobs, sequences, strict=True)
        ]


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both (B, longest), with the padding (id 0, mask 0) on the left."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


@contextlib.contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model without dropout and without its generation config, which `generate` mixes in."""
    training, own_config = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = own_config
        model.train(training)


def _outputs(token_ids: Tensor, logprobs: Tensor, ending: Ending) -> list[Output]:
    """Cut each row of (B, T) where it ended."""
    rows = zip(token_ids.tolist(), logprobs.tolist(), ending.lengths(), strict=True)
    return [
        Output(tuple(ids[:length]), tuple(scores[:length]), ending.reason(row, ids[length - 1]))
        for row, (ids, scores, length) in enumerate(rows)
    ]


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
