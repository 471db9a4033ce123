"""Artifacts are complete under their final name or not there; locks; hashes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from online_dpo.errors import CorruptError, DiskError, LockedError
from online_dpo.files import combined_hash, sha256_text, write_atomic
from online_dpo.locks import RunLock, hold_as_worker, holder
from online_dpo.store import RoundDir, RunDir


@pytest.fixture
def round_dir(tmp_path: Path) -> RoundDir:
    run = RunDir(tmp_path)
    (tmp_path / "rounds").mkdir()
    directory = run.round(1)
    directory.write_plan({"round": 1})
    return directory


def commit(directory: RoundDir, name: str = "pairs", text: str = "data") -> None:
    with directory.commit(name, inputs={"samples": "abc"}) as draft:
        (draft.path / "sub").mkdir()
        (draft.path / "sub/data.txt").write_text(text)
        draft.rows = 3


def test_a_committed_artifact_says_what_it_is(round_dir: RoundDir) -> None:
    commit(round_dir)
    manifest = round_dir.manifest("pairs")
    assert manifest["rows"] == 3 and manifest["inputs"] == {"samples": "abc"}
    expected = sha256_text(f"sub/data.txt {sha256_text('data')}\n")
    assert manifest["sha256"] == expected == combined_hash({"sub/data.txt": sha256_text("data")})
    assert round_dir.verify("pairs") == round_dir.path / "pairs"


def test_an_exception_leaves_nothing_under_the_final_name(round_dir: RoundDir) -> None:
    with pytest.raises(RuntimeError), round_dir.commit("pairs", inputs={}) as draft:
        (draft.path / "half").write_text("x")
        raise RuntimeError
    assert not round_dir.has("pairs") and not (round_dir.path / "pairs").exists()
    commit(round_dir)
    assert not (round_dir.path / "pairs/half").exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_noticed(round_dir: RoundDir, damage: str) -> None:
    commit(round_dir)
    file = round_dir.path / "pairs/sub/data.txt"
    if damage == "flip":
        file.write_text("data"[:-1] + "e")
    elif damage == "truncate":
        file.write_text("")
    else:
        file.unlink()
    with pytest.raises(CorruptError, match=r"data\.txt"):
        round_dir.verify("pairs")


def test_the_round_manifest_lists_its_artifacts(round_dir: RoundDir) -> None:
    commit(round_dir)
    commit(round_dir, "samples/part-00000")
    digest = round_dir.close({"promoted": True})
    names = [artifact["name"] for artifact in round_dir.manifest()["artifacts"]]
    assert names == ["pairs", "samples/part-00000"]
    assert digest == round_dir.manifest_sha256() and round_dir.finished


def test_children_are_committed_ones_only(round_dir: RoundDir) -> None:
    commit(round_dir, "samples/part-00000")
    round_dir.begin("samples/part-00001")
    assert round_dir.children("samples") == ["samples/part-00000"]


def test_events_survive_a_torn_line(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.event("one")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "to')
    run.event("two")
    assert [event["event"] for event in run.events()] == ["one", "two"]


def test_atomic_text_replaces_whole(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", "1")
    write_atomic(tmp_path / "a.json", "2")
    assert (tmp_path / "a.json").read_text() == "2" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_named(round_dir: RoundDir) -> None:
    with (
        pytest.raises(DiskError, match="No space left on device"),
        round_dir.commit("pairs", inputs={}) as draft,
    ):
        os.symlink("/dev/full", draft.path / "full")
        with (draft.path / "full").open("w") as file:
            file.write("x")
    assert not round_dir.has("pairs")


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    found = holder(tmp_path)
    assert found is not None and found["pid"] == os.getpid()
    with pytest.raises(LockedError, match=f"process {os.getpid()}"):
        RunLock(tmp_path)
    lock.release()
    assert holder(tmp_path) is None
    RunLock(tmp_path).release()


def test_a_start_waits_for_dying_workers(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from online_dpo.locks import hold_as_worker\n"
        "file = hold_as_worker(Path(sys.argv[1])); print('held', flush=True); time.sleep(0.6)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
    ) as worker:
        assert worker.stdout is not None and worker.stdout.readline() == b"held\n"
        began = time.monotonic()
        RunLock(tmp_path).release()
        assert time.monotonic() - began > 0.2
    with hold_as_worker(tmp_path), pytest.raises(LockedError, match="still running"):
        RunLock(tmp_path, workers_timeout_s=0.1)


def test_a_look_at_the_lock_never_stops_a_start(tmp_path: Path) -> None:
    RunLock(tmp_path).release()
    with (tmp_path / "lock").open() as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        timer = threading.Timer(1.5, look.close)
        timer.start()
        RunLock(tmp_path).release()
        assert look.closed
        timer.join()


def test_a_start_gets_in_between_looks_without_a_pause(tmp_path: Path) -> None:
    RunLock(tmp_path).release()
    code = (
        "import sys; from pathlib import Path; from online_dpo.locks import holder\n"
        "print('looking', flush=True)\nwhile True: holder(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as watcher:
        try:
            assert watcher.stdout is not None and watcher.stdout.readline() == b"looking\n"
            for _ in range(20):
                RunLock(tmp_path).release()
        finally:
            watcher.kill()


def test_the_workers_in_the_way_are_named(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from online_dpo.locks import hold_as_worker\n"
        "file = hold_as_worker(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
    ) as worker:
        try:
            assert worker.stdout is not None and worker.stdout.readline() == b"held\n"
            with pytest.raises(LockedError, match=rf"still running.*\(process {worker.pid}\)"):
                RunLock(tmp_path, workers_timeout_s=0.1)
        finally:
            worker.kill()
