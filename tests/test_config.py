"""Reading a config: the traps of YAML are closed and every error names its place and remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_dpo.config import Config
from online_dpo.config_file import (
    config_from_dict,
    differences,
    dump_yaml,
    load_config,
    override_config,
)
from online_dpo.errors import ConfigError

MINIMAL = """\
model:
  path: some/model
prompts:
  train:
    - path: some/dataset
  holdout: 4
judge:
  name: heuristic
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(MINIMAL)
    return path


def error_of(path: Path, text: str, *overrides: str) -> str:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_defaults_are_those_of_the_field(minimal: Path) -> None:
    config = load_config(minimal).config
    assert (config.train.loss, config.train.beta, config.train.learning_rate) == (
        "sigmoid",
        0.1,
        5e-7,
    )
    assert (config.train.batch_size, config.train.epochs, config.train.weight_decay) == (128, 1, 0)
    assert (config.train.warmup, config.train.max_grad_norm) == (0.1, 1.0)
    assert (config.sampling.n, config.sampling.temperature, config.sampling.top_k) == (8, 1.0, 0)


def test_scientific_notation_is_a_number(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "train: {learning_rate: 1e-6, beta: .5}\n")
    config = load_config(minimal, ["train.max_grad_norm=5e-1"]).config
    assert (config.train.learning_rate, config.train.beta) == (1e-6, 0.5)
    assert config.train.max_grad_norm == 0.5


def test_no_is_text_and_not_false(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "campaign: {name: no}\n")
    assert load_config(minimal).config.campaign.name == "no"


def test_duplicate_keys_are_refused(minimal: Path) -> None:
    message = error_of(minimal, MINIMAL + "train:\n  beta: 0.1\n  beta: 0.2\n")
    assert message == f"{minimal}:11: the key 'beta' stands here a second time"


def test_unsafe_tags_are_refused(minimal: Path) -> None:
    message = error_of(minimal, MINIMAL + "train: !!python/object/apply:os.system ['true']\n")
    assert f"{minimal}:9: the tag" in message and "not allowed" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {betta: 1}\n", "unknown key 'train.betta'; did you mean 'train.beta'?"),
        ("beta: 1\n", "unknown key 'beta'; did you mean 'train.beta'?"),
        ("train: {beta: high}\n", "train.beta: input should be a valid number"),
        ("train: {beta: -1}\n", "train.beta: input should be greater than 0, got -1"),
        ("train: {beta: .inf}\n", "train.beta: input should be a valid number"),
        ("model: {}\n", "the key 'model' stands here a second time"),
        ("sampling: {temperature: 0}\n", "greedy decoding"),
        ("reference: {promote: sometimes}\n", "'every_round' or 'never'"),
        ("train: {parallel: fsdp}\n", "over several processes, and train.num_processes is 1"),
        ("train: {gradient_sync: micro_batch}\n", "ddp sums gradients once a step"),
        (
            "train: {num_processes: 2, launch: {use_fsdp: true}}\n",
            "to shard the model set train.parallel: fsdp",
        ),
    ],
)
def test_errors_name_the_line_and_the_key(minimal: Path, text: str, expected: str) -> None:
    message = error_of(minimal, MINIMAL + text)
    assert f"{minimal}:9: " in message
    assert expected in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sampling:\n  top_p: 0.5\n  n: 1\n", ":11: sampling.n: 1 gives no two"),
        ("campaign: {rounds: 3,\n  save_policy_every: 2}\n", ":10: campaign.save_policy_every"),
        ("train:\n  devices: [1, 1]\n", ":10: train.devices: names a GPU twice"),
        ("reference: {promote: {every: 0}}\n", ":9: reference.promote.every: input should be gre"),
        ("reference: {promote: 3}\n", "be 'every_round' or 'never' or a valid dictionary, got 3"),
    ],
)
def test_combinations_and_alternatives_have_one_line_and_its_number(
    minimal: Path, text: str, expected: str
) -> None:
    message = error_of(minimal, MINIMAL + text)
    assert expected in message and "\n" not in message


def test_an_override_is_named_where_a_combination_fails(minimal: Path) -> None:
    message = error_of(minimal, MINIMAL, "sampling.n=1")
    assert message.startswith("--set sampling.n=1: sampling.n: 1 gives no two responses")
    message = error_of(minimal, MINIMAL, "prompts.train.0.pth=x")
    assert message.endswith(
        "unknown key 'prompts.train.0.pth'; did you mean 'prompts.train.0.path'?"
    )


@pytest.mark.parametrize("key", ["train.weight_decay", "sampling.temperature", "judge.timeout_s"])
def test_what_is_not_finite_is_refused(minimal: Path, key: str) -> None:
    assert f"{key}: input should be a finite number" in error_of(minimal, MINIMAL, f"{key}=1e999")


def test_missing_sections_are_named(minimal: Path) -> None:
    message = error_of(minimal, "model: {path: x}\n")
    assert "'prompts' is required" in message and "'judge' is required" in message


def test_overrides_are_checked_and_named(minimal: Path) -> None:
    message = error_of(minimal, MINIMAL, "train.betta=1")
    assert message.startswith("--set train.betta=1: unknown key 'train.betta'; did you mean")
    assert "write it as section.key=value" in error_of(minimal, MINIMAL, "train.beta")


def test_missing_files_say_where_was_looked(minimal: Path) -> None:
    message = error_of(minimal, MINIMAL.replace("some/dataset", "nowhere.jsonl"))
    assert "'nowhere.jsonl' does not exist" in message and str(minimal.parent) in message


def test_files_beside_the_config_become_absolute(minimal: Path) -> None:
    (minimal.parent / "mine.jsonl").write_text('{"prompt": "a"}\n')
    minimal.write_text(MINIMAL.replace("some/dataset", "mine.jsonl"))
    source = load_config(minimal).config.prompts.train[0]
    assert (source.path, source.name) == (str(minimal.parent / "mine.jsonl"), "mine")


def test_a_dumped_config_reads_back_equal(minimal: Path, tmp_path: Path) -> None:
    config = load_config(minimal, ["train.learning_rate=5e-7", "campaign.name='1e3'"]).config
    again = tmp_path / "campaign.yaml"
    again.write_text(dump_yaml(config.model_dump(mode="json")))
    assert load_config(again, resolved=True).config == config


@given(st.floats(min_value=1e-12, max_value=1e6), st.text(max_size=20))
def test_any_value_survives_the_round_trip(rate: float, name: str) -> None:
    data = config_from_dict(
        {
            "model": {"path": "m"},
            "prompts": {"train": [{"path": "d"}], "holdout": 1},
            "judge": {"name": "heuristic", "options": {"label": name}},
            "train": {"learning_rate": rate},
        }
    ).config
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_text(dump_yaml(data.model_dump(mode="json")), encoding="utf-8")
        assert load_config(path, resolved=True).config == data


def test_differences_name_dotted_keys(minimal: Path) -> None:
    old = load_config(minimal).config
    new = override_config(old, ["train.beta=0.2"], source="test")
    assert differences(old, new) == {"train.beta": (0.1, 0.2)}


def test_every_field_is_explained_and_the_schema_is_valid_json() -> None:
    schema = json.loads(json.dumps(Config.model_json_schema()))
    for name, section in schema["$defs"].items():
        for field, facts in section["properties"].items():
            assert facts.get("description"), f"{name}.{field} has no docstring"


def test_every_shipped_config_parses() -> None:
    folder = Path(__file__).parent.parent / "configs"
    shipped = sorted(folder.glob("*.yaml"))
    names = {path.name for path in shipped}
    assert {"quickstart.yaml", "arithmetic.yaml", "hackable.yaml"} <= names
    assert {"llm_judge.yaml", "reward_model.yaml", "online.yaml", "multi_gpu.yaml"} <= names
    assert "fsdp.yaml" in names
    for path in shipped:
        load_config(path)
        assert path.read_text().startswith("#"), f"{path.name} has no header"
