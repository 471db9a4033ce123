"""Training on a CPU keeps large blocks of memory instead of mapping each tensor anew (glibc)."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""mallopt's parameters (malloc.h)."""


def keep_large_blocks() -> bool:
    """Whether blocks of any size now come from the heap, and stay with the process when freed.

    By default each tensor of some MB is mapped anew, and the kernel clears its pages when they are
    first touched, in every step anew. Left alone where the environment sets MALLOC_* itself, and
    where the C library is another one.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
