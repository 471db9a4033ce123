"""Settings that nothing would read where others stand as they do: refused, with the reason; pure.

A setting counts as given where it is not its default. Each rule yields a sentence that names the
setting first. What a rule needs to know beside the config (the machine, the judge) is an argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from online_dpo.asking.comparison_schedules import ACROSS_PROMPTS, ACTIVE
from online_dpo.loss_rules import needs_reference
from online_dpo.resources import is_row_file

if TYPE_CHECKING:
    from online_dpo.config import Config, JudgeConfig, PromptSource

MAX_VLLM_TEMPERATURE = 2.0
ENGINE_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
ENGINE_DTYPES = ("float32", "bfloat16", "float16")
"""What vLLM may compute in: for these the canary has a tolerance."""

MAX_P_MARGIN = 0.5

PEOPLE = "human"
"""The judge that asks people."""
CALLING = (
    "concurrency",
    "retries",
    "deadline_s",
    "requests_per_minute",
    "tokens_per_minute",
    "service_tier",
    "batch",
    "max_invalid",
    "max_invalid_after",
    "model_mismatch",
    "reuse_from",
)
"""Settings of judges that call an API."""

DEFAULT_PROBES = 32
"""Of a judge whose answers cost neither money nor anybody's time."""
COMPARING = ("orders", "swap", "comparisons", "comparisons_per_round", "schedule", "margins")
"""Settings of judges that compare."""

_OWN_LAUNCH = {"num_processes": "train.num_processes", "mixed_precision": "train.precision"}


def is_given(section: BaseModel, field: str) -> bool:
    """Whether a field says something else than its default."""
    return bool(getattr(section, field) != type(section).model_fields[field].default)


def in_config(config: Config) -> Iterator[str]:
    """What does not go together wherever the config runs."""
    yield from _model(config)
    yield from _prompts(config)
    yield from _sampling(config)
    yield from _engine(config.sampling.engine)
    yield from _swap(config.judge, "judge")
    yield from _schedule(config.judge)
    yield from _implicit_rewards(config)
    yield from _unpaired(config)
    yield from _evaluation_judge(config)
    yield from _processes(config)
    yield from _retention(config)


def on_machine(config: Config, *, sampler: str, gpus: int) -> Iterator[str]:
    """What the sampler that `auto` came to, or a machine of so many GPUs, would not read."""
    yield from _for_other_samplers(config, sampler)
    yield from _too_few_gpus(config, sampler, gpus) if gpus else _for_gpus(config)


def of_judge(
    config: JudgeConfig,
    *,
    section: str,
    compares: bool,
    mode: str,
    priced: bool = True,
    repeats: bool = False,
) -> Iterator[str]:
    """What a judge of this kind and mode (inline, async, worker or own_model) would not read.

    `priced` is False where the judge says that it knows no price for its calls, `repeats` True
    where it answers at temperature 0.
    """
    name = config.name
    if config.votes > 1 and repeats:
        place = "options.members[...].options" if config.options.get("members") else "options"
        yield (
            f"{section}.votes: {config.votes} would buy the same answer so often, for {name!r} "
            f"answers at temperature 0. Set {section}.{place}.temperature, e.g. 0.7, or leave "
            f"{section}.votes out"
        )
    if config.budget.max_usd is not None and not priced:
        yield (
            "judge.budget.max_usd cannot be kept without a price: the price file has none for the "
            f"model of {section} at its endpoint and tier. Set {section}.options.price_per_million"
            ": [IN, OUT] in dollars ([0, 0] where it is free), or name a price file in judge.prices"
        )
    for field in () if compares else COMPARING:
        if is_given(config, field):
            yield (
                f"{section}.{field}: {getattr(config, field)} is for judges that compare; {name!r} "
                f"scores each response by itself. Leave {section}.{field} out"
            )
    if compares and is_given(config, "scale"):
        yield (
            f"{section}.scale makes p of two scores; {name!r} compares and gives p itself. Leave "
            f"{section}.scale out"
        )
    for field in () if mode == "async" else CALLING:
        if is_given(config, field):
            yield (
                f"{section}.{field} is for judges that call an API; {name!r} makes no calls. Leave "
                f"{section}.{field} out"
            )
    for field in ("orders", "votes") if mode == "people" else ():
        if is_given(config, field):
            yield (
                f"{section}.{field}: each annotator is shown a pair once, in an order drawn for "
                f"them; {section}.options.per_item is how many are asked. Leave {section}.{field} "
                "out"
            )
    yield from _checks(config, section, mode)
    if mode == "people" and is_given(config, "timeout_s"):
        yield f"{section}.timeout_s: people take their time. Leave {section}.timeout_s out"
    if mode in ("inline", "own_model") and is_given(config, "timeout_s"):
        how = "is called directly" if mode == "inline" else "is asked through the sampler"
        yield (
            f"{section}.timeout_s: {name!r} {how}, without a deadline. Leave "
            f"{section}.timeout_s out"
        )


def _checks(config: JudgeConfig, section: str, mode: str) -> Iterator[str]:
    """What is asked of a judge beside labels, to see how good it is."""
    if mode == "people":
        own = "judge.options.gold and judge.options.repeats measure annotators"
        for field in ("gold", "gold_pairs", "probes", "constant"):
            if is_given(config, field):
                yield f"{section}.{field}: {own}. Leave {section}.{field} out"
    if is_given(config, "gold_pairs") and config.gold is None:
        yield (
            f"{section}.gold_pairs is how many of the comparisons of {section}.gold are asked "
            "about, which is not set; give both or neither"
        )
    if is_given(config, "constant") and not num_probes(config, mode):
        yield (
            f"{section}.constant is set against the policy's responses {section}.probes times a "
            f"round, and that is 0{'' if config.probes == 0 else ' for a judge that makes calls'}; "
            f"set {section}.probes, or leave {section}.constant out"
        )


def num_probes(config: JudgeConfig, mode: str) -> int:
    """How often a round probes a judge of this mode with a constant response."""
    if config.probes is not None:
        return config.probes
    return 0 if mode in ("async", "people") else DEFAULT_PROBES


def with_judges(
    config: Config, pays: bool, compares: bool, *, also_priced: bool = True
) -> Iterator[str]:
    """What does not go with the judges: `pays`, one may make paid calls; `compares`, labels do.

    `also_priced` is False where nobody knows what sampling.also costs.
    """
    if config.judge.budget.max_usd is not None and not also_priced:
        yield (
            "sampling.also.price_per_million: judge.budget.max_usd cannot be kept without it, and "
            "the price file has none for that model there; give [IN, OUT] in dollars, [0, 0] where "
            "it is free"
        )
    buys = pays or config.sampling.also is not None
    for field in () if buys else ("budget", "prices"):
        if is_given(config.judge, field):
            yield (
                f"judge.{field} is for paid calls, and neither the judge {config.judge.name!r} nor "
                f"another part of this campaign makes any. Leave judge.{field} out"
            )
    if compares and config.pairs.threshold is not None:
        yield (
            f"pairs.threshold holds scores against {config.pairs.threshold:g}, and "
            f"{config.judge.name!r} compares; take a judge that scores, or leave it out"
        )
    if compares and config.pairs.min_margin > MAX_P_MARGIN:
        yield (
            f"pairs.min_margin: {config.pairs.min_margin:g} can never be reached: "
            f"{config.judge.name!r} compares, and a margin is then |p - 0.5|, at most 0.5"
        )


def num_sampler_gpus(config: Config, sampler: str) -> int:
    """GPUs that all engines of a sampler span together."""
    sizes = [int(config.sampling.engine.get(key, 1)) for key in ENGINE_SIZES]
    return sizes[0] * sizes[1] * sizes[2] if sampler == "vllm" else 1


def _model(config: Config) -> Iterator[str]:
    model = config.model
    if model.init is not None and model.trust_remote_code:
        yield "model.trust_remote_code is for a given model's own files; model.init makes none"
    if model.attention == "flash_attention_2" and config.train.precision == "float32":
        yield "model.attention: flash_attention_2 needs train.precision: bfloat16"


def _prompts(config: Config) -> Iterator[str]:
    for role, sources in (("train", config.prompts.train), ("eval", config.prompts.eval)):
        for index, source in enumerate(sources):
            place = f"prompts.{role}.{index}"
            if is_given(source, "split") and is_row_file(source.path):
                yield f"{place}.split is for datasets by name; {source.path} is a file without any"
            if role == "eval":
                yield from _eval_source(source, place)


def _eval_source(source: PromptSource, place: str) -> Iterator[str]:
    if is_given(source, "weight"):
        yield f"{place}.weight: evaluations use every held-out prompt; leave it out"
    if is_given(source, "answer_field"):
        yield f"{place}.answer_field: answers join the candidates of training prompts only"


def _sampling(config: Config) -> Iterator[str]:
    sampling = config.sampling
    for field in ("top_p", "top_k"):
        if sampling.temperature == 0 and is_given(sampling, field):
            yield f"sampling.{field} does nothing to greedy decoding (sampling.temperature: 0)"
    reached = all(endpoint.reload_url for endpoint in sampling.endpoints)
    if not reached and sampling.reload_command is None:
        yield (
            "sampling.endpoints: the openai_server sampler needs a way to give each round's policy "
            "to its servers: sampling.reload_command, or a reload_url for each"
        )


def _engine(engine: dict[str, Any]) -> Iterator[str]:
    for key in ENGINE_SIZES:
        size = engine.get(key, 1)
        if not isinstance(size, int) or size < 1:
            yield f"sampling.engine.{key}: {size!r} is no number of GPUs; give 1 or more"
    if engine.get("dtype", "float32") not in ENGINE_DTYPES:
        yield f"sampling.engine.dtype is one of {', '.join(ENGINE_DTYPES)}, not {engine['dtype']!r}"


def _swap(judge: JudgeConfig, section: str) -> Iterator[str]:
    if judge.orders == "one" and is_given(judge, "swap"):
        yield (
            f"{section}.swap: {judge.swap} combines two orders, and {section}.orders is one; leave "
            "one of the two out"
        )


def _schedule(judge: JudgeConfig) -> Iterator[str]:
    if judge.schedule == "knockout" and judge.comparisons != "all":
        yield (
            "judge.comparisons: a knockout has as many comparisons as it takes to find the best "
            "and the worst; leave it out"
        )
    of_round = judge.comparisons_per_round
    if judge.schedule in ACTIVE and judge.comparisons == "all" and of_round is None:
        yield (
            f"judge.schedule: {judge.schedule} chooses which comparisons a budget goes to; set "
            "judge.comparisons, their number for each prompt"
        )
    if of_round is None:
        return
    if judge.schedule not in ACROSS_PROMPTS:
        yield (
            f"judge.comparisons_per_round: {of_round} is for schedules that give some prompts more "
            f"than others ({', '.join(ACROSS_PROMPTS)}), and judge.schedule is {judge.schedule}; "
            "set judge.comparisons, the number for each prompt, or one of these schedules"
        )
    if judge.comparisons != "all":
        yield (
            f"judge.comparisons_per_round: {of_round} stands in the place of judge.comparisons: "
            f"{judge.comparisons}; leave one of the two out"
        )


def _implicit_rewards(config: Config) -> Iterator[str]:
    if config.judge.schedule != "reward_margin":
        if is_given(config.judge, "margins"):
            yield (
                f"judge.margins: {config.judge.margins} says which implicit margins judge.schedule:"
                f" reward_margin asks about, and judge.schedule is {config.judge.schedule}; leave "
                "one of the two out"
            )
        return
    if not needs_reference(config.train.loss):
        yield (
            "judge.schedule: reward_margin goes by log(policy / reference), and the loss has no "
            "reference; take another schedule"
        )
    if config.reference.promote == "every_round":
        yield (
            "judge.schedule: reward_margin goes by log(policy / reference), which is 0 where the "
            "policy that samples is the reference, as with reference.promote: every_round; set "
            "that to never or {every: k}, or take another schedule"
        )


def _unpaired(config: Config) -> Iterator[str]:
    if config.pairs.threshold is None:
        return
    for field in ("selector", "max_per_prompt"):
        if is_given(config.pairs, field):
            yield (
                f"pairs.{field} chooses pairs, and with pairs.threshold every response is trained "
                "on by itself; leave one of the two out"
            )
    if is_given(config.judge, "scale"):
        yield "judge.scale makes p of two scores, and pairs.threshold needs none; leave it out"


def _evaluation_judge(config: Config) -> Iterator[str]:
    if config.eval_judge.name == PEOPLE:
        yield (
            f"evaluation.judge: people (judge.name: {PEOPLE}) label what is trained on, and "
            "answers to held-out prompts are not kept for them; name another judge there"
        )
    judge = config.evaluation.judge
    if judge is None:
        return
    yield from _swap(judge, "evaluation.judge")
    reasons = {
        **dict.fromkeys(
            ("comparisons", "comparisons_per_round", "schedule", "margins"),
            "an evaluation compares each answer with policy 0's and the previous one's",
        ),
        "scale": "an evaluation counts wins, and no p is made of its scores",
        **dict.fromkeys(
            ("gold", "gold_pairs", "probes", "constant"), "the judge that labels is checked"
        ),
    }
    for field, reason in reasons.items():
        if is_given(judge, field):
            yield f"evaluation.judge.{field}: {reason}; leave it out"


def _processes(config: Config) -> Iterator[str]:
    train, layout = config.train, config.compute.layout
    for key, decider in _OWN_LAUNCH.items():
        if key in train.launch:
            yield f"train.launch.{key}: it is decided by {decider}; set that"
    machines = int(train.launch.get("num_machines", 1))
    if train.devices is not None and len(train.devices) * machines != train.num_processes:
        yield (
            f"train.devices names {len(train.devices)} GPUs of this machine, and "
            f"train.num_processes {train.num_processes} on {machines} machines take one each"
        )
    if train.listen is not None:
        if layout == "exit":
            yield (
                "compute.layout: exit ends the trainer every round, and other machines' processes "
                "(train.listen) with it; take colocated or separate"
            )
        host, _, port = train.listen.rpartition(":")
        if not host or not port.isdigit():
            yield f"train.listen is HOST:PORT, not {train.listen!r}"
    both = set(config.sampling.devices or ()) & set(train.devices or ())
    if layout == "separate" and both:
        named = ", ".join(map(str, sorted(both)))
        yield (
            f"compute.layout: separate gives each worker its own GPUs, but sampling.devices and "
            f"train.devices both name {named}"
        )


def _retention(config: Config) -> Iterator[str]:
    campaign = config.campaign
    if campaign.save_policy_every == 1:
        return
    if campaign.retention != "all":
        yield (
            f"campaign.save_policy_every goes with campaign.retention: all; with "
            f"{campaign.retention!r} that alone decides which policies stay"
        )
    if config.reference.promote == "every_round":
        yield (
            "campaign.save_policy_every does nothing with reference.promote: every_round: a "
            "promoted policy always stays. Set campaign.retention: {last: n} to keep fewer"
        )


def _for_other_samplers(config: Config, sampler: str) -> Iterator[str]:
    sampling = config.sampling
    owners = {
        "engine": "vllm",
        "update": "vllm",
        "reload_command": "openai_server",
        "endpoints": "openai_server",
        "batch_size": "transformers",
    }
    for field, owner in owners.items():
        if is_given(sampling, field) and sampler != owner:
            yield (
                f"sampling.{field} is for the {owner} sampler, and this machine and config use the "
                f"{sampler} sampler. Remove it, or set sampling.sampler: {owner}"
            )
    if sampler == "openai_server" and sampling.devices is not None:
        yield "sampling.devices: the openai_server sampler's servers have their own devices"
    if sampler == "transformers":
        return
    for section, value in (("sampling", sampling), ("evaluation", config.evaluation)):
        if value.temperature > MAX_VLLM_TEMPERATURE:
            yield (
                f"{section}.temperature is {value.temperature:g}, and vLLM allows "
                f"{MAX_VLLM_TEMPERATURE:g} at most"
            )


def _too_few_gpus(config: Config, sampler: str, gpus: int) -> Iterator[str]:
    devices = config.sampling.devices
    if sampler != "openai_server":
        wanted = num_sampler_gpus(config, sampler)
        if devices is not None and len(devices) != wanted:
            yield (
                f"sampling.devices names {len(devices)} GPUs, and the {sampler} sampler uses "
                f"{wanted}; name as many, or change the parallel sizes in sampling.engine"
            )
        if devices is None and wanted > gpus:
            yield (
                f"sampling.engine: its parallel sizes need {wanted} GPUs, and {gpus} are there; "
                "lower them"
            )
    here = config.train.num_processes // int(config.train.launch.get("num_machines", 1))
    if config.train.devices is None and here > gpus:
        yield (
            f"train.num_processes starts {here} processes here with a GPU each, and {gpus} are "
            "there; lower it"
        )


def _for_gpus(config: Config) -> Iterator[str]:
    given = {
        "sampling.devices": config.sampling.devices is not None,
        "train.devices": config.train.devices is not None,
        "compute.layout": config.compute.layout != "colocated",
    }
    for name, is_set in given.items():
        if is_set:
            yield f"{name} places work on GPUs, and this campaign runs on the CPU"
    if config.model.attention == "flash_attention_2":
        yield "model.attention: flash_attention_2 needs a GPU, and this campaign runs on the CPU"
