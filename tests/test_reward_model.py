"""The reward model judge: its scores are transformers' own, and it ranks what it was taught."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import make_tokenizer

from judges.reward_model import RewardModel
from online_dpo.errors import ConfigError
from online_dpo.records import Message, Prompt, Response


def rated(rng: random.Random, more: str, fewer: str) -> str:
    """Eight letters, most of them `more`."""
    letters = [more] * rng.randint(5, 7)
    letters += [rng.choice(fewer + "mq") for _ in range(8 - len(letters))]
    rng.shuffle(letters)
    return "".join(letters)


def pairs(seed: int, count: int) -> list[tuple[str, str]]:
    """Better and worse texts: of many an a, and of many a z."""
    rng = random.Random(seed)
    return [(rated(rng, "a", "z"), rated(rng, "z", "a")) for _ in range(count)]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier, trained here to like the letter a and dislike the letter z."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=1,
        eos_token_id=0,
    )
    model = LlamaForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def logits(texts: Sequence[str]) -> torch.Tensor:
        batch = tokenizer([f"Say: {t}" for t in texts], return_tensors="pt", padding=True)
        return model(**batch).logits

    for step in range(30):
        better, worse = zip(*pairs(step, 16), strict=True)
        loss = -torch.nn.functional.logsigmoid(logits(better) - logits(worse)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("reward")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def response(text: str) -> Response:
    return Response(text, "p", text, (1,), "eos")


def test_scores_are_those_of_transformers(reward_model: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    prompt = Prompt("p", "s", text="Say: ")
    texts = ["aaaa", "zzzz", "a much longer answer than the others"]
    scores = RewardModel(str(reward_model), batch_size=2).score(
        prompt, [response(t) for t in texts]
    )
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = make_tokenizer()
    for text, score in zip(texts, scores, strict=True):
        with torch.inference_mode():
            alone = model(**tokenizer(f"Say: {text}", return_tensors="pt")).logits.item()
        assert score.value == pytest.approx(alone, abs=1e-5)
    assert scores[0].value is not None and scores[1].value is not None
    assert scores[0].value > scores[1].value + 1


def test_it_ranks_pairs_that_it_was_not_trained_on(reward_model: Path) -> None:
    trained = {text for step in range(30) for pair in pairs(step, 16) for text in pair}
    held_out = [p for p in pairs(1000, 64) if not trained & set(p)]
    assert len(held_out) >= 16
    judge = RewardModel(str(reward_model), batch_size=5)
    prompt = Prompt("p", "s", text="Say: ")
    right = 0
    for better, worse in held_out:
        high, low = judge.score(prompt, [response(better), response(worse)])
        assert high.value is not None and low.value is not None
        right += high.value > low.value
    assert right / len(held_out) > 0.95


def test_scores_do_not_depend_on_the_batch(reward_model: Path) -> None:
    prompt = Prompt("p", "s", text="Say: ")
    responses = [response(t) for t in ("a", "zz", "a much longer answer than the others", "q", "m")]
    values = [
        [
            score.value
            for score in RewardModel(str(reward_model), batch_size=n).score(prompt, responses)
        ]
        for n in (1, 2, 16)
    ]
    assert values[1] == pytest.approx(values[0], abs=1e-5)
    assert values[2] == pytest.approx(values[0], abs=1e-5)


@pytest.mark.skipif("not __import__('torch').cuda.is_available()")
def test_scores_on_a_gpu_are_those_on_the_cpu(reward_model: Path) -> None:
    prompt = Prompt("p", "s", text="Say: ")
    responses = [response(better) for better, _ in pairs(7, 8)]
    cpu, gpu = (
        [score.value for score in RewardModel(str(reward_model), device=d).score(prompt, responses)]
        for d in ("cpu", "cuda")
    )
    assert gpu == pytest.approx(cpu, abs=1e-4)


def test_messages_enter_the_chat_template_once(reward_model: Path) -> None:
    judge = RewardModel(str(reward_model))
    prompt = Prompt("p", "s", messages=(Message("user", "hi"),))
    tokenizer = make_tokenizer()
    expected = tokenizer("<|user|>hi\n<|assistant|>there\n", add_special_tokens=False).input_ids
    assert judge._ids(prompt, response("there")) == expected


def test_too_long_is_no_score(reward_model: Path) -> None:
    judge = RewardModel(str(reward_model), max_tokens=5)
    (score,) = judge.score(Prompt("p", "s", text="Say: "), [response("a long answer")])
    assert score.value is None and score.reason is not None and "max_tokens 5" in score.reason


def test_what_is_no_reward_model_is_named(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        RewardModel(str(tmp_path))
    with pytest.raises(ConfigError, match=r"no weights for score\.weight"):
        RewardModel(str(tiny_llama))
