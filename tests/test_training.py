"""The trainer by its own door: exact averages, exact resume, and what it writes."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import trainer_calls
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trainer_calls import settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from online_dpo.config import SftConfig
from online_dpo.errors import ConfigError, CorruptError, DivergedError, DriftError, NoPairsError
from online_dpo.models.loading import load_model
from online_dpo.training.handler import Trainer


def ignore(event: dict[str, Any]) -> None:
    """Hears no progress."""


def write_pairs(
    path: Path, count: int, *, seed: int = 0, longest: int = 12
) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)

    def ids(low: int) -> list[int]:
        return [int(i) for i in rng.integers(2, 320, rng.integers(low, longest))]

    rows = [
        {
            "pair_id": f"pair-{i:03d}",
            "prompt_token_ids": ids(1),
            "chosen_token_ids": [*ids(2), 0],
            "rejected_token_ids": ids(2),
        }
        for i in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return rows


def write_demonstrations(path: Path, count: int) -> None:
    rows = [
        {"prompt": f"{a}+{b}=", "response": str(a + b)}
        for a, b in np.random.default_rng(0).integers(10, 99, (count, 2)).tolist()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def plan(**changes: Any) -> dict[str, Any]:
    given = {"beta": 0.1, "learning_rate": 1e-3, "seed": 5, "round": 1, "rounds": 4}
    return {**given, "optimizer_step": 0, **changes}


def ref(folder: Path, sha256: str = "") -> dict[str, str]:
    return {"path": str(folder), "sha256": sha256 or str(folder)}


def dpo_arguments(
    folder: Path, model: Path, name: str = "policy", **changes: Any
) -> dict[str, Any]:
    given = {
        "model": ref(model),
        "pairs": str(folder / "pairs.parquet"),
        "reference_logps": str(folder / "reference.parquet"),
        "plan": plan(),
        "optimizer": None,
        "out": str(folder / name),
        "optimizer_out": str(folder / f"{name}-optimizer"),
        "checkpoints": str(folder / f"{name}-checkpoints"),
        "resume_from": None,
    }
    return {**given, **changes}


def score_reference(folder: Path, model: Path, trainer: Trainer | None = None) -> None:
    (trainer or Trainer(settings())).score_reference(
        emit=ignore,
        model=ref(model),
        pairs=str(folder / "pairs.parquet"),
        out=str(folder / "reference.parquet"),
    )


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def gradients(folder: Path) -> dict[str, torch.Tensor]:
    """A first step's gradients, from AdamW's first moment: (1 - 0.9) * gradient."""
    moments = load_file(folder / "optimizer.safetensors")
    return {k[: -len(".exp_avg")]: v * 10 for k, v in moments.items() if k.endswith(".exp_avg")}


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path) -> Path:
    """Ten pairs with the tiny Llama's log-probs as the reference's."""
    write_pairs(tmp_path / "pairs.parquet", 10)
    score_reference(tmp_path, tiny_llama)
    return tmp_path


def textbook_gradients(folder: Path, model_folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean DPO loss of all pairs and its gradient: all logits, float64, one pair at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    rows = pq.read_table(folder / "pairs.parquet").to_pylist()
    reference = pq.read_table(folder / "reference.parquet").to_pylist()

    def logp(prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
        logps = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
        at = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        return logps[at, list(response)].sum()

    losses = []
    for row, given in zip(rows, reference, strict=True):
        chosen = logp(row["prompt_token_ids"], row["chosen_token_ids"]) - given["chosen_logp"]
        rejected = logp(row["prompt_token_ids"], row["rejected_token_ids"]) - given["rejected_logp"]
        losses.append(-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("micro", [1, 3, 10])
@pytest.mark.parametrize("architecture", ["tiny_llama", "tiny_qwen2"])
def test_gradient_is_that_of_the_mean_over_the_step(
    folder: Path, micro: int, architecture: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(architecture)
    trainer = Trainer(settings(batch_size=10, micro_batch_size=micro, max_grad_norm=1e9))
    trainer.dpo(emit=ignore, **dpo_arguments(folder, model))
    loss, expected = textbook_gradients(folder, model)
    found = gradients(folder / "policy-optimizer")
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].double(), gradient, atol=2e-5, rtol=1e-4)
    summary = json.loads((folder / "policy" / "summary.json").read_text())
    assert summary["first_loss"] == pytest.approx(loss, abs=1e-6)
    total = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    assert summary["first_grad_norm"] == pytest.approx(total, rel=1e-5)


def test_policy_equal_to_reference_starts_at_ln_2(folder: Path, tiny_llama: Path) -> None:
    trainer = Trainer(settings(batch_size=4, micro_batch_size=2))
    result = trainer.dpo(emit=ignore, **dpo_arguments(folder, tiny_llama))
    assert result["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result["first_margin"] == pytest.approx(0.0, abs=1e-6)
    assert result["steps"] == result["optimizer_step"] == 3
    assert result["pairs"] == 10


@pytest.mark.parametrize(
    ("train", "start"),
    [
        ({"loss": "ipo"}, 25.0),
        ({"loss": {"hinge": 0.5, "nca_pair": 2.0}}, 0.5 + 4.0 * math.log(2)),
    ],
)
def test_another_loss_starts_at_its_own_constant(
    folder: Path, tiny_llama: Path, train: dict[str, Any], start: float
) -> None:
    trainer = Trainer(settings(batch_size=4, micro_batch_size=2, **train))
    result = trainer.dpo(emit=ignore, **dpo_arguments(folder, tiny_llama))
    assert result["first_loss"] == pytest.approx(start, rel=1e-5)


def test_training_prefers_the_chosen(folder: Path, tiny_llama: Path) -> None:
    trainer = Trainer(settings(batch_size=5, epochs=10))
    result = trainer.dpo(emit=ignore, **dpo_arguments(folder, tiny_llama))
    assert result["last_accuracy"] == 1.0
    assert result["last_margin"] > 1.0 > result["last_loss"]


def test_clipping(folder: Path, tiny_llama: Path) -> None:
    Trainer(settings(max_grad_norm=0.25)).dpo(emit=ignore, **dpo_arguments(folder, tiny_llama))
    norm = math.sqrt(
        sum(
            float(g.double().square().sum())
            for g in gradients(folder / "policy-optimizer").values()
        )
    )
    assert norm == pytest.approx(0.25, rel=1e-4)


def test_likelihood_term(folder: Path, tiny_llama: Path) -> None:
    trainer = Trainer(settings(nll_weight=0.5))
    result = trainer.dpo(emit=ignore, **dpo_arguments(folder, tiny_llama))
    reference = pq.read_table(folder / "reference.parquet").to_pylist()
    rows = pq.read_table(folder / "pairs.parquet").to_pylist()
    nll = [
        -given["chosen_logp"] / len(row["chosen_token_ids"])
        for given, row in zip(reference, rows, strict=True)
    ]
    assert result["first_loss"] == pytest.approx(math.log(2) + 0.5 * np.mean(nll), abs=1e-5)


def test_events_and_metrics(folder: Path, tiny_llama: Path) -> None:
    events: list[dict[str, Any]] = []
    trainer = Trainer(settings(batch_size=4, learning_rate=1.0, warmup=0.0, checkpoint_every=2))
    trainer.dpo(emit=events.append, **dpo_arguments(folder, tiny_llama))
    steps = [event for event in events if event["event"] == "step"]
    assert [(event["step"], event["of"]) for event in steps] == [(1, 3), (2, 3), (3, 3)]
    rows = pq.read_table(folder / "pairs.parquet").to_pylist()
    assert sum(event["tokens"] for event in steps) == sum(
        len(row["prompt_token_ids"]) + len(row["chosen_token_ids"]) + len(row["rejected_token_ids"])
        for row in rows
    )
    # The plan's rate counts, not the config's: cosine at 0, 1/3, 2/3.
    rates = [event["metrics"]["learning_rate"] for event in steps]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.25e-3])
    lines = (folder / "policy" / "train_metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": event["step"], **event["metrics"]} for event in steps
    ]
    metrics = steps[-1]["metrics"]
    assert metrics["margin"] == pytest.approx(metrics["chosen_reward"] - metrics["rejected_reward"])
    assert [event for event in events if event["event"] == "checkpoint"] == [
        {
            "event": "checkpoint",
            "path": str(folder / "policy-checkpoints" / "step-000002.partial"),
            "step": 2,
        }
    ]


def test_policy_folder_is_a_plain_one(folder: Path, tiny_qwen2: Path) -> None:
    trainer = Trainer(settings())
    trainer.dpo(emit=ignore, **dpo_arguments(folder, tiny_qwen2))
    policy = folder / "policy"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (policy / name).read_bytes() == (tiny_qwen2 / name).read_bytes()
    assert {path.name for path in policy.iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "train_metrics.jsonl",
        "summary.json",
    }
    generation = json.loads((policy / "generation_config.json").read_text())
    assert set(generation) <= {"eos_token_id", "pad_token_id", "transformers_version"}


def test_the_policy_takes_the_template_it_was_trained_with(
    folder: Path, tiny_qwen2: Path, tmp_path: Path
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}own: {{ m.content }}{% endfor %}")
    given = settings()
    given["model"]["chat_template"] = str(template)
    Trainer(given).dpo(emit=ignore, **dpo_arguments(folder, tiny_qwen2))
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    assert tokenizer.chat_template == template.read_text()


def test_adopted_weights_are_those_of_the_file(folder: Path, tiny_llama: Path) -> None:
    """In bfloat16 too: the next round's training must not know more than its file does."""
    sequences = [{"prompt": [5, 6], "response": [7, 8, 9]}]
    for dtype in ("float32", "bfloat16"):
        trainer = Trainer(settings(dtype=dtype))
        trainer.dpo(emit=ignore, **dpo_arguments(folder, tiny_llama, dtype))
        trainer.adopt(emit=ignore, sha256="adopted")
        gone = {"path": str(folder / "nowhere"), "sha256": "adopted"}
        kept = trainer.score(emit=ignore, model=gone, sequences=sequences)
        fresh = Trainer(settings(dtype=dtype))
        loaded = fresh.score(emit=ignore, model=ref(folder / dtype), sequences=sequences)
        assert kept == loaded
        with safe_open(folder / dtype / "model.safetensors", "pt") as file:
            assert file.get_slice("model.norm.weight").get_dtype() == {"float32": "F32"}.get(
                dtype, "BF16"
            )


def test_a_carried_optimizer_makes_two_rounds_one_run(folder: Path, tiny_llama: Path) -> None:
    """Two rounds of one step on the same pairs are two epochs; the second is loaded from disk."""
    common = {"schedule": "linear", "batch_size": 10, "warmup": 0.0}
    whole = Trainer(settings(epochs=2, **common))
    whole.dpo(emit=ignore, **dpo_arguments(folder, tiny_llama, "whole"))
    carried = settings(optimizer="carry", **common)
    first = dpo_arguments(folder, tiny_llama, "first", plan=plan(rounds=2))
    Trainer(carried).dpo(emit=ignore, **first)
    second = dpo_arguments(
        folder,
        folder / "first",
        "second",
        plan=plan(round=2, rounds=2, optimizer_step=1),
        optimizer=str(folder / "first-optimizer"),
    )
    result = Trainer(carried).dpo(emit=ignore, **second)
    assert result["optimizer_step"] == 2
    assert contents(folder / "whole-optimizer") == contents(folder / "second-optimizer")
    assert (folder / "whole/model.safetensors").read_bytes() == (
        folder / "second/model.safetensors"
    ).read_bytes()


def test_memory_and_disk_give_the_same_next_round(folder: Path, tiny_llama: Path) -> None:
    stays = Trainer(settings())
    stays.dpo(emit=ignore, **dpo_arguments(folder, tiny_llama, "one"))
    stays.adopt(emit=ignore, sha256=str(folder / "one"))
    stays.dpo(emit=ignore, **dpo_arguments(folder, folder / "one", "two"))
    fresh = Trainer(settings())
    fresh.dpo(emit=ignore, **dpo_arguments(folder, folder / "one", "again"))
    assert contents(folder / "two") == contents(folder / "again")


def test_a_reference_in_memory_is_not_trained(folder: Path, tiny_llama: Path) -> None:
    """Policy and reference are the same folder; the policy alone changes."""
    trainer = Trainer(settings())
    score_reference(folder, tiny_llama, trainer)
    before = (folder / "reference.parquet").read_bytes()
    trainer.dpo(emit=ignore, **dpo_arguments(folder, tiny_llama))
    trainer.adopt(emit=ignore, sha256="trained")
    score_reference(folder, tiny_llama, trainer)
    assert (folder / "reference.parquet").read_bytes() == before


def test_gradient_checkpointing_changes_nothing(folder: Path, tiny_llama: Path) -> None:
    for name, on in (("plain", False), ("recomputed", True)):
        trainer = Trainer(settings(gradient_checkpointing=on))
        trainer.dpo(emit=ignore, **dpo_arguments(folder, tiny_llama, name))
    assert contents(folder / "plain-optimizer") == contents(folder / "recomputed-optimizer")


def test_bfloat16_trains(folder: Path, tiny_llama: Path) -> None:
    """Each step sees the weights that the one before it left."""
    trainer = Trainer(settings(precision="bfloat16", batch_size=2, epochs=3))
    score_reference(folder, tiny_llama, trainer)
    result = trainer.dpo(emit=ignore, **dpo_arguments(folder, tiny_llama))
    assert result["first_loss"] == pytest.approx(math.log(2), abs=1e-2)
    assert result["last_loss"] < result["first_loss"] - 0.05
    moments = load_file(folder / "policy-optimizer" / "optimizer.safetensors")
    assert {tensor.dtype for tensor in moments.values()} == {torch.float32}


def test_long_pairs_are_skipped_and_counted(folder: Path, tiny_llama: Path) -> None:
    rows = pq.read_table(folder / "pairs.parquet").to_pylist()
    long = [
        row
        for row in rows
        if len(row["prompt_token_ids"])
        + max(len(row["chosen_token_ids"]), len(row["rejected_token_ids"]))
        > 14
    ]
    assert 0 < len(long) < 10
    trainer = Trainer(settings(max_tokens=14))
    result = trainer.dpo(emit=ignore, **dpo_arguments(folder, tiny_llama))
    assert result["pairs"] == 10 - len(long)
    assert result["skipped"] == {"longer than train.max_tokens 14": len(long)}
    with pytest.raises(NoPairsError, match="10 x longer than train.max_tokens 2"):
        Trainer(settings(max_tokens=2)).dpo(emit=ignore, **dpo_arguments(folder, tiny_llama))


def test_a_step_that_is_not_finite_changes_no_weight(folder: Path, tiny_llama: Path) -> None:
    table = pq.read_table(folder / "reference.parquet").to_pylist()
    table[3]["chosen_logp"] = math.nan
    pq.write_table(pa.Table.from_pylist(table), folder / "reference.parquet")
    trainer = Trainer(settings())
    arguments = dpo_arguments(folder, tiny_llama)
    with pytest.raises(DivergedError, match="step 1: .*loss nan"):
        trainer.dpo(emit=ignore, **arguments)
    assert not Path(arguments["out"]).exists()
    trainer.adopt(emit=ignore, sha256="after")
    sequences = [{"prompt": [5], "response": [6, 7]}]
    after = trainer.score(emit=ignore, model={"path": "", "sha256": "after"}, sequences=sequences)
    before = Trainer(settings()).score(emit=ignore, model=ref(tiny_llama), sequences=sequences)
    assert after == before


def test_reference_of_other_pairs_is_refused(folder: Path, tiny_llama: Path) -> None:
    write_pairs(folder / "pairs.parquet", 12)
    with pytest.raises(CorruptError, match="for 2 of 12 pairs, e.g. pair-010"):
        Trainer(settings()).dpo(emit=ignore, **dpo_arguments(folder, tiny_llama))


def test_a_checkpoint_of_other_settings_is_refused(folder: Path, tiny_llama: Path) -> None:
    trainer = Trainer(settings(batch_size=4, checkpoint_every=1))
    trainer.dpo(emit=ignore, **dpo_arguments(folder, tiny_llama))
    checkpoint = str(folder / "policy-checkpoints" / "step-000001.partial")
    arguments = dpo_arguments(folder, tiny_llama, plan=plan(seed=6), resume_from=checkpoint)
    with pytest.raises(DriftError, match="seed was 5, is 6"):
        trainer.dpo(emit=ignore, **arguments)


def test_a_checkpoint_of_another_model_is_refused(
    folder: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    trainer = Trainer(settings(batch_size=4, checkpoint_every=1))
    trainer.dpo(emit=ignore, **dpo_arguments(folder, tiny_llama))
    checkpoint = folder / "policy-checkpoints" / "step-000001.partial"
    arguments = dpo_arguments(folder, tiny_llama, resume_from=str(checkpoint))
    name, weights_file = "model.norm.weight", checkpoint / "model.safetensors"
    moments = load_file(checkpoint / "optimizer.safetensors")
    del moments[f"{name}.exp_avg"]
    save_file(moments, checkpoint / "optimizer.safetensors")
    with pytest.raises(CorruptError, match=f"{name}.exp_avg is on one side only"):
        trainer.dpo(emit=ignore, **arguments)
    weights = load_file(weights_file)
    save_file({**weights, name: weights[name][:-1].clone()}, weights_file)
    with pytest.raises(CorruptError, match=rf"{name} has the shape \[63\], here \[64\]"):
        trainer.dpo(emit=ignore, **arguments)


def test_scores_are_in_the_order_given(tiny_llama: Path) -> None:
    trainer = Trainer(settings(micro_batch_size=1))
    sequences = [{"prompt": [5] * n, "response": list(range(2, 2 + n))} for n in (4, 1, 3, 2)]
    logps = trainer.score(emit=ignore, model=ref(tiny_llama), sequences=sequences)["logps"]
    assert [len(values) for values in logps] == [4, 1, 3, 2]
    with torch.no_grad():
        logits = load_model(tiny_llama)(torch.tensor([[5, 5, 5, 2, 3, 4]])).logits[0]
    expected = logits.log_softmax(-1)[[2, 3, 4], [2, 3, 4]]
    assert logps[2] == pytest.approx(expected.tolist(), abs=1e-5)


def sft_arguments(
    folder: Path, model: Path, name: str = "policy", **changes: Any
) -> dict[str, Any]:
    config = SftConfig(demonstrations="", learning_rate=3e-3, batch_size=8)
    given = {
        "model": ref(model),
        "demonstrations": str(folder / "demonstrations.jsonl"),
        "sft": config.model_dump(),
        "max_tokens": None,
        "seed": 3,
        "out": str(folder / name),
        "checkpoints": str(folder / f"{name}-checkpoints"),
        "checkpoint_every": 4,
        "resume_from": None,
    }
    return {**given, **changes}


def test_supervised_training_learns_and_reports(tmp_path: Path, tiny_llama: Path) -> None:
    write_demonstrations(tmp_path / "demonstrations.jsonl", 60)
    with (tmp_path / "demonstrations.jsonl").open("a") as file:
        file.write('{"prompt": "1+1="}\nnot json\n')
    result = Trainer(settings()).sft(emit=ignore, **sft_arguments(tmp_path, tiny_llama))
    assert result["demonstrations"] == 60
    assert sum(result["skipped"].values()) == 2
    assert {row["row"] for row in result["skipped_examples"]} == {61, 62}
    assert result["final_loss"] < 0.7 * result["first_loss"]


def test_supervised_loss_is_the_mean_over_tokens(tmp_path: Path, tiny_llama: Path) -> None:
    rows = [{"prompt": "ab", "response": "x"}, {"prompt": "a", "response": "long answer"}]
    (tmp_path / "demonstrations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    trainer = Trainer(settings(micro_batch_size=1))
    result = trainer.sft(emit=ignore, **sft_arguments(tmp_path, tiny_llama))
    tokenizer = trainer._tokenizer(tiny_llama)
    sequences = [
        {
            "prompt": tokenizer(r["prompt"]).input_ids,
            "response": [*tokenizer(r["response"]).input_ids, 0],
        }
        for r in rows
    ]
    scores = trainer.score(emit=ignore, model=ref(tiny_llama), sequences=sequences)["logps"]
    tokens = [value for values in scores for value in values]
    assert result["first_loss"] == pytest.approx(-np.mean(tokens), abs=1e-5)


def test_no_demonstrations(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "demonstrations.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no usable demonstration"):
        Trainer(settings()).sft(emit=ignore, **sft_arguments(tmp_path, tiny_llama))


def test_killed_and_resumed_is_byte_equal(tmp_path: Path, tiny_llama: Path) -> None:
    """SIGKILL at a step checkpoint of SFT and of DPO, resumed by a fresh process."""
    write_demonstrations(tmp_path / "demonstrations.jsonl", 50)
    write_pairs(tmp_path / "pairs.parquet", 30)
    score_reference(tmp_path, tiny_llama)

    def exit_status(job: dict[str, Any]) -> int | None:
        process = trainer_calls.fork_server().Process(
            target=trainer_calls.run, args=([job], tmp_path / "out")
        )
        process.start()
        process.join(120)
        return process.exitcode

    options = settings(batch_size=4, epochs=2, checkpoint_every=3, micro_batch_size=2)
    trainer = Trainer(options)
    trainer.sft(emit=ignore, **sft_arguments(tmp_path, tiny_llama, "sft-whole"))
    trainer.dpo(emit=ignore, **dpo_arguments(tmp_path, tiny_llama, "dpo-whole"))
    for method, step, arguments in (("sft", 4, sft_arguments), ("dpo", 9, dpo_arguments)):
        name = f"{method}-cut"
        job = {
            "settings": options,
            "calls": [[method, arguments(tmp_path, tiny_llama, name)]],
            "kill_at": step,
        }
        assert exit_status(job) == -signal.SIGKILL
        assert not (tmp_path / name).exists()
        checkpoint = tmp_path / f"{name}-checkpoints" / f"step-{step:06d}.partial"
        assert {path.name for path in checkpoint.iterdir()} == {
            "model.safetensors",
            "optimizer.safetensors",
            "state.json",
            "metrics.jsonl",
        }
        shutil.move(checkpoint, tmp_path / method)
        resumed = arguments(tmp_path, tiny_llama, name, resume_from=str(tmp_path / method))
        assert exit_status({"settings": options, "calls": [[method, resumed]]}) == 0
        assert contents(tmp_path / name) == contents(tmp_path / f"{method}-whole")
    assert contents(tmp_path / "dpo-cut-optimizer") == contents(tmp_path / "dpo-whole-optimizer")


def test_processes_that_did_not_start_are_noticed() -> None:
    with pytest.raises(ConfigError, match="num_processes is 2, and 1 were started"):
        Trainer(settings(num_processes=2))


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no GPU"):
        Trainer({**settings(), "device": "cuda"})


@pytest.mark.parametrize("accumulation", [1, 4])
def test_resumed_at_each_of_twenty_steps_is_byte_equal(
    tmp_path: Path, tiny_llama: Path, accumulation: int
) -> None:
    write_pairs(tmp_path / "pairs.parquet", 21 * accumulation)
    score_reference(tmp_path, tiny_llama)
    given = settings(
        batch_size=accumulation, micro_batch_size=1, checkpoint_every=1, micro_batch_tokens=64
    )
    kept: list[Path] = []

    def keep(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint":
            kept.append(tmp_path / f"kept-{event['step']:02d}")
            shutil.copytree(event["path"], kept[-1])

    Trainer(given).dpo(emit=keep, **dpo_arguments(tmp_path, tiny_llama))
    whole = contents(tmp_path / "policy")
    state = contents(tmp_path / "policy-optimizer")
    assert len(kept) == 20
    weights = [(step / "model.safetensors").read_bytes() for step in kept]
    assert len({*weights, whole["model.safetensors"]}) == 21  # every step changes the weights
    for number, checkpoint in enumerate(kept, start=1):
        name = f"again-{number:02d}"
        changes = {"resume_from": str(checkpoint)}
        Trainer(given).dpo(emit=ignore, **dpo_arguments(tmp_path, tiny_llama, name, **changes))
        assert contents(tmp_path / name) == whole, number
        assert contents(tmp_path / f"{name}-optimizer") == state, number
        for folder in (name, f"{name}-optimizer", f"{name}-checkpoints"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
