"""SIGINT and SIGTERM as an exception that ends work in good order."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from online_dpo.errors import SignalError


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise SignalError in the block at the first signal; a second one ends the process at once.

    In another thread than the main one, where Python delivers no signals, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, signal.SIG_DFL)
        raise SignalError(f"Stopped by {signal.Signals(number).name}.", exit_code=128 + number)

    old = {kind: signal.signal(kind, stop) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for kind, handler in old.items():
            signal.signal(kind, handler)
