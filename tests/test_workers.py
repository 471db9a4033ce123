"""Worker processes: they answer, fail by name, and never outlive their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from online_dpo.errors import ConfigError, EngineError
from online_dpo.workers import ChildWorker, InlineWorker

TESTS = Path(__file__).parent


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[ChildWorker]:
    made = make_worker(tmp_path)
    yield made
    made.close()


def make_worker(run: Path) -> ChildWorker:
    return ChildWorker(
        "echo",
        "echo_handler:Echo",
        {"colour": "red"},
        run=run,
        log=run / "logs" / "echo.log",
        env={"PYTHONPATH": str(TESTS)},
    )


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def wait_for(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_a_worker_answers_and_reports_progress(worker: ChildWorker) -> None:
    events: list[dict[str, Any]] = []
    result = worker.call("echo", on_event=events.append, text="hällo\nthere")
    assert result["text"] == "hällo\nthere" and result["settings"] == {"colour": "red"}
    assert events == [{"event": "heard", "text": "hällo\nthere"}]
    assert worker.call("echo", text="x" * 3_000_000)["pid"] == result["pid"]


def test_an_error_keeps_its_kind_and_its_remedy(worker: ChildWorker) -> None:
    with pytest.raises(ConfigError, match="no such thing") as caught:
        worker.call("fail")
    assert caught.value.remedy == "do this"


def test_a_killed_worker_is_an_engine_error_with_its_log(worker: ChildWorker) -> None:
    with pytest.raises(EngineError, match=r"(?s)SIGKILL.*last words"):
        worker.call("crash")
    assert worker.call("echo", text="again")["text"] == "again"


def test_close_ends_the_whole_group(worker: ChildWorker) -> None:
    pids = worker.call("spawn")
    worker.close()
    assert wait_for(lambda: gone(pids["pid"]) and gone(pids["child"]))


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_survives_the_parent(tmp_path: Path, kind: signal.Signals) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from test_workers import make_worker\n"
        "w = make_worker(Path(sys.argv[1]))\n"
        "pids = w.call('spawn'); print(pids['pid'], pids['child'], flush=True)\n"
        "w.call('sleep')\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(TESTS)], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    time.sleep(0.2)
    os.kill(parent.pid, kind)
    parent.wait()
    parent.stdout.close()
    assert len(pids) == 2
    assert wait_for(lambda: all(gone(pid) for pid in pids))


def test_an_inline_worker_makes_its_handler_when_first_used() -> None:
    made: list[str] = []

    class Handler:
        def double(self, *, emit: Callable[[dict[str, Any]], None], x: int) -> dict[str, Any]:
            return {"x": 2 * x}

        def close(self) -> None:
            made.append("closed")

    def make() -> Handler:
        made.append("made")
        return Handler()

    inline = InlineWorker(make)
    inline.close()
    assert made == []
    assert inline.call("double", x=4) == {"x": 8}
    inline.close()
    inline.close()
    assert made == ["made", "closed"]
