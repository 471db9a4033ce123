"""A run directory that somebody sent: its files run nothing, lead nowhere and learn no secret."""

from __future__ import annotations

import json
import os
import pickle
import random
import shlex
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from run_fixture import make_run
from test_bad_input import cli
from test_security_models import CODE, Bomb
from tiny import in_child, tiny_config

from online_dpo.campaign import resume
from online_dpo.config import Config
from online_dpo.config_file import config_from_dict, dump_yaml
from online_dpo.errors import CampaignError, ConfigError
from online_dpo.integrity import write_start
from online_dpo.report.build import build_report
from online_dpo.store import RunDir
from online_dpo.trust import check_trust, code_fields, trust_flags
from online_dpo.views import Campaign

SEED = 20261124


# --- code


def config_with(**sections: Any) -> Config:
    base = {
        "model": {"init": {"hidden_size": 32, "num_heads": 4}},
        "sft": {"demonstrations": "quickstart_demonstrations.jsonl"},
        "prompts": {"train": [{"path": "quickstart.jsonl"}], "holdout": 8},
        "judge": {"name": "heuristic", "options": {"kind": "length"}},
    }
    return config_from_dict({**base, **sections}).config


LLM = {"name": "llm_pairwise"}
EVIL = {"model": "m", "base_url": "https://evil.test/v1", "api_key_env": "AWS_SECRET_ACCESS_KEY"}
LOCAL = {"model": "m", "base_url": "http://127.0.0.1:8000/v1", "api_key_env": "ANY"}


@pytest.mark.parametrize(
    ("sections", "fields"),
    [
        ({"judge": {"name": "os:system"}}, ["judge.name"]),
        ({"judge": {"name": f"{__file__}:f"}}, ["judge.name"]),
        ({"evaluation": {"judge": {"name": "os:system"}}}, ["evaluation.judge.name"]),
        ({"judge": {"name": "panel", "options": {"members": [{"name": "heuristic"},
          {"name": "os:system"}]}}}, ["judge.options.members[1].name"]),
        ({"pairs": {"selector": "os:system"}}, ["pairs.selector"]),
        ({"model": {"path": "x", "trust_remote_code": True}, "sft": None},
         ["model.trust_remote_code"]),
        ({"sampling": {"sampler": "openai_server", "reload_command": "id",
          "endpoints": [{"url": "http://127.0.0.1:1/v1"}]}}, ["sampling.reload_command"]),
        ({"sampling": {"sampler": "openai_server",
          "endpoints": [{"url": "http://127.0.0.1:1/v1", "reload_url": "http://x/"}]}},
         ["sampling.endpoints.reload_url"]),
        ({"sampling": {"engine": {"worker_extension_cls": "os.system"}}},
         ["sampling.engine.worker_extension_cls"]),
        # Where a secret of the environment would be sent.
        ({"judge": {**LLM, "options": EVIL}},
         ["judge.options.base_url", "judge.options.api_key_env"]),
        ({"evaluation": {"judge": {**LLM, "options": EVIL}}},
         ["evaluation.judge.options.base_url", "evaluation.judge.options.api_key_env"]),
        ({"judge": {**LLM, "options": {"model": "m", "api_key_env": "AWS"}}},
         ["judge.options.api_key_env"]),
        ({"judge": {"name": "panel", "options": {"members": [
          {**LLM, "options": LOCAL}, {**LLM, "options": EVIL}]}}},
         ["judge.options.members[1].options.base_url",
          "judge.options.members[1].options.api_key_env"]),
        ({"sampling": {"sampler": "openai_server",
          "endpoints": [{"url": "https://evil.test/v1", "api_key_env": "AWS",
          "reload_url": "http://x/"}]}},
         ["sampling.endpoints[0].url", "sampling.endpoints[0].api_key_env",
          "sampling.endpoints.reload_url"]),
        ({"sampling": {"also": {"url": "https://evil.test/v1", "model": "m"}}},
         ["sampling.also.url"]),
        # What stays on this machine, or goes where no config has a say.
        ({}, []),
        ({"judge": {**LLM, "options": LOCAL}}, []),
        ({"judge": {**LLM, "options": {"model": "m"}}}, []),
        ({"sampling": {"sampler": "openai_server",
          "endpoints": [{"url": "http://gpu1:8000/v1", "reload_url": "http://x/"}]}},
         ["sampling.endpoints.reload_url"]),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_what_must_be_repeated_on_the_command_line(
    sections: dict[str, Any], fields: list[str]
) -> None:
    config = config_with(**sections)
    found = dict(code_fields(config))
    assert list(found) == fields
    flags = shlex.split(" ".join(trust_flags(config)))
    assert flags[::2] == ["--trust"] * len(fields)
    check_trust(config, flags[1::2], run=Path("r"))
    for left_out in range(len(fields)):
        given = [flag for i, flag in enumerate(flags[1::2]) if i != left_out]
        with pytest.raises(ConfigError) as caught:
            check_trust(config, given, run=Path("r"))
        remedy = shlex.split(caught.value.remedy or "")
        assert remedy == ["online-dpo", "resume", "r", "--trust", flags[1::2][left_out]]
        with pytest.raises(ConfigError):  # Another value is another trust.
            check_trust(config, [*given, flags[1::2][left_out] + "x"], run=Path("r"))


def edit_config(run: Path, **sections: Any) -> None:
    import yaml

    data = yaml.safe_load((run / "campaign.yaml").read_text())
    for section, values in sections.items():
        data[section] = {**data[section], **values}
    write_start(RunDir(run), (run / "versions.json").read_text(), dump_yaml(data))


def test_no_command_runs_what_a_snapshot_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, canary = make_run(tmp_path, finished=1), tmp_path / "canary"
    (run / "evil.py").write_text(CODE.format(canary=str(canary)) + "def score(p, r): return 1.0\n")
    edit_config(run, judge={"name": f"{run}/evil.py:score", "options": {}})
    with pytest.raises(ConfigError, match="names code to run") as caught:
        resume(run, trust=[])
    assert f"judge.name={run}/evil.py:score" in (caught.value.remedy or "")
    build_report(Campaign(run))
    for arguments in (["status"], ["status", "--json"], ["report"], ["label"]):
        in_child(cli, [*arguments, str(run)], str(tmp_path / "out.txt"))
    assert not canary.exists()


def test_the_offer_to_resume_names_the_trust(tmp_path: Path) -> None:
    run = make_run(tmp_path, finished=1)
    edit_config(run, judge={"name": "/somebody's/judge.py:score", "options": {}})
    assert in_child(cli, ["status", str(run)], str(tmp_path / "out.txt")) == 0
    offered = "".join((tmp_path / "out.txt").read_text().split())
    flag = shlex.quote("judge.name=/somebody's/judge.py:score")
    assert "--trust" + "".join(flag.split()) in offered


# --- pickles


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny campaign of one round, as it stands when it is done."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny_config(folder / "run", campaign={"rounds": 1})
    assert in_child(run_config, config) == 0
    return folder / "run"


def run_config(config: dict[str, Any]) -> None:
    from online_dpo.campaign import start

    os.umask(0)  # Whatever the user's own says.
    start(config_from_dict(config))


def go_on(runs: list[str], log: str) -> None:
    """Resume each in this process; what goes wrong is a CampaignError with its exit code."""
    codes = []
    for run in runs:
        try:
            resume(run, trust=[], overrides=["campaign.rounds=2"])
            codes.append(0)
        except CampaignError as error:
            codes.append(error.exit_code)
    Path(log).write_text(json.dumps(codes))


def test_a_payload_in_any_state_file_does_nothing(finished: Path, tmp_path: Path) -> None:
    """A file of every name, replaced by a pickle that runs code when it is loaded."""
    canary = tmp_path / "canary"
    payload = pickle.dumps(Bomb(canary))
    files = sorted(p.relative_to(finished) for p in finished.rglob("*") if p.is_file())
    of_use = [p for p in files if "logs" not in p.parts and "lock" not in p.name]
    chosen = sorted({p.name: p for p in of_use}.values())
    assert {".json", ".jsonl", ".parquet", ".safetensors"} <= {p.suffix for p in chosen}
    runs = []
    for number, file in enumerate(chosen):
        run = tmp_path / f"run{number}"
        shutil.copytree(finished, run, copy_function=os.link)
        (run / file).unlink()
        (run / file).write_bytes(payload)
        runs.append(str(run))
    assert in_child(go_on, runs, str(tmp_path / "codes"), timeout_s=600) == 0
    assert not canary.exists()
    codes = dict(zip(map(str, chosen), json.loads((tmp_path / "codes").read_text()), strict=True))
    assert {name for name, code in codes.items() if code == 1} == set(), "each has its message"


def test_a_payload_in_a_step_checkpoint_does_nothing(tmp_path: Path) -> None:
    import torch

    from online_dpo.training.checkpoints import (
        MODEL_FILE,
        OPTIMIZER_FILE,
        STATE_FILE,
        Progress,
        load_checkpoint,
        save_checkpoint,
    )

    canary = tmp_path / "canary"
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    for name in (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE):
        folder = tmp_path / name
        progress = Progress(1, 1, 0, {}, [])
        save_checkpoint(folder, model, optimizer, progress, write=True)
        (folder / name).write_bytes(pickle.dumps(Bomb(canary)))
        with pytest.raises(Exception, match="."):  # The store compares hashes before this.
            load_checkpoint(folder, model, optimizer, settings={})
    assert not canary.exists()


LOADERS = (
    "torch.load", "pickle.load", "import pickle", "allow_pickle", "shelve", "marshal",
    "joblib.load", "yaml.load(", "yaml.unsafe", "use_safetensors=False",
)  # fmt: skip


def test_no_source_file_reads_pickles() -> None:
    root = Path(__file__).parent.parent
    for path in [*(root / "online_dpo").rglob("*.py"), *(root / "judges").rglob("*.py")]:
        text = path.read_text()
        for word in LOADERS:
            assert word not in text, f"{path.name}: {word}"


# --- links, modes and names


def test_modes_are_the_users_alone_under_any_umask(finished: Path) -> None:
    for path in [finished, *finished.rglob("*")]:
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), f"{path}: {mode:o}"
    build_report(Campaign(finished))
    assert stat.S_IMODE((finished / "report.html").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "name",
    ["campaign.yaml.partial", "events.jsonl", "metrics.jsonl", "logs", "rounds/002", "lock",
     "judgments.sqlite", "annotation", "report.html.partial", "rounds/001/policy"],
)  # fmt: skip
def test_no_link_is_followed(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "made", finished=1)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    link = run / name
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(outside if "." not in link.name else outside / "precious")
    for use in (lambda: resume(run, trust=[]), lambda: Campaign(run)):
        with pytest.raises(ConfigError, match="is a link or a device"):
            use()
    assert {p.name: p.read_text() for p in outside.iterdir()} == {"precious": "precious"}


def test_a_pipe_in_a_run_directory_hangs_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, finished=1)
    os.mkfifo(run / "amendment-001.json")
    with pytest.raises(ConfigError, match="is a link or a device"):
        resume(run, trust=[])


def names(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    pieces = [
        "..", ".", "/", "\\", "a", "run", "\0", "\n", "~", " ", "-", "%2e", "C:", "con", "\u202e",
        "\u2028", "\ud800", "*", "$HOME", "x" * 90, "\u00e9", "\u4f60", "'", '"', "`id`", ";",
    ]  # fmt: skip
    made = {"".join(draw.choices(pieces, k=draw.randint(1, 5))) for _ in range(count * 2)}
    return sorted(made)[:count]


def test_run_names_make_one_folder_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    taken = 0
    made = names(SEED, 500)
    assert len(made) == 500
    for name in made:
        try:
            config = config_with(campaign={"name": name})
        except ConfigError:
            continue
        taken += 1
        place = Path(config.campaign.run_dir or "")
        assert place.parent == tmp_path / "runs", f"seed {SEED}: {name!r}"
        place.mkdir(parents=True)
        assert place.resolve() == place
    assert taken > 30, "the test must not refuse all"
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}
