"""The models and preference pairs that the DPO benchmarks train on, and the work they need."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

EOS, PAD = 0, 1
BETA = 0.1
PLAN_SEED = 0


@dataclass(frozen=True)
class Size:
    """A model's shape, in ModelInit's fields, and its pairs: token counts and pairs a step."""

    name: str
    model: Mapping[str, Any]
    prompt: int
    response: int
    batch_size: int
    reference_pairs: int
    """Pairs of one turn of reference scoring."""
    steps: int
    """Optimizer steps of one turn of training."""


@dataclass(frozen=True)
class DpoJob:
    """What a side trains, and how its time is cut into turns.

    First `1 + reference_turns` turns of reference scoring, of `reference_pairs` pairs each; then a
    turn of `warm_up` steps, `step_turns` turns of `steps` steps, and a step that is looked into.
    The first turn of either kind includes setting up, and is not used.
    """

    model: str
    pairs: str
    batch_size: int
    reference_turns: int
    reference_pairs: int
    step_turns: int
    steps: int
    warm_up: int = 1
    learning_rate: float = 1e-6
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 2
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The side's own settings, in its own words."""
    profile: bool = False
    """Whether the last step is profiled; otherwise its operations are counted."""

    @property
    def step_sizes(self) -> list[int]:
        return [self.warm_up, *[self.steps] * self.step_turns, 1]

    @property
    def num_pairs(self) -> int:
        return self.reference_pairs * (1 + self.reference_turns)

    @property
    def num_turns(self) -> int:
        return 1 + self.reference_turns + len(self.step_sizes)


@dataclass(frozen=True)
class LoopJob:
    """Rounds of a campaign or of TRL's trainer, one a turn; the first is the warm-up."""

    model: str
    prompts: str
    run: str
    rounds: int
    prompts_per_round: int
    new_tokens: int
    batch_size: int
    learning_rate: float
    threads: int
    scorers: list[dict[str, Any]]
    """Options of the heuristic judge, which gives the reward on both sides."""
    dtype: str = "float32"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Sections of the config here, OnlineDPOConfig's fields there."""


def _llama(hidden: int, intermediate: int, layers: int, heads: int, vocab: int) -> dict[str, Any]:
    return {
        "architecture": "llama", "hidden_size": hidden, "intermediate_size": intermediate,
        "num_layers": layers, "num_heads": heads, "num_kv_heads": None, "vocab_size": vocab,
        "max_length": 2048, "tie_embeddings": True,
    }  # fmt: skip


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int
) -> dict[str, Any]:
    shape = _llama(hidden, intermediate, layers, heads, 151936)
    return {**shape, "architecture": "qwen2", "num_kv_heads": kv_heads}


SIZES = {
    "a": Size("20M, 256 + 2 x 128", _llama(384, 1024, 4, 6, 32000), 256, 128, 4, 8, 1),
    "b": Size("120M, 64 + 2 x 256", _llama(768, 2304, 12, 12, 32000), 64, 256, 2, 2, 1),
    "c": Size("1M, 24 + 2 x 24", _llama(128, 352, 4, 4, 1024), 24, 24, 16, 64, 4),
    "0.5B": Size("0.5B, 512 + 2 x 512", _qwen2(896, 4864, 24, 14, 2), 512, 512, 8, 16, 2),
    "1.5B": Size("1.5B, 512 + 2 x 512", _qwen2(1536, 8960, 28, 12, 2), 512, 512, 8, 16, 2),
    "tiny": Size("tiny, 16 + 2 x 16", _qwen2(64, 128, 2, 4, 2), 16, 16, 8, 8, 1),
}


def prepare(folder: Path, size: Size, job: DpoJob, *, lengths: str) -> None:
    """Write the job's model, in a process of its own, and its pairs."""
    process = multiprocessing.get_context("spawn").Process(
        target=write_model, args=(folder / "model", size, job.device)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    write_pairs(Path(job.pairs), size, job.num_pairs, lengths=lengths)


def new_job(folder: Path, size: Size, *, turns: int, **others: Any) -> DpoJob:
    """A job of the size in a folder, with `turns` turns of either kind; `others` are its fields."""
    return DpoJob(
        model=str(folder / "model"),
        pairs=str(folder / "pairs.parquet"),
        batch_size=size.batch_size,
        reference_turns=turns,
        reference_pairs=size.reference_pairs,
        step_turns=turns,
        steps=size.steps,
        **others,
    )


def write_model(folder: Path, size: Size, device: str = "cpu") -> None:
    """Random weights, and a tokenizer whose words are the numbers of its tokens.

    The weights are drawn on the device, and are float32 on a CPU, bfloat16 on a GPU.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from online_dpo.models.loading import make_model, save_model

    vocab_size = size.model["vocab_size"]
    with torch.device(device):
        model = make_model(size.model, vocab_size=vocab_size, eos_id=EOS, pad_id=PAD, seed=0)
    save_model(model, folder, dtype="float32" if device == "cpu" else "bfloat16")
    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token=str(PAD)))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=str(EOS), pad_token=str(PAD)
    ).save_pretrained(folder)


def write_pairs(path: Path, size: Size, count: int, *, lengths: str) -> None:
    """Random pairs in the trainer's format; chosen responses prefer the low half of the vocabulary.

    `lengths`: `fixed`, or `varied`, uniform from a quarter of the size's length to all of it.
    """
    rng = np.random.default_rng(0)
    vocab_size = size.model["vocab_size"]

    def ids(longest: int, upper: int) -> list[int]:
        shortest = longest if lengths == "fixed" else max(2, longest // 4)
        tokens: list[int] = rng.integers(2, upper, rng.integers(shortest, longest + 1)).tolist()
        return tokens

    rows = [
        {
            "pair_id": f"{number:06d}",
            "prompt_token_ids": ids(size.prompt, vocab_size),
            "chosen_token_ids": [*ids(size.response, 2 + vocab_size // 2)[:-1], EOS],
            "rejected_token_ids": [*ids(size.response, vocab_size)[:-1], EOS],
        }
        for number in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_prompts(path: Path, size: Size, count: int) -> None:
    """Random prompts as text, of the size's length each."""
    tokens = np.random.default_rng(1).integers(2, size.model["vocab_size"], (count, size.prompt))
    rows = [{"prompt": " ".join(map(str, prompt))} for prompt in tokens.tolist()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def reorder_pairs(path: Path, out: Path, batch_size: int) -> None:
    """The pairs in the order in which the trainer's plan of one epoch takes them."""
    from online_dpo.training.batching import plan_steps

    table = pq.read_table(path)
    steps = plan_steps(table.num_rows, batch_size=batch_size, epochs=1, seed=PLAN_SEED)
    pq.write_table(table.take([item for step in steps for item in step.items]), out)


def read_pairs(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def num_parameters(size: Size) -> tuple[int, int]:
    """Weights that multiply each token: of the blocks together, and of the output projection."""
    shape = size.model
    hidden, heads = shape["hidden_size"], shape["num_heads"]
    kv = hidden * (shape["num_kv_heads"] or heads) // heads
    block = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * shape["intermediate_size"]
    return shape["num_layers"] * block, hidden * shape["vocab_size"]


def floor_flops(size: Size, row: Mapping[str, Any]) -> float:
    """Floating-point operations of one forward pass over a pair, as few as the mathematics needs.

    The prompt runs once, attention is causal, the output projection sees the positions alone that
    predict a response's token. A backward pass costs twice as much; nothing is recomputed.
    """
    blocks, head = num_parameters(size)
    prompt = len(row["prompt_token_ids"])
    responses = [len(row[f"{name}_token_ids"]) for name in ("chosen", "rejected")]
    attended = prompt * (prompt + 1) / 2
    attended += sum(n * prompt + n * (n + 1) / 2 for n in responses)
    attention = 4 * attended * size.model["hidden_size"] * size.model["num_layers"]
    return 2 * blocks * (prompt + sum(responses)) + 2 * head * sum(responses) + attention
