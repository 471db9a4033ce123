"""Offline DPO on given preferences, by command and from Python: made, refused and resumed."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import make_tiny_model
from peft import PeftModel
from tiny import in_child
from transformers import AutoModelForCausalLM, AutoTokenizer

import online_dpo
from online_dpo.errors import ConfigError, DriftError, LockedError, NoPairsError
from online_dpo.files import file_hashes
from online_dpo.locks import RunLock
from online_dpo.offline.training import TrainedPolicy, train_preferences
from online_dpo.store import RoundDir

ROWS = [
    {"prompt": f"quick {i}", "chosen": f" the fox {i}", "rejected": f" a lazy dog {i}"}
    for i in range(16)
]
SETTINGS: dict[str, Any] = {"compute": {"device": "cpu", "threads": 1}}
TRAIN: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": 4, "epochs": 2, "checkpoint_every": 2}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedPolicy:
    """ROWS, trained on without an interruption."""
    out = tmp_path_factory.mktemp("trained") / "policy"
    return train_preferences(ROWS, tiny_llama, out=out, config=SETTINGS, **TRAIN)


def test_it_learns_to_prefer_the_chosen(trained: TrainedPolicy, tiny_llama: Path) -> None:
    assert trained.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [row["step"] for row in trained.metrics] == list(range(1, 9))
    assert trained.metrics[-1]["accuracy"] == 1.0
    assert (trained.summary["pairs"], trained.summary["steps"]) == (16, 8)
    tokenizer = AutoTokenizer.from_pretrained(trained.policy)

    def margin(model: Path) -> float:
        """Of a prompt that training never saw."""
        prompts = [tokenizer("quick 99").input_ids] * 2
        answers = [[*tokenizer(text).input_ids, 0] for text in (" the fox 99", " a lazy dog 99")]
        chosen, rejected = online_dpo.sequence_logps(model, prompts, answers)
        return float(chosen - rejected)

    assert margin(trained.policy) > margin(tiny_llama) + 5.0


def test_the_folder_is_a_plain_model(trained: TrainedPolicy, tiny_llama: Path) -> None:
    names = {path.name for path in trained.policy.iterdir()}
    assert names == {path.name for path in tiny_llama.iterdir()} | {
        "manifest.json", "summary.json", "train_metrics.jsonl",
    }  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (trained.policy / name).read_bytes() == (tiny_llama / name).read_bytes()
    lines = (trained.policy / "train_metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == trained.metrics
    assert json.loads((trained.policy / "summary.json").read_text()) == trained.summary
    assert AutoModelForCausalLM.from_pretrained(trained.policy).dtype == torch.float32
    assert [path.name for path in trained.policy.parent.iterdir()] == ["policy"]


def test_adapters_and_a_moving_reference(tiny_llama: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", "llama", seed=5)
    lora = {**TRAIN, "lora": {"rank": 4, "alpha": 8.0}}
    found = train_preferences(
        ROWS, tiny_llama, reference=other, out=tmp_path / "a", config=SETTINGS, **lora
    )
    assert abs(found.metrics[0]["loss"] - math.log(2)) > 1e-2
    moving = {**TRAIN, "reference_update": {"every": 1}}
    found = train_preferences(ROWS, tiny_llama, out=tmp_path / "b", config=SETTINGS, **moving)
    assert [row["loss"] for row in found.metrics] == pytest.approx([math.log(2)] * 8, abs=1e-6)


def same_training(one: Path, other: Path) -> bool:
    """Whether two folders agree but for the manifest, which names the arguments."""
    skip = frozenset({"manifest.json"})
    return file_hashes(one, skip=skip) == file_hashes(other, skip=skip)


def cli(folder: Path, *arguments: str, at: dict[str, int] | None = None) -> tuple[int, str]:
    """The command in a process of its own: its exit code, and what it printed."""
    log = folder / "log.txt"
    code = in_child(run_cli, str(log), list(arguments), at or {})
    return code, log.read_text()


def run_cli(log: str, arguments: list[str], at: dict[str, int]) -> None:
    """The command; `at` has the signal to send when an artifact has been committed."""
    from online_dpo.cli import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    send_at_commit(at)
    sys.argv = ["online-dpo", *arguments]
    main()


def send_at_commit(at: dict[str, int]) -> None:
    finish = RoundDir.finish

    def finish_and_send(self: RoundDir, name: str, *args: Any, **kwargs: Any) -> Any:
        info = finish(self, name, *args, **kwargs)
        if name in at:
            os.kill(os.getpid(), at[name])
        return info

    RoundDir.finish = finish_and_send  # type: ignore[method-assign]


def arguments(pairs: Path, model: Path, out: Path) -> list[str]:
    """The command that trains as `trained` was."""
    sets = {**{f"train.{key}": value for key, value in TRAIN.items()}, "compute.device": "cpu",
            "compute.threads": 1}  # fmt: skip
    options = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    return ["train", "--pairs", str(pairs), "--model", str(model), "--out", str(out), *options]


def test_command_and_python_give_the_same(
    pairs: Path, tiny_llama: Path, trained: TrainedPolicy, tmp_path: Path
) -> None:
    assert cli(tmp_path, *arguments(pairs, tiny_llama, tmp_path / "command"))[0] == 0
    assert same_training(tmp_path / "command", trained.policy)
    called = train_preferences(
        str(pairs), str(tiny_llama), out=tmp_path / "command", config=SETTINGS, **TRAIN
    )
    assert called == TrainedPolicy(tmp_path / "command", trained.metrics, trained.summary)


def test_rows_may_come_from_a_dataset(
    tiny_llama: Path, trained: TrainedPolicy, tmp_path: Path
) -> None:
    """In memory, as parquet, and by name with a split: a folder is a name that `datasets` loads."""
    dataset = datasets.Dataset.from_list([{**row, "score": 1.0} for row in ROWS])
    dataset.to_parquet(tmp_path / "pairs.parquet")
    folder = tmp_path / "data"
    folder.mkdir()
    dataset.to_json(folder / "train_prefs.jsonl")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train_prefs, path: "
        "train_prefs.jsonl}\n---\n"
    )
    split = {**SETTINGS, "pairs": {"offline": {"split": "train_prefs"}}}
    sources = [(dataset, SETTINGS), (tmp_path / "pairs.parquet", SETTINGS), (str(folder), split)]
    for number, (source, config) in enumerate(sources):
        out = tmp_path / str(number)
        train_preferences(source, tiny_llama, out=out, config=config, **TRAIN)
        assert same_training(out, trained.policy), source


class Recorder:
    """Progress that keeps the steps it was told of."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def stage(self, name: str, *, total: int, unit: str) -> Any:
        yield self

    def set(self, done: int, *, total: int | None = None) -> None:
        if total == 8:
            self.steps.append(done)

    def advance(self, items: int = 1) -> None: ...

    def round(self, number: int, of: int) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("artifact", "first"),
    [("pairs", 1), ("reference", 1), ("checkpoints/step-000004", 5), ("policy", None)],
)
def test_a_kill_changes_nothing(
    artifact: str, first: int | None, tiny_llama: Path, trained: TrainedPolicy, tmp_path: Path
) -> None:
    out = tmp_path / "policy"
    assert in_child(train_and_die, str(tiny_llama), str(out), artifact) == -signal.SIGKILL
    assert not out.exists()
    progress = Recorder()
    resumed = train_preferences(
        ROWS, tiny_llama, out=out, config=SETTINGS, progress=progress, **TRAIN
    )
    assert progress.steps[:1] == ([] if first is None else [first])
    assert resumed.metrics == trained.metrics
    assert file_hashes(out) == file_hashes(trained.policy)
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def train_and_die(model: str, out: str, artifact: str) -> None:
    send_at_commit({artifact: signal.SIGKILL})
    train_preferences(ROWS, model, out=out, config=SETTINGS, **TRAIN)


def test_a_signal_ends_with_the_command_to_go_on(
    pairs: Path, tiny_llama: Path, trained: TrainedPolicy, tmp_path: Path
) -> None:
    words = arguments(pairs, tiny_llama, tmp_path / "policy")
    at = {"checkpoints/step-000002": int(signal.SIGTERM)}
    code, said = cli(tmp_path, *words, at=at)
    assert code == 143
    assert re.search(r"^safe: .*checkpoints/step-000002; training goes on from there", said, re.M)
    (command,) = re.findall(r"^to go on: online-dpo (.*)$", said, re.M)
    assert shlex.split(command) == words
    assert cli(tmp_path, *shlex.split(command))[0] == 0
    assert same_training(tmp_path / "policy", trained.policy)
    before = file_hashes(tmp_path / "policy")
    code, said = cli(tmp_path, *words)
    assert code == 0 and "finished already: nothing to do" in said
    assert file_hashes(tmp_path / "policy") == before


def test_other_arguments_are_refused(pairs: Path, tiny_llama: Path, tmp_path: Path) -> None:
    words = arguments(pairs, tiny_llama, tmp_path / "policy")
    at = {"checkpoints/step-000002": int(signal.SIGKILL)}
    assert cli(tmp_path, *words, at=at)[0] == -signal.SIGKILL
    code, said = cli(tmp_path, *words, "--set", "train.beta=0.2")
    assert code == 3 and "unfinished" in said and "train.beta: 0.1 -> 0.2" in said
    assert cli(tmp_path, *words, "--set", "train.checkpoint_every=1")[0] == 0
    code, said = cli(tmp_path, *words, "--set", "train.beta=0.2")
    assert code == 3 and "trained with other" in said and "train.beta: 0.1 -> 0.2" in said
    pairs.write_text(pairs.read_text() + json.dumps({**ROWS[0], "prompt": "new"}) + "\n")
    code, said = cli(tmp_path, *words)
    assert code == 3 and "pairs.sha256: " in said


def test_faults_end_with_their_code_and_remedy(
    pairs: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "policy"
    words = [*arguments(pairs, tiny_llama, out), "--set", "train.learning_rate=1e30"]
    code, said = cli(tmp_path, *words)
    begin = rf"to go on: rm -r {re.escape(str(out))}\.partial; online-dpo train --pairs "
    assert code == 7 and re.search(begin + ".* --set train.learning_rate=5e[+]29$", said, re.M)
    (out.with_name("policy.partial") / "rounds/001/pairs/pairs.parquet").write_bytes(b"torn")
    code, said = cli(tmp_path, *words)
    assert code == 9 and re.search(begin, said)


def test_what_is_not_its_own_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("policy", "other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").touch()
        out = tmp_path / name.removesuffix(".partial")
        with pytest.raises(ConfigError, match="holds something else"):
            train_preferences(ROWS, tiny_llama, out=out, config=SETTINGS)
        assert {path.name for path in (tmp_path / name).iterdir()} >= {"precious"}
    (tmp_path / "busy.partial").mkdir()
    lock = RunLock(tmp_path / "busy.partial")
    with pytest.raises(LockedError, match=r"busy\.partial is in use by process"):
        train_preferences(ROWS, tiny_llama, out=tmp_path / "busy", config=SETTINGS)
    lock.release()
    (tmp_path / "empty").mkdir()
    train_preferences(ROWS[:2], tiny_llama, out=tmp_path / "empty", config=SETTINGS)


def test_a_reference_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    """The first loss is -log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected))."""
    reference = make_tiny_model(tmp_path / "reference", "llama", seed=1)
    out = tmp_path / "policy"
    made = train_preferences(
        ROWS, tiny_llama, reference=reference, out=out, config=SETTINGS, beta=0.05, batch_size=16
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    margins = torch.zeros(16, dtype=torch.float64)
    for sign, model in ((1.0, tiny_llama), (-1.0, reference)):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        for i, row in enumerate(ROWS):
            for side, name in ((1.0, "chosen"), (-1.0, "rejected")):
                prompt = tokenizer(row["prompt"]).input_ids
                answer = [*tokenizer(row[name]).input_ids, 0]
                with torch.no_grad():
                    logits = loaded(torch.tensor([prompt + answer])).logits[0]
                logps = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(
                    1, torch.tensor(answer)[:, None]
                )
                margins[i] += sign * side * logps.sum()
    expected = -torch.nn.functional.logsigmoid(0.05 * margins).mean()
    assert made.metrics[0]["loss"] == pytest.approx(float(expected), abs=1e-5)
    assert abs(float(expected) - math.log(2)) > 1e-2


def test_a_loss_without_a_reference_scores_none(tiny_llama: Path, tmp_path: Path) -> None:
    simpo: dict[str, Any] = {"config": SETTINGS, "loss": "simpo", "beta": 2.0}
    made = train_preferences(ROWS, tiny_llama, out=tmp_path / "policy", **simpo)
    manifest = json.loads((made.policy / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"policy", "pairs"}
    with pytest.raises(ConfigError, match="The loss simpo compares with no reference"):
        train_preferences(ROWS, tiny_llama, reference=tiny_llama, out=tmp_path / "other", **simpo)


def test_a_reference_with_another_tokenizer_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    reference = make_tiny_model(tmp_path / "reference", "llama")
    text = (reference / "tokenizer.json").read_text()
    assert '"!": 2,' in text and '"#": 4,' in text
    text = text.replace('"!": 2,', '"!": 4,').replace('"#": 4,', '"#": 2,')
    (reference / "tokenizer.json").write_text(text)
    out = tmp_path / "policy"
    with pytest.raises(ConfigError, match="another tokenizer.* 2 is '#' there and '!' here"):
        train_preferences(ROWS, tiny_llama, reference=reference, out=out, config=SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["reference"], "a corrected call may come"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betta": 0.2}, "unknown key 'train.betta'; did you mean 'train.beta'"),
        ({"beta": -1}, "train.beta: input should be greater than 0"),
        ({"optimizer": "carry"}, "offline training is one round"),
        ({"config": {"sampling": {"n": 4}}}, "sampling.n has no part in offline training"),
        ({"config": {"model": {"path": "other", "init": {}}}}, "exactly one of model.path"),
        ({"config": {"trian": {}}}, "unknown key 'trian'"),
        ({"max_tokens": 2}, "16 x longer than train.max_tokens 2"),
    ],
)
def test_settings_that_cannot_be_used(
    settings: dict[str, Any], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, NoPairsError), match=re.escape(message)):
        train_preferences(ROWS, tiny_llama, out=tmp_path / "out", **settings)
    assert not any(tmp_path.iterdir())


def test_pairs_that_cannot_be_used(tiny_llama: Path, tmp_path: Path) -> None:
    splits: Any = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    refused: list[tuple[Any, str]] = [
        (splits, "Row 0 of the pairs is a string"),
        (
            [{"prompt": 1.5, "chosen": b"a", "rejected": "b"}],
            "Row 0 of the pairs is not plain text",
        ),
        ([], "no usable preference"),
        ([{"prompt": "a"}], "line 1: 'chosen' is null"),
    ]
    for rows, message in refused:
        with pytest.raises(ConfigError, match=message):
            train_preferences(rows, tiny_llama, out=tmp_path / "out", config=SETTINGS)
    progress = Recorder()
    rows = [*ROWS[:3], ROWS[0], {"prompt": "a", "chosen": "b"}]
    made = train_preferences(
        rows, tiny_llama, out=tmp_path / "out", config=SETTINGS, progress=progress
    )
    reasons = {"duplicate": 1, "'rejected' is null, not an answer": 1}
    assert made.summary["unusable"] == reasons and made.summary["pairs"] == 3
    assert [example["line"] for example in made.summary["unusable_examples"]] == [4, 5]
    assert progress.notes == [f"pairs: 1 left out: {reason}" for reason in reasons]


def test_sections_may_come_from_a_file(tiny_llama: Path, tmp_path: Path) -> None:
    config = tmp_path / "offline.yaml"
    config.write_text(
        "train: {beta: 0.2, learning_rate: 1e-4}\nmodel: {dtype: bfloat16, chat_template: own}\n"
        "compute: {threads: 1}\ncampaign: {seed: 3}\n"
    )
    (tmp_path / "own").write_text("{% for m in messages %}own: {{ m.content }}{% endfor %}")
    made = train_preferences(
        ROWS[:4], tiny_llama, out=tmp_path / "out", config=config, learning_rate=1e-3
    )
    known = json.loads((made.policy / "manifest.json").read_text())["arguments"]
    assert (known["train"]["beta"], known["train"]["learning_rate"]) == (0.2, 1e-3)
    assert known["seed"] == 3
    assert AutoModelForCausalLM.from_pretrained(made.policy).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(made.policy).chat_template.startswith("{% for m in")
    (tmp_path / "own").write_text("another")
    with pytest.raises(DriftError, match=r"model\.template_sha256"):
        train_preferences(
            ROWS[:4], tiny_llama, out=tmp_path / "out", config=config, learning_rate=1e-3
        )
    config.write_text("train:\n  betta: 0.2\n")
    with pytest.raises(ConfigError, match=r"offline\.yaml:2: unknown key 'train\.betta'"):
        train_preferences(ROWS, tiny_llama, out=tmp_path / "other", config=config)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_an_adapter_is_merged(tiny_llama: Path, tmp_path: Path, quantization: str | None) -> None:
    """The folder is a whole model; with the base in 4 bits, what was trained and not its source."""
    out = tmp_path / "policy"
    adapter = {"rank": 4, "alpha": 8.0, "quantization": quantization}
    settings: dict[str, Any] = {"config": SETTINGS, "lora": adapter, **TRAIN, "learning_rate": 1e-2}
    made = train_preferences(ROWS, tiny_llama, out=out, **settings)
    assert made.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert made.metrics[-1]["accuracy"] == 1.0
    whole = AutoModelForCausalLM.from_pretrained(out)
    assert not (out / "adapter_config.json").exists() and not (out / "base.json").exists()
    assert json.loads((out / "manifest.json").read_text())["files"].keys() == {
        path.relative_to(out).as_posix()
        for path in out.rglob("*.*")
        if path.name != "manifest.json"
    }
    head = AutoModelForCausalLM.from_pretrained(tiny_llama).lm_head.weight
    assert torch.equal(whole.lm_head.weight, head), "no adapter changes the output head"
    tokens = torch.tensor([[5, 6, 7, 8]])
    if quantization is None:
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        adapted = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
        with torch.no_grad():
            torch.testing.assert_close(
                whole(tokens).logits, adapted(tokens).logits, atol=2e-5, rtol=0
            )
    else:
        assert not (out / "adapter").exists()
        other = make_tiny_model(tmp_path / "other", "llama", seed=1)
        with pytest.raises(ConfigError, match="hold the reference .*other in 4 bits too"):
            train_preferences(ROWS, tiny_llama, reference=other, out=tmp_path / "no", **settings)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_train_as_one(
    tiny_llama: Path, trained: TrainedPolicy, tmp_path: Path
) -> None:
    made = train_preferences(
        ROWS, tiny_llama, out=tmp_path / "two", config=SETTINGS, num_processes=2, **TRAIN
    )
    assert [row["loss"] for row in made.metrics] == pytest.approx(
        [row["loss"] for row in trained.metrics], abs=1e-4
    )
    assert [path.name for path in tmp_path.iterdir()] == ["two"]
