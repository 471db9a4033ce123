"""The sampler that asks servers: completions of token ids, from several endpoints in turn."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import openai

from online_dpo.config import Endpoint, ModelConfig, SamplingConfig
from online_dpo.endpoints import connect
from online_dpo.errors import EngineError
from online_dpo.models.loading import load_tokenizer
from online_dpo.records import ModelRef, Response, SamplingParams, SamplingRequest
from online_dpo.samplers.reload_hooks import call_reload_hook, run_reload_command
from online_dpo.samplers.responses import (
    Output,
    StopStrings,
    TokenPairs,
    build_response,
    eos_token_ids,
    response_limit,
    trim,
)

if TYPE_CHECKING:
    from openai.types import CompletionChoice
    from transformers import PreTrainedTokenizerBase

Result = TypeVar("Result")

CONCURRENCY = 128
"""Requests in flight at one endpoint."""

WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Waits before a request is tried again, after which its failure is the engine's."""


class OpenAIServerSampler:
    """Endpoints that all serve the policy and return token ids, as vLLM's server does.

    Servers do not say what they compute in; they are held to the tolerance of bfloat16.
    """

    batch_size = None
    deterministic = False
    dtype = "bfloat16"

    def __init__(self, model: ModelConfig, sampling: SamplingConfig) -> None:
        self._model = model
        self._sampling = sampling
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._eos: tuple[int, ...] = ()
        self.context: int | None = None
        """Most tokens of a prompt and its response together."""
        self.how = "reloaded"

    def load(self, policy: ModelRef, folder: Path) -> None:
        """Have every endpoint serve the folder, by the config's command and its reload hooks."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(
                folder, trust_remote_code=self._model.trust_remote_code
            )
        self._eos = eos_token_ids(folder, self._tokenizer)
        if self._sampling.reload_command is not None:
            run_reload_command(self._sampling.reload_command, folder)
        for endpoint in self._sampling.endpoints:
            if endpoint.reload_url is not None:
                call_reload_hook(endpoint.reload_url, folder)
        contexts = self._on_servers(lambda servers: _gather(s.context_length() for s in servers))
        self.context = min((c for c in contexts if c is not None), default=None)
        self.how = "reloaded"

    def restart(self, policy: ModelRef, folder: Path) -> None:
        """Ask once more: there is no surer way to a server."""
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
        assert self._tokenizer is not None, "load() comes first"
        rows = [(r.prompt, k, seed) for r in requests for k, seed in enumerate(r.seeds)]
        limits = [
            response_limit(prompt, max_new_tokens=params.max_new_tokens, context=self.context)
            for prompt, _, _ in rows
        ]
        done = itertools.count(1)

        async def answer(server: _Server, i: int) -> CompletionChoice:
            prompt, _, seed = rows[i]
            options = self._options(params, seed=seed, limit=limits[i])
            choice = await server.complete(prompt.token_ids, options)
            if progress is not None:
                progress(next(done))
            return choice

        choices = self._on_servers(lambda servers: _spread(servers, answer, len(rows)))
        stop = StopStrings(self._tokenizer, params.stop)
        responses = iter(
            build_response(
                prompt,
                k,
                self._output(choice, stop),
                tokenizer=self._tokenizer,
                stop=params.stop,
                strip_thinking=self._sampling.strip_thinking,
            )
            for (prompt, k, _), choice in zip(rows, choices, strict=True)
        )
        for request in requests:
            yield [next(responses) for _ in request.seeds]

    def score(self, sequences: TokenPairs) -> list[list[float]]:
        """Raw log-probs (nats, temperature 1) of response tokens, for (prompt, response) ids."""

        async def score_one(server: _Server, i: int) -> list[float]:
            return await server.score(*sequences[i])

        return self._on_servers(lambda servers: _spread(servers, score_one, len(sequences)))

    def probe(self, sequences: TokenPairs) -> list[list[list[float]]]:
        """What `score` gives, from each endpoint, by requests that can sample one token only."""

        async def probe_all(server: _Server) -> list[list[float]]:
            return await _gather(server.probe(*sequence) for sequence in sequences)

        return self._on_servers(lambda servers: _gather(probe_all(s) for s in servers))

    def sleep(self) -> None:
        """Nothing: the servers' devices are not this machine's to share."""

    def wake(self) -> None:
        """Nothing, as in `sleep`."""

    def close(self) -> None:
        """Nothing: the servers go on."""

    def _on_servers(self, work: Callable[[list[_Server]], Coroutine[Any, Any, Result]]) -> Result:
        async def connected() -> Result:
            servers = [_Server(endpoint) for endpoint in self._sampling.endpoints]
            try:
                return await work(servers)
            finally:
                await _gather(server.close() for server in servers)

        return asyncio.run(connected())

    def _options(self, params: SamplingParams, *, seed: int, limit: int) -> dict[str, Any]:
        return {
            "max_tokens": limit,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed,
            "stop": list(params.stop) or None,
            "extra_body": {
                "top_k": params.top_k,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "min_tokens": 0,
                "ignore_eos": False,
                "stop_token_ids": list(self._eos),
                "skip_special_tokens": True,
            },
        }

    def _output(self, choice: CompletionChoice, stop: StopStrings) -> Output:
        return trim(
            _token_ids(choice),
            _sampled_logprobs(choice),
            eos=self._eos,
            stop=stop,
            stopped=choice.finish_reason == "stop",
        )


class _Server:
    """A connection pool to one endpoint, for one event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        key = os.environ.get(endpoint.api_key_env) if endpoint.api_key_env else None
        # Retries are ours: the client's own do not reach a server that is restarting.
        self._client = connect(endpoint.url, key, key_env=endpoint.api_key_env)
        self._room = asyncio.Semaphore(CONCURRENCY)

    async def close(self) -> None:
        await self._client.close()

    async def context_length(self) -> int | None:
        """The longest sequence served, where the server tells. EngineError for an unknown model."""
        listed = await self._retried(self._client.models.list)
        models = {model.id: model for model in listed.data}
        name = self._endpoint.model
        if name not in models:
            raise EngineError(
                f"{self._endpoint.url} serves no model named {name!r}; it serves "
                f"{', '.join(sorted(models)) or 'none'}. Set model: of this endpoint, or start the "
                f"server with --served-model-name {name}."
            )
        return getattr(models[name], "max_model_len", None)

    async def complete(self, prompt: Sequence[int], options: Mapping[str, Any]) -> CompletionChoice:
        """One completion with its token ids and raw log-probs."""
        extra = {"return_token_ids": True, **options.get("extra_body", {})}
        body: dict[str, Any] = {
            **options,
            "model": self._endpoint.model,
            "prompt": list(prompt),
            "n": 1,
            "logprobs": 0,
            "extra_body": extra,
        }
        async with self._room:
            completion = await self._retried(lambda: self._client.completions.create(**body))
        choice: CompletionChoice = completion.choices[0]
        if getattr(choice, "token_ids", None) is None or choice.logprobs is None:
            raise EngineError(
                f"{self._endpoint.url} returns no token ids or no log-probs. The policy must be "
                "trained on the tokens that it emitted, not on their text: use a server that knows "
                "return_token_ids, e.g. vLLM 0.10.2 or later."
            )
        return choice

    async def score(self, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        """Log-probs of a response's tokens; the last is sampled, with no other choice."""
        choice = await self._force_last(prompt, response, prompt_logprobs=0)
        entries = getattr(choice, "prompt_logprobs", None)
        if entries is None:
            raise EngineError(
                f"{self._endpoint.url} does not know prompt_logprobs, which scoring needs."
            )
        scored = zip(entries[len(prompt) :], response[:-1], strict=True)
        return [entry[str(token)]["logprob"] for entry, token in scored] + [
            _sampled_logprobs(choice)[0]
        ]

    async def probe(self, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        """Log-probs of a response's tokens, each by a request that can sample this one only."""
        choices = await _gather(
            self._force_last(prompt, response[: i + 1]) for i in range(len(response))
        )
        return [_sampled_logprobs(choice)[0] for choice in choices]

    async def _force_last(
        self, prompt: Sequence[int], response: Sequence[int], **extra: Any
    ) -> CompletionChoice:
        options = {
            "max_tokens": 1,
            "temperature": 0.0,
            "extra_body": {"allowed_token_ids": [response[-1]], "ignore_eos": True, **extra},
        }
        choice = await self.complete((*prompt, *response[:-1]), options)
        if list(_token_ids(choice)) != [response[-1]]:
            raise EngineError(
                f"{self._endpoint.url} does not know allowed_token_ids, by which its weights "
                "are checked; use vLLM's server."
            )
        return choice

    async def _retried(self, request: Callable[[], Awaitable[Any]]) -> Any:
        """The request's result, tried again where the server is away, busy or failing."""
        for wait_s in (*WAITS_S, None):
            try:
                return await request()
            except openai.APIStatusError as error:
                if wait_s is None or (error.status_code < 500 and error.status_code != 429):
                    raise EngineError(
                        f"{self._endpoint.url} refuses a request: HTTP {error.status_code}: "
                        f"{error.message}"
                    ) from error
            except openai.APIConnectionError as error:
                if wait_s is None:
                    raise EngineError(
                        f"{self._endpoint.url} cannot be reached in {len(WAITS_S) + 1} attempts: "
                        f"{error.__cause__ or error}. Is the server running?"
                    ) from error
            await asyncio.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")


async def _gather(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results in order. At the first failure the other work is cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in work]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _spread(
    servers: Sequence[_Server],
    work: Callable[[_Server, int], Coroutine[Any, Any, Result]],
    num_items: int,
) -> list[Result]:
    """Items 0, 1, ... given to the servers in turn; the results in the items' order."""
    return await _gather(work(servers[i % len(servers)], i) for i in range(num_items))


def _token_ids(choice: CompletionChoice) -> Sequence[int]:
    ids: Sequence[int] = choice.token_ids  # type: ignore[attr-defined]
    return ids


def _sampled_logprobs(choice: CompletionChoice) -> Sequence[float]:
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    return choice.logprobs.token_logprobs
