"""Counts what a stretch of torch code multiplies, and what the machine can multiply."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode
    from turns import PeakMemory, Turns


def flop_counter() -> FlopCounterMode:
    """A context in which matrix products and attention are counted; attention in full, not causal.

    torch knows neither a CPU's fused attention nor products that are added in place.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten

    def forward(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    def backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_backward_flop_count(grad, q, k, v))

    def added(acc: Any, a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * math.prod(a) * b[-1]

    unknown: dict[Any, Callable[..., int]] = {
        aten.addmm_: added,
        aten.baddbmm_: added,
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=unknown)


class StepProbe:
    """What a step costs beside time: memory at its highest up to now, then operations or a profile.

    Memory is taken first, because counting and profiling need some themselves.
    """

    def __init__(self, memory: PeakMemory, *, profile: bool) -> None:
        self._memory = memory
        self._profile = profile
        self._figures: dict[str, Any] = {}
        self._inside: Any = None

    def __enter__(self) -> None:
        import torch

        self._figures["memory"] = self._memory.peak()
        self._inside = torch.profiler.profile() if self._profile else flop_counter()
        self._inside.__enter__()

    def __exit__(self, *error: object) -> None:
        self._inside.__exit__(*error)

    def figures(self) -> dict[str, Any]:
        if self._profile:
            table = self._inside.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
            return {**self._figures, "profile": table}
        return {**self._figures, "flops": self._inside.get_total_flops()}


@dataclass(frozen=True)
class PeakJob:
    device: str
    dtype: str
    clock: str
    turns: int


def matmul_peak(job: PeakJob, turns: Turns) -> None:
    """A side that multiplies square matrices: `rate` is the fastest, in FLOP/s."""
    import torch

    sizes = (4096, 8192) if job.device == "cuda" else (768, 1024, 2048)
    matrices = [
        torch.randn(3, n, n, device=job.device).to(getattr(torch, job.dtype)) for n in sizes
    ]

    clock = time.perf_counter if job.clock == "wall" else time.process_time

    def rate(stack: torch.Tensor) -> float:
        repeats = max(1, 4096**3 // len(stack[0]) ** 3 // (1 if job.device == "cuda" else 16))
        begin = clock()
        for _ in range(repeats):
            torch.mm(stack[0], stack[1], out=stack[2])
        if job.device == "cuda":
            torch.cuda.synchronize()
        return repeats * 2 * len(stack[0]) ** 3 / (clock() - begin)

    for stack in matrices:
        rate(stack)
    turns.ready()
    for _ in range(job.turns):
        turns.begin()
        rates = [rate(stack) for stack in matrices]
        turns.end(rate=max(rates))
