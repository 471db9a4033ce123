"""Whole optimizer steps with every loss and modifier, against a textbook step in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid
from trainer_calls import settings
from transformers import AutoModelForCausalLM, PreTrainedModel

from online_dpo.loss_rules import LOSS_FACTS, needs_reference
from online_dpo.training.handler import Trainer

BETA = 0.3
NEEDED: dict[str, Any] = {
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 0.1},
}
PAIRS = [
    # (prompt, chosen, rejected, p, margin): two pairs share a prompt and its best response
    ([5, 9, 2], [11, 12, 0], [13, 14, 15, 16, 0], 0.9, 2.0),
    ([5, 9, 2], [11, 12, 0], [20, 21], 0.7, 0.5),
    ([7], [30, 31, 32, 33], [34, 0], 0.6, 0.1),
    ([3, 4, 5, 6], [40, 0], [41, 42, 43], 0.8, 1.5),
    ([8, 8], [50], [51, 52, 53, 54, 55, 0], 1.0, 3.0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("objective")
    rows = [
        {
            "pair_id": f"pair-{i}",
            "prompt_token_ids": prompt,
            "chosen_token_ids": chosen,
            "rejected_token_ids": rejected,
            "p": p,
            "margin": margin,
        }
        for i, (prompt, chosen, rejected, p, margin) in enumerate(PAIRS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), made / "pairs.parquet")
    return made


def ignore(event: dict[str, Any]) -> None:
    """Hears no progress."""


def step(
    folder: Path, policy: Path, reference: Path, *, soft: bool = False, **train: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One optimizer step's summary and gradient, of a policy that differs from its reference."""
    options = {"batch_size": 8, "max_grad_norm": 1e9, **train}
    trainer = Trainer(settings(**options))
    table = None
    if needs_reference(options.get("loss", "sigmoid")):
        table = str(folder / "reference.parquet")
        trainer.score_reference(
            emit=ignore,
            model={"path": str(reference), "sha256": "reference"},
            pairs=str(folder / "pairs.parquet"),
            out=table,
        )
    summary = trainer.dpo(
        emit=ignore,
        model={"path": str(policy), "sha256": "policy"},
        pairs=str(folder / "pairs.parquet"),
        reference_logps=table,
        plan={
            "beta": BETA,
            "learning_rate": 1e-6,
            "seed": 0,
            "round": 1,
            "rounds": 1,
            "optimizer_step": 0,
        },
        optimizer=None,
        out=str(folder / "policy"),
        optimizer_out=str(folder / "optimizer"),
        checkpoints=str(folder / "checkpoints"),
        resume_from=None,
        soft_labels=soft,
    )
    moments = load_file(folder / "optimizer" / "optimizer.safetensors")
    return summary, {k[:-8]: 10 * v for k, v in moments.items() if k.endswith(".exp_avg")}


class Book:
    """Per-token values of both models in float64, each sequence alone."""

    def __init__(self, policy: Path, reference: Path) -> None:
        self.policy = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float64)
        self.reference = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float64)

    def tokens(self, model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
        """(n, V) log-probs at a response's positions."""
        logits = model(torch.tensor([[*prompt, *response]])).logits[0]
        return logits.log_softmax(-1)[len(prompt) - 1 : len(prompt) + len(response) - 1]

    def logps(self, model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
        return self.tokens(model, prompt, response)[range(len(response)), response]

    def ratio(
        self, prompt: list[int], response: list[int], weights: Tensor | None = None
    ) -> Tensor:
        with torch.no_grad():
            reference = self.logps(self.reference, prompt, response)
        difference = self.logps(self.policy, prompt, response) - reference
        return difference.sum() if weights is None else (difference * weights).sum()

    def gradient(self, loss: Tensor) -> dict[str, Tensor]:
        self.policy.zero_grad()
        loss.backward()
        return {name: p.grad for name, p in self.policy.named_parameters() if p.grad is not None}


def sigmoid(book: Book) -> Tensor:
    margins = [BETA * (book.ratio(p, c) - book.ratio(p, r)) for p, c, r, _, _ in PAIRS]
    return -logsigmoid(torch.stack(margins)).mean()


def soft(book: Book) -> Tensor:
    losses = []
    for prompt, chosen, rejected, p, _ in PAIRS:
        margin = BETA * (book.ratio(prompt, chosen) - book.ratio(prompt, rejected))
        losses.append(-p * logsigmoid(margin) - (1 - p) * logsigmoid(-margin))
    return torch.stack(losses).mean()


def ld(book: Book) -> Tensor:
    losses = []
    for prompt, chosen, rejected, _, _ in PAIRS:
        common = min(len(chosen), len(rejected))
        ratios = []
        for response in (chosen, rejected):
            weights = torch.tensor([1.0 if i < common else 0.4 for i in range(len(response))])
            ratios.append(book.ratio(prompt, response, weights.double()))
        losses.append(-logsigmoid(BETA * (ratios[0] - ratios[1])))
    return torch.stack(losses).mean()


def wpo(book: Book) -> Tensor:
    losses = []
    for prompt, chosen, rejected, _, _ in PAIRS:
        weight = 0.0
        for response in (chosen, rejected):
            with torch.no_grad():
                tokens = book.tokens(book.policy, prompt, response)
            drawn = tokens[range(len(response)), response]
            weight += float((drawn - (2 * tokens).logsumexp(-1)).mean())
        margin = BETA * (book.ratio(prompt, chosen) - book.ratio(prompt, rejected))
        losses.append(-math.exp(weight) * logsigmoid(margin))
    return torch.stack(losses).mean()


def odpo(book: Book) -> Tensor:
    losses = []
    for prompt, chosen, rejected, _, by in PAIRS:
        margin = BETA * (book.ratio(prompt, chosen) - book.ratio(prompt, rejected))
        losses.append(-logsigmoid(margin - 0.5 * by))
    return torch.stack(losses).mean()


def simpo(book: Book) -> Tensor:
    losses = []
    for prompt, chosen, rejected, _, _ in PAIRS:
        means = [book.logps(book.policy, prompt, y).mean() for y in (chosen, rejected)]
        losses.append(-logsigmoid(BETA * (means[0] - means[1]) - 0.5))
    return torch.stack(losses).mean()


def aot(book: Book) -> Tensor:
    """Sorted margins of the policy against sorted margins of the reference."""
    policy, reference = [], []
    for prompt, chosen, rejected, _, _ in PAIRS:
        policy.append(
            book.logps(book.policy, prompt, chosen).sum()
            - book.logps(book.policy, prompt, rejected).sum()
        )
        with torch.no_grad():
            c, r = (book.logps(book.reference, prompt, y).sum() for y in (chosen, rejected))
            reference.append(c - r)
    margins = torch.stack(policy).sort().values - torch.stack(reference).sort().values
    return -logsigmoid(BETA * margins).mean()


def kto(book: Book) -> Tensor:
    strangers = [2, 2, 3, 4, 0]  # the next pair with another prompt
    with torch.no_grad():
        z = torch.stack(
            [book.ratio(PAIRS[i][0], PAIRS[j][1]) for i, j in enumerate(strangers)]
        ).mean()
    z = z.clamp(min=0)
    losses = []
    for prompt, chosen, rejected, _, _ in PAIRS:
        losses.append(1 - torch.sigmoid(BETA * (book.ratio(prompt, chosen) - z)))
        losses.append(1 - torch.sigmoid(BETA * (z - book.ratio(prompt, rejected))))
    return torch.stack(losses).mean()


CASES: dict[str, tuple[dict[str, Any], Callable[[Book], Tensor]]] = {
    "sigmoid": ({}, sigmoid),
    "soft": ({"soft": True}, soft),
    "ld_alpha": ({"ld_alpha": 0.4}, ld),
    "wpo": ({"wpo": True}, wpo),
    "margin_weight": ({"margin_weight": 0.5}, odpo),
    "simpo": ({"loss": "simpo"}, simpo),
    "aot": ({"loss": "aot"}, aot),
    "kto": ({"loss": "kto"}, kto),
}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that is not the reference: the tiny Llama from another seed."""
    from conftest import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "other", "llama", seed=7)


@pytest.mark.parametrize("tokens", [12, 4096])
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_textbooks(
    folder: Path, tiny_llama: Path, other: Path, name: str, tokens: int
) -> None:
    options, formula = CASES[name]
    summary, found = step(folder, other, tiny_llama, micro_batch_tokens=tokens, **options)
    book = Book(other, tiny_llama)
    loss = formula(book)
    assert summary["first_loss"] == pytest.approx(float(loss.detach()), rel=2e-5)
    for parameter, gradient in book.gradient(loss).items():
        torch.testing.assert_close(found[parameter].double(), gradient, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("name", LOSS_FACTS)
def test_no_loss_depends_on_how_a_step_is_divided(
    folder: Path, tiny_llama: Path, other: Path, name: str
) -> None:
    train = {"loss": name, **NEEDED.get(name, {})}
    whole, expected = step(folder, other, tiny_llama, **train)
    single, found = step(folder, other, tiny_llama, micro_batch_size=1, **train)
    assert single["first_loss"] == pytest.approx(whole["first_loss"], rel=1e-5)
    for key in ("first_margin", "first_accuracy", "first_chosen_reward"):
        assert single[key] == pytest.approx(whole[key], rel=1e-4)
    scale = max(float(g.abs().max()) for g in expected.values())
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, atol=2e-4 * scale, rtol=1e-3)


def test_the_samplers_log_probs_as_the_references(
    folder: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """Where a pair has both they are taken as they are; the others are scored."""
    trainer = Trainer(settings())
    call = {"emit": ignore, "model": {"path": str(tiny_llama), "sha256": "llama"}}
    trainer.score_reference(**call, pairs=str(folder / "pairs.parquet"), out=str(tmp_path / "own"))
    rows = pq.read_table(folder / "pairs.parquet").to_pylist()
    own = pq.read_table(tmp_path / "own").to_pylist()
    for index, (row, scored) in enumerate(zip(rows, own, strict=True)):
        known = index != 3
        row["chosen_sampled_logp"] = scored["chosen_logp"] + 0.01 if known else None
        row["rejected_sampled_logp"] = scored["rejected_logp"] - 0.02
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs")
    result = trainer.score_reference(
        **call, pairs=str(tmp_path / "pairs"), out=str(tmp_path / "sampled"), sampled=True
    )
    assert (result["pairs_from_sampler"], result["pairs_checked"]) == (4, 4)
    assert result["sampled_max_error"] == pytest.approx(0.02, abs=1e-5)
    assert result["sampled_mean_error"] == pytest.approx(0.015, abs=1e-5)
    for index, row in enumerate(pq.read_table(tmp_path / "sampled").to_pylist()):
        shift = 0.0 if index == 3 else 0.01
        assert row["chosen_logp"] == pytest.approx(own[index]["chosen_logp"] + shift, abs=1e-5)


def test_the_layout_is_stated(folder: Path, tiny_llama: Path) -> None:
    summary, _ = step(folder, tiny_llama, tiny_llama)
    assert summary["layout"].startswith("shared:")
    assert json.loads((folder / "policy" / "summary.json").read_text())["layout"]
