"""Preference sets in all their forms become the same tokens; rows that are none are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from online_dpo.errors import ConfigError
from online_dpo.offline.pairs import read_offline_pairs
from online_dpo.offline.same_tokenizer import check_same_tokenizer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(tmp_path: Path, *rows: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    preferences, _, problems = read_offline_pairs(make_tokenizer(), str(path), append_eos=True)
    return preferences, problems


def ids(text: str) -> tuple[int, ...]:
    return tuple(make_tokenizer()(text).input_ids)


def test_plain_text_is_not_chat(tmp_path: Path) -> None:
    ((pair,), _) = read(tmp_path, {"prompt": "the fox", "chosen": " jumps", "rejected": " is"})
    assert pair.prompt_token_ids == ids("the fox")
    assert (pair.chosen_token_ids, pair.rejected_token_ids) == (
        (*ids(" jumps"), 0),
        (*ids(" is"), 0),
    )


WHO, FOX, DOG = user("who?"), assistant("a fox"), assistant("a dog")
FORMS: dict[str, dict[str, Any]] = {
    "prompt of messages, answers of text": {
        "prompt": [WHO], "chosen": "a fox", "rejected": "a dog",
    },
    "prompt and answers of messages": {"prompt": [WHO], "chosen": [FOX], "rejected": [DOG]},
    "no prompt": {"chosen": [WHO, FOX], "rejected": [WHO, DOG]},
    "prompt repeated": {"prompt": [WHO], "chosen": [WHO, FOX], "rejected": [WHO, DOG]},
    "prompt repeated as text": {"prompt": "who?", "chosen": [WHO, FOX], "rejected": [WHO, DOG]},
}  # fmt: skip


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_every_form_of_chat_gives_the_same_ids(tmp_path: Path, row: dict[str, Any]) -> None:
    ((pair,), problems) = read(tmp_path, row)
    assert problems == []
    assert pair.prompt_token_ids == ids("<|user|>who?\n<|assistant|>")
    assert pair.chosen_token_ids == (*ids("a fox"), 0)
    assert pair.rejected_token_ids == (*ids("a dog"), 0)


def test_the_turns_before_the_last_are_the_prompt(tmp_path: Path) -> None:
    turns = [WHO, FOX, user("where?")]
    sides = {"chosen": [*turns, assistant("here")], "rejected": [*turns, assistant("there")]}
    goes_on = {name: side[1:] for name, side in sides.items()}
    pairs, _ = read(tmp_path, sides, {"prompt": [WHO], **goes_on})
    assert len(pairs) == 1, "the second row is the first one in another form"
    text = "<|user|>who?\n<|assistant|>a fox\n<|user|>where?\n<|assistant|>"
    assert pairs[0].prompt_token_ids == ids(text)


GOOD = {"prompt": "the", "chosen": "fox", "rejected": "dog"}
BAD: dict[str, dict[str, Any]] = {
    "'rejected' is null, not an answer": {"prompt": "a", "chosen": "b"},
    "no 'prompt', and no messages before the answers": {"chosen": "a", "rejected": "b"},
    "chosen and rejected are identical": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "chosen and rejected answer different messages": {
        "chosen": [WHO, FOX], "rejected": [user("what?"), DOG],
    },
    "the prompt is none of the messages before the answers": {
        "prompt": "what?", "chosen": [WHO, FOX], "rejected": [WHO, DOG],
    },
    "'chosen' ends with a turn of 'user', not the assistant's": {
        "chosen": [WHO], "rejected": [WHO, DOG],
    },
    "'chosen': a message is not an object with a role and a content": {
        "chosen": [{"from": "gpt"}], "rejected": [DOG],
    },
    "the last message is the assistant's, so nothing is left to answer": {
        "prompt": [assistant("a")], "chosen": "b", "rejected": "c",
    },
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD)
def test_a_row_that_is_no_preference_is_named(tmp_path: Path, reason: str) -> None:
    pairs, problems = read(tmp_path, GOOD, BAD[reason])
    assert len(pairs) == 1
    assert [(problem["line"], problem["reason"]) for problem in problems] == [(2, reason)]


def test_a_set_without_a_preference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no usable preference: line 1: 'rejected' is null"):
        read(tmp_path, {"prompt": "a", "chosen": "b"})


# --- tokenizers of a policy and its reference ---------------------------------------------------


def bpe(vocab: list[str], merges: list[tuple[str, str]], **parts: Any) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
    made.normalizer = parts.get("normalizer")
    return PreTrainedTokenizerFast(tokenizer_object=made)


VOCAB = ["a", "b", "c", "ab", "bc", "abc"]
MERGES = [("a", "b"), ("ab", "c"), ("b", "c")]
OTHERS = {
    "5 and 6 entries, and 5 is no token there and 'abc' here": bpe(VOCAB[:5], MERGES[:1]),
    "6 and 6 entries, and 0 is 'b' there and 'a' here": bpe(["b", "a", *VOCAB[2:]], MERGES),
    "its entries are the same, its merges are not": bpe(VOCAB, MERGES[::-1]),
    "its entries are the same, its normalizer is not": bpe(
        VOCAB, MERGES, normalizer=normalizers.Lowercase()
    ),
}


@pytest.mark.parametrize("difference", OTHERS)
def test_another_tokenizer_is_refused_with_the_difference(difference: str) -> None:
    names = {"policy_name": "mine", "reference_name": "theirs"}
    with pytest.raises(
        ConfigError, match="reference theirs has another .* policy mine: "
    ) as caught:
        check_same_tokenizer(bpe(VOCAB, MERGES), OTHERS[difference], **names)
    assert difference in str(caught.value)


def test_what_a_reference_may_have_of_its_own() -> None:
    """Its text is never tokenized by itself: a template, an EOS and a further token are its own."""
    reference = bpe(VOCAB, MERGES)
    reference.chat_template = CHAT_TEMPLATE
    reference.add_special_tokens({"eos_token": "<eos>"})
    names = {"policy_name": "mine", "reference_name": "theirs"}
    check_same_tokenizer(bpe(VOCAB, MERGES), reference, **names)
    with pytest.raises(ConfigError, match="6 is no token there and '<eos>' here"):
        check_same_tokenizer(reference, bpe(VOCAB, MERGES), **names)
