"""Good and bad responses: made of scores, trained on by KTO, imported and exported."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import digests, in_child, tiny_config
from torch import Tensor
from trainer_calls import settings
from transformers import AutoModelForCausalLM, PreTrainedModel

from online_dpo import Campaign
from online_dpo.errors import ConfigError, NoPairsError
from online_dpo.export import export_campaign
from online_dpo.files import read_json
from online_dpo.offline.preference_forms import UnusableError, parse_label
from online_dpo.offline.training import train_preferences
from online_dpo.pairing import Judged
from online_dpo.records import Prompt, Response, Score
from online_dpo.store import RunDir
from online_dpo.tables import read_table
from online_dpo.training.handler import Trainer
from online_dpo.training.unpaired import Example, mismatched
from online_dpo.unpaired import check_unpaired, make_unpaired

BETA = 0.3
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
ROWS: list[tuple[list[int], list[int], bool]] = [
    ([5, 9, 2], [11, 12, 0], True),
    ([5, 9, 2], [13, 14, 15, 16, 0], False),
    ([5, 9, 2], [20, 21], False),
    ([7], [30, 31, 32, 33], True),
    ([3, 4, 5, 6], [40, 0], False),
]
STRANGERS = [3, 4, 3, 4, 0]
"""Whose response stands in for each row's own in KTO's z: by hand."""


# --- from scores to rows


def test_scores_become_good_and_bad() -> None:
    prompt = Prompt("p", "set", text="2+2=", token_ids=(1,))
    scores = [1.0, 0.4, None, 0.5, -3.0, 0.4]
    responses = [Response(f"p:{i}", "p", str(i), (i, 0), "eos") for i in range(len(scores))]
    judged = Judged(
        prompt, responses, scores=[Score(s, None if s is not None else "none") for s in scores]
    )
    made = make_unpaired([judged], threshold=0.5, min_margin=0.0, round_number=3)
    assert [(row.completion_id, row.label) for row in made.rows] == [
        ("p:0", True), ("p:1", False), ("p:3", True), ("p:4", False), ("p:5", False),
    ]  # fmt: skip
    assert made.rows[3].margin == 3.5 and made.rows[0].origin == "round-003"
    assert made.fates == {"bad": 3, "good": 2, "invalid": 1}
    check_unpaired(made.rows)
    wider = make_unpaired([judged], threshold=0.5, min_margin=0.2, round_number=3)
    assert wider.fates == {"bad": 1, "below_margin": 3, "good": 1, "invalid": 1}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_mismatched_responses_answer_other_prompts(prompts: list[int]) -> None:
    examples = [Example(str(i), (p,), (i,), True) for i, p in enumerate(prompts)]
    for example, (place,) in zip(examples, mismatched(examples), strict=True):
        assert prompts[place] != example.prompt[0] or len(set(prompts)) == 1


# --- a step of KTO


def tables(folder: Path, rows: Sequence[tuple[list[int], list[int], bool]]) -> Path:
    path = folder / "unpaired.parquet"
    made = [
        {
            "row_id": f"row-{i}",
            "prompt_token_ids": prompt,
            "completion_token_ids": completion,
            "label": label,
        }
        for i, (prompt, completion, label) in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(made), path)
    return path


def step(
    folder: Path, policy: Path, reference: Path, rows: Any, **train: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One optimizer step's summary and gradient."""
    table = str(tables(folder, rows))
    options = {"batch_size": 8, "max_grad_norm": 1e9, "loss_options": WEIGHTS, **train}
    trainer = Trainer(settings(loss="kto", **options))
    common: dict[str, Any] = {"emit": lambda event: None, "pairs": table}
    trainer.score_reference(
        **common,
        model={"path": str(reference), "sha256": "reference"},
        out=str(folder / "reference.parquet"),
    )
    plan = {"beta": BETA, "learning_rate": 1e-6, "seed": 0, "round": 1, "rounds": 1}
    summary = trainer.dpo(
        **common,
        model={"path": str(policy), "sha256": "policy"},
        reference_logps=str(folder / "reference.parquet"),
        plan={**plan, "optimizer_step": 0},
        optimizer=None,
        out=str(folder / "policy"),
        optimizer_out=str(folder / "optimizer"),
        checkpoints=str(folder / "checkpoints"),
        resume_from=None,
    )
    moments = load_file(folder / "optimizer" / "optimizer.safetensors")
    return summary, {k[:-8]: 10 * v for k, v in moments.items() if k.endswith(".exp_avg")}


def textbook(
    policy: PreTrainedModel, reference: PreTrainedModel, rows: Any, strangers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """KTO's loss (2402.01306, eq. 7) and the rewards, in float64, each sequence alone."""

    def ratio(prompt: list[int], response: list[int]) -> Tensor:
        ids = torch.tensor([[*prompt, *response]])
        places = range(len(prompt) - 1, ids.shape[1] - 1)
        own, other = (
            model(ids).logits[0].log_softmax(-1)[places, response].sum()
            for model in (policy, reference)
        )
        return own - other.detach()

    with torch.no_grad():
        apart = [ratio(rows[i][0], rows[s][1]) for i, s in enumerate(strangers)]
    z = torch.stack(apart).mean().clamp(min=0)
    ratios = [ratio(prompt, completion) for prompt, completion, _ in rows]
    losses = [
        WEIGHTS["desirable_weight"] * (1 - torch.sigmoid(BETA * (r - z)))
        if good
        else WEIGHTS["undesirable_weight"] * (1 - torch.sigmoid(BETA * (z - r)))
        for r, (_, _, good) in zip(ratios, rows, strict=True)
    ]
    return torch.stack(losses).mean(), BETA * torch.stack(ratios).detach()


@pytest.mark.parametrize(
    ("rows", "strangers"), [(ROWS, STRANGERS), ([ROWS[1], ROWS[4]], [1, 0])], ids=["both", "bad"]
)
@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_a_step_is_ktos(
    tiny_llama: Path, tmp_path: Path, rows: Any, strangers: list[int], micro_batch_size: int | None
) -> None:
    reference = make_tiny_model(tmp_path / "reference", "llama", seed=3)
    summary, found = step(tmp_path, tiny_llama, reference, rows, micro_batch_size=micro_batch_size)
    models = [
        AutoModelForCausalLM.from_pretrained(m, dtype=torch.float64)
        for m in (tiny_llama, reference)
    ]
    loss, rewards = textbook(models[0], models[1], rows, strangers)
    loss.backward()
    for name, parameter in models[0].named_parameters():
        assert torch.allclose(found[name].double(), parameter.grad, atol=1e-6, rtol=1e-4), name
    assert summary["first_loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    good = torch.tensor([label for _, _, label in rows])
    counts = (summary["unpaired"], summary["good"], summary["bad"])
    assert counts == (len(rows), int(good.sum()), int((~good).sum()))
    assert summary["first_rejected_reward"] == pytest.approx(float(rewards[~good].mean()), abs=1e-5)
    if not good.any():  # what no response of the step has is not there
        assert "first_chosen_reward" not in summary and "first_margin" not in summary
        return
    assert summary["first_chosen_reward"] == pytest.approx(float(rewards[good].mean()), abs=1e-5)
    difference = summary["first_chosen_reward"] - summary["first_rejected_reward"]
    assert summary["first_margin"] == pytest.approx(difference)


# --- a campaign


def kto_config(run: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    given: dict[str, dict[str, Any]] = {
        "pairs": {"threshold": 0.5},
        "train": {"loss": "kto", "batch_size": 8, "epochs": 2},
    }
    return tiny_config(run, **{**given, **sections})


def run_it(config: dict[str, Any]) -> None:
    import online_dpo
    from online_dpo import CampaignError

    try:
        online_dpo.run(config)
    except CampaignError as error:
        print(error.message)
        raise SystemExit(error.exit_code) from None


def run_and_die(config: dict[str, Any], artifact: str) -> None:
    """Run, and end by SIGKILL before the named artifact is committed."""
    from online_dpo.store import RoundDir

    finish = RoundDir.finish

    def finish_or_die(self: RoundDir, name: str, *args: Any, **kwargs: Any) -> Any:
        if f"{self.number:03d}/{name}" == artifact:
            os.kill(os.getpid(), signal.SIGKILL)
        return finish(self, name, *args, **kwargs)

    RoundDir.finish = finish_or_die  # type: ignore[method-assign]
    run_it(config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted campaign."""
    run = tmp_path_factory.mktemp("kto") / "run"
    assert in_child(run_it, kto_config(run)) == 0
    return run


def test_a_round_trains_on_all_its_labelled_responses(finished: Path) -> None:
    run = RunDir(finished)
    first, second = run.round(1), run.round(2)
    assert not first.has("pairs") and first.has("unpaired")
    rows = read_table(first.verify("unpaired") / "unpaired.parquet")
    assert len(rows) == 32 and {row["label"] for row in rows} == {True, False}
    for number, round_dir in ((1, first), (2, second)):
        counts = round_dir.manifest()["counts"]
        assert counts["samples"] == counts["unpaired"] == 32 == sum(counts["responses"].values())
        steps = (round_dir.path / "training" / "steps.jsonl").read_text().splitlines()
        opening = json.loads(steps[0])
        assert len(steps) == 8, number
        assert opening["loss"] == pytest.approx(0.5, abs=1e-6)
    view = Campaign(finished).rounds()[2]
    assert (view.pairs, view.unpaired, view.stage) == (0, 32, "done")


@pytest.mark.parametrize("artifact", ["001/unpaired", "002/reference", "002/policy"])
def test_a_kill_changes_nothing(finished: Path, tmp_path: Path, artifact: str) -> None:
    config = kto_config(tmp_path / "run")
    assert in_child(run_and_die, config, artifact) == -signal.SIGKILL
    assert in_child(resume_it, tmp_path / "run") == 0
    assert digests(tmp_path / "run") == digests(finished)


def resume_it(run: Path) -> None:
    from online_dpo.campaign import resume

    resume(run)


def test_what_was_trained_on_comes_out_and_goes_in_again(finished: Path, tmp_path: Path) -> None:
    paths = export_campaign(Campaign(finished), tmp_path / "out")
    assert [path.name for path in paths] == ["policy", "unpaired.jsonl", "unpaired.parquet"]
    rows = [json.loads(line) for line in paths[1].read_text().splitlines()]
    assert len(rows) == 64 and rows == Campaign(finished).unpaired().to_list()
    assert set(rows[0]) >= {"prompt", "completion", "label", "round"}
    trained = train_preferences(
        paths[1],
        Campaign(finished).policy(0),
        out=tmp_path / "policy",
        config={"compute": {"threads": 1, "device": "cpu"}},
        loss="kto",
        learning_rate=1e-3,
        batch_size=16,
        epochs=8,
    )
    stated = [(row["prompt"], row["completion"], row["label"]) for row in rows]
    usable = [row for row in stated if row[1]]  # a policy may answer with nothing but an EOS
    assert trained.summary["unpaired"] == len(set(usable))
    assert trained.summary["unusable"]["duplicate"] == len(usable) - len(set(usable))
    assert trained.metrics[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert trained.metrics[-1]["margin"] > 0


def test_earlier_and_offline_rows_are_mixed_in(tmp_path: Path) -> None:
    table = tmp_path / "given.jsonl"
    given_rows = [
        {"prompt": f"thing {i}:", "completion": " red." if i % 2 else " blue.", "label": i % 2}
        for i in range(40)
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in given_rows))
    config = kto_config(
        tmp_path / "run",
        pairs={
            "threshold": 0.5,
            "earlier_share": 0.25,
            "offline": {"path": str(table), "share": 0.25},
        },
    )
    assert in_child(run_it, config) == 0
    made = read_json(tmp_path / "run/rounds/002/unpaired/metrics.json")
    assert made["origins"] == {"offline": 16, "round-001": 16, "round-002": 32}
    assert made["unpaired"] == 64 == made["good"] + made["bad"]


def test_a_round_without_both_labels_ends(tmp_path: Path) -> None:
    config = kto_config(tmp_path / "run", pairs={"threshold": 1000})
    assert in_child(run_it, config) == NoPairsError.exit_code


# --- offline


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "completion": "b"}, "'label' is null, not true or false"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "'label' is a string"),
        ({"prompt": "a", "completion": "b", "label": 2}, "'label' is a number"),
        ({"prompt": "a", "label": True}, "'completion' is null, not an answer"),
        ({"completion": "b", "label": True}, "no 'prompt'"),
    ],
)
def test_a_row_that_is_no_label_is_named(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableError, match=reason):
        parse_label(row)


def test_labels_take_the_forms_of_preferences() -> None:
    turns = [{"role": "user", "content": "Why?"}]
    answer = [{"role": "assistant", "content": "So."}]
    plain = parse_label({"prompt": "Why?", "completion": "So.", "label": 1})
    assert (plain.text, plain.completion, plain.label) == ("Why?", "So.", True)
    for row in ({"prompt": turns, "completion": answer}, {"completion": [*turns, *answer]}):
        chat = parse_label({**row, "label": False})
        assert (chat.messages[0].content, chat.completion, chat.label) == ("Why?", "So.", False)


def test_labels_are_for_kto(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": True}]
    with pytest.raises(ConfigError, match="which train.loss: kto trains on and sigmoid cannot"):
        train_preferences(rows, tiny_llama, out=tmp_path / "policy")


# --- the shipped config


def run_shipped(run: Path, overrides: list[str]) -> None:
    import online_dpo
    from online_dpo.config_file import load_config

    config = load_config("kto.yaml", overrides).config.model_dump(mode="json")
    online_dpo.run(config, run_dir=run)


def test_the_shipped_config_runs_in_small(tmp_path: Path) -> None:
    """After so little fine-tuning no sum is right, so a digit makes an answer a good one."""
    judge = {"scorers": [{"kind": "regex", "pattern": "1"}]}
    reduced = {
        "judge": {"name": "heuristic", "options": judge},
        "sft.epochs": 0.2,
        "evaluation.max_prompts": 8,
        "train.epochs": 1,
        "campaign.rounds": 1,
        "campaign.prompts_per_round": 32,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in reduced.items()]
    assert in_child(run_shipped, tmp_path / "run", overrides) == 0
    view = Campaign(tmp_path / "run").rounds()[1]
    assert view.unpaired == view.samples == 128 and set(view.responses) == {"bad", "good"}


@pytest.mark.slow
def test_the_shipped_config_learns(tmp_path: Path) -> None:
    assert in_child(run_shipped, tmp_path / "run", [], timeout_s=600) == 0
    first, *_, last = Campaign(tmp_path / "run").rounds()
    assert first.evaluation is not None and last.evaluation is not None
    assert last.evaluation["score"]["mean"] > first.evaluation["score"]["mean"] + 0.1
