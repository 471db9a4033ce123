"""Which GPUs this process may use, asked without importing torch."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess


@functools.cache
def visible_gpus() -> tuple[str, ...]:
    """The NVIDIA GPUs of this process, as CUDA_VISIBLE_DEVICES names them; empty for none."""
    limited = os.environ.get("CUDA_VISIBLE_DEVICES")
    if limited is not None:
        return tuple(part.strip() for part in limited.split(",") if part.strip() not in ("", "-1"))
    if shutil.which("nvidia-smi") is None:
        return ()
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    if listing.returncode != 0:
        return ()
    count = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    return tuple(str(index) for index in range(count))


def hiding_gpus(device: str) -> dict[str, str]:
    """What compute.device adds to a process's environment: "cpu" hides the GPUs."""
    return {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
