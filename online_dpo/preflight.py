"""What can be checked of a config before anything starts, and what it would do in figures."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from online_dpo.asking.comparison_schedules import most_comparisons
from online_dpo.asking.judge_forms import (
    Mode,
    is_built_in,
    kind_of,
    make_form,
    mode_of,
    repeats_itself,
)
from online_dpo.asking.judge_worker import JudgeProcess
from online_dpo.asking.members import all_repeat, most_demanding, paying_like
from online_dpo.config import Config, JudgeConfig
from online_dpo.crew import Crew
from online_dpo.devices import hiding_gpus
from online_dpo.errors import ConfigError
from online_dpo.judge_clashes import PEOPLE, num_probes, of_judge, with_judges
from online_dpo.loss_rules import describe_loss
from online_dpo.paid.prices import also_priced, is_priced
from online_dpo.plugins import resolve
from online_dpo.resources import find_rows
from online_dpo.stages.judge_questions import chosen_gold
from online_dpo.stages.pair import find_selector


@dataclass(frozen=True)
class Plan:
    """What a config would do, and why it cannot on this machine ("" where it can)."""

    text: str
    here: str


@dataclass(frozen=True)
class _Judge:
    """What a judge turned out to be, as `of_judge` asks for it."""

    compares: bool
    mode: Mode
    priced: bool = True
    repeats: bool = False
    members: tuple[JudgeConfig, ...] = ()


def check_config(config: Config) -> Plan:
    """Resolve all that the config names and try what goes together, without loading a model.

    A judge of the user's own is imported and made in a process of its own. Raises ConfigError for
    the first fault that the config has wherever it runs.
    """
    for path in _tables(config):
        find_rows(path)
    find_selector(config.pairs.selector)
    chosen_gold(config)
    env = hiding_gpus(config.compute.device)
    judges = [_checked_judge(config.judge, "judge", env)]
    if config.evaluation.judge is not None:
        judges.append(_checked_judge(config.eval_judge, "evaluation.judge", env))
    pays = any(judge.mode == "async" for judge in judges)
    _refuse(with_judges(config, pays, judges[0].compares, also_priced=also_priced(config)))
    runs_on, here = _machine(config)
    return Plan(_describe(config, judges[0], judges[-1], runs_on), here)


def _refuse(problems: Iterator[str]) -> None:
    if (problem := next(problems, None)) is not None:
        raise ConfigError(f"{problem}.")


def _machine(config: Config) -> tuple[str, str]:
    """Where the work runs, and why it cannot here."""
    try:
        crew = Crew(config, run=Path())
    except ConfigError as error:
        return "another machine", error.message
    processes = "one process" if crew.inline else "worker processes"
    return f"{'GPU' if crew.gpu else 'CPU'}, sampler {crew.sampler_kind}, {processes}", ""


def _describe(config: Config, judge: _Judge, evaluator: _Judge, runs_on: str) -> str:
    """Rounds, samples, labels and where they run, in a few lines."""
    campaign, sampling = config.campaign, config.sampling
    samples = campaign.prompts_per_round * sampling.n
    asked = _num_questions(config, judge.compares)
    checks = _num_checks(config, judge)
    every = config.evaluation.every
    return "\n".join(
        (
            f"rounds        {campaign.rounds}, reference: {_promotion(config)}",
            f"a round       {campaign.prompts_per_round} prompts x {sampling.n} responses = "
            f"{samples} samples of at most {sampling.max_new_tokens} tokens",
            f"judge         {config.judge.name}; at most {asked} a round"
            f"{f', and {checks} to check it' if checks else ''}",
            f"training      {describe_loss(config.train.loss)}, beta {config.train.beta}, "
            f"learning rate {config.train.learning_rate}, {config.train.batch_size} pairs a step"
            f"{_adapter(config)}",
            f"evaluation    {'every round' if every == 1 else f'every {every} rounds'}, by "
            f"{config.eval_judge.name}; at most {_num_wins(config, evaluator.compares)}",
            f"runs on       {runs_on}",
            f"run directory {campaign.run_dir}",
        )
    )


def _num_questions(config: Config, compares: bool) -> str:
    """How often labelling asks the judge in a round at most; a vote and an order count each."""
    judge, prompts = config.judge, config.campaign.prompts_per_round
    n = config.sampling.n + any(source.answer_field for source in config.prompts.train)
    n += config.sampling.also.n if config.sampling.also is not None else 0
    if not compares:
        if judge.name == PEOPLE:
            return f"{prompts * n * judge.options.get('per_item', 1)} verdicts of people"
        return f"{prompts * n * judge.votes} scores"
    pairs = prompts * most_comparisons(judge.schedule, judge.comparisons, n)
    pairs = min(pairs, judge.comparisons_per_round or pairs)
    if judge.name == PEOPLE:
        return f"{pairs * judge.options.get('per_item', 1)} comparisons by people"
    return f"{pairs * (2 if judge.orders == 'both' else 1) * judge.votes} comparisons"


def _num_checks(config: Config, judge: _Judge) -> int:
    """How often a round asks about the gold set and the constant response at most."""
    settings, gold = config.judge, len(chosen_gold(config))
    probes = num_probes(settings, judge.mode)
    if judge.compares:
        return (gold + probes) * (2 if settings.orders == "both" else 1) * settings.votes
    return (2 * gold + min(probes, config.campaign.prompts_per_round)) * settings.votes


def _num_wins(config: Config, compares: bool) -> str:
    """How often an evaluation asks its judge: each answer alone, or against two earlier ones."""
    judge, limit = config.eval_judge, config.evaluation.max_prompts
    each = judge.votes * (2 * (2 if judge.orders == "both" else 1) if compares else 1)
    what = "comparisons" if compares else "scores"
    if limit is not None:
        return f"{each * limit} {what}"
    return f"{each} {what if each > 1 else what[:-1]} for each held-out prompt"


def _adapter(config: Config) -> str:
    lora = config.train.lora
    if lora is None:
        return ""
    return f", an adapter of rank {lora.rank}" + (" over 4 bits" if lora.quantization else "")


def _promotion(config: Config) -> str:
    promote = config.reference.promote
    if isinstance(promote, dict):
        return f"promoted every {promote['every']} rounds"
    return {"every_round": "promoted every round", "never": "policy 0 throughout"}[promote]


def _tables(config: Config) -> list[str]:
    paths = [s.path for s in (*config.prompts.train, *config.prompts.eval)]
    if config.sft is not None:
        paths.append(config.sft.demonstrations)
    if config.pairs.offline is not None:
        paths.append(config.pairs.offline.path)
    return paths


def _checked_judge(judge: JudgeConfig, section: str, env: Mapping[str, str]) -> _Judge:
    """Make the judge, as far as that loads no model, and try its settings on it."""
    found = _built_in(judge) if is_built_in(judge.name) else _of_ones_own(judge, env)
    if found.members:
        found = _with_members(found, judge, section, env)
    _refuse(
        of_judge(
            judge,
            section=section,
            compares=found.compares,
            mode=found.mode,
            priced=found.priced,
            repeats=found.repeats,
        )
    )
    return found


def _with_members(
    panel: _Judge, config: JudgeConfig, section: str, env: Mapping[str, str]
) -> _Judge:
    """A judge that asks others, with what the others turn out to be."""
    asked = [
        _checked_judge(paying_like(member, config), f"{section}.options.members[{index}]", env)
        for index, member in enumerate(panel.members)
    ]
    return replace(
        panel,
        mode=most_demanding(member.mode for member in asked),
        priced=all(member.priced for member in asked),
        repeats=all_repeat((member.mode, member.repeats) for member in asked),
    )


def _built_in(judge: JudgeConfig) -> _Judge:
    target = resolve(judge.name)
    if mode_of(target) != "worker":
        form = make_form(judge.name, judge.options, None)
        if seats := getattr(form.judge, "seats", ()):
            members = tuple(seat.config for seat in seats)
            return _Judge(form.kind == "compare", form.mode, members=members)
        priced = is_priced(form.judge, judge)
        return _Judge(form.kind == "compare", form.mode, priced, repeats_itself(form.judge))
    try:
        inspect.signature(target).bind(**judge.options)
    except TypeError as error:
        raise ConfigError(f"judge.options do not fit {judge.name!r}: {error}") from error
    return _Judge(kind_of(target, judge.name) == "compare", "worker")


def _of_ones_own(judge: JudgeConfig, env: Mapping[str, str]) -> _Judge:
    with tempfile.TemporaryDirectory(prefix="online-dpo-") as folder:
        run = Path(folder)
        log = run / "judge.log"
        process = JudgeProcess(judge.name, judge.options, None, run=run, log=log, env=env)
        try:
            found = process.describe()
        finally:
            process.close()
    return _Judge(found["kind"] == "compare", found["mode"])
