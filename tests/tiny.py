"""A campaign so small that it runs in a second, and children that start with torch imported."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

PRELOAD = [
    "online_dpo.campaign",
    "online_dpo.training.handler",
    "online_dpo.samplers.handler",
    "online_dpo.judging",
    "online_dpo.paid.openai_client",
    "datasets",
    "online_dpo.cli",
    "online_dpo.worker_main",
    "online_dpo.samplers.transformers",
    "transformers.models.llama.modeling_llama",
    "kills",
]

WORDS = ("red", "green", "blue", "round", "square", "small")


def tiny_config(run_dir: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A config over prompts and demonstrations that are written beside the run directory."""
    folder = run_dir.parent
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "prompts.jsonl", [json.dumps({"prompt": p}) for p in _prompts(24)])
    _write(folder / "demonstrations.jsonl", _demonstrations())
    config: dict[str, Any] = {
        "model": {
            "init": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_layers": 2,
                "num_heads": 2,
                "vocab_size": 300,
                "max_length": 64,
            }
        },
        "sft": {
            "demonstrations": str(folder / "demonstrations.jsonl"),
            "epochs": 5,
            "learning_rate": 1e-2,
            "batch_size": 16,
        },
        "prompts": {"train": [{"path": str(folder / "prompts.jsonl")}], "holdout": 8},
        "sampling": {"n": 4, "max_new_tokens": 12, "prompts_per_shard": 4},
        "judge": {
            "name": "heuristic",
            "options": {
                "scorers": [
                    {"kind": "lexicon", "positive": ["red", "round"], "negative": ["blue", "small"]}
                ]
            },
        },
        "train": {
            "learning_rate": 1e-3,
            "batch_size": 2,
            "micro_batch_size": 2,
            "checkpoint_every": 1,
        },
        "compute": {"threads": 1},
        "campaign": {"rounds": 2, "prompts_per_round": 8, "run_dir": str(run_dir)},
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    return config


def digests(run: Path) -> dict[str, str]:
    """The sha256 of everything a campaign commits, by relative path; logs and times left out."""
    files = [
        p for p in sorted((run / "rounds").rglob("*")) if p.is_file() and "logs" not in p.parts
    ]
    files.append(run / "metrics.jsonl")
    return {
        p.relative_to(run).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def start_child(target: Callable[..., None], *args: Any) -> ForkServerProcess:
    """Start a module-level function in a fresh process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=target, args=args)
    process.start()
    return process


def in_child(target: Callable[..., None], *args: Any, timeout_s: float = 120.0) -> int:
    """Run a module-level function in a fresh process; its exit code, negative for a signal."""
    process = start_child(target, *args)
    process.join(timeout_s)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{target.__name__} did not end within {timeout_s:.0f} s")
    assert process.exitcode is not None
    return process.exitcode


def _prompts(count: int) -> list[str]:
    return [f"{WORDS[i % 6]} {WORDS[(i // 6) % 6]} thing {i}:" for i in range(count)]


def _demonstrations() -> list[str]:
    rows = []
    for i in range(96):
        a, b, c = WORDS[i % 6], WORDS[(i * 5 + 1) % 6], WORDS[(i * 7 + 2) % 6]
        rows.append(f'{{"prompt": "{a} {b} thing {i}:", "response": " {a} {c} {b}."}}')
    return rows


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n")
