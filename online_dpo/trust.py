"""Code and addresses that a run directory names: used only where its user repeats them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from online_dpo.config import Config
from online_dpo.endpoint_urls import is_loopback
from online_dpo.errors import ConfigError
from online_dpo.plugins import member_names, names_code

_USUAL_KEY = "OPENAI_API_KEY"
"""The variable that is read where a config names none."""

_HARMLESS_ENGINE_KEYS = frozenset(
    (
        "block_size",
        "cpu_offload_gb",
        "data_parallel_size",
        "dtype",
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "enable_sleep_mode",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_dtype",
        "max_model_len",
        "max_num_batched_tokens",
        "max_num_seqs",
        "pipeline_parallel_size",
        "quantization",
        "seed",
        "swap_space",
        "tensor_parallel_size",
    )
)
"""Engine arguments whose plain values name no code; vLLM imports what some others name."""


def code_fields(config: Config) -> Iterator[tuple[str, str]]:
    """(field, value) for all that names code to run, or a place that a key is sent to."""
    judges = [("judge", config.judge)]
    if config.evaluation.judge is not None:
        judges.append(("evaluation.judge", config.evaluation.judge))
    for section, judge in judges:
        for place, name in [("name", judge.name), *member_names(judge.options)]:
            if names_code(name):
                yield f"{section}.{place}", name
        yield from _asked_fields(f"{section}.options", judge.options)
    if config.sampling.also is not None:
        also = config.sampling.also
        yield from _key_goes_to("sampling.also", "url", also.url, also.api_key_env)
    if names_code(config.pairs.selector):
        yield "pairs.selector", config.pairs.selector
    if config.model.trust_remote_code:
        yield "model.trust_remote_code", "true"
    if config.sampling.reload_command is not None:
        yield "sampling.reload_command", config.sampling.reload_command
    for index, endpoint in enumerate(config.sampling.endpoints):
        if endpoint.api_key_env is not None:
            place = f"sampling.endpoints[{index}]"
            yield from _key_goes_to(place, "url", endpoint.url, endpoint.api_key_env)
        if endpoint.reload_url is not None:
            yield "sampling.endpoints.reload_url", endpoint.reload_url
    for key, value in config.sampling.engine.items():
        if _imports_code(key, value):
            yield f"sampling.engine.{key}", str(value)
    for key, value in config.train.launch.items():
        yield f"train.launch.{key}", str(value)


def _asked_fields(place: str, options: Any) -> Iterator[tuple[str, str]]:
    """(field, value) of the endpoints in a judge's options, and in its members'."""
    if isinstance(options, list):
        for index, value in enumerate(options):
            yield from _asked_fields(f"{place}[{index}]", value)
    elif isinstance(options, Mapping):
        url, variable = options.get("base_url"), options.get("api_key_env", _USUAL_KEY)
        yield from _key_goes_to(place, "base_url", url, variable)
        for name, value in options.items():
            yield from _asked_fields(f"{place}.{name}", value)


def _key_goes_to(place: str, name: str, url: object, variable: object) -> Iterator[tuple[str, str]]:
    """What says which secret of the environment is sent where, unless it stays on this machine."""
    if isinstance(url, str) and is_loopback(url):
        return
    if url is not None:
        yield f"{place}.{name}", str(url)
    if variable != _USUAL_KEY:
        yield f"{place}.api_key_env", str(variable)


def check_trust(config: Config, trusted: Sequence[str], *, run: Path) -> None:
    """Raise ConfigError unless all that `code_fields` finds is in `trusted`."""
    missing = [f"{field}={value}" for field, value in code_fields(config)]
    missing = [entry for entry in missing if entry not in trusted]
    if missing:
        named = "\n".join(f"  {entry}" for entry in missing)
        flags = " ".join(f"--trust {shlex.quote(entry)}" for entry in missing)
        raise ConfigError(
            f"{run} names code to run, or where to send a key:\n{named}\n"
            "If you know it and where it comes from, say so.",
            remedy=f"online-dpo resume {run} {flags}",
        )


def trust_flags(config: Config) -> list[str]:
    """The arguments of `resume` that trust all code a config names."""
    return [f"--trust {shlex.quote(f'{field}={value}')}" for field, value in code_fields(config)]


def _imports_code(key: str, value: Any) -> bool:
    plain = value is None or isinstance(value, bool | int | float | str)
    return key not in _HARMLESS_ENGINE_KEYS or not plain
