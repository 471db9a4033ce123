"""The reward model judge: its scores are transformers' own, and it ranks what it was taught."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_tokenizer

from judges.reward_model import RewardModel
from online_dpo.errors import ConfigError
from online_dpo.records import Message, Prompt, Response


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
    good, bad = (tokenizer(f"Say: {letter * 4}", return_tensors="pt") for letter in "az")
    for _ in range(20):
        loss = -torch.nn.functional.logsigmoid(model(**good).logits - model(**bad).logits).sum()
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
