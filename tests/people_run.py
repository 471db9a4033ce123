"""A run directory in which a campaign has asked people about pairs, without any model."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from online_dpo.annotation.board import Board
from online_dpo.annotation.options import people_options
from online_dpo.config import JudgeConfig
from online_dpo.config_file import config_from_dict, dump_yaml
from online_dpo.errors import WaitingError
from online_dpo.integrity import write_start
from online_dpo.judging import Labeller, Labels
from online_dpo.records import Prompt, Response
from online_dpo.store import RunDir

SEED = 5


def pairs(count: int, *, first: int = 0) -> list[tuple[Prompt, list[Response]]]:
    """Prompts with two answers each; the second is the better one."""
    made = []
    for i in range(first, first + count):
        prompt = Prompt(f"p{i}", "test", text=f"Question {i}?")
        texts = (f"A poor answer to {i}.", f"The better answer to {i}.")
        made.append(
            (
                prompt,
                [Response(f"p{i}-{k}", f"p{i}", t, (i, k), "eos") for k, t in enumerate(texts)],
            )
        )
    return made


@dataclass
class PeopleRun:
    """A run, its judge `human`, and what that judge reported."""

    path: Path
    options: dict[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def board(self) -> Board:
        return Board(self.path, people_options(self.options), seed=SEED)

    def labeller(self, **settings: Any) -> Labeller:
        return Labeller(
            JudgeConfig(name="human", options=self.options, **settings),
            base=None,
            ledger_path=self.path / "judgments.sqlite",
            seed=SEED,
            round=1,
            on_event=self.events.append,
        )

    def ask(self, items: Sequence[tuple[Prompt, Sequence[Response]]]) -> list[Labels]:
        """Labels as the label stage gets them. Raises WaitingError."""
        with contextlib.closing(self.labeller()) as labeller:
            return labeller.label(items, purpose="round-001")

    def post(self, items: Sequence[tuple[Prompt, Sequence[Response]]]) -> str:
        """Ask, and give the words with which the campaign waits."""
        try:
            self.ask(items)
        except WaitingError as error:
            return error.message
        raise AssertionError("nobody was waited for")

    def given(self, annotator: str) -> dict[str, str]:
        """Question to the text that the annotator found better ("tie", "skip")."""
        found = {}
        by_id = {item.id: item for part in self.board.parts("round-001") for item in part.items}
        for given in self.board.given(annotator):
            if given.purpose == "item":
                item, names = by_id[given.item], {0.5: "tie", None: "skip"}
                sides = {1.0: item.answers[0].text, 0.0: item.answers[-1].text}
                found[item.messages[0].content] = {**names, **sides}[given.value]
        return found


def make_people_run(folder: Path, **options: Any) -> PeopleRun:
    """A run directory with a config and nothing sampled."""
    run = RunDir(folder / "run")
    run.path.mkdir(parents=True)
    asked = {"annotators": ["ann", "bob"], "repeats": 0.0, **options}
    config = {
        "model": {"init": {"hidden_size": 32, "num_heads": 4}},
        "sft": {"demonstrations": "quickstart_demonstrations.jsonl"},
        "prompts": {"train": [{"path": "quickstart.jsonl"}], "holdout": 4},
        "judge": {"name": "human", "options": asked},
        "evaluation": {"judge": {"name": "scripted", "options": {"scores": {}}}},
        "campaign": {"name": "people", "seed": SEED, "run_dir": str(run.path)},
    }
    loaded = config_from_dict(config)
    write_start(run, "{}\n", dump_yaml(loaded.config.model_dump(mode="json")))
    return PeopleRun(run.path, asked)


@contextlib.contextmanager
def serving(run: Path, annotator: str, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`online-dpo label` in a process of its own, and the address that it prints."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "online_dpo.cli",
            "label",
            str(run),
            "--annotator",
            annotator,
            *more,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert " labels at http://127.0.0.1:" in line, line + process.stdout.read()
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
