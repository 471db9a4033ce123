"""Worker processes: they answer, fail by name, and never outlive their parent."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from online_dpo import workers
from online_dpo.errors import ConfigError, EngineError
from online_dpo.workers import ChildWorker, InlineWorker

TESTS = Path(__file__).parent


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[ChildWorker]:
    made = make_worker(tmp_path)
    yield made
    made.close()


def make_worker(run: Path, handler: str = "echo_handler:Echo", **options: Any) -> ChildWorker:
    return ChildWorker(
        "echo",
        handler,
        {"colour": "red"},
        run=run,
        log=run / "logs" / "echo.log",
        env={"PYTHONPATH": str(TESTS)},
        **options,
    )


class Stuck:
    """A worker's handler that never lets go of the interpreter."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        pass

    def match(self, *, emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        emit({"pids": [os.getpid(), child.pid]})
        re.match(r"(a+)+$", "a" * 40 + "b")
        return {}


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


def test_a_worker_stuck_in_native_code_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from test_workers import make_worker\n"
        "w = make_worker(Path(sys.argv[1]), 'test_workers:Stuck')\n"
        "w.call('match', on_event=lambda e: print(*e['pids'], flush=True))\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(TESTS)], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    time.sleep(0.5)
    try:
        assert len(pids) == 2 and not any(gone(pid) for pid in pids)
        parent.kill()
        parent.wait()
        assert wait_for(lambda: all(gone(pid) for pid in pids))
    finally:
        parent.kill()
        parent.stdout.close()
        for pid in pids:
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_worker_outlives_the_thread_that_started_it(worker: ChildWorker) -> None:
    pids: list[int] = []
    thread = threading.Thread(target=lambda: pids.append(worker.call("echo", text="")["pid"]))
    thread.start()
    thread.join()
    time.sleep(0.5)
    assert [worker.call("echo", text="")["pid"]] == pids


STRANGERS = [
    b"GET /health HTTP/1.0\r\n\r\n",
    b"[" * 3000 + b"\n",
    b'{"rank": 0}\n',
    b"",
    b"x" * 9999,
]


@pytest.mark.parametrize("text", STRANGERS)
def test_strangers_do_not_stop_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes
) -> None:
    monkeypatch.setattr(workers, "GREETING_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    met: list[socket.socket] = []

    def visit() -> None:
        while not met:
            try:
                met.append(socket.create_connection(("127.0.0.1", port)))
            except ConnectionRefusedError:
                time.sleep(0.005)
        met[0].sendall(text)

    visitor = threading.Thread(target=visit)
    visitor.start()
    made = make_worker(tmp_path, listen=f"127.0.0.1:{port}")
    try:
        assert made.call("echo", text="here")["text"] == "here"
    finally:
        made.close()
        visitor.join()
        met[0].close()


@pytest.mark.parametrize("greets", [False, True])
def test_a_death_while_connecting_is_an_engine_error(tmp_path: Path, greets: bool) -> None:
    (tmp_path / "dies.py").write_text(
        "import json, os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(os.environ['ONLINE_DPO_SOCKET'])\n"
        "hello = {'rank': 0, 'token': os.environ['ONLINE_DPO_TOKEN']}\n"
        f"if {greets}: s.sendall(json.dumps(hello).encode() + b'\\n')\n"
        "s.close(); sys.exit(3)\n"
    )
    made = make_worker(tmp_path, launcher=[sys.executable, str(tmp_path / "dies.py")])
    with pytest.raises(EngineError, match="exit code 3"):
        made.call("echo", text="")


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(EngineError, match=f"{address}.*in use"):
            make_worker(tmp_path, listen=address).call("echo", text="")


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
