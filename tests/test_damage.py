"""Damage to any committed file is found before the file is used, named, and left to the user."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from kills import assert_same, copy_until, kill_config, message, start
from test_left_out import die_after
from tiny import in_child

from online_dpo.campaign import resume
from online_dpo.drift import current_config
from online_dpo.errors import CorruptError
from online_dpo.integrity import check_run
from online_dpo.store import RunDir


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[2 * len(data) // 3] ^= 4
    path.write_bytes(bytes(data))


def zero_the_tail(path: Path) -> None:
    data = path.read_bytes()
    keep = len(data) - max(1, len(data) // 4)
    path.write_bytes(data[:keep] + bytes(len(data) - keep))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "emptied": empty,
    "one bit flipped": flip_a_bit,
    "tail zeroed": zero_the_tail,
    "deleted": Path.unlink,
}

VIEWS = {"events.jsonl", "metrics.jsonl", "lock", "workers.lock"}
"""What holds no committed work; metrics.jsonl is made anew at every start."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("clean") / "run"
    assert start(kill_config(run, campaign={"rounds": 2, "prompts_per_round": 8})) == 0
    return run


@pytest.fixture(scope="module")
def interrupted(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same campaign, killed once round 2 has a step checkpoint."""
    run = tmp_path_factory.mktemp("interrupted") / "run"
    copy_until(clean, run, 2)
    config = kill_config(run)
    assert start(config, before=partial(die_after, "checkpoints/step-000002")) == -9
    shutil.rmtree(run / "logs", ignore_errors=True)
    return run


def check_all(run: Path) -> None:
    """What a start does before it uses anything."""
    folder = RunDir(run)
    current_config(folder)
    check_run(folder)


@contextlib.contextmanager
def as_it_was(path: Path) -> Iterator[None]:
    """Puts a file back."""
    data = path.read_bytes()
    try:
        yield
    finally:
        path.write_bytes(data)


def committed(run: Path) -> list[Path]:
    """Every file that the campaign has committed; empty ones have nothing to damage."""
    files = [p for p in sorted(run.rglob("*")) if p.is_file() and p.stat().st_size > 0]
    return [p for p in files if p.name not in VIEWS and ".partial" not in str(p)]


def listing(run: Path) -> list[str]:
    files = (str(p.relative_to(run)) for p in run.rglob("*"))
    return sorted(name for name in files if name not in VIEWS)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_before_use_and_named(interrupted: Path, damage: str) -> None:
    files = committed(interrupted)
    kinds = {"/".join(p.relative_to(interrupted).parts[-2:]) for p in files}
    assert len(kinds) >= 30
    missed = []
    for path in files:
        with as_it_was(path):
            DAMAGES[damage](path)
            before = listing(interrupted)
            name = path.relative_to(interrupted)
            try:
                check_all(interrupted)
                missed.append(f"{name}: not found")
            except CorruptError as error:
                if str(path.parent) not in error.message:
                    missed.append(f"{name}: {error.message}")
            if listing(interrupted) != before:
                missed.append(f"{name}: files changed")
    assert not missed, "\n".join(missed)
    path = interrupted / "rounds/001/pairs/pairs.parquet"
    with as_it_was(path):
        DAMAGES[damage](path)
        with pytest.raises(CorruptError) as caught:
            resume(interrupted)
        assert caught.value.exit_code == 9 and caught.value.remedy is not None


NEWEST = [
    "samples/part-00003", "labels/part-00003", "judge_check", "pairs", "reference",
    "checkpoints/step-000002", "training", "policy", "canary", "evaluation",
]  # fmt: skip


@pytest.mark.parametrize("name", NEWEST)
def test_the_newest_artifact_gone_as_a_whole_is_made_again(
    clean: Path, tmp_path: Path, name: str
) -> None:
    run = tmp_path / "run"
    copy_until(clean, run, 2)
    config = kill_config(run)
    assert start(config, before=partial(die_after, name)) == -9
    shutil.rmtree(run / "rounds/002" / name)
    assert start(config) == 0, message(config)
    assert_same(run, clean, name)


@pytest.mark.parametrize("name", ["samples/part-00000", "pairs", "reference", "training", "policy"])
def test_an_older_artifact_that_is_gone_is_missed(clean: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    copy_until(clean, run, 3)
    (run / "rounds/002/manifest.json").unlink()
    shutil.rmtree(run / "rounds/002" / name)
    with pytest.raises(CorruptError, match=f"rounds/002/{name} is missing"):
        resume(run)


@pytest.mark.parametrize("name", ["pairs", "policy", "evaluation"])
def test_an_artifact_of_a_closed_round_that_is_gone_is_missed(
    clean: Path, tmp_path: Path, name: str
) -> None:
    run = tmp_path / "run"
    copy_until(clean, run, 2)
    shutil.rmtree(run / "rounds/001" / name)
    with pytest.raises(CorruptError, match=f"rounds/001/{name} is missing"):
        resume(run)


def test_a_closed_rounds_manifest_that_is_gone_is_missed(clean: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    copy_until(clean, run, 3)
    (run / "rounds/001/manifest.json").unlink()
    with pytest.raises(CorruptError, match=r"rounds/001/manifest\.json is missing"):
        resume(run)


def test_an_amendment_that_was_altered_is_found(clean: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    copy_until(clean, run, 2)
    assert in_child(resume_to, str(run), "campaign.rounds=3") == 0
    amendment = run / "amendment-001.json"
    amendment.write_text(amendment.read_text().replace('"rounds": 3', '"rounds": 2'))
    with pytest.raises(CorruptError, match=r"amendment-001\.json"):
        resume(run)


def resume_to(run: str, override: str) -> None:
    from kills import fork_workers

    fork_workers()
    resume(run, overrides=[override])


def test_a_flipped_bit_in_a_row_of_the_ledger_is_found(tmp_path: Path) -> None:
    from judge_server import JudgeServer
    from test_kills import judged_config, longer_wins

    with JudgeServer(longer_wins) as server:
        config = judged_config(tmp_path / "run", server.url)
        assert start(config, before=partial(die_after_labels, 1)) == -9
        ledger = tmp_path / "run/judgments.sqlite"
        data = bytearray(ledger.read_bytes())
        at = data.index(b'"verdict": "') + len(b'"verdict": "')
        data[at] ^= 1
        ledger.write_bytes(bytes(data))
        asked = len(server.requests)
        assert start(config) == 9
        assert "The ledger's row of prompt" in message(config)
        assert len(server.requests) == asked
    with contextlib.closing(sqlite3.connect(ledger)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def die_after_labels(number: int) -> None:
    die_after("labels/part-00000", number=number)


def test_views_and_logs_are_made_again_or_mended(clean: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    copy_until(clean, run, 3)
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole[: len(whole) // 2])
    resume(run)
    assert (run / "metrics.jsonl").read_bytes() == whole
    with (run / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "to')
    before = len(RunDir(run).events())
    RunDir(run).event("next")
    assert len(RunDir(run).events()) == before + 1
    assert (run / "events.jsonl").read_bytes().endswith(b"}\n")
    data = bytearray((run / "events.jsonl").read_bytes())
    data[data.index(b"\n") + 1] = 0
    (run / "events.jsonl").write_bytes(bytes(data))
    with pytest.raises(CorruptError, match=r"events\.jsonl is damaged in line 2"):
        resume(run)
