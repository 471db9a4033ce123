"""Code that a config names: nothing of a run directory is run unless its user repeats it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from online_dpo.config import Config
from online_dpo.errors import ConfigError
from online_dpo.plugins import member_names, names_code

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
    """(field, value) for everything in a config that names code to run."""
    judges = [("judge", config.judge)]
    if config.evaluation.judge is not None:
        judges.append(("evaluation.judge", config.evaluation.judge))
    for section, judge in judges:
        for place, name in [("name", judge.name), *member_names(judge.options)]:
            if names_code(name):
                yield f"{section}.{place}", name
    if names_code(config.pairs.selector):
        yield "pairs.selector", config.pairs.selector
    if config.model.trust_remote_code:
        yield "model.trust_remote_code", "true"
    if config.sampling.reload_command is not None:
        yield "sampling.reload_command", config.sampling.reload_command
    for endpoint in config.sampling.endpoints:
        if endpoint.reload_url is not None:
            yield "sampling.endpoints.reload_url", endpoint.reload_url
    for key, value in config.sampling.engine.items():
        if _imports_code(key, value):
            yield f"sampling.engine.{key}", str(value)
    for key, value in config.train.launch.items():
        yield f"train.launch.{key}", str(value)


def check_trust(config: Config, trusted: Sequence[str], *, run: Path) -> None:
    """Raise ConfigError unless every piece of code that the config names is in `trusted`."""
    missing = [f"{field}={value}" for field, value in code_fields(config)]
    missing = [entry for entry in missing if entry not in trusted]
    if missing:
        named = "\n".join(f"  {entry}" for entry in missing)
        flags = " ".join(f"--trust {shlex.quote(entry)}" for entry in missing)
        raise ConfigError(
            f"{run} names code to run:\n{named}\nIf you know it and where it comes from, say so.",
            remedy=f"online-dpo resume {run} {flags}",
        )


def trust_flags(config: Config) -> list[str]:
    """The arguments of `resume` that trust all code a config names."""
    return [f"--trust {shlex.quote(f'{field}={value}')}" for field, value in code_fields(config)]


def _imports_code(key: str, value: Any) -> bool:
    plain = value is None or isinstance(value, bool | int | float | str)
    return key not in _HARMLESS_ENGINE_KEYS or not plain
