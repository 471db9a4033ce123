"""The sampler that runs vLLM's offline engine in this process; the only file that imports vllm."""

from __future__ import annotations

import difflib
import gc
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from online_dpo.config import ModelConfig, SamplingConfig
from online_dpo.errors import ConfigError, EngineError
from online_dpo.models.adapter_files import is_adapter
from online_dpo.models.loading import load_tokenizer
from online_dpo.models.merging import merged_weights, write_merged
from online_dpo.models.pinning import base_folder
from online_dpo.records import ModelRef, Response, SamplingParams, SamplingRequest
from online_dpo.samplers.adapter_proof import prove_adapter
from online_dpo.samplers.proof import prove_reload
from online_dpo.samplers.responses import (
    Output,
    StopStrings,
    TokenPairs,
    build_response,
    eos_token_ids,
    response_limit,
    trim,
)
from online_dpo.samplers.vllm_settings import (
    adapter_arguments,
    engine_arguments,
    set_environment,
)
from online_dpo.samplers.weights import WeightSource, stored_weights, with_head

if TYPE_CHECKING:
    import vllm
    from transformers import PreTrainedTokenizerBase
    from vllm.lora.request import LoRARequest


class VllmSampler:
    """One engine over all rounds: new weights go in place, once that is proven to be exact here."""

    def __init__(
        self,
        model: ModelConfig,
        sampling: SamplingConfig,
        *,
        device: str,
        threads: int | None,
        adapter_rank: int | None = None,
    ) -> None:
        """`adapter_rank` is that of the adapters that policies are, from the second round on."""
        self._model = model
        self._sampling = sampling
        self._arguments = engine_arguments(model, sampling.engine, device=device)
        self._threads = threads
        self._llm: vllm.LLM | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._eos: tuple[int, ...] = ()
        self._reload_is_exact: bool | None = None
        hot = sampling.update in ("auto", "adapter")
        self._adapter_rank = adapter_rank if hot else None
        self._adapter: LoRARequest | None = None
        self._num_adapters = 0
        self._adapters_are_exact = False
        self.batch_size = None
        self.how = "fresh"
        self.dtype = str(self._arguments["dtype"])

    @property
    def deterministic(self) -> bool:
        """Whether vLLM's batch-invariant mode is on, which alone promises equal results."""
        return os.environ.get("VLLM_BATCH_INVARIANT", "0") != "0"

    def load(self, policy: ModelRef, folder: Path) -> None:
        """A fresh engine at first; later as `sampling.update` and the proofs allow.

        That is by the adapter alone, or in place, or by another fresh engine.
        """
        if self._llm is None:
            self._start(folder)
            self.how = "fresh"
        elif self._adapter_rank is not None and self._may_serve(folder):
            self.serve_adapter(folder)
            self.how = "adapter"
        elif self._adapter_rank is None and self._may_reload(folder):
            self.replace_weights(folder, merged_weights if is_adapter(folder) else stored_weights)
            self.how = "reloaded"
        else:
            self.restart(policy, folder)

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its response together."""
        return int(self._engine.model_config.max_model_len)

    def restart(self, policy: ModelRef, folder: Path) -> None:
        """A fresh engine; the old one ends first.

        Where adapters were not exact it is given their merged weights, then and from then on.
        """
        self.close()
        if self._sampling.update != "adapter":
            self._adapter_rank = None
        self._start(folder)
        self.how = "restarted"

    def replace_weights(self, folder: Path, weights: WeightSource) -> None:
        """Put a folder's weights into the running engine and forget the keys of the old ones."""
        self._engine.collective_rpc(_reload, args=(folder, weights))
        self.forget_prefixes()

    def serve_adapter(self, folder: Path) -> None:
        """Answer with the adapter in a folder from now on; a whole model's folder is the base's."""
        from vllm.lora.request import LoRARequest

        self._adapter = None
        if is_adapter(folder):
            # Every adapter has an id of its own, by which vLLM tells their keys and values apart.
            self._num_adapters += 1
            name = f"adapter-{self._num_adapters}"
            self._adapter = LoRARequest(name, self._num_adapters, str(folder.absolute()))
        self.forget_prefixes()

    def forget_prefixes(self) -> None:
        """Empty the prefix cache: its keys and values are those of the weights that made them."""
        if not self._engine.reset_prefix_cache():
            raise EngineError("vLLM could not empty its prefix cache; requests were still running.")

    def generate(
        self,
        requests: Sequence[SamplingRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[list[Response]]:
        """Yield each request's responses, in order; `progress` gets the number of finished ones."""
        tokenizer = self._loaded_tokenizer
        context = self.context
        rows = [(request.prompt, k) for request in requests for k in range(len(request.seeds))]
        seeds = [seed for request in requests for seed in request.seeds]
        settings = [
            self._params(
                params,
                seed=seed,
                limit=response_limit(prompt, max_new_tokens=params.max_new_tokens, context=context),
            )
            for (prompt, _), seed in zip(rows, seeds, strict=True)
        ]
        completions = self._run([prompt.token_ids for prompt, _ in rows], settings, progress)
        stop = StopStrings(tokenizer, params.stop)
        responses = iter(
            build_response(
                prompt,
                k,
                self._output(completion.outputs[0], stop),
                tokenizer=tokenizer,
                stop=params.stop,
                strip_thinking=self._sampling.strip_thinking,
            )
            for (prompt, k), completion in zip(rows, completions, strict=True)
        )
        for request in requests:
            yield [next(responses) for _ in request.seeds]

    def score(self, sequences: TokenPairs) -> list[list[float]]:
        """Raw log-probs (nats, temperature 1) of response tokens, for (prompt, response) ids.

        The last token is forced and its log-prob taken as a sampled one's, so that a sequence may
        fill the whole context.
        """
        scored = self._force_last(sequences, prompt_logprobs=0)
        result = []
        for (prompt, response), output in zip(sequences, scored, strict=True):
            entries = output.prompt_logprobs[len(prompt) :]
            logprobs = [
                entry[token].logprob for entry, token in zip(entries, response[:-1], strict=True)
            ]
            result.append([*logprobs, _sampled_logprobs(output.outputs[0])[0]])
        return result

    def probe(self, sequences: TokenPairs) -> list[list[list[float]]]:
        """What `score` gives, by one request a token that can sample only this one.

        A request for a prompt's log-probs does not read the prefix cache, and sampling does.
        """
        prefixes = [
            (prompt, response[: i + 1])
            for prompt, response in sequences
            for i in range(len(response))
        ]
        outputs = iter(self._force_last(prefixes, prompt_logprobs=None))
        return [
            [
                [_sampled_logprobs(next(outputs).outputs[0])[0] for _ in response]
                for _, response in sequences
            ]
        ]

    def sleep(self, *, level: int = 1) -> None:
        """Free the GPU's memory; level 1 keeps the weights in the CPU's, 2 drops them.

        After level 2 a policy must be loaded before the next request. Nothing happens on a CPU.
        """
        if self._llm is None or not self._arguments.get("enable_sleep_mode"):
            return
        self.forget_prefixes()
        self._llm.sleep(level=level)

    def wake(self) -> None:
        """Take the GPU's memory again."""
        if self._llm is not None and self._arguments.get("enable_sleep_mode"):
            self._llm.wake_up()

    def close(self) -> None:
        """End the engine and free what it holds."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = self._adapter = None
        gc.collect()
        cleanup_dist_env_and_memory()

    @property
    def _engine(self) -> vllm.LLM:
        assert self._llm is not None, "load() comes first"
        return self._llm

    @property
    def _loaded_tokenizer(self) -> PreTrainedTokenizerBase:
        assert self._tokenizer is not None, "load() comes first"
        return self._tokenizer

    def _start(self, folder: Path) -> None:
        set_environment(self._threads)

        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(
                folder, trust_remote_code=self._model.trust_remote_code
            )
        self._eos = eos_token_ids(folder, self._tokenizer)
        if self._adapter_rank is not None and self._start_for_adapters(folder):
            self.serve_adapter(folder)
        elif is_adapter(folder):
            with tempfile.TemporaryDirectory(prefix="online-dpo-") as merged:
                write_merged(
                    folder,
                    Path(merged),
                    dtype=self._model.dtype,
                    trust_remote_code=self._model.trust_remote_code,
                )
                self._llm = self._engine_of(Path(merged), {})
        else:
            self._llm = self._engine_of(folder, {})
        # The first request with log-probs is slow; a real one should not be.
        self.score([((self._eos[0],), (self._eos[0],))])

    def _start_for_adapters(self, folder: Path) -> bool:
        """Start with the base; False where this architecture takes no adapters in vLLM."""
        assert self._adapter_rank is not None
        base = base_folder(folder) if is_adapter(folder) else folder
        try:
            self._llm = self._engine_of(base, adapter_arguments(self._adapter_rank))
        except EngineError as error:
            if self._sampling.update == "adapter" or "LoRA" not in str(error.__cause__):
                raise
            self._adapter_rank = None
        return self._adapter_rank is not None

    def _engine_of(self, folder: Path, more: Mapping[str, Any]) -> vllm.LLM:
        import vllm

        _check_names(self._sampling.engine)
        arguments = {**self._arguments, **more}
        try:
            return vllm.LLM(model=str(folder), **arguments)
        except Exception as error:
            raise EngineError(
                f"vLLM could not start with the model in {folder} and {arguments}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _may_serve(self, folder: Path) -> bool:
        """Whether adapters are exact here; proven before the first one."""
        if self._adapters_are_exact or not is_adapter(folder):
            return True
        problem = prove_adapter(self, folder, trust_remote_code=self._model.trust_remote_code)
        if problem is not None and self._sampling.update == "adapter":
            raise EngineError(
                f"sampling.update is adapter, but adapters are not exact with this model and vLLM: "
                f"{problem}. Set sampling.update: reload."
            )
        self._adapters_are_exact = problem is None
        return self._adapters_are_exact

    def _may_reload(self, folder: Path) -> bool:
        if self._sampling.update == "restart":
            return False
        if self._reload_is_exact is None:
            base = base_folder(folder) if is_adapter(folder) else folder
            problem = prove_reload(self, base, trust_remote_code=self._model.trust_remote_code)
            self._reload_is_exact = problem is None
            if problem is not None and self._sampling.update == "reload":
                raise EngineError(
                    f"sampling.update is reload, but loading weights in place is not exact with "
                    f"this model and vLLM: {problem}. Set sampling.update: restart."
                )
        return self._reload_is_exact

    def _params(self, params: SamplingParams, *, seed: int, limit: int) -> vllm.SamplingParams:
        from vllm import SamplingParams as EngineParams

        return EngineParams(
            n=1,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=0.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            seed=seed,
            max_tokens=limit,
            min_tokens=0,
            ignore_eos=False,
            stop=list(params.stop),
            stop_token_ids=list(self._eos),
            logprobs=0,
            detokenize=bool(params.stop),
            skip_special_tokens=True,
        )

    def _force_last(self, sequences: TokenPairs, *, prompt_logprobs: int | None) -> list[Any]:
        """The outputs of requests whose one new token can only be the response's last."""
        from vllm import SamplingParams as EngineParams

        settings = [
            EngineParams(
                temperature=0.0,
                max_tokens=1,
                allowed_token_ids=[response[-1]],
                logprobs=0,
                prompt_logprobs=prompt_logprobs,
                detokenize=False,
            )
            for _, response in sequences
        ]
        return self._run([(*prompt, *response[:-1]) for prompt, response in sequences], settings)

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sequence[vllm.SamplingParams],
        progress: Callable[[int], None] | None = None,
    ) -> list[Any]:
        from vllm import TokensPrompt

        outputs: list[Any] = self._engine.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
            list(settings),
            lora_request=self._adapter,
            use_tqdm=False if progress is None else _bar(progress),
        )
        return outputs

    def _output(self, completion: Any, stop: StopStrings) -> Output:
        return trim(
            completion.token_ids,
            _sampled_logprobs(completion),
            eos=self._eos,
            stop=stop,
            stopped=completion.finish_reason == "stop",
        )


def _check_names(engine: Mapping[str, Any]) -> None:
    """Raises ConfigError for an argument of `sampling.engine` that this vLLM does not have."""
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    known = [field.name for field in fields(EngineArgs)]
    for name in engine:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ConfigError(
                f"sampling.engine.{name}: vLLM {vllm.__version__} has no such engine argument{hint}"
            )


def _reload(worker: Any, folder: Path, weights: WeightSource) -> None:
    """Runs inside each of vLLM's workers."""
    # `model.load_weights` fails on the CPU's packed weights; `reload_weights` packs them anew.
    worker.reload_weights(weights_iterator=with_head(weights(folder)))


def _sampled_logprobs(completion: Any) -> list[float]:
    return [
        entry[token].logprob
        for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
    ]


def _bar(progress: Callable[[int], None]) -> Callable[..., Any]:
    """What vLLM takes for a tqdm: it shows nothing and passes on how many requests are finished."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            super().update(n)
            progress(int(self.n))
            return None

    return Bar
