"""A judge in a package of the user's own, installed by pip, judges a campaign by its name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from tiny import tiny_config

from online_dpo.config_file import dump_yaml
from online_dpo.store import RunDir
from online_dpo.tables import read_table

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "tests" / "plugin_package"
WORDS = 3


def run(command: list[str | Path], *, cwd: Path, code: int = 0) -> str:
    """Its output; fails with it where the exit code is another."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**env, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the plug-in, and with what this one has."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False)
    (site,) = root.glob("lib/python*/site-packages")
    # addsitedir reads the .pth files there too: an editable online-dpo is seen.
    path = sysconfig.get_path("purelib")
    (site / "dependencies.pth").write_text(f"import site; site.addsitedir({path!r})\n")
    # A copy, because setuptools builds inside the source.
    source = shutil.copytree(
        PACKAGE,
        root / "source",
        ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"),
    )
    interpreter = root / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", interpreter, "--disable-pip-version-check"]
    options = ["-q", "--no-index", "--no-deps", "--no-build-isolation"]
    run([*pip, "install", *options, source], cwd=root)
    return interpreter


@pytest.fixture(scope="module")
def campaign(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny campaign with the plug-in's judge."""
    folder = tmp_path_factory.mktemp("campaign")
    config = tiny_config(
        folder / "run",
        judge={"name": "brevity", "options": {"words": WORDS}},
        campaign={"rounds": 1},
    )
    (folder / "brief.yaml").write_text(dump_yaml(config))
    run([python, "-m", "online_dpo.cli", "run", "brief.yaml"], cwd=folder)
    return folder / "run"


def test_the_package_is_the_readmes() -> None:
    readme = (REPO / "README.md").read_text()
    for language, name in (("toml", "pyproject.toml"), ("python", "brevity_judge.py")):
        shown = re.findall(rf"^```{language}\n(.*?)^```$", readme, re.M | re.S)
        assert (PACKAGE / name).read_text() in shown
    assert len((PACKAGE / "pyproject.toml").read_text().splitlines()) == 5


def test_the_installed_judge_scored_every_response(campaign: Path) -> None:
    first = RunDir(campaign).round(1)
    seen = 0
    for shard in first.children("samples"):
        labels = shard.replace("samples/", "labels/")
        assert first.manifest(labels)["judge"]["name"] == "brevity"
        assert first.manifest(labels)["judge"]["version"] == "1"
        scores = {
            row["first_id"]: row for row in read_table(first.path / labels / "labels.parquet")
        }
        for row in read_table(first.path / shard / "samples.parquet"):
            count = len(row["text"].split())
            score = scores[row["id"]]
            assert score["score"] == (-abs(count - WORDS) if count else None)
            assert score["reason"] == (None if count else "no words")
            seen += 1
    assert seen == 32


def test_the_preferred_response_is_nearer_to_the_length(campaign: Path) -> None:
    pairs = read_table(RunDir(campaign).round(1).artifact("pairs") / "pairs.parquet")
    assert pairs
    for row in pairs:
        chosen, rejected = (
            abs(len(row[f"{side}_text"].split()) - WORDS) for side in ("chosen", "rejected")
        )
        assert chosen < rejected and row["margin"] == rejected - chosen


def test_an_installed_judge_needs_no_trust(campaign: Path, python: Path) -> None:
    out = run([python, "-m", "online_dpo.cli", "resume", campaign], cwd=campaign.parent)
    assert "finished" in out


def test_without_the_package_the_judge_is_unknown(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", judge={"name": "brevity", "options": {}})
    (tmp_path / "brief.yaml").write_text(dump_yaml(config))
    command = [sys.executable, "-m", "online_dpo.cli", "run", "brief.yaml"]
    out = run(command, cwd=tmp_path, code=2)
    assert "no judge named 'brevity'" in out and "heuristic" in out


def test_wrong_options_are_named(python: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", judge={"name": "brevity", "options": {"length": 3}})
    (tmp_path / "brief.yaml").write_text(dump_yaml(config))
    command = [python, "-m", "online_dpo.cli", "validate", "brief.yaml"]
    out = run(command, cwd=tmp_path, code=2)
    assert "judge.options do not fit 'brevity'" in out and "length" in out
