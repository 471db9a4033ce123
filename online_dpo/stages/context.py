"""What every stage is given: the round's folder, its inputs, and the hands that do the work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from online_dpo.config import Config
from online_dpo.crew import Crew
from online_dpo.models.adapter_files import base_of, is_adapter
from online_dpo.models.pinning import base_folder, model_folder
from online_dpo.progress import Progress
from online_dpo.records import ModelRef, Prompt, RoundPlan
from online_dpo.store import RoundDir, RunDir
from online_dpo.tables import prompt_from_row, read_table

if TYPE_CHECKING:
    from online_dpo.judging import Labeller

STAGES = ("sample", "label", "pair", "train", "evaluate", "promote")
"""The stages of every round after round 0, in order."""


@dataclass(frozen=True)
class Work:
    """A stretch of a stage's real work, in seconds of the monotonic clock."""

    stage: str
    start: float
    end: float


def busy_seconds(work: Sequence[Work]) -> dict[str, float]:
    """Seconds of work by stage; overlapping stages both count."""
    seconds: dict[str, float] = {}
    for item in work:
        seconds[item.stage] = seconds.get(item.stage, 0.0) + item.end - item.start
    return seconds


def covered_seconds(work: Sequence[Work]) -> float:
    """Seconds in which any stage worked: overlaps count once."""
    covered, reached = 0.0, float("-inf")
    for item in sorted(work, key=lambda w: w.start):
        covered += max(0.0, item.end - max(item.start, reached))
        reached = max(reached, item.end)
    return covered


@dataclass
class PromptTable:
    """The campaign's prompts, tokenized: by id, and the ids of each role by source."""

    by_id: dict[str, Prompt]
    train: dict[str, list[str]]
    eval: dict[str, list[str]]
    weights: dict[str, float]
    sha256: str


@dataclass
class Context:
    """A stage's world. `plan` is None in round 0 alone."""

    config: Config
    run: RunDir
    round: RoundDir
    crew: Crew
    progress: Progress
    make_labeller: Callable[[bool], Labeller]
    """Gives the training judge (False) or the evaluation judge (True); both live on."""
    plan: RoundPlan | None = None
    work: list[Work] = field(default_factory=list)
    """What was done when, for the round's fixed cost; stages may overlap."""
    prompts: PromptTable | None = None

    @property
    def inputs(self) -> RoundPlan:
        """The plan of a round after round 0."""
        assert self.plan is not None
        return self.plan

    def folder(self, model: ModelRef) -> Path:
        """Where a model's files lie."""
        return model_folder(self.run, model)

    def model_params(self, model: ModelRef) -> dict[str, str]:
        """A model as workers are told of it, after its files and its base's held their hashes."""
        for part in (model, self.base(model)):
            self.run.verify_model(part)
        return {"path": str(self.folder(model)), "sha256": model.sha256}

    def base(self, model: ModelRef) -> ModelRef:
        """The model that an adapter belongs to, as plans record it; a whole model is its own."""
        folder = self.folder(model)
        if not is_adapter(folder):
            return model
        base = base_of(folder)
        inside = base_folder(folder).is_relative_to(self.run.path)
        path = self.run.relative(base_folder(folder)) if inside else base.path
        return ModelRef(path, base.sha256)

    @contextmanager
    def working(self, stage: str) -> Iterator[None]:
        """Count the time inside as work of a stage."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.work.append(Work(stage, start, time.monotonic()))

    def load_prompts(self) -> PromptTable:
        """The prompts as round 0 committed them, read once."""
        if self.prompts is None:
            self.prompts = read_prompts(self.run)
        return self.prompts


def read_prompts(run: RunDir) -> PromptTable:
    """The table of round 0. Raises CorruptError where it is not what was committed."""
    origin = run.round(0)
    rows = read_table(origin.verify("prompts") / "prompts.parquet")
    if origin.has("offline"):
        rows += read_table(origin.verify("offline") / "prompts.parquet")
    table = PromptTable({}, {}, {}, {}, str(origin.manifest("prompts")["sha256"]))
    for row in rows:
        prompt = prompt_from_row(row)
        table.by_id.setdefault(prompt.id, prompt)
        if row["role"] == "train":
            table.train.setdefault(prompt.source, []).append(prompt.id)
            table.weights[prompt.source] = row["weight"]
        elif row["role"] == "eval":
            table.eval.setdefault(prompt.source, []).append(prompt.id)
    return table


def trained_on(round_dir: RoundDir) -> str:
    """The artifact that a round trains on, and its table's name: "pairs", or "unpaired"."""
    return "unpaired" if round_dir.has("unpaired") else "pairs"


def engine_length(config: Config) -> int | None:
    """The engine's longest sequence where the config sets one; "auto" and -1 leave it open."""
    length = config.sampling.engine.get("max_model_len")
    return length if isinstance(length, int) and length > 0 else None
