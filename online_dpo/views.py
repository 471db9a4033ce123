"""What a campaign has come to, read from its files: for `status`, the report and scripts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from online_dpo.alarms import Alarm, judge_alarms
from online_dpo.annotation.board import Board
from online_dpo.annotation.options import people_options
from online_dpo.drift import current_config, is_finished
from online_dpo.errors import ConfigError
from online_dpo.files import read_json
from online_dpo.judge_clashes import PEOPLE
from online_dpo.locks import holder
from online_dpo.models.pinning import model_folder
from online_dpo.paid.ledger import LEDGER
from online_dpo.paid.spending import Spending, spending_by_round
from online_dpo.records import Prompt
from online_dpo.store import RoundDir, RunDir, read_lines
from online_dpo.tables import read_table

if TYPE_CHECKING:
    from datasets import Dataset

    from online_dpo.config import Config


@dataclass(frozen=True)
class RoundView:
    """A round in figures. Rates are {value, low, high, count}, estimates {mean, stderr, count}."""

    round: int
    stage: str
    """done, or the stage that comes next."""
    prompts: int
    samples: int
    pairs: int
    unpaired: int
    """Good and bad responses that are trained on instead of pairs."""
    responses: dict[str, int]
    """Responses by fate."""
    no_verdict: dict[str, int]
    """Verdicts of the judge that are none, by reason."""
    policy: dict[str, str] | None
    reference: dict[str, str] | None
    promoted: bool | None
    why: str | None
    training: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    judge: dict[str, Any] | None
    """How sound the judge's verdicts are, on the labels, a gold set and a constant response."""
    alarms: list[Alarm]
    """Which of these figures are above the thresholds that the config has now."""
    wall_s: float | None
    busy_s: dict[str, float]
    """Seconds of sampling, labelling, training and so on."""
    fixed_s: float | None
    """Wall time less the work of all stages."""
    spent: Spending | None = None
    """What paid calls came to; those of a gold set, asked about once, in round 0."""


class Campaign:
    """A run directory, to look at and take results from; nothing here writes."""

    def __init__(self, run_dir: str | Path) -> None:
        self._run = RunDir(run_dir)
        self._run.require()

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._run.path

    @property
    def config(self) -> Config:
        """The config with its accepted changes."""
        return current_config(self._run)

    @property
    def state(self) -> str:
        """running, finished, waiting (for people), or stopped."""
        if is_finished(self._run, self.config):
            return "finished"
        if holder(self._run.path) is not None:
            return "running"
        return "waiting" if self._waits_for_people() else "stopped"

    def _waits_for_people(self) -> bool:
        """Whether verdicts are lacking that the next round cannot do without."""
        config, last = self.config, self._run.rounds()[-1:]
        if config.judge.name != PEOPLE or not last or last[0].has("pairs"):
            return False
        options = people_options(config.judge.options)
        return bool(Board(self._run.path, options, seed=config.campaign.seed).open_items())

    def rounds(self) -> list[RoundView]:
        """Every round that has begun, round 0 first."""
        timings, config = _timings(self._run), self.config
        spent = spending_by_round(self.path / LEDGER)
        views = [_view(r, timings.get(r.number, {}), config) for r in self._run.rounds()]
        return [replace(view, spent=spent.get(view.round)) for view in views]

    def status(self) -> dict[str, Any]:
        """All of the above as plain JSON types."""
        config = self.config
        rounds = self.rounds()
        return {
            "run_dir": str(self.path),
            "name": config.campaign.name,
            "state": self.state,
            "rounds_done": sum(1 for r in rounds if r.stage == "done" and r.round > 0),
            "rounds_total": config.campaign.rounds,
            "rounds": [asdict(r) for r in rounds],
        }

    def pairs(self, round: int | None = None) -> Dataset:
        """The preferences of a round, or of all, as a `datasets.Dataset`: prompt, chosen, rejected.

        Prompts that were messages stay messages, and so do their responses. Raises ConfigError
        where there are prompts of both forms, which no column can hold.
        """
        return self._dataset(preference_rows(self._run, round))

    def unpaired(self, round: int | None = None) -> Dataset:
        """The good and bad responses of a round, or of all: prompt, completion, label.

        As `pairs`.
        """
        return self._dataset(unpaired_rows(self._run, round))

    def _dataset(self, rows: list[dict[str, Any]]) -> Dataset:
        from datasets import Dataset

        if len({isinstance(row["prompt"], str) for row in rows}) > 1:
            raise ConfigError(
                f"{self.path} has prompts of plain text and prompts of messages; a dataset holds "
                "one form. `online-dpo export` writes a table of each."
            )
        return Dataset.from_list(rows)

    def policy(self, round: int | None = None) -> Path:
        """The folder of a round's policy, of the last finished one without a number.

        Under train.lora it holds an adapter, as PEFT reads it; `online-dpo export` merges it.
        """
        done = [r for r in self._run.rounds() if r.finished]
        if round is not None:
            done = [r for r in done if r.number == round]
        if not done:
            which = "" if round is None else f" {round}"
            raise ConfigError(f"{self.path} has no finished round{which}.")
        from online_dpo.records import model_ref_from_dict

        model = model_ref_from_dict(done[-1].manifest()["policy"])
        assert model is not None
        folder = model_folder(self._run, model)
        if not folder.is_dir():
            number = done[-1].number
            raise ConfigError(f"The policy of round {number} was deleted by campaign.retention.")
        return folder

    def answers(self, round: int) -> list[dict[str, Any]]:
        """The evaluation answers of a round's policy; empty where it was not evaluated."""
        directory = self._run.round(round)
        if not directory.has("evaluation"):
            return []
        return read_table(directory.path / "evaluation" / "answers.parquet")


def preference_rows(run: RunDir, number: int | None = None) -> list[dict[str, Any]]:
    """Preferences in the prompt/chosen/rejected form that TRL and datasets read."""
    known = ("pair_id", "prompt_source", "margin", "p", "origin")
    return [
        {**_conversation(prompt, row, ("chosen", "rejected")), **_facts(n, row, known)}
        for n, prompt, row in _trained(run, number, "pairs")
    ]


def unpaired_rows(run: RunDir, number: int | None = None) -> list[dict[str, Any]]:
    """Good and bad responses in the prompt/completion/label form of TRL's KTO."""
    known = ("row_id", "prompt_source", "margin", "origin")
    return [
        {
            **_conversation(prompt, row, ("completion",)),
            "label": row["label"],
            **_facts(n, row, known),
        }
        for n, prompt, row in _trained(run, number, "unpaired")
    ]


def _trained(
    run: RunDir, number: int | None, name: str
) -> Iterator[tuple[int, Prompt, dict[str, Any]]]:
    """(round, prompt, row) of what the rounds' artifacts of a name hold."""
    from online_dpo.stages.context import read_prompts

    prompts = read_prompts(run).by_id
    for directory in run.rounds() if number is None else [run.round(number)]:
        if directory.has(name):
            for row in read_table(directory.artifact(name) / f"{name}.parquet"):
                yield directory.number, prompts[row["prompt_id"]], row


def _conversation(prompt: Prompt, row: dict[str, Any], sides: Sequence[str]) -> dict[str, Any]:
    if prompt.text is not None:
        return {"prompt": prompt.text, **{side: row[f"{side}_text"] for side in sides}}
    return {
        "prompt": [{"role": m.role, "content": m.content} for m in prompt.messages],
        **{side: [{"role": "assistant", "content": row[f"{side}_text"]}] for side in sides},
    }


def _facts(number: int, row: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {"round": number, **{key: row[key] for key in keys}}


def _view(directory: RoundDir, timing: dict[str, Any], config: Config) -> RoundView:
    manifest = directory.manifest() if directory.finished else {}
    plan = directory.plan() if directory.planned and directory.number else None
    made = _metrics(directory, "pairs") or _metrics(directory, "unpaired") or {}
    shards = directory.children("samples")
    num_shards = math.ceil(len(plan.prompt_ids) / config.sampling.prompts_per_shard) if plan else 1
    policy = manifest.get("policy")
    judge, number = _metrics(directory, "judge_check"), directory.number
    return RoundView(
        round=directory.number,
        stage="done" if manifest else _stage(directory, num_shards),
        prompts=len(plan.prompt_ids) if plan else 0,
        samples=sum(directory.manifest(name)["rows"] for name in shards),
        pairs=int(made.get("pairs", 0)),
        unpaired=int(made.get("unpaired", 0)),
        responses=dict(made.get("responses", {})),
        no_verdict=_no_verdict(directory),
        policy=policy,
        reference=asdict(plan.reference) if plan else None,
        promoted=manifest.get("promoted"),
        why=manifest.get("why"),
        training=_metrics(directory, "training"),
        evaluation=_metrics(directory, "evaluation"),
        judge=judge,
        alarms=[] if judge is None else judge_alarms(judge, config.alarms, round=number),
        wall_s=timing.get("wall_s"),
        busy_s=timing.get("busy_s", {}),
        fixed_s=timing.get("fixed_s"),
    )


def _no_verdict(directory: RoundDir) -> dict[str, int]:
    """The most frequent reason first."""
    reasons: Counter[str] = Counter()
    for name in directory.children("labels"):
        reasons.update(read_json(directory.path / name / "metrics.json")["invalid"])
    return {reason: count for reason, count in reasons.most_common() if count}


def _metrics(directory: RoundDir, name: str) -> dict[str, Any] | None:
    if not directory.has(name):
        return None
    data: dict[str, Any] = read_json(directory.path / name / "metrics.json")
    return data


def _stage(directory: RoundDir, num_shards: int) -> str:
    """The stage that an unfinished round is at; `num_shards` are its shards of samples."""
    if directory.number == 0:
        return "evaluate" if directory.has("canary") else "origin"
    if directory.has("evaluation"):
        return "promote"
    if directory.has("policy"):
        return "evaluate"
    if directory.has("pairs") or directory.has("unpaired"):
        return "train"
    if directory.has("judge_check"):
        return "pair"
    sampled = len(directory.children("samples")) >= num_shards
    return "label" if sampled or directory.children("labels") else "sample"


def _timings(run: RunDir) -> dict[int, dict[str, Any]]:
    """The last recorded timing of every round that ended."""
    events = read_lines(run.path / "events.jsonl")
    return {int(e["round"]): e for e in events if e["event"] == "round ended"}


def evaluated(rounds: Sequence[RoundView]) -> list[RoundView]:
    """The rounds with an evaluation."""
    return [r for r in rounds if r.evaluation is not None]


def source_views(view: RoundView) -> dict[str, RoundView]:
    """A round's evaluation on the prompts of each source, as views with nothing else in them."""
    sources = (view.evaluation or {}).get("by_source", {})
    return {
        name: replace(
            view,
            evaluation=figures,
            training=None,
            judge=None,
            alarms=[],
            pairs=0,
            unpaired=0,
            spent=None,
        )
        for name, figures in sources.items()
    }
