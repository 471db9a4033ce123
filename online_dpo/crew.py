"""The workers of a campaign: where the sampler and the trainer run, and whose turn the GPU is."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from online_dpo.clashes import num_sampler_gpus, on_machine
from online_dpo.config import Config
from online_dpo.devices import visible_gpus
from online_dpo.errors import ConfigError
from online_dpo.models.memory_options import check_memory_options
from online_dpo.samplers.restarting import RestartingSampler
from online_dpo.workers import ChildWorker, InlineWorker, Worker

TRAINER = "online_dpo.training.handler:Trainer"
SAMPLER = "online_dpo.samplers.handler:SamplerHandler"


class Crew:
    """Starts each worker when first needed and keeps it across rounds; `close` ends all."""

    def __init__(self, config: Config, *, run: Path) -> None:
        self._config = config
        self._run = run
        self.gpu = _uses_gpu(config)
        self.sampler_kind = choose_sampler(config, gpu=self.gpu, vllm=has_vllm())
        check_memory_options(config.train.model_dump(), "cuda" if self.gpu else "cpu")
        gpus = len(visible_gpus()) if self.gpu else 0
        problem = next(on_machine(config, sampler=self.sampler_kind, gpus=gpus), None)
        if problem is not None:
            raise ConfigError(f"{problem}.")
        _check_keys(config)
        self.inline = _is_inline(config, gpu=self.gpu, sampler=self.sampler_kind)
        self._sampler: Worker | None = None
        self._trainer: Worker | None = None
        self._asleep = False
        self.sampler_turn = threading.RLock()
        """Held over a load and what is asked of it: a judge may load another model meanwhile."""

    def sampler(self) -> Worker:
        """The sampler, with the GPU where turns are taken."""
        if self._takes_turns and self._trainer is not None:
            self._yield_trainer()
        if self._sampler is None:
            self._sampler = self._make_sampler()
        elif self._asleep:
            self._sampler.call("wake")
        self._asleep = False
        return self._sampler

    def trainer(self) -> Worker:
        """The trainer, with the GPU where turns are taken."""
        if self._takes_turns and self._sampler is not None and not self._asleep:
            self._yield_sampler()
        if self._trainer is None:
            self._trainer = self._make_trainer()
        return self._trainer

    def close(self) -> None:
        for worker in (self._sampler, self._trainer):
            if worker is not None:
                worker.close()
        self._sampler = self._trainer = None

    @property
    def facts(self) -> dict[str, Any]:
        """What results depend on beside the config, for manifests."""
        return {
            "sampler": self.sampler_kind,
            "device": "cuda" if self.gpu else "cpu",
            "inline": self.inline,
            "threads": self._threads,
        }

    @property
    def _threads(self) -> int:
        """What torch takes, as far as it can be known without torch."""
        pinned = os.environ.get("OMP_NUM_THREADS", "")
        default = int(pinned) if pinned.isdigit() else os.cpu_count()
        return self._config.compute.threads or default or 1

    @property
    def _takes_turns(self) -> bool:
        return self.gpu and self._config.compute.layout != "separate"

    def _yield_trainer(self) -> None:
        assert self._trainer is not None
        if self._config.compute.layout == "exit":
            self._trainer.close()
            self._trainer = None
        else:
            self._trainer.call("release")

    def _yield_sampler(self) -> None:
        assert self._sampler is not None
        if self._config.compute.layout == "exit":
            self._sampler.close()
            self._sampler = None
        elif self.sampler_kind != "openai_server":
            self._sampler.call("sleep")
            self._asleep = True

    def _make_trainer(self) -> Worker:
        config = self._config
        settings = {
            **self._common_settings(),
            "train": config.train.model_dump(mode="json"),
            "num_processes": config.train.num_processes,
        }
        if self.inline:
            return InlineWorker(lambda: _load(TRAINER)(settings))
        return ChildWorker(
            "trainer",
            TRAINER,
            settings,
            run=self._run,
            log=self._run / "logs" / "trainer.log",
            launcher=trainer_launcher(config),
            num_processes=config.train.num_processes,
            env=self._environment(self._devices(config.train.devices, "train.devices")),
            listen=config.train.listen,
        )

    def _make_sampler(self) -> Worker:
        """The sampler, or one for each replica of `sampling.engine.data_parallel_size`."""
        return self._start_sampler(1) if self.inline else RestartingSampler(self._start_sampler)

    def _start_sampler(self, divisor: int) -> Worker:
        """A sampler with batches smaller by a divisor than the config has them."""
        config = self._config
        sampling = smaller_batches(config.sampling.model_dump(mode="json"), divisor)
        replicas = int(sampling["engine"].pop("data_parallel_size", 1))
        settings = {
            **self._common_settings(),
            "sampler": self.sampler_kind,
            "sampling": sampling,
            "adapter_rank": config.train.lora.rank if config.train.lora is not None else None,
        }
        if self.inline:
            return InlineWorker(lambda: _load(SAMPLER)(settings))
        devices = self._devices(config.sampling.devices, "sampling.devices")
        if replicas == 1:
            return self._sampler_process(settings, "sampler", devices)
        from online_dpo.samplers.replicas import ReplicatedSampler

        shares = self._shares(devices, replicas)
        return ReplicatedSampler(
            [
                self._sampler_process(settings, f"sampler-{index}", share)
                for index, share in enumerate(shares)
            ]
        )

    def _sampler_process(
        self, settings: Mapping[str, Any], role: str, devices: list[str] | None
    ) -> Worker:
        return ChildWorker(
            role,
            SAMPLER,
            settings,
            run=self._run,
            log=self._run / "logs" / f"{role}.log",
            env=self._environment(devices),
            stall_s=self._config.sampling.stall_s,
        )

    def _shares(self, devices: list[str] | None, replicas: int) -> list[list[str] | None]:
        """Each replica's GPUs, as many as one engine spans; on a CPU there is nothing to share."""
        if not self.gpu:
            return [None] * replicas
        here = devices if devices is not None else list(visible_gpus())
        span = num_sampler_gpus(self._config, self.sampler_kind) // replicas
        return [here[index * span : (index + 1) * span] for index in range(replicas)]

    def _common_settings(self) -> dict[str, Any]:
        return {
            "device": "cuda" if self.gpu else "cpu",
            "threads": self._config.compute.threads,
            "model": self._config.model.model_dump(mode="json"),
        }

    def _devices(self, wanted: list[int] | None, field: str) -> list[str] | None:
        """The GPUs of a worker as CUDA_VISIBLE_DEVICES names them; None leaves all."""
        if not self.gpu or wanted is None:
            return None
        here = visible_gpus()
        missing = [index for index in wanted if index >= len(here)]
        if missing:
            raise ConfigError(f"{field} names GPU {missing[0]}, but there are {len(here)}.")
        return [here[index] for index in wanted]

    def _environment(self, devices: list[str] | None) -> Mapping[str, str]:
        env = {} if devices is None else {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
        if not self.gpu:
            env["CUDA_VISIBLE_DEVICES"] = ""  # compute.device: cpu, on a machine with GPUs
        if self._config.compute.threads is not None:
            env["OMP_NUM_THREADS"] = str(self._config.compute.threads)
        return env


def smaller_batches(sampling: dict[str, Any], divisor: int) -> dict[str, Any]:
    """A sampler's settings with fewer sequences at once; 1 leaves them as they are."""
    if divisor == 1:
        return sampling
    engine = sampling["engine"]
    most = engine.get("max_num_seqs", sampling["batch_size"])
    return {
        **sampling,
        "batch_size": max(1, sampling["batch_size"] // divisor),
        "engine": {**engine, "max_num_seqs": max(1, int(most) // divisor)},
    }


def choose_sampler(config: Config, *, gpu: bool, vllm: bool) -> str:
    """The sampler that `auto` means here. Raises ConfigError where the one asked for is missing."""
    wanted = config.sampling.sampler
    if wanted == "vllm" and not vllm:
        raise ConfigError(
            "sampling.sampler is vllm, but vllm is not installed.", remedy="online-dpo doctor"
        )
    if wanted == "auto":
        return "vllm" if gpu and vllm else "transformers"
    return wanted


def trainer_launcher(config: Config) -> list[str]:
    """What starts the trainer: python itself for one process, `accelerate launch` for several."""
    num_processes = config.train.num_processes
    if num_processes == 1:
        return [sys.executable]
    # --multi_gpu on a CPU too: the trainer then takes gloo, and --cpu would start one process only.
    options = {
        "num_processes": num_processes,
        "num_machines": 1,
        "mixed_precision": "no",
        "dynamo_backend": "no",
        "main_process_port": 0,
        **config.train.launch,
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    return command


def has_vllm() -> bool:
    """Whether vllm could be imported, without importing it."""
    return importlib.util.find_spec("vllm") is not None


def _uses_gpu(config: Config) -> bool:
    wanted = config.compute.device
    if wanted == "cuda" and not visible_gpus():
        raise ConfigError("compute.device is cuda, but no NVIDIA GPU is visible.")
    return wanted == "cuda" or (wanted == "auto" and bool(visible_gpus()))


def _check_keys(config: Config) -> None:
    """Endpoints that ask for a key must have it before anything is done for them."""
    for index, endpoint in enumerate(config.sampling.endpoints):
        name = endpoint.api_key_env
        if name is not None and not os.environ.get(name):
            raise ConfigError(
                f"The environment variable {name} is not set; it holds the key of {endpoint.url} "
                f"(sampling.endpoints.{index}.api_key_env)."
            )


def _is_inline(config: Config, *, gpu: bool, sampler: str) -> bool:
    wanted = config.compute.workers
    can = not gpu and sampler == "transformers" and config.train.num_processes == 1
    if wanted == "inline" and not can:
        raise ConfigError(
            "compute.workers: inline needs the CPU, the transformers sampler and one training "
            "process; set compute.workers: processes"
        )
    return can if wanted == "auto" else wanted == "inline"


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
