"""Settings that nothing would read where others stand as they do: refused, with the reason; pure.

A setting counts as given where it is not its default. Each rule yields a sentence that names the
setting first. What a rule needs to know beside the config (the machine, the judge) is an argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from online_dpo.judge_clashes import in_judges, is_given
from online_dpo.resources import is_row_file

if TYPE_CHECKING:
    from online_dpo.config import Config, PromptSource

MAX_VLLM_TEMPERATURE = 2.0
ENGINE_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
ENGINE_DTYPES = ("float32", "bfloat16", "float16")
"""What vLLM may compute in: for these the canary has a tolerance."""

_OWN_LAUNCH = {"num_processes": "train.num_processes", "mixed_precision": "train.precision"}


def in_config(config: Config) -> Iterator[str]:
    """What does not go together wherever the config runs."""
    yield from _model(config)
    yield from _prompts(config)
    yield from _sampling(config)
    yield from _engine(config.sampling.engine)
    yield from in_judges(config)
    yield from _unpaired(config)
    yield from _processes(config)
    yield from _retention(config)


def on_machine(config: Config, *, sampler: str, gpus: int) -> Iterator[str]:
    """What the sampler that `auto` came to, or a machine of so many GPUs, would not read."""
    yield from _for_other_samplers(config, sampler)
    yield from _too_few_gpus(config, sampler, gpus) if gpus else _for_gpus(config)


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
