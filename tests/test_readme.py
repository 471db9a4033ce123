"""The README and the docs say what is true: their code runs, and what they name exists."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from judge_server import JudgeServer, Say
from pydantic import TypeAdapter
from tiny import in_child

from online_dpo import Prompt, Response
from online_dpo.cli import app
from online_dpo.config import Config, JudgeConfig
from online_dpo.config_file import load_config
from online_dpo.display.wording import FATES
from online_dpo.drift import OPERATIONAL
from online_dpo.errors import BY_NAME
from online_dpo.judge_figures import figures
from online_dpo.judging import Labeller
from online_dpo.loss_rules import LOSS_FACTS, MODIFIERS
from online_dpo.offline.preference_forms import parse_label, parse_preference
from online_dpo.plugins import available
from online_dpo.samplers.vllm_settings import OWN_ARGUMENTS, engine_arguments
from online_dpo.tables import read_table
from online_dpo.training.losses import LOSSES
from online_dpo.workers import RUN_ENV, SOCKET_ENV, TCP, TOKEN_ENV

REPO = Path(__file__).resolve().parent.parent
README = REPO / "README.md"
DOCS = REPO / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
WRITTEN = [page for page in PAGES if page.name != "design.md"]
"""The pages whose every word describes this version; design.md is the plan."""

NEED_FILES = {"reward_model", "replay"}
"""Judges that can only be made where a model or a record is."""

SHRINK = [
    "model.init={vocab_size: 400, hidden_size: 32, intermediate_size: 64, num_layers: 1, "
    "num_heads: 2}",
    "sft.epochs=0.1", "sampling.n=4", "sampling.max_new_tokens=24", "evaluation.max_prompts=16",
    "train.optimizer=carry", "train.epochs=1", "compute.threads=1", "campaign.rounds=1",
    "campaign.prompts_per_round=32",
]  # fmt: skip
"""The quickstart in seconds, with the one artifact that it does not make by itself."""


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def block(page: Path, language: str, marker: str) -> str:
    """The one block that contains a text."""
    (found,) = (text for text in blocks(page, language) if marker in text)
    return found


def table(page: Path, title: str) -> list[list[str]]:
    """The cells of the first table whose header row begins with a title, after any heading."""
    return tables(page, title)[0]


def tables(page: Path, title: str) -> list[list[list[str]]]:
    """All tables with this first column, without their two head rows."""
    found = []
    for text in re.findall(r"(?:^\|.*\|\n)+", page.read_text() + "\n", re.M):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines()]
        if rows[0][0].strip() == title:
            found.append([[cell.strip() for cell in row] for row in rows[2:]])
    assert found, f"{page.name} has no table with the column {title!r}"
    return found


def first_code(rows: Sequence[Sequence[str]]) -> list[str]:
    """The name in the first cell of each row."""
    return [re.findall(r"`([^`]*)`", row[0])[0] for row in rows]


def commands(page: Path) -> list[str]:
    """Every `online-dpo ...` in shell blocks and in running text."""
    shell = [line for text in blocks(page, "sh") for line in text.splitlines()]
    spans = re.findall(r"`(online-dpo [^`]*)`", page.read_text())
    lines = [line.split("  #")[0].strip() for line in shell]
    return [line for line in lines if line.startswith("online-dpo ")] + spans


def cli(folder: str, log: str, *command_lines: str) -> None:
    """Commands in this process, one after the other; the first that fails ends it."""
    from online_dpo.cli import main

    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for line in command_lines:
        sys.argv = shlex.split(line)
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise


def execute(folder: str, log: str, code: str) -> None:
    """A block of Python, from a folder."""
    os.chdir(folder)
    with open(log, "w") as out, contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def run(home: Path, *command_lines: str) -> str:
    """What commands print, run from a folder; all must succeed."""
    log = home / "log.txt"
    code = in_child(cli, str(home), str(log), *command_lines)
    assert code == 0, log.read_text()
    return log.read_text()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the quickstart has run, small, with a round added, and the README's judge."""
    folder = tmp_path_factory.mktemp("home")
    sets = " ".join(f"--set {shlex.quote(change)}" for change in SHRINK)
    run(folder, f"online-dpo run quickstart.yaml {sets}")
    (more,) = (c for c in commands(DOCS / "quickstart.md") if "campaign.rounds=" in c)
    run(folder, more.replace("rounds=8", "rounds=2"))
    (folder / "my_judge.py").write_text(block(README, "python", "# my_judge.py"))
    (folder / "first_person.yaml").write_text(block(README, "yaml", "# first_person.yaml"))
    (start,) = (c for c in commands(README) if c.endswith("run first_person.yaml"))
    run(folder, start)
    return folder


# --- what the README shows ---------------------------------------------------------------------


def test_the_judge_in_one_file_scored_every_response(home: Path) -> None:
    spec = importlib.util.spec_from_file_location("my_judge", home / "my_judge.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rounds = home / "runs/first_person/rounds"
    compared = 0
    for shard in sorted(rounds.glob("00[123]/samples/part-*")):
        labels = {
            row["first_id"]: row
            for row in read_table(
                rounds / shard.parents[1].name / "labels" / shard.name / "labels.parquet"
            )
        }
        for row in read_table(shard / "samples.parquet"):
            response = Response(row["id"], "", row["text"], (), row["finish_reason"])
            label = labels[row["id"]]
            assert label["score"] == module.score(Prompt("", ""), response)
            assert (label["score"] is None) == (label["reason"] is not None)
            compared += 1
    assert compared == 3 * 64 * 8


def test_the_judge_of_a_run_directory_must_be_trusted(home: Path) -> None:
    log = home / "refused.txt"
    unfinished = home / "unfinished"
    shutil.copytree(home / "runs/first_person", unfinished)
    (unfinished / "rounds/003/manifest.json").unlink()
    assert in_child(cli, str(home), str(log), "online-dpo resume unfinished") == 2
    (shown,) = (c for c in commands(DOCS / "judges.md") if "--trust judge.name" in c)
    trusting = shown.replace("/home/me/", f"{home}/")
    assert f"{unfinished} {shlex.join(shlex.split(trusting)[3:])}" in log.read_text()
    assert "finished" in run(home, trusting)


def test_the_python_example_runs(home: Path) -> None:
    log = home / "python.txt"
    code = block(README, "python", "online_dpo.run(")
    assert in_child(execute, str(home), str(log), code) == 0, log.read_text()
    lines = log.read_text().splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["0", "1", "2", "3"]
    assert "features: ['prompt', 'chosen', 'rejected'" in log.read_text()
    assert lines[-1] == str(home / "runs/quickstart/rounds/002/policy")


def test_the_examples_of_training_alone_run(home: Path) -> None:
    page = DOCS / "training.md"
    run(home, *block(page, "sh", "--pairs").splitlines())
    log = home / "training.txt"
    for code in blocks(page, "python"):
        assert in_child(execute, str(home), str(log), code) == 0, log.read_text()
    assert re.fullmatch(r"tensor\(\[-.*, -.*\], dtype=torch.float64\)\n", log.read_text())
    command, python = (home / name for name in ("offline", "offline-python"))
    files = {path.name for path in command.iterdir()} - {"manifest.json"}
    assert all((command / name).read_bytes() == (python / name).read_bytes() for name in files)
    (told,) = re.findall(r"`summary.json` with (.*?) and the first", page.read_text())
    summary = json.loads((command / "summary.json").read_text())
    assert set(re.findall(r"`(\w+)`", told)) < set(summary)


def test_the_forms_of_pairs_are_read() -> None:
    lines = block(DOCS / "training.md", "json", "chosen").splitlines()
    stated = [parse_preference(json.loads(line)) for line in lines]
    assert [preference.chosen for preference in stated] == [
        " I love it.", "Because.", "So.", "So.", "Now.",
    ]  # fmt: skip
    assert [len(preference.messages) for preference in stated] == [0, 1, 1, 1, 1]
    labelled = block(DOCS / "training.md", "json", "completion").splitlines()
    labels = [parse_label(json.loads(line)) for line in labelled]
    assert [(row.completion, row.label) for row in labels] == [("4", True), ("5", False)]


def test_the_tree_is_that_of_a_run(home: Path) -> None:
    run(home, "online-dpo report runs/quickstart")
    shown = block(README, "text", "manifest.json")
    top, _, rounds = shown.partition("rounds/000/")
    origin, _, later = rounds.partition("rounds/001/")
    runs = [home / "runs/quickstart", home / "runs/first_person"]
    there = {path.name for folder in runs for path in folder.iterdir()} - {"rounds"}
    assert words(top) - {"runs", "quickstart"} == there | {"judgments.sqlite", "annotation"}
    assert words(origin) == {path.name for path in (runs[0] / "rounds/000").iterdir()}
    made = {path.name for folder in runs for path in (folder / "rounds/001").iterdir()}
    made |= {path.name for path in (runs[0] / "rounds/001/samples").iterdir()}
    assert words(later) == made | {"checkpoints"}


def words(text: str) -> set[str]:
    """The files and folders that lines of the tree begin with, several to a line."""
    entry = re.compile(r"[\w.-]+(?:/|\.\w+|\b)")
    names = set()
    for line in text.splitlines():
        for part in re.split(r" {2,}", line.strip()):
            if entry.fullmatch(part.split("/")[0]) and " " not in part:
                names |= set(part.strip("/").split("/"))
    extra = re.findall(r"amendment-001\.json", text)
    return names | set(extra)


def test_the_table_of_commands_is_complete_and_they_work(home: Path) -> None:
    rows = table(README, "Command")
    lines = [line for row in rows for line in re.findall(r"`([^`]*)`", row[0])]
    click_app: Any = typer.main.get_command(app)
    assert {line.split()[1] for line in lines} == set(click_app.commands)
    pair_id = read_table(home / "runs/first_person/rounds/001/pairs/pairs.parquet")[0]["pair_id"]
    values = {
        "CONFIG": "first_person.yaml",
        "RUN_DIR": "runs/first_person",
        "ID": pair_id,
        "DIR": "out",
        "FILE": "out/preferences.jsonl",
        "M": "out/policy",
        "POLICY": "trained",
        "TEXT": "hello",
    }
    ready = []
    for line in lines:
        plain = re.sub(r" \[[^]]*\]", "", line)
        if plain.split()[1] not in ("resume", "doctor", "label"):
            ready.append(re.sub(r"\b[A-Z_]+\b", lambda m: values[m[0]], plain))
    out = run(home, *ready)
    assert pair_id in out
    assert all((home / p / "model.safetensors").is_file() for p in ("out/policy", "trained"))


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    click_app: Any = typer.main.get_command(app)
    for line in commands(page):
        words = shlex.split(line.replace("[", " ").replace("]", " ").replace("...", ""))[1:]
        if not words or words[0].startswith("--"):
            continue
        command = click_app.commands[words[0]]
        command = getattr(command, "commands", {}).get(words[1] if words[1:] else "", command)
        known = {name for parameter in command.params for name in parameter.opts}
        given = {word for word in words[1:] if word.startswith("--")}
        assert given <= known | {"--debug"}, line


def test_the_exit_codes_are_the_errors() -> None:
    listed = {int(code) for row in table(README, "Exit code") for code in row[0].split(",")}
    known = {error.exit_code for error in BY_NAME.values()}
    assert listed == known | {0, 130, 143}
    explained = {
        int(code) for row in table(DOCS / "resume.md", "Code") for code in row[0].split(",")
    }
    assert explained == listed - {0}


# --- links, configs, references ----------------------------------------------------------------


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.is_file(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", place.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in heads}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:online_dpo|configs|prompts|requirements|tests)/[\w./]*)`", page.read_text()
    )
    assert not [name for name in named if not (REPO / name).exists()]


def yaml_blocks() -> Iterator[Any]:
    for page in WRITTEN:
        for number, text in enumerate(blocks(page, "yaml")):
            yield pytest.param(text, id=f"{page.name}-{number}")


@pytest.mark.parametrize("text", list(yaml_blocks()))
def test_every_piece_of_config_is_valid(text: str, tmp_path: Path) -> None:
    sections = yaml.safe_load(text)
    if {"model", "prompts", "judge"} <= sections.keys():
        (tmp_path / "my_judge.py").touch()
        (tmp_path / "a.yaml").write_text(text)
        load_config(tmp_path / "a.yaml")
        return
    for name, section in sections.items():
        checked = TypeAdapter(Config.model_fields[name].annotation).validate_python(section)
        if isinstance(checked, JudgeConfig) and checked.name in available():
            judge = available()[checked.name].load()
            inspect.signature(judge).bind(**checked.options)
            if checked.name not in NEED_FILES:
                judge(**checked.options)


def test_the_config_reference_is_up_to_date() -> None:
    command = [sys.executable, str(DOCS / "config_reference.py")]
    made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert made.stdout == (DOCS / "config.md").read_text(), (
        "python docs/config_reference.py > docs/config.md"
    )


def test_the_settings_that_may_change_at_any_time_are_listed() -> None:
    (line,) = re.findall(
        r"^- \*\*At any time:\*\* (.*?)\. More", (DOCS / "resume.md").read_text(), re.M
    )
    listed = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)`", line))
    assert listed == set(OPERATIONAL)


def test_the_losses_their_knobs_and_modifiers_are_listed() -> None:
    rows = table(DOCS / "losses.md", "Name")
    assert first_code(rows) == list(LOSSES)
    for name, row in zip(first_code(rows), rows, strict=True):
        for knob in set(LOSS_FACTS[name].knobs) - {"label_smoothing"}:
            assert f"`{knob}`" in row[4], name
        assert ("no reference" not in row[3]) == LOSS_FACTS[name].needs_reference
        assert ("lengths" in row[3]) == LOSS_FACTS[name].needs_lengths
        assert ("the whole step" in row[3]) == LOSS_FACTS[name].coupled
    assert first_code(table(DOCS / "losses.md", "Setting")) == list(MODIFIERS)


# --- judges ------------------------------------------------------------------------------------


def test_the_built_in_judges_and_their_options_are_listed() -> None:
    rows = table(DOCS / "judges.md", "Name")
    ours = {
        name: point for name, point in available().items() if point.module.startswith("judges.")
    }
    assert set(first_code(rows)) == set(ours)
    for name, row in zip(first_code(rows), rows, strict=True):
        parameters = [
            parameter.name
            for parameter in inspect.signature(ours[name].load()).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        named = re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", row[2]))
        assert named == parameters, name


def test_the_options_of_an_llm_judges_model_are_listed() -> None:
    from judges.llm_model import ChatModel, ModelOptions

    parameters = list(inspect.signature(ChatModel).parameters)
    assert first_code(table(DOCS / "judges.md", "Option")) == parameters
    assert ["model", *ModelOptions.__annotations__] == parameters


def test_the_heuristic_kinds_are_listed() -> None:
    from judges.heuristics import Options

    kinds = re.findall(r"'const': '(\w+)'", str(TypeAdapter(Options).json_schema()))
    assert sorted(first_code(table(DOCS / "judges.md", "Kind"))) == sorted(set(kinds))


def test_the_instructions_and_their_arguments_are_listed() -> None:
    from judges.verifiers_ifeval_checks import CHECKS

    rows = table(DOCS / "judges.md", "Instruction")
    assert first_code(rows) == list(CHECKS)
    for name, row in zip(first_code(rows), rows, strict=True):
        arguments = list(inspect.signature(CHECKS[name]).parameters)[1:]
        assert re.findall(r"`(\w+)`", row[1]) == arguments, name


def test_a_judge_that_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of docs/judges.md against a server, and its queries of the ledger."""
    monkeypatch.chdir(tmp_path)
    page = DOCS / "judges.md"
    Path("grade.py").write_text(block(page, "python", "# grade.py"))
    config = yaml.safe_load(block(page, "yaml", "grade.py:Grade"))["judge"]
    replies = ["7", "no idea"]
    with JudgeServer(lambda request, number: Say(replies[number])) as server:
        config["options"] |= {"base_url": server.url, "price_per_million": [1e6, 0]}
        labeller = Labeller(
            JudgeConfig(**config, concurrency=1), base=tmp_path, seed=0, round=1,
            ledger_path=tmp_path / "runs/demo/judgments.sqlite", on_event=lambda event: None,
        )  # fmt: skip
        responses = [Response(str(i), "p", f"answer {i}", (i,), "eos") for i in range(2)]
        labels = labeller.label([(Prompt("p", "s", "why?"), responses)], purpose="round-001")
        labeller.close()
    assert labels[0].scores is not None
    assert [score.value for score in labels[0].scores] == [7.0, None]
    assert labels[0].scores[1].reason == "no grade in the reply"
    queries = re.findall(r'^sqlite3 (\S+) "(.*)"$', page.read_text(), re.M)
    with contextlib.closing(sqlite3.connect(queries[0][0])) as db:
        answers = [db.execute(query).fetchall() for _, query in queries]
    assert answers == [[(2, 200.0)], [("judge", "settled", 2)]]


# --- figures and GPUs --------------------------------------------------------------------------


def test_every_figure_is_explained(home: Path) -> None:
    evaluation, step, training, pairs, fates, samples, labels, judge, check = metric_tables()
    first = home / "runs/first_person/rounds/001"

    def keys(name: str) -> set[str]:
        return set(json.loads((first / name).read_text()))

    assert keys("evaluation/metrics.json") == evaluation
    lines = (first / "training/steps.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])) == step
    summary = {f"{when}_{name}" for when in ("first", "last", "mean") for name in step}
    assert keys("training/metrics.json") - summary == training
    assert keys("pairs/metrics.json") == pairs
    assert fates == set(FATES)
    assert keys("samples/part-00000/metrics.json") == samples
    assert keys("labels/part-00000/metrics.json") == labels
    assert set(figures([])) == judge
    assert keys("judge_check/metrics.json") == check


def metric_tables() -> list[set[str]]:
    """The names in the tables of metrics.md, in their order on the page."""
    text = re.findall(r"(?:^\|.*\|\n)+", (DOCS / "metrics.md").read_text(), re.M)
    return [set(re.findall(r"^\| `(\w+)` \|", rows, re.M)) for rows in text]


def test_the_engine_arguments_are_listed() -> None:
    page = (DOCS / "gpus.md").read_text()
    assert not [name for name in OWN_ARGUMENTS if not re.search(rf"`{name}\b", page)]
    config = load_config("llm_judge.yaml").config
    made = engine_arguments(config.model, {}, device="cuda")
    for name in ("dtype", "enable_sleep_mode", "distributed_executor_backend"):
        assert f"`{name}: {yaml.safe_dump(made[name]).split()[0]}`" in page


def test_the_environment_of_a_second_machine_is_the_workers() -> None:
    text = block(DOCS / "gpus.md", "sh", "--machine_rank 1")
    assert set(re.findall(r"\bONLINE_DPO_\w+", text)) == {SOCKET_ENV, TOKEN_ENV, RUN_ENV}
    assert f"{SOCKET_ENV}={TCP}" in text and "-m online_dpo.worker_main" in text


def test_the_quickstart_is_described_as_it_is() -> None:
    config = load_config("quickstart.yaml").config
    assert config.sft is not None
    text = (DOCS / "quickstart.md").read_text()
    for file in (
        config.sft.demonstrations,
        config.prompts.train[0].path,
        config.prompts.eval[0].path,
    ):
        with (REPO / "prompts" / file).open() as lines:
            assert re.search(rf"(?<![\d,]){sum(1 for _ in lines):,}(?!\d)", text), file
    assert f"samples {config.sampling.n} reviews of each" in text
    assert (config.pairs.selector, config.reference.promote) == ("best_worst", "every_round")
    kinds = {scorer["kind"] for scorer in config.judge.options["scorers"]}
    assert kinds == {
        "lexicon",
        "length",
        "transitions",
        "regex",
        "repetition",
        "finished",
    }


def test_every_gpu_config_is_listed() -> None:
    page = (DOCS / "gpus.md").read_text()
    for path in sorted((REPO / "configs").glob("*.yaml")):
        gpu = "GPU of" in path.read_text() or "GPUs of" in path.read_text()
        assert (f"configs/{path.name}" in page) == gpu, path.name
