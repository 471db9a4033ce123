"""What tests share: tiny models as plain transformers folders, and one vLLM engine and server."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from labellers import make as make
from labellers import open_labeller as open_labeller

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
    from vllm_processes import VllmServer

    from online_dpo.workers import ChildWorker

# Two processes with two threads each on two cores are ten times slower than one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Machines are shared: how long an example takes says nothing.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

TINY_CONTEXT = 384
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 entries with EOS, padding and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog and the other one"], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )


def make_tiny_model(folder: Path, architecture: str, *, seed: int = 0, **changes: int) -> Path:
    """Write a random model of some 100k parameters; the Qwen2 one has tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": TINY_CONTEXT,
        # Wide weights make the tokens' probabilities differ visibly.
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
        **changes,
    }
    torch.manual_seed(seed)
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, *, seed: int, size: float = 0.1) -> Path:
    """Write a LoRA adapter of rank 4 over all linear layers of `base`, its B drawn from `seed`."""
    import torch

    from online_dpo.config import AdapterConfig
    from online_dpo.models.loading import copy_tokenizer, load_model
    from online_dpo.models.lora import AdaptedModel, lora_config
    from online_dpo.records import ModelRef

    settings = AdapterConfig(rank=4, alpha=8.0).model_dump()
    adapted = AdaptedModel(load_model(base), lora_config(settings))
    adapted.reset(seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.model.named_parameters():
        if ".lora_B." in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    adapted.save(folder, ModelRef(str(base), str(base)), base)
    copy_tokenizer(base, folder)
    return folder


Figure = Callable[[str, object], None]


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Figure:
    """Puts a figure, by name, into the table at the end of the test run."""
    return lambda name, value: record_property(f"figure: {name}", value)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of figures that tests gave, from every process that ran some."""
    rows = [
        (name.removeprefix("figure: "), str(value))
        for report in terminalreporter.stats.get("passed", [])
        if report.when == "call"
        for name, value in report.user_properties
        if name.startswith("figure: ")
    ]
    if rows:
        width = max(len(name) for name, _ in rows)
        terminalreporter.section("figures")
        for name, value in sorted(rows):
            terminalreporter.write_line(f"{name:<{width}}  {value}")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama with its own output projection."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Qwen2 with tied embeddings."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2")


@pytest.fixture(scope="session")
def vllm_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChildWorker]:
    """The shared vLLM engine: a sampler worker on the CPU, which `fail` breaks in stated ways.

    A test loads the policy that it needs, by a sha256 of its own, and mends what it broke.
    """
    run = tmp_path_factory.mktemp("vllm_worker")
    worker = start_vllm_worker(run)
    yield worker
    worker.close()


def start_vllm_worker(run: Path, **settings: object) -> ChildWorker:
    """A sampler worker with vLLM on the CPU, which `fail` breaks in stated ways."""
    _require_vllm()
    from vllm_processes import ENVIRONMENT

    from online_dpo.workers import ChildWorker

    return ChildWorker(
        "sampler",
        "vllm_processes:FaultyHandler",
        {
            "sampler": "vllm",
            "device": "cpu",
            "threads": 1,
            "model": {"path": "tiny"},
            "sampling": {"sampler": "vllm"},
            **settings,
        },
        run=run,
        log=run / "sampler.log",
        env={**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parent)},
    )


@pytest.fixture(scope="session")
def vllm_server(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """A real OpenAI-compatible server of the tiny Qwen2, with chat and structured output."""
    from vllm_processes import running_server

    _require_vllm()
    with running_server(tiny_qwen2, tmp_path_factory.mktemp("vllm_server") / "log") as server:
        yield server


def _require_vllm() -> None:
    """Importing vllm to see whether it is there would take seconds and change this process."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
