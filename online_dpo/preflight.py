"""What can be checked of a config before anything starts, and what it would do in figures."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

from online_dpo.config import Config, JudgeConfig
from online_dpo.crew import Crew
from online_dpo.errors import ConfigError
from online_dpo.loss_rules import describe_loss
from online_dpo.plugins import instantiate, names_code, resolve
from online_dpo.resources import find_data
from online_dpo.stages.pair import find_selector


def check_config(config: Config) -> None:
    """Resolve all that the config names: files, judge, selector, sampler, devices.

    Raises ConfigError for the first that cannot be used.
    """
    for path in _tables(config):
        if path.endswith((".jsonl", ".parquet", ".json")):
            find_data(path)
    for judge in {id(j): j for j in (config.judge, config.eval_judge)}.values():
        _check_judge(judge)
    find_selector(config.pairs.selector)


def describe(config: Config) -> str:
    """Rounds, samples, labels and where they run, in a few lines."""
    campaign, sampling = config.campaign, config.sampling
    prompts = campaign.prompts_per_round
    samples = prompts * sampling.n
    compared = math.comb(sampling.n, 2)
    if config.judge.comparisons != "all":
        compared = min(compared, config.judge.comparisons)
    calls = prompts * compared * (2 if config.judge.orders == "both" else 1) * config.judge.votes
    crew = Crew(config, run=_nowhere())
    device = "GPU" if crew.gpu else "CPU"
    return "\n".join(
        (
            f"rounds        {campaign.rounds}, reference: {_promotion(config)}",
            f"a round       {prompts} prompts x {sampling.n} responses = {samples} samples of at "
            f"most {sampling.max_new_tokens} tokens",
            f"judge         {config.judge.name}; at most {samples} scores, or {calls} comparisons "
            "a round where it is pairwise",
            f"training      {describe_loss(config.train.loss)}, beta {config.train.beta}, "
            f"learning rate {config.train.learning_rate}, {config.train.batch_size} pairs a step"
            f"{_adapter(config)}",
            f"runs on       {device}, sampler {crew.sampler_kind}, "
            f"{'one process' if crew.inline else 'worker processes'}",
            f"run directory {campaign.run_dir}",
        )
    )


def _adapter(config: Config) -> str:
    lora = config.train.lora
    if lora is None:
        return ""
    return f", an adapter of rank {lora.rank}" + (" over 4 bits" if lora.quantization else "")


def _nowhere() -> Path:
    return Path()


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


def _check_judge(judge: JudgeConfig) -> None:
    """Resolve a judge and fit its options, without loading models or running a user's file."""
    if names_code(judge.name):
        return
    target = resolve(judge.name)
    if inspect.isclass(target) and not getattr(target, "inline", False):
        try:
            inspect.signature(target).bind(**judge.options)
        except TypeError as error:
            raise ConfigError(f"judge.options do not fit {judge.name!r}: {error}") from error
        return
    instantiate(target, judge.options, name=judge.name)
