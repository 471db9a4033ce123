"""What `validate` and `plan` find and say before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from online_dpo.config import Config
from online_dpo.config_file import config_from_dict, load_config
from online_dpo.errors import ConfigError
from online_dpo.loop import Loop
from online_dpo.preflight import check_config
from online_dpo.progress import SilentProgress
from online_dpo.store import RunDir

CASES = Path(__file__).parent / "judge_cases.py"
LLM = {"name": "llm_pairwise", "options": {"model": "m", "base_url": "http://localhost:1/v1"}}


def config(judge: dict[str, Any], **sections: dict[str, Any]) -> Config:
    return config_from_dict(
        {
            "model": {"path": "some/model"},
            "prompts": {"train": [{"path": "some/dataset"}], "holdout": 4},
            "judge": judge,
            "campaign": {"prompts_per_round": 10},
            **sections,
        }
    ).config


@pytest.mark.parametrize(
    "name", [path.name for path in (CASES.parent.parent / "configs").iterdir()]
)
def test_every_shipped_config_is_valid_wherever_it_can_run(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    settings = load_config(name).config
    plan = check_config(settings)
    places_on_gpus = None not in (settings.sampling.devices, settings.train.devices)
    assert plan.here or not places_on_gpus
    assert ("runs on       another machine" in plan.text) == bool(plan.here)


def test_questions_are_counted_by_what_the_judge_does() -> None:
    warm = {**LLM["options"], "temperature": 0.7}
    llm = {**LLM, "votes": 3, "comparisons": 2, "options": warm}
    assert "at most 120 comparisons a round" in check_config(config(llm)).text  # 10 x 2 x 2 x 3
    one = {**LLM, "orders": "one"}
    assert "at most 280 comparisons a round" in check_config(config(one)).text  # 10 x (8 over 2)
    also = {"url": "http://localhost:1/v1", "model": "m", "n": 2}
    more = check_config(config(llm, sampling={"n": 2, "also": also})).text
    assert "at most 120 comparisons a round" in more  # of 4 candidates
    best = {**LLM, "schedule": "knockout"}
    assert "at most 220 comparisons a round" in check_config(config(best)).text  # 10 x 11 x 2
    answers = {"name": "final_answer", "votes": 2}
    # 32 probes find 10 prompts, on each of which the constant response is scored once.
    assert "at most 160 scores a round, and 20 to check it" in check_config(config(answers)).text
    probed = check_config(config({**llm, "probes": 5})).text
    assert "at most 120 comparisons a round, and 30 to check it" in probed  # 5 x 2 x 3


def test_what_an_evaluation_asks_is_counted_too() -> None:
    warm = {**LLM, "votes": 3, "options": {**LLM["options"], "temperature": 0.7}}
    # Against policy 0's answer and the previous one's, in two orders, three times.
    assert "at most 12 comparisons for each held-out" in check_config(config(warm)).text
    few = check_config(config(warm, evaluation={"max_prompts": 5})).text
    assert "by llm_pairwise; at most 60 comparisons\n" in few
    other = {"judge": {"name": "final_answer"}}
    scored = check_config(config(warm, evaluation=other)).text
    assert "by final_answer; at most 1 score for each held-out prompt" in scored


@pytest.mark.parametrize(
    ("judge", "sections", "said"),
    [
        (
            {**LLM, "budget": {"max_usd": 3}},
            {},
            "judge.budget.max_usd cannot be kept without a price",
        ),
        ({"name": "final_answer", "orders": "one"}, {}, "judge.orders: one is for judges that"),
        (
            {"name": "final_answer", "budget": {"max_calls": 9}},
            {},
            "judge.budget is for paid calls",
        ),
        ({"name": "reward_model", "options": {"modle": "m"}}, {}, "judge.options do not fit"),
        ({"name": "reward_model", "options": {"model": "m"}, "retries": 1}, {}, "makes no calls"),
        ({**LLM, "votes": 2}, {}, "judge.votes: 2 would buy the same answer"),
        (LLM, {"pairs": {"min_margin": 0.7}}, "pairs.min_margin: 0.7 can never be reached"),
        (LLM, {"pairs": {"threshold": 1}, "train": {"loss": "kto"}}, "holds scores against 1"),
        (LLM, {"pairs": {"selector": "nope"}}, "There is no selector named 'nope'"),
        (
            LLM,
            {"evaluation": {"judge": {"name": "final_answer", "orders": "one"}}},
            "evaluation.judge.orders: one is for judges that compare",
        ),
    ],
)
def test_what_a_start_would_refuse_is_found_without_one(
    judge: dict[str, Any], sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(config(judge, **sections))
    assert said in caught.value.message


def test_a_judge_of_ones_own_is_imported_and_made() -> None:
    assert "scores a round" in check_config(config({"name": f"{CASES}:length"})).text
    with pytest.raises(ConfigError, match="OSError: the weights are gone"):
        check_config(config({"name": f"{CASES}:CannotBeMade"}))


def test_a_judges_process_sees_no_gpu_where_the_device_is_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    judge = {"name": f"{CASES}:NeedsTheCpu"}
    with pytest.raises(ConfigError, match="GPUs are in sight"):
        check_config(config(judge))
    on_cpu = config(judge, compute={"device": "cpu"})
    check_config(on_cpu)
    with Loop(RunDir(tmp_path), on_cpu, SilentProgress()) as loop:
        loop.prepare()
