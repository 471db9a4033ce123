"""What is seen from outside: the system calls of a commit, and disks that are full or read-only."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer
from kills import assert_same, copy_until, kill_config, living_groups, message, run_or_resume, start
from test_interruptions import wait_until
from test_kills import judged_config, longer_wins
from tiny import in_child

from online_dpo.config_file import dump_yaml
from online_dpo.files import read_signed_json

Figure = Callable[[str, object], None]
SYNC = re.compile(r"f(?:data)?sync\(\d+<(?P<path>[^>]*)>\)\s*= 0")
RENAME = re.compile(r'rename\("(?P<old>[^"]*)", "(?P<new>[^"]*)"\)\s*= 0')


def test_every_commit_is_synced_renamed_and_synced(tmp_path: Path) -> None:
    inline = {"threads": 1, "workers": "inline"}
    config = kill_config(tmp_path / "run", campaign={"rounds": 1}, compute=inline)
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config))
    trace = tmp_path / "trace"
    traced = ["strace", "-f", "-y", "--seccomp-bpf", "-s", "4096", "-o", str(trace)]
    traced += ["-e", "trace=fsync,fdatasync,rename,renameat,renameat2"]
    command = [sys.executable, "-m", "online_dpo.cli", "run", str(file)]
    done = subprocess.run([*traced, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    calls = [line.partition(" ")[2].strip() for line in trace.read_text().splitlines()]
    commits, texts = committed(calls, tmp_path / "run")
    run = tmp_path / "run"
    whole = {str(p.parent) for p in run.rglob("manifest.json") if len(p.parts) - len(run.parts) > 3}
    assert whole and whole <= commits
    rounds = {
        f"{run}/rounds/00{n}/{name}" for n in (0, 1) for name in ("round.json", "manifest.json")
    }
    assert {f"{run}/campaign.yaml", f"{run}/versions.json", *rounds} <= texts


def committed(calls: list[str], run: Path) -> tuple[set[str], set[str]]:
    """The folders and the files that were renamed to their final name, each as it must be."""
    folders, files = set(), set()
    synced: dict[str, int] = {}
    for place, call in enumerate(calls):
        if found := SYNC.match(call):
            synced[found["path"]] = place
        found = RENAME.match(call)
        if (
            not found
            or not found["old"].endswith(".partial")
            or not found["new"].startswith(str(run))
        ):
            continue
        old, new = found["old"], found["new"]
        assert any(
            (after := SYNC.match(later)) and after["path"] == os.path.dirname(new)
            for later in calls[place + 1 : place + 2]
        ), f"the parent was not synced after {call}"
        if not Path(new).is_dir() and not new.endswith((".json", ".yaml", ".jsonl")):
            continue  # deleted since
        if Path(new).is_dir():
            inside = [
                f"{old}/{name}" for name in read_signed_json(Path(new, "manifest.json"))["files"]
            ]
            manifest = synced[f"{old}/manifest.json.partial"]
            assert all(synced[path] < manifest for path in inside), f"{new}: manifest last"
            assert synced[old] > manifest, f"{new}: its folder was not synced"
            folders.add(new)
        else:
            assert old in synced, f"{old} was renamed before it was synced"
            files.add(new)
    return folders, files


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, whose size and mode can be changed."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    assert subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def die_before_labels() -> None:
    """SIGKILL when labels are about to be asked for."""
    from online_dpo.stages.label import Labelling

    Labelling.submit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore


def test_a_read_only_disk_ends_with_8_before_a_judge_is_called(tmp_path: Path, disk: Path) -> None:
    with JudgeServer(longer_wins) as server:
        config = judged_config(disk / "run", server.url)
        assert start(config, before=die_before_labels) == -signal.SIGKILL
        asked = len(server.requests)
        wait_until(lambda: not living_groups(disk / "run"))
        remount(disk, "ro")
        log = tmp_path / "run.txt"
        config["campaign"]["run_dir"] = str(disk / "run")
        assert in_child(resume_and_tell, config, str(log)) == 8
        assert "Read-only file system" in log.read_text() and str(disk / "run") in log.read_text()
        assert len(server.requests) == asked
        remount(disk, "rw")
        assert start(config) == 0, message(config)


def resume_and_tell(config: dict[str, Any], log: str) -> None:
    from kills import fork_workers

    from online_dpo.errors import CampaignError

    fork_workers()
    try:
        run_or_resume(config)
    except CampaignError as error:
        Path(log).write_text(f"{error.message}\nto go on: {error.remedy}\n")
        raise SystemExit(error.exit_code) from None


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("clean") / "run"
    assert start(kill_config(run)) == 0
    return run


def full_once(count: int) -> None:
    """The count-th sync of a file finds the disk full, and no other does."""
    real, calls = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == count:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        real(descriptor)

    os.fsync = fsync


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_disk_full_at_twenty_sizes_resumes_when_grown(
    clean: Path, tmp_path: Path, disk: Path, figure: Figure
) -> None:
    needed = sum(p.stat().st_blocks * 512 for p in clean.rglob("*")) // 1024
    refused = 0
    for share in range(20):
        run = disk / str(share) / "run"
        run.parent.mkdir()
        config = kill_config(run)
        used = sum(p.stat().st_blocks * 512 for p in disk.rglob("*")) // 1024
        remount(disk, f"size={used + max(16, needed * (share + 1) // 22)}k")
        log = tmp_path / "log"
        assert in_child(resume_and_tell, config, str(log)) == 8, share
        said = log.read_text()
        assert str(run) in said and re.search(r"need about [\d.,]+ MB; [\d.,]+ MB are free", said)
        refused += "The disk is too small" in said
        remount(disk, "size=64m")
        assert in_child(resume_and_tell, config, str(log)) == 0, log.read_text()
        assert_same(run, clean, f"share {share}")
        subprocess.run(["rm", "-r", str(run.parent)], check=True)
    figure("disk full at 20 sizes, then grown: byte-equal", f"20, {refused} refused at the start")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_disk_full_once_at_twenty_moments_is_resumed(
    clean: Path, tmp_path: Path, figure: Figure
) -> None:
    from functools import partial

    for seed in range(20):
        config = kill_config(tmp_path / f"{seed}/run")
        count = random.Random(seed).randint(1, 150)
        assert start(config, before=partial(full_once, count)) == 8, (seed, count)
        said = message(config)
        assert "No space left on device" in said and str(tmp_path / f"{seed}/run") in said
        assert start(config) == 0, message(config)
        assert_same(tmp_path / f"{seed}/run", clean, f"seed {seed}, sync {count}")
    figure("disk full once at 20 syncs, then resumed: byte-equal", 20)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kills_inside_checkpoint_writes_leave_nothing(
    clean: Path, tmp_path: Path, figure: Figure
) -> None:
    from functools import partial

    run = tmp_path / "run"
    copy_until(clean, run, 1)
    config = kill_config(run)
    for seed in range(50):
        code = start(config, before=partial(die_inside_a_checkpoint, seed))
        assert code in (-signal.SIGKILL, 0), (seed, message(config))
    assert start(config) == 0, message(config)
    assert_same(run, clean, "after 50 kills inside checkpoint writes")
    sizes = [
        sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and "logs" not in p.parts)
        for folder in (run, clean)
    ]
    ratio = sizes[0] / sizes[1]
    figure("disk after 50 kills inside checkpoint writes (at most 1.1)", f"{ratio:.3f} of clean")
    assert ratio <= 1.1


def die_inside_a_checkpoint(seed: int) -> None:
    """SIGKILL at one of the writes, syncs and renames of a step checkpoint, by seed."""
    from online_dpo import store

    finish, sync = store.RoundDir.finish, store.fsync_path
    left = [random.Random(seed).randint(0, 6), False]

    def count_down() -> None:
        if left[1]:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def counting(path: Path) -> None:
        count_down()
        sync(path)

    def finish_step(self: store.RoundDir, name: str, *args: Any, **kwargs: Any) -> Any:
        left[1] = name.startswith("checkpoints/")
        try:
            return finish(self, name, *args, **kwargs)
        finally:
            left[1] = False

    store.fsync_path = counting
    store.RoundDir.finish = finish_step  # type: ignore[method-assign]
