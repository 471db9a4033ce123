"""The rounds of a campaign, one after the other, in one process that holds its run directory."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from online_dpo.asking.own_model import who_judges_whom
from online_dpo.config import Config, JudgeConfig
from online_dpo.crew import Crew
from online_dpo.devices import hiding_gpus
from online_dpo.errors import ConfigError, CorruptError
from online_dpo.judge_clashes import with_judges
from online_dpo.judging import Labeller
from online_dpo.metrics_log import append_metrics
from online_dpo.paid.ledger import LEDGER
from online_dpo.paid.prices import also_priced
from online_dpo.progress import Progress
from online_dpo.records import model_ref_from_dict
from online_dpo.schedule import PastRound, PromptPool, plan_round
from online_dpo.stages.context import (
    Context,
    PromptTable,
    busy_seconds,
    covered_seconds,
    trained_on,
)
from online_dpo.stages.evaluate import evaluate
from online_dpo.stages.implicit_rewards import ready_shards
from online_dpo.stages.judge_check import check_judge, heed_alarms
from online_dpo.stages.judge_questions import chosen_gold
from online_dpo.stages.label import Labelling
from online_dpo.stages.origin import check_pool, make_origin
from online_dpo.stages.own_models import RoundModels
from online_dpo.stages.pair import find_selector, pair
from online_dpo.stages.promote import promote
from online_dpo.stages.train import train
from online_dpo.store import RoundDir, RunDir
from online_dpo.tidying import prune, tidy


class Loop:
    """One process's work on a campaign: the crew, the judges, and the rounds one by one."""

    def __init__(self, folder: RunDir, config: Config, progress: Progress) -> None:
        self._folder = folder
        self._config = config
        self._progress = progress
        self._crew = Crew(config, run=folder.path)
        self._judges: list[tuple[JudgeConfig, Labeller]] = []
        self._prompts: PromptTable | None = None

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.ExitStack() as ends:  # a signal in the midst of one ends the others too
            ends.callback(self._crew.close)
            for _, judge in self._judges:
                ends.callback(judge.close)

    def prepare(self) -> None:
        """Make the judges and find the selector, before anything is written or paid for.

        Raises ConfigError for what is not there, does not load or clashes.
        """
        if self._folder.round(self._config.campaign.rounds).finished:
            return
        find_selector(self._config.pairs.selector)
        chosen_gold(self._config)
        judges = [self._labeller(evaluation, None) for evaluation in (False, True)]
        pays = any(judge.mode == "async" for judge in judges)
        compares = judges[0].kind == "compare"
        problems = with_judges(self._config, pays, compares, also_priced=also_priced(self._config))
        if (problem := next(problems, None)) is not None:
            raise ConfigError(f"{problem}.")
        if judges[0].mode == "own_model":
            evaluates = judges[1].mode == "own_model"
            self._progress.note(who_judges_whom(judges[0].who, evaluates=evaluates))

    def run(self) -> None:
        self._folder.event("campaign started", pid=os.getpid(), made_with=self._crew.facts)
        tidy(self._folder, self._config)
        total = self._config.campaign.rounds
        if not self._folder.round(0).finished:
            self._timed(0, self._origin)
        history = [_past(r) for r in takewhile(lambda r: r.finished, self._folder.rounds())]
        for number in range(len(history), total + 1):
            self._timed(number, lambda: self._round(history))
            history.append(_past(self._folder.round(len(history))))
            prune(self._folder, self._config)
        self._progress.round(total + 1, total)
        self._folder.event("campaign finished", rounds=total)

    def _timed(self, number: int, work: Callable[[], Context]) -> None:
        """Do a round; its wall time, work by stage and fixed cost go to the events."""
        self._progress.round(number, self._config.campaign.rounds)
        self._folder.event("round began", round=number)
        began = time.monotonic()
        context = work()
        wall = time.monotonic() - began
        busy = {stage: round(s, 4) for stage, s in busy_seconds(context.work).items()}
        fixed = round(wall - covered_seconds(context.work), 4)
        times = {"wall_s": round(wall, 4), "busy_s": busy, "fixed_s": fixed}
        self._folder.event("round ended", round=number, **times)
        append_metrics(self._folder, self._folder.round(number))

    def _origin(self) -> Context:
        context = self._context(self._folder.round(0))
        if not context.round.planned:
            seed = self._config.campaign.seed
            context.round.write_plan({"round": 0, "seed": seed})
        with context.working("origin"):
            make_origin(context)
        evaluate(context)
        promote(context)
        return context

    def _round(self, history: Sequence[PastRound]) -> Context:
        round_dir = self._folder.round(len(history))
        context = self._context(round_dir)
        table = context.load_prompts()
        if not round_dir.planned:
            check_pool(context)
            pool = PromptPool(table.train, table.weights, table.sha256)
            round_dir.write_plan(plan_round(self._config, history, pool))
        context.plan = round_dir.plan()
        self._check_chain(context, history[-1])
        if not round_dir.has(trained_on(round_dir)):
            total = len(context.plan.prompt_ids)
            with Labelling(context, total=total) as labelling:
                for shard in ready_shards(context):
                    labelling.submit(shard)
            with context.working("label"):
                check_judge(context)
            heed_alarms(context)
        with context.working("pair"):
            pair(context)
        train(context)
        if context.plan.evaluate:
            evaluate(context)
        promote(context)
        return context

    def _context(self, round_dir: RoundDir) -> Context:
        context = Context(
            config=self._config,
            run=self._folder,
            round=round_dir,
            crew=self._crew,
            progress=self._progress,
            make_labeller=lambda evaluation: self._labeller(evaluation, context),
            prompts=self._prompts,
        )
        if self._folder.round(0).has("prompts"):
            self._prompts = context.load_prompts()
        return context

    def _labeller(self, evaluation: bool, context: Context | None) -> Labeller:
        """The judge of labelling or of evaluation, set to a round; one serves both where equal."""
        number = 0 if context is None else context.round.number
        own_models = None if context is None else RoundModels(context)
        config = self._config.eval_judge if evaluation else self._config.judge
        for known, labeller in self._judges:
            if known == config:
                labeller.round, labeller.own_models = number, own_models
                return labeller
        labeller = Labeller(
            config,
            base=None,
            ledger_path=self._folder.path / LEDGER,
            seed=self._config.campaign.seed,
            round=number,
            on_event=self._heard,
            env=hiding_gpus(self._config.compute.device),
            section="evaluation.judge" if evaluation and self._config.evaluation.judge else "judge",
        )
        labeller.own_models = own_models
        self._judges.append((config, labeller))
        return labeller

    def _heard(self, event: dict[str, Any]) -> None:
        """Keep a judge's event; what a person should know now is said as well."""
        self._folder.event("judge", **event)
        if event.get("event") == "judge_model_mismatch":
            self._progress.note(event["message"])

    def _check_chain(self, context: Context, last: PastRound) -> None:
        """The plan must name the round before it as it stands on the disk."""
        if context.inputs.previous_manifest_sha256 != last.manifest_sha256:
            raise CorruptError(
                f"{context.round.path / 'round.json'} was made after another round "
                f"{last.round:03d} than the one on disk."
            )
        if context.inputs.prompts_sha256 != context.load_prompts().sha256:
            raise CorruptError(
                f"{context.round.path / 'round.json'} was made of other prompts than those on disk."
            )


def _past(round_dir: RoundDir) -> PastRound:
    manifest = round_dir.manifest()
    policy = model_ref_from_dict(manifest["policy"])
    assert policy is not None
    return PastRound(
        round=round_dir.number,
        prompt_ids=round_dir.plan().prompt_ids if round_dir.number else (),
        policy=policy,
        promoted=bool(manifest["promoted"]),
        optimizer=model_ref_from_dict(manifest["optimizer"]),
        optimizer_step=int(manifest["optimizer_step"]),
        manifest_sha256=round_dir.manifest_sha256(),
    )
