"""The campaign's own model as the judge: in one batch, by recorded weights, and said aloud."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from judge_cases import pair
from tiny import in_child, tiny_config

from judges.self_judge import SelfJudge
from online_dpo.asking.own_model import Chat, Who
from online_dpo.config import JudgeConfig
from online_dpo.errors import ConfigError
from online_dpo.judging import Labeller
from online_dpo.paid.chat import ChatReply
from online_dpo.store import RunDir
from online_dpo.tables import read_table


class Voice:
    """Stands for the sampler: says what a test has it say, and keeps what it was asked."""

    def __init__(self, say: str | None) -> None:
        self.say = say
        self.asked: list[tuple[Who, list[Chat], float, int]] = []

    def sha256(self, who: Who) -> str:
        return {"policy": "a", "reference": "b"}[who] * 64

    def reply(
        self, who: Who, chats: Sequence[Chat], *, temperature: float, max_tokens: int
    ) -> list[ChatReply | None]:
        self.asked.append((who, list(chats), temperature, max_tokens))
        return [self._reply(chat) for chat in chats]

    def _reply(self, chat: Chat) -> ChatReply | None:
        if self.say is None:
            return None
        text = chat.messages[-1].content
        good_first = text.find("good") < text.find("poor")
        said = self.say.replace("{better}", "A" if good_first else "B")
        return ChatReply(said, "stop", "judge", None, 5)


@pytest.fixture
def labeller(tmp_path: Path) -> Iterator[Any]:
    made = []

    def make(options: dict[str, Any], **settings: Any) -> Labeller:
        labeller = Labeller(
            JudgeConfig(name="self", options=options, **settings),
            base=None,
            ledger_path=tmp_path / "judgments.sqlite",
            seed=3,
            round=1,
            on_event=lambda event: None,
        )
        made.append(labeller)
        return labeller

    yield make
    for each in made:
        each.close()


def test_both_orders_of_all_pairs_are_one_batch(labeller: Any, tmp_path: Path) -> None:
    judge = labeller({"who": "reference", "temperature": 0.5, "max_tokens": 7})
    judge.own_models = voice = Voice("Hm.\nVerdict: {better}")
    asked = [pair(0), pair(1, "poor", "good")]
    found = judge.compare_pairs(asked, purpose="label")
    assert [c.p for c in found] == [1.0, 0.0]
    assert found[0].raws == ("Hm.\nVerdict: A", "Hm.\nVerdict: B")
    ((who, chats, temperature, max_tokens),) = voice.asked
    assert (who, len(chats), temperature, max_tokens) == ("reference", 4, 0.5, 7)
    assert len({chat.seed for chat in chats}) == 4
    assert "Verdict: tie" in chats[0].messages[1].content, "asked in words"
    assert not (tmp_path / "judgments.sqlite").exists(), "nothing is paid"
    judge.compare_pairs(asked, purpose="label")
    assert voice.asked[1] == voice.asked[0], "the same question is asked in the same words"


def test_the_weights_are_part_of_the_version(labeller: Any) -> None:
    versions = set()
    for who in ("policy", "reference"):
        judge = labeller({"who": who})
        judge.own_models = Voice("")
        version = judge.identity["version"]
        assert version.endswith(f"-{who}-" + Voice("").sha256(who)[:16])
        versions.add(version)
    assert len(versions) == 2


def test_a_rubric_makes_it_score(labeller: Any) -> None:
    judge = labeller({"rubric": "additive"})
    assert judge.kind == "score"
    judge.own_models = voice = Voice("Score: 4")
    prompt, one, other = pair()
    (scores,) = judge.score([(prompt, [one, other])], purpose="label")
    assert [score.value for score in scores] == [4.0, 4.0]
    assert len(voice.asked[0][1]) == 2
    judge.own_models = Voice(None)
    (scores,) = judge.score([(prompt, [one])], purpose="label")
    assert (scores[0].value, scores[0].reason) == (None, "too long for the judge")


def test_it_needs_a_campaigns_model(labeller: Any) -> None:
    with pytest.raises(ConfigError, match="asks the model of a campaign's round"):
        labeller({}).compare_pairs([pair()], purpose="label")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"who": "me"}, "who is policy or reference"),
        ({"criteria": [{"name": "x"}]}, "criteria goes with"),
        ({"temperature": -1.0}, "temperature is 0 or more"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SelfJudge(**options)


def test_settings_of_paid_calls_are_refused(labeller: Any) -> None:
    for settings in ({"concurrency": 4}, {"retries": 1}, {"timeout_s": 5.0}):
        with pytest.raises(ConfigError, match=f"judge.{next(iter(settings))}"):
            labeller({}, **settings)


# --- a campaign


def own_config(run: Path) -> dict[str, Any]:
    """A policy that was taught to prefer the first, whatever it is shown."""
    config = tiny_config(
        run,
        judge={"name": "self", "options": {}, "orders": "one"},
        evaluation={"judge": tiny_config(run)["judge"]},
    )
    folder = run.parent
    (folder / "chat.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (folder / "ask.jinja").write_text("{% block user %}verdict:{% endblock %}")
    taught = json.dumps({"prompt": "verdict:", "response": " [[A]]"}) + "\n"
    with (folder / "demonstrations.jsonl").open("a") as file:
        file.write(taught * 32)
    config["model"]["chat_template"] = str(folder / "chat.jinja")
    config["judge"]["options"] = {"template": str(folder / "ask.jinja"), "max_tokens": 8}
    return config


def run_it(config: dict[str, Any]) -> None:
    import online_dpo

    online_dpo.run(config)


def test_each_rounds_policy_labels_its_own_answers(tmp_path: Path) -> None:
    assert in_child(run_it, own_config(tmp_path / "run")) == 0
    run = RunDir(tmp_path / "run")
    policies = []
    for number in (1, 2):
        round_dir = run.round(number)
        policy = round_dir.plan().policy
        for shard in range(2):
            name = f"labels/part-{shard:05d}"
            version = round_dir.manifest(name)["judge"]["version"]
            assert version.endswith(f"-policy-{policy.sha256[:16]}")
            rows = read_table(round_dir.verify(name) / "labels.parquet")
            asked = [row for row in rows if row["orders"]]
            assert asked and all(row["raws"] == [" [[A]]"] for row in asked)
            assert {row["p"] for row in asked} == {0.0, 1.0}, "the first as shown"
        policies.append(policy.sha256)
    assert policies[0] != policies[1]
    assert not (run.path / "judgments.sqlite").exists()
