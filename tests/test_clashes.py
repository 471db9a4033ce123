"""Settings that nothing would read are refused, each with the setting's name and the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import in_child, tiny_config

from online_dpo.clashes import in_config, on_machine
from online_dpo.config import BudgetConfig, Config, JudgeConfig
from online_dpo.config_file import config_from_dict
from online_dpo.errors import ConfigError
from online_dpo.judge_clashes import of_judge, with_judges
from online_dpo.judging import Labeller

BASE: dict[str, Any] = {
    "model": {"path": "some/model"},
    "prompts": {"train": [{"path": "some/dataset"}], "eval": [{"path": "other/dataset"}]},
    "judge": {"name": "heuristic"},
}
SERVERS: dict[str, Any] = {
    "sampler": "openai_server",
    "endpoints": [{"url": "http://localhost:1/v1"}],
    "reload_command": "true",
}
ALSO = {"url": "http://localhost:1/v1", "model": "m"}
MARGIN = {"schedule": "reward_margin", "comparisons": 2}
KTO = {"train": {"loss": "kto"}}
PAIRWISE = {"name": "heuristic", "comparisons": 2}
HUMAN = {"name": "human", "options": {"annotators": ["ann"]}}
MADE = {"model": {"init": {}, "trust_remote_code": True}, "sft": {"demonstrations": "d"}}


def config(**sections: dict[str, Any]) -> Config:
    merged = {**BASE, **{name: {**BASE.get(name, {}), **s} for name, s in sections.items()}}
    return config_from_dict(merged).config


def test_the_plain_config_has_no_clash() -> None:
    assert list(in_config(config())) == []


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"path": None, **MADE["model"]}, "sft": MADE["sft"]}, "trust_remote_code is"),
        ({"model": {"attention": "flash_attention_2"}}, "needs train.precision: bfloat16"),
        ({"prompts": {"eval": [{"path": "d", "weight": 2}]}}, "prompts.eval.0.weight"),
        ({"prompts": {"eval": [{"path": "d", "answer_field": "a"}]}}, "eval.0.answer_field"),
        ({"sampling": {"temperature": 0, "n": 1, "top_p": 0.9, "also": ALSO}}, "sampling.top_p"),
        ({"sampling": {"temperature": 0, "n": 1, "top_k": 9, "also": ALSO}}, "sampling.top_k"),
        ({"sampling": {**SERVERS, "reload_command": None}}, "needs a way to give each round"),
        ({"sampling": {"engine": {"tensor_parallel_size": "two"}}}, "'two' is no number of GPUs"),
        ({"sampling": {"engine": {"data_parallel_size": 0}}}, "engine.data_parallel_size: 0 is"),
        ({"sampling": {"engine": {"dtype": "auto"}}}, "engine.dtype is one of float32"),
        ({"judge": HUMAN}, "are not kept for them; name another judge there"),
        ({"evaluation": {"judge": HUMAN}}, "evaluation.judge: people (judge.name: human) label"),
        ({"evaluation": {"judge": PAIRWISE}}, "evaluation.judge.comparisons: an evaluation"),
        ({"evaluation": {"judge": {"name": "j", "scale": 2}}}, "evaluation.judge.scale: an"),
        ({"evaluation": {"judge": {"name": "j", "probes": 2}}}, "evaluation.judge.probes: the"),
        ({"train": {"num_processes": 2, "launch": {"num_processes": 4}}}, "train.launch.num_p"),
        ({"train": {"num_processes": 2, "launch": {"mixed_precision": "bf16"}}}, "mixed_precision"),
        ({"train": {"num_processes": 2, "devices": [0]}}, "train.devices names 1 GPUs"),
        ({"train": {"devices": [0, 1]}}, "train.devices names 2 GPUs"),
        ({"train": {"devices": [0, 0]}}, "names a GPU twice"),
        ({"train": {"devices": [-1]}}, "greater than or equal to 0"),
        (
            {
                "compute": {"layout": "separate"},
                "train": {"num_processes": 2, "devices": [1, 2]},
                "sampling": {"devices": [0, 1]},
            },
            "sampling.devices and train.devices both name 1",
        ),
        (
            {
                "train": {"num_processes": 2, "launch": {"num_machines": 2}, "listen": "h:1"},
                "compute": {"layout": "exit"},
            },
            "compute.layout: exit ends the trainer",
        ),
        (
            {"train": {"num_processes": 2, "launch": {"num_machines": 2}, "listen": "29600"}},
            "train.listen is HOST:PORT, not '29600'",
        ),
        ({"campaign": {"save_policy_every": 2}}, "promote: every_round"),
        ({"judge": {"orders": "one", "swap": "agree"}}, "judge.swap: agree combines two orders"),
        ({"judge": {"schedule": "knockout", "comparisons": 3}}, "a knockout has as many"),
        ({"judge": {"schedule": "uncertainty"}}, "set judge.comparisons, their number"),
        (
            {"judge": {"comparisons_per_round": 9}},
            "(uncertainty, entropy), and judge.schedule is draw",
        ),
        ({"judge": {**MARGIN, "comparisons_per_round": 9}}, "judge.schedule is reward_margin"),
        (
            {"judge": {"schedule": "entropy", "comparisons": 2, "comparisons_per_round": 9}},
            "9 stands in the place of judge.comparisons: 2",
        ),
        (
            {"evaluation": {"judge": {"name": "j", "comparisons_per_round": 9}}},
            "evaluation.judge.comparisons_per_round: an evaluation",
        ),
        ({"judge": {"margins": "narrow"}}, "judge.margins: narrow says which implicit margins"),
        (
            {"judge": {"schedule": "entropy", "comparisons": 2, "margins": "mixed"}},
            "and judge.schedule is entropy",
        ),
        (
            {"evaluation": {"judge": {"name": "j", "margins": "narrow"}}},
            "evaluation.judge.margins: an evaluation",
        ),
        ({"judge": MARGIN}, "is 0 where the policy that samples is the reference"),
        ({"judge": MARGIN, "train": {"loss": "simpo", "beta": 2}}, "the loss has no reference"),
        ({"evaluation": {"judge": {"name": "j", "schedule": "knockout"}}}, "schedule: an evaluat"),
        ({"pairs": {"threshold": 1}}, "sigmoid compares two; set train.loss: kto"),
        ({"pairs": {"threshold": 1, "selector": "all"}, **KTO}, "pairs.selector chooses pairs"),
        ({"pairs": {"threshold": 1, "max_per_prompt": 2}, **KTO}, "pairs.max_per_prompt chooses"),
        ({"pairs": {"threshold": 1, "labels": "soft"}, **KTO}, "kto cannot use the judge's p"),
        ({"pairs": {"threshold": 1}, "judge": {"scale": 2}, **KTO}, "judge.scale makes p of two"),
        (
            {
                "campaign": {"save_policy_every": 2, "retention": {"last": 2}},
                "reference": {"promote": "never"},
            },
            "goes with campaign.retention: all",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**sections)
    assert said in caught.value.message


def test_a_split_is_for_datasets(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n')
    source = {"path": str(file), "split": "test"}
    with pytest.raises(ConfigError, match=r"prompts\.train\.0\.split is for datasets by name"):
        config(prompts={"train": [source]})


@pytest.mark.parametrize(
    ("sampler", "sections", "said"),
    [
        ("transformers", {"sampling": {"engine": {"max_num_seqs": 4}}}, "sampling.engine is for"),
        ("transformers", {"sampling": {"update": "reload"}}, "sampling.update is for the vllm"),
        ("vllm", {"sampling": {"batch_size": 8}}, "sampling.batch_size is for the transformers"),
        ("openai_server", {"sampling": {**SERVERS, "batch_size": 8}}, "sampling.batch_size is for"),
        ("openai_server", {"sampling": {**SERVERS, "devices": [0]}}, "have their own devices"),
        ("vllm", {"sampling": {"temperature": 2.5}}, "sampling.temperature is 2.5, and vLLM"),
        ("vllm", {"evaluation": {"temperature": 2.5}}, "evaluation.temperature is 2.5, and vLLM"),
    ],
)
def test_what_a_sampler_does_not_read_is_refused(
    sampler: str, sections: dict[str, Any], said: str
) -> None:
    settings = config(**sections)
    assert said in next(on_machine(settings, sampler=sampler, gpus=8))
    if sampler == "vllm" and "temperature" in said:
        assert not list(on_machine(settings, sampler="transformers", gpus=8))


@pytest.mark.parametrize(
    ("gpus", "sections", "said"),
    [
        (0, {"sampling": {"devices": [0]}}, "sampling.devices places work on GPUs"),
        (0, {"compute": {"layout": "exit"}}, "compute.layout places work on GPUs"),
        (4, {"sampling": {"devices": [0, 1]}}, "names 2 GPUs, and the vllm sampler uses 1"),
        (1, {"sampling": {"engine": {"tensor_parallel_size": 2}}}, "need 2 GPUs, and 1 are there"),
        (2, {"train": {"num_processes": 4}}, "starts 4 processes here with a GPU each, and 2"),
    ],
)
def test_what_a_machine_lacks_is_refused(gpus: int, sections: dict[str, Any], said: str) -> None:
    assert said in next(on_machine(config(**sections), sampler="vllm", gpus=gpus))


@pytest.mark.parametrize(
    ("judge", "compares", "mode", "said"),
    [
        ({"orders": "one"}, False, "worker", "judge.orders: one is for judges that compare"),
        ({"comparisons": 2}, False, "async", "judge.comparisons: 2 is for judges that compare"),
        ({"comparisons_per_round": 2}, False, "async", "judge.comparisons_per_round: 2 is for"),
        ({"margins": "narrow"}, False, "async", "judge.margins: narrow is for judges that"),
        ({"swap": "agree"}, False, "async", "judge.swap: agree is for judges that compare"),
        ({"schedule": "knockout"}, False, "async", "judge.schedule: knockout is for judges that"),
        ({"scale": 2.0}, True, "async", "judge.scale makes p of two scores"),
        ({"concurrency": 2}, True, "worker", "judge.concurrency is for judges that call an API"),
        ({"retries": 0}, False, "inline", "judge.retries is for judges that call an API"),
        ({"timeout_s": 2.0}, False, "inline", "judge.timeout_s: 'j' is called directly"),
        ({"gold": "g.jsonl"}, True, "people", "judge.gold: judge.options.gold and"),
        ({"probes": 3}, False, "people", "judge.probes: judge.options.gold and"),
        ({"gold_pairs": 3}, False, "inline", "comparisons of judge.gold are asked about, which is"),
        ({"constant": "Yes."}, True, "async", "that is 0 for a judge that makes calls; set"),
        ({"constant": "Yes.", "probes": 0}, True, "inline", "that is 0; set judge.probes, or"),
        ({"timeout_s": 2.0}, True, "own_model", "'j' is asked through the sampler, without a dead"),
        ({"timeout_s": 2.0}, True, "people", "judge.timeout_s: people take their time. Leave"),
        ({"orders": "one"}, True, "people", "judge.options.per_item is how many are asked. Leave"),
        ({"votes": 3}, True, "people", "judge.votes: each annotator is shown a pair once"),
        ({"model_mismatch": "refuse"}, True, "worker", "judge.model_mismatch is for judges that"),
    ],
)
def test_what_a_judge_does_not_read_is_refused(
    judge: dict[str, Any], compares: bool, mode: str, said: str
) -> None:
    settings = JudgeConfig(name="j", **judge)
    found = list(of_judge(settings, section="judge", compares=compares, mode=mode, priced=True))
    assert len(found) == 1 and said in found[0]


def test_a_budget_needs_a_price_and_something_to_pay_for() -> None:
    budget = JudgeConfig(name="j", budget=BudgetConfig(max_usd=1.0))
    found = of_judge(budget, section="evaluation.judge", compares=True, mode="async", priced=False)
    assert "Set evaluation.judge.options.price_per_million" in next(found)
    settings = config(judge={"budget": {"max_usd": 3}})
    assert "judge.budget is for paid calls" in next(with_judges(settings, False, False))
    assert not list(with_judges(settings, True, False))
    also = next(with_judges(settings, True, False, also_priced=False))
    assert "sampling.also.price_per_million" in also


def test_what_compares_gives_no_good_and_bad_responses() -> None:
    settings = config(pairs={"threshold": 0.5}, train={"loss": "kto"}, sampling={"n": 1})
    assert "and 'heuristic' compares" in next(with_judges(settings, False, True))
    assert not list(with_judges(settings, False, False))


def test_a_margin_that_no_comparison_reaches_is_refused() -> None:
    settings = config(pairs={"min_margin": 0.6})
    assert "can never be reached" in next(with_judges(settings, True, True))
    assert not list(with_judges(settings, True, False))


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (HUMAN, "people answer 'human' on a page, when they like; nothing else can wait for them"),
        ({"name": "self"}, "'self' is asked through the campaign's sampler"),
    ],
)
def test_who_cannot_sit_on_a_panel_is_told_why(
    tmp_path: Path, member: dict[str, Any], said: str
) -> None:
    other = {"name": "scripted", "options": {"default": 0.5, "verdicts": []}}
    with pytest.raises(ConfigError) as caught:
        Labeller(
            JudgeConfig(name="panel", options={"members": [other, member]}),
            base=None,
            ledger_path=tmp_path / "judgments.sqlite",
            seed=0,
            round=1,
            on_event=lambda event: None,
        )
    assert said in caught.value.message and "members[1]" in caught.value.message
    assert "Let it judge alone" in caught.value.message


def run_it(config: dict[str, Any]) -> None:
    import online_dpo

    try:
        online_dpo.run(config)
    except ConfigError as error:
        raise SystemExit(0 if "judge.timeout_s" in error.message else 1) from None


def test_a_start_refuses_before_it_writes(tmp_path: Path) -> None:
    settings = tiny_config(tmp_path / "run")
    settings["judge"]["timeout_s"] = 3.0
    assert in_child(run_it, settings) == 0
    assert not (tmp_path / "run").exists()
