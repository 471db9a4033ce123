"""Measures several programs side by side: each in a process of its own, one at work at a time.

A process imports, loads and warms up, then waits; the parent gives the turn to one after the other,
again and again, so that what else the machine does falls on all of them. A turn's work is timed
inside the process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""Freed memory stays with the process; without it, half of a step on a CPU is page faults."""


class _Clock:
    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def passed(self) -> dict[str, float]:
        """Seconds on the wall, and of this process's threads together on the cores."""
        return {
            "wall": time.perf_counter() - self._wall,
            "cpu": time.process_time() - self._cpu,
        }


class Turns:
    """The child's end of the exchange: `begin` waits for the turn, `end` says how long it took."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._began = _Clock()

    def ready(self) -> None:
        """The imports are done."""
        self._connection.send({})

    def begin(self) -> None:
        self._connection.recv()
        self._began = _Clock()

    def end(self, **figures: Any) -> None:
        """`figures` are what else there is to tell: names with plain values."""
        _synchronize()
        self._connection.send({**self._began.passed(), "figures": figures})

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        self.begin()
        yield
        self.end()


class Probe(Protocol):
    """Looks at the last turn from inside; that turn's time is not used."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: object) -> Any: ...

    def figures(self) -> dict[str, Any]:
        """What was seen, once it is over."""


class CountedTurns:
    """Cuts a loop that calls `count` after each pass into turns of so many passes each."""

    def __init__(self, turns: Turns, sizes: Sequence[int], *, probe: Probe | None = None) -> None:
        self._turns = turns
        self._left = list(sizes)
        self._probe = probe
        self._passes = 0

    def begin(self) -> None:
        """Before the loop is set up, which the first turn includes: it is the warm-up."""
        self._turns.begin()

    def count(self, **figures: Any) -> bool:
        """Whether all turns are over; the figures are told where a turn ends here."""
        self._passes += 1
        if self._passes < self._left[0]:
            return False
        self._passes = 0
        del self._left[0]
        if self._left:
            self._turns.end(**figures)
            self._turns.begin()
            if len(self._left) == 1 and self._probe is not None:
                self._probe.__enter__()
            return False
        if self._probe is not None:
            self._probe.__exit__(None, None, None)
            figures |= self._probe.figures()
        self._turns.end(**figures)
        return True


Work = Callable[[Any, Turns], None]
"""What a child runs: a function of a module, given its job and its turns."""


@dataclass
class Side:
    """A program to measure: its name in the tables, what it runs, and with which job."""

    name: str
    work: Work
    job: Any
    clock: str = "wall"
    """Which of a turn's times counts: `wall`, or `cpu` where others keep the machine busy."""
    seconds: list[float] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    """Of each turn, like `seconds`: what the program told of it."""


class SideEnded(RuntimeError):
    """A side's process ended before its last turn; the message has the end of its log."""


class _Running:
    def __init__(self, side: Side, log: Path) -> None:
        self._side, self._log = side, log
        self._connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_child, args=(side.work, side.job, theirs, log))
        self._process.start()
        theirs.close()
        self._receive()

    def turn(self) -> None:
        self._connection.send("go")
        reply = self._receive()
        self._side.seconds.append(reply[self._side.clock])
        self._side.figures.append(reply["figures"])

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> dict[str, Any]:
        try:
            reply: dict[str, Any] = self._connection.recv()
        except EOFError:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])
            raise SideEnded(f"{self._side.name} ended too early:\n{tail}") from None
        return reply


def take_turns(sides: Sequence[Side], num_turns: int, *, logs: Path) -> None:
    """Give each side `num_turns` turns, in rotation; `seconds` gets one figure a turn."""
    running: list[_Running] = []
    try:
        for side in sides:
            running.append(_Running(side, logs / f"{side.name.replace(' ', '-')}.log"))
        for _ in range(num_turns):
            for program in running:
                program.turn()
    finally:
        for program in running:
            program.close()


def _child(work: Work, job: Any, connection: Connection, log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has what it wants
        work(job, Turns(connection))


def set_environment(threads: int) -> None:
    """What every child gets: the allocator's settings, its threads, no network, no GPU choice."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.update(ALLOCATOR | offline | dict.fromkeys(names, str(threads)))


class PeakMemory:
    """Bytes at the highest point above where it was made, after the imports.

    On a GPU the allocator's count; on a CPU the process's resident memory.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._base = 0 if self._cuda else _resident()

    def peak(self) -> int:
        if self._cuda:
            import torch

            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self._base


def _synchronize() -> None:
    """A GPU works on after a call has returned."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """Half the distance of the quartiles, relative to the median."""
    if len(values) < 4:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / statistics.median(values)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A markdown table: the first column is text, the others are figures."""
    print(f"| {' | '.join(header)} |")
    print("|" + " --- |" + " ---: |" * (len(header) - 1))
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def print_conditions(*, threads: int, device: str) -> None:
    """When, where and with which versions: a line for the table's head."""
    packages = ("torch", "transformers", "accelerate", "trl", "online-dpo")
    versions = ", ".join(f"{name} {_version(name)}" for name in packages)
    load = os.getloadavg()[0]
    print(
        f"{time.strftime('%d %B %Y')}; {_hardware(device)}, {threads} threads, load {load:.1f} at "
        f"the start; Python {platform.python_version()}, {versions}.\n"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _hardware(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()} x {os.cpu_count()}"
