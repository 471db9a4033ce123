"""The real vLLM for tests: an API server, and a sampler worker whose engine can be made to fail."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_dpo.samplers.handler import Emit, SamplerHandler

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class VllmServer:
    """A running server: its base URL, the served model's name, and the folder it came from."""

    base_url: str
    model: str
    folder: Path

    @property
    def root(self) -> str:
        return self.base_url.removesuffix("/v1")


@contextmanager
def running_server(folder: Path, log: Path) -> Iterator[VllmServer]:
    """vLLM's OpenAI server, with its development routes, which load weights."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(folder), "--served-model-name", "policy",
        "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--disable-log-stats",
        "--structured-outputs-config", '{"disable_any_whitespace": true, "backend": "xgrammar"}',
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, **ENVIRONMENT, "VLLM_SERVER_DEV_MODE": "1"},
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        yield VllmServer(f"http://127.0.0.1:{port}/v1", "policy", folder)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            pass
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise RuntimeError(f"vLLM's server did not come up:\n{log.read_text()[-3000:]}")


class FaultyHandler(SamplerHandler):
    """A vLLM worker whose loading can be broken in the ways that nobody would notice."""

    def fail(self, *, emit: Emit, fault: str | None, fresh_engine: bool = False) -> dict[str, Any]:
        """Break loading in place from now on; None mends it.

        no_head: a tied output projection is not passed on. stale_cache: the prefix cache keeps its
        old keys and values. no_load: the weights of the policy before stay. no_adapter: so does its
        adapter. A fresh engine takes seconds: unless it is asked for, a load in place that works
        stands in for it.
        """
        engine: Any = self._engine
        for name in ("replace_weights", "forget_prefixes", "restart", "serve_adapter"):
            vars(engine).pop(name, None)
        replace = engine.replace_weights
        if fault == "no_head":
            engine.replace_weights = lambda folder, weights: _without_head(engine, folder, weights)
        elif fault == "stale_cache":
            engine.forget_prefixes = lambda: None
        elif fault == "no_load":
            engine.replace_weights = lambda folder, weights: None
        elif fault == "no_adapter":
            engine.serve_adapter = lambda folder: engine.forget_prefixes()
        if fault is not None and not fresh_engine:
            engine.restart = lambda policy, folder: _mended_load(engine, folder, replace)
        return {}

    def prove(self, *, emit: Emit, folder: str) -> dict[str, Any]:
        """Run the proof of loading in place again."""
        from online_dpo.samplers.proof import prove_reload

        self._loaded = None
        return {"problem": prove_reload(self._engine, Path(folder))}  # type: ignore[arg-type]

    def prove_adapter(self, *, emit: Emit, folder: str) -> dict[str, Any]:
        """Run the proof of exchanging adapters again."""
        from online_dpo.samplers.adapter_proof import prove_adapter

        self._loaded = None
        return {"problem": prove_adapter(self._engine, Path(folder))}  # type: ignore[arg-type]


def _without_head(engine: Any, folder: Path, weights: Any) -> None:
    engine._engine.collective_rpc(_reload_without_head, args=(folder, weights))
    engine.forget_prefixes()


def _reload_without_head(worker: Any, folder: Path, weights: Any) -> None:
    worker.reload_weights(weights_iterator=weights(folder))


def _mended_load(engine: Any, folder: Path, replace: Any) -> None:
    from online_dpo.samplers.weights import stored_weights

    vars(engine).pop("forget_prefixes", None)
    replace(folder, stored_weights)
    engine.how = "restarted"
