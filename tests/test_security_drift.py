"""Every field of the config, the prompts, the judge, the model and the code has a drift class."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from run_fixture import make_run

from online_dpo.config import Config
from online_dpo.config_file import override_config
from online_dpo.drift import check_changes, current_config, record_change
from online_dpo.errors import DriftError
from online_dpo.models.pinning import check_pin, pin_model
from online_dpo.store import RunDir

COSMETIC = [
    "alarms",
    "judge.model_mismatch",
    "campaign.name",
    "campaign.rounds",
    "campaign.retention",
    "campaign.save_policy_every",
    "judge.budget.max_usd",
    "judge.budget.max_calls",
    "judge.budget.max_tokens",
    "judge.prices",
    "judge.concurrency",
    "judge.retries",
    "judge.deadline_s",
    "judge.requests_per_minute",
    "judge.tokens_per_minute",
    "judge.service_tier",
    "judge.batch",
    "judge.max_invalid",
    "judge.max_invalid_after",
    "judge.reuse_from",
    "judge.timeout_s",
    "evaluation.judge.concurrency",
    "evaluation.judge.retries",
    "evaluation.judge.deadline_s",
    "evaluation.judge.requests_per_minute",
    "evaluation.judge.tokens_per_minute",
    "evaluation.judge.service_tier",
    "evaluation.judge.batch",
    "evaluation.judge.max_invalid",
    "evaluation.judge.max_invalid_after",
    "evaluation.judge.reuse_from",
    "evaluation.judge.timeout_s",
    "evaluation.examples",
    "sampling.devices",
    "sampling.endpoints",
    "sampling.reload_command",
    "sampling.stall_s",
    "sampling.update",
    "train.checkpoint_every",
    "train.listen",
    "compute.layout",
]
"""How much, how often and where: nothing that is committed depends on it."""

COMPUTED = [
    "sampling.batch_size",
    "sampling.engine",
    "sampling.sampler",
    "train.activation_offload",
    "train.devices",
    "train.gradient_checkpointing",
    "train.gradient_sync",
    "train.launch",
    "train.micro_batch_size",
    "train.micro_batch_tokens",
    "train.num_processes",
    "train.parallel",
    "compute.device",
    "compute.threads",
    "compute.workers",
    "judge.gold",
    "judge.gold_pairs",
    "judge.probes",
    "judge.constant",
]
"""How things are computed, and what else a judge is asked: accepted within a round too."""

IDENTITY = [
    "model",
    "sft",
    "prompts",
    "campaign.seed",
    "campaign.run_dir",
    "pairs.offline",
    "sampling.stop",
    "sampling.max_new_tokens",
    "evaluation.temperature",
    "evaluation.max_new_tokens",
    "evaluation.max_prompts",
    "train.lora",
]
"""What round 0 rests on: another campaign."""

NEXT_ROUND = [
    "sampling.n",
    "sampling.temperature",
    "sampling.top_p",
    "sampling.top_k",
    "sampling.prompts_per_shard",
    "sampling.strip_thinking",
    "sampling.also",
    "judge.name",
    "judge.options",
    "judge.schedule",
    "judge.votes",
    "judge.orders",
    "pairs",
    "train.beta",
    "train.learning_rate",
    "train.optimizer",
    "train.epochs",
    "train.loss",
    "train.batch_size",
    "reference",
    "evaluation.every",
    "campaign.prompts_per_round",
]
"""What a round is made of; other fields that no list names are of this class too, see below."""


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields; a section that may be absent counts as one field."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def below(key: str, names: list[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


FIELDS = [*leaves(Config), *(name for name in COSMETIC if name.startswith("evaluation.judge."))]


@pytest.fixture(scope="module")
def between(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Two rounds done, the third not begun: everything but its identity may still change."""
    run = RunDir(make_run(tmp_path_factory.mktemp("between"), rounds=3, finished=2))
    shutil.rmtree(run.round(3).path)
    return run


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Round 3 has been sampled, labelled, paired and trained; its policy is missing."""
    run = RunDir(make_run(tmp_path_factory.mktemp("begun"), rounds=3, finished=2))
    for name in ("labels/part-00000", "pairs", "reference", "training", "evaluation"):
        with run.round(3).commit(name, inputs={}) as draft:
            (draft.path / "x").write_text("x")
    return run


def test_every_list_names_fields_that_there_are() -> None:
    for name in [*COSMETIC, *COMPUTED, *IDENTITY, *NEXT_ROUND]:
        assert any(below(field, [name]) for field in FIELDS), f"{name} is no field"
    assert len(FIELDS) > 90


@pytest.mark.parametrize("key", FIELDS)
def test_every_field_changes_as_its_class_says(between: RunDir, begun: RunDir, key: str) -> None:
    change = {key: (1, 7)}
    if below(key, COSMETIC):
        check_changes(between, change, accept_change=False)
        check_changes(begun, change, accept_change=False)
        return
    for run in (between, begun):
        for accept in (False, True) if below(key, IDENTITY) else (False,):
            with pytest.raises(DriftError) as caught:
                check_changes(run, change, accept_change=accept)
            assert key in caught.value.message
            if below(key, IDENTITY):
                assert "cannot change" in caught.value.message
                assert "--accept-change" not in (caught.value.remedy or "")
            else:
                assert "--accept-change" in (caught.value.remedy or "")
    if below(key, IDENTITY):
        return
    check_changes(between, change, accept_change=True)
    if below(key, COMPUTED):
        check_changes(begun, change, accept_change=True)
    else:
        with pytest.raises(DriftError, match="come past the point"):
            check_changes(begun, change, accept_change=True)


def test_one_identity_among_many_changes_holds_them_all_up(between: RunDir) -> None:
    for key in IDENTITY:
        with pytest.raises(DriftError, match="cannot change"):
            changes = {"judge.budget.max_usd": (1, 2), "train.epochs": (1, 2), key: (1, 2)}
            check_changes(between, changes, accept_change=True)


def test_an_accepted_change_is_recorded_with_its_values(tmp_path: Path) -> None:
    run = RunDir(make_run(tmp_path, rounds=3, finished=2))
    for number, beta in enumerate((0.2, 0.3), start=1):
        before = current_config(run)
        changed = override_config(before, [f"train.beta={beta}"], source="--set")
        record_change(run, changed, {"train.beta": (before.train.beta, beta)})
        facts = json.loads((run.path / f"amendment-{number:03d}.json").read_text())
        assert facts["changes"] == {"train.beta": [before.train.beta, beta]}
        assert facts["from_round"] == 3
        assert current_config(run).train.beta == beta


# --- what the config only names


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_models_files_are_part_of_its_identity(
    tmp_path: Path, tiny_llama: Path, file: str
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    run = RunDir(make_run(tmp_path / "made", rounds=1, policy=model, pinned=True))
    pin = pin_model(str(model), None, trust_remote_code=False)
    (run.round(0).path / "model" / "pin.json").write_text(json.dumps(pin))
    check_pin(run)
    (model / file).write_bytes((model / file).read_bytes() + b" ")
    with pytest.raises(DriftError, match=f"has changed since the campaign started: {file}"):
        check_pin(run)
    (model / file).unlink()
    with pytest.raises(DriftError, match=file):
        check_pin(run)


def test_a_judges_version_is_part_of_what_was_bought(tmp_path: Path, open_labeller: Any) -> None:
    """Another version of a judge, or another template, is asked anew and never mixed up."""
    from judge_cases import pair
    from judge_server import Say
    from labellers import PRICE, rows, serve

    from online_dpo.resources import find_data

    mine = tmp_path / "mine.jinja"
    mine.write_text(find_data("pairwise.jinja").read_text())
    with serve(Say('{"verdict": "A"}')) as server:
        options = {
            "model": "m", "base_url": server.url, "price_per_million": PRICE, "template": str(mine),
        }  # fmt: skip

        def label() -> int:
            labeller = open_labeller(seed=3, name="llm_pairwise", options=options)
            labeller.compare_pairs([pair(0)], purpose="label")
            labeller.close()
            return len(server.requests)

        assert (label(), label()) == (2, 2)
        mine.write_text(mine.read_text() + "{# another #}")
        assert label() == 4
    assert len({version for (version,) in rows(tmp_path, "version")}) == 2


def test_one_round_has_one_version_of_a_judge(tmp_path: Path) -> None:
    """A judge's file that was edited between a kill and a resume would mix two in one round."""
    from online_dpo.stages.label import check_judge

    run = RunDir(make_run(tmp_path, rounds=3, finished=1))
    second = run.round(2)
    now = {"name": "mine", "version": "2"}
    check_judge(second, now)
    for part, version in (("00000", "2"), ("00001", "1")):
        with second.commit(f"labels/part-{part}", inputs={}) as draft:
            draft.facts = {"judge": {"name": "mine", "version": version}}
    with pytest.raises(DriftError, match="in version 1.*now 'mine' in version 2") as caught:
        check_judge(second, now)
    assert caught.value.remedy == f"rm -r {second.path / 'labels'}"
