"""Labelling beside sampling: it ends with the campaign, whatever ends that."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from types import SimpleNamespace
from typing import Any, cast

import pytest

from online_dpo.errors import JudgeError, SignalError
from online_dpo.progress import Bar, SilentProgress
from online_dpo.stages import label
from online_dpo.stages.context import Context
from online_dpo.stages.label import Labelling


class Judge:
    """Stands for a labeller whose judge takes for ever, or fails."""

    def __init__(self) -> None:
        self.made_on: list[threading.Thread] = []
        self.asked = threading.Event()
        self.cancelled = threading.Event()
        self.hanging = threading.Event()

    def make(self, evaluation: bool) -> Judge:
        assert not evaluation
        self.made_on.append(threading.current_thread())
        return self

    def cancel(self) -> None:
        self.cancelled.set()


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Judge:
    made = Judge()

    def label_shard(context: Context, shard: str, bar: Bar) -> None:
        if shard == "fails":
            raise JudgeError("no verdict")
        if shard == "hangs":
            made.hanging.set()
            made.asked.set()
            made.cancelled.wait()
            time.sleep(0.05)  # ends a little later than it is told to
            made.hanging.clear()
            raise CancelledError

    monkeypatch.setattr(label, "label_shard", label_shard)
    return made


@pytest.fixture
def labelling(judge: Judge) -> Labelling:
    context = SimpleNamespace(progress=SilentProgress(), make_labeller=judge.make)
    return Labelling(cast(Context, context), total=2)


@pytest.fixture(autouse=True)
def no_thread_left(judge: Judge) -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert not judge.hanging.is_set()
    left = set(threading.enumerate()) - before
    judge.cancelled.set()
    for thread in left:  # its work is done; it may still be in its last instructions
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_every_shard_is_waited_for(labelling: Labelling, judge: Judge) -> None:
    with labelling:
        labelling.submit("one")
        labelling.submit("two")
    assert judge.made_on == [threading.main_thread()] and not judge.cancelled.is_set()


def test_a_failure_of_the_judge_is_raised_at_the_end(labelling: Labelling) -> None:
    with pytest.raises(JudgeError, match="no verdict"), labelling:
        labelling.submit("fails")


def test_an_error_of_sampling_ends_labelling(labelling: Labelling, judge: Judge) -> None:
    with pytest.raises(KeyError), labelling:
        labelling.submit("hangs")
        judge.asked.wait()
        raise KeyError
    assert judge.made_on == [threading.main_thread()]


def test_a_signal_while_waiting_ends_labelling(labelling: Labelling, judge: Judge) -> None:
    def stop(number: int, frame: Any) -> None:
        raise SignalError("stopped", exit_code=143)

    def send() -> None:
        judge.asked.wait()
        os.kill(os.getpid(), signal.SIGUSR1)

    old = signal.signal(signal.SIGUSR1, stop)
    sender = threading.Timer(0.3, send)
    try:
        with pytest.raises(SignalError), labelling:
            labelling.submit("hangs")
            sender.start()
    finally:
        signal.signal(signal.SIGUSR1, old)
        sender.join()
    assert judge.cancelled.is_set()
