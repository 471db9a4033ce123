"""How a round's policy reaches servers: a command of the config's, or an endpoint's hook."""

from __future__ import annotations

import json
import shlex
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

from online_dpo.errors import EngineError

RELOAD_TIMEOUT_S = 3600.0
"""Longest time that a reload hook or command may take."""


def run_reload_command(command: str, folder: Path) -> None:
    """Run the reload command in a shell. Raises EngineError with its output where it fails."""
    line = command.replace("{policy}", shlex.quote(str(folder)))
    try:
        done = subprocess.run(
            line,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RELOAD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"sampling.reload_command did not end within {RELOAD_TIMEOUT_S:g} s: {line}"
        ) from None
    if done.returncode != 0:
        raise EngineError(
            f"sampling.reload_command failed with status {done.returncode}: {line}\n"
            f"{done.stdout[-2000:].strip() or 'It printed nothing.'}"
        )


def call_reload_hook(url: str, folder: Path) -> None:
    """POST the folder to a reload hook. Raises EngineError with its answer where it fails."""
    request = urllib.request.Request(
        url,
        data=json.dumps({"path": str(folder)}).encode(),
        headers={"Content-Type": "application/json"},
        method="POST",
    )
    try:
        with urllib.request.urlopen(request, timeout=RELOAD_TIMEOUT_S) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        with error:
            said = error.read().decode(errors="replace")[-1000:]
        raise EngineError(f"The reload hook {url} failed: HTTP {error.code}: {said}") from error
    except OSError as error:
        raise EngineError(f"The reload hook {url} cannot be reached: {error}") from error
