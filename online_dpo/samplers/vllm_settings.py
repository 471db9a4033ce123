"""The arguments and the environment that vLLM's engine gets, before vllm is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from online_dpo.config import ModelConfig
from online_dpo.errors import ConfigError

OWN_ARGUMENTS = {
    "model": "model.path",
    "tokenizer": "model.path",
    "trust_remote_code": "model.trust_remote_code",
    "generation_config": "the fields of sampling",
    "logprobs_mode": "the contract (raw log-probs)",
    "data_parallel_size": "the orchestrator, which starts a worker for each replica",
    "enable_lora": "train.lora",
    "max_lora_rank": "train.lora.rank",
    "max_loras": "the campaign, which serves one adapter at a time",
}
"""Engine arguments that `sampling.engine` cannot set, and what decides them."""


_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM makes room for."""


def engine_arguments(
    model: ModelConfig, extra: Mapping[str, Any], *, device: str
) -> dict[str, Any]:
    """vLLM's engine arguments. Raises ConfigError for those that are decided elsewhere."""
    for name, decider in OWN_ARGUMENTS.items():
        if name in extra:
            raise ConfigError(f"sampling.engine.{name} cannot be set: it is decided by {decider}.")
    arguments: dict[str, Any] = {
        "trust_remote_code": model.trust_remote_code,
        "generation_config": "vllm",
        "logprobs_mode": "raw_logprobs",
        "seed": 0,
        "disable_log_stats": True,
        "dtype": "float32" if device == "cpu" else "bfloat16",
    }
    if device == "cpu":
        arguments["enforce_eager"] = True
    else:
        arguments["enable_sleep_mode"] = True
    if extra.get("tensor_parallel_size", 1) == 1 and extra.get("pipeline_parallel_size", 1) == 1:
        arguments["distributed_executor_backend"] = "uni"
    return {**arguments, **extra}


def adapter_arguments(rank: int) -> dict[str, Any]:
    """vLLM's engine arguments for one adapter at a time of a rank."""
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": next(size for size in _LORA_RANKS if size >= rank),
    }


def set_environment(threads: int | None) -> None:
    """Set what vLLM reads from the environment, unless the user has; its import comes later."""
    settings = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # The engine lives in this process: starts three times faster, and ends with it.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if threads is not None:
        # vLLM would bind its threads to cores of its own choice, one for each core it sees.
        settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
