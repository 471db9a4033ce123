"""Text to tokens and back; prompt sets with good and bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from trainer_calls import settings
from transformers import PreTrainedTokenizerBase

from online_dpo.errors import ConfigError
from online_dpo.models.loading import load_tokenizer, train_tokenizer
from online_dpo.records import Message, Prompt, prompt_id
from online_dpo.tokenization import (
    Room,
    decode_response,
    encode_answer,
    prepare_prompts,
    tokenize_prompt,
)
from online_dpo.training.handler import Trainer

BOS_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
PLAIN_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make(*, bos: bool = False, eos: bool = False, template: str | None = None) -> Any:
    """A tokenizer that adds a BOS, an EOS or neither to a text, as Llama, T5 and Qwen do."""
    tokenizer: Any = train_tokenizer(
        ["some words to merge"], vocab_size=270, chat_template=template
    )
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
    parts = [*(["<s>"] if bos else []), "$A", *(["<|endoftext|>"] if eos else [])]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(parts),
        special_tokens=[
            (token, tokenizer.convert_tokens_to_ids(token)) for token in parts if token != "$A"
        ],
    )
    return tokenizer


def text_prompt(text: str) -> Prompt:
    return Prompt("id", "source", text=text)


def chat_prompt(*contents: str) -> Prompt:
    return Prompt("id", "source", messages=tuple(Message("user", c) for c in contents))


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
@given(text=st.text(min_size=1).filter(lambda text: "<" not in text))
def test_one_bos_where_it_is_used_and_no_eos(bos: bool, eos: bool, text: str) -> None:
    tokenizer = TOKENIZERS[bos, eos]
    ids = tokenize_prompt(tokenizer, text_prompt(text))
    assert ids[bos:] == encode_answer(tokenizer, text, append_eos=False)
    if bos:
        assert ids[0] == tokenizer.bos_token_id
        assert tokenize_prompt(tokenizer, text_prompt("<s>" + text)) == ids


TOKENIZERS = {(bos, eos): make(bos=bos, eos=eos) for bos in (False, True) for eos in (False, True)}


@pytest.mark.parametrize("template", [BOS_TEMPLATE, PLAIN_TEMPLATE])
def test_messages_get_one_bos_whether_the_template_has_it_or_not(template: str) -> None:
    tokenizer = make(bos=True, template=template)
    ids = tokenize_prompt(tokenizer, chat_prompt("hello"))
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_messages_end_with_the_generation_prompt() -> None:
    tokenizer = make(template=PLAIN_TEMPLATE)
    ids = tokenize_prompt(tokenizer, chat_prompt("hello"))
    assert tokenizer.decode(ids) == "<user>hello<assistant>"


def test_plain_text_does_not_go_through_the_template() -> None:
    tokenizer = make(template=PLAIN_TEMPLATE)
    assert tokenizer.decode(tokenize_prompt(tokenizer, text_prompt("hello"))) == "hello"


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(ConfigError, match="model.chat_template"):
        tokenize_prompt(make(), chat_prompt("hello"))


def test_a_template_that_refuses_the_messages_is_quoted() -> None:
    tokenizer = make(template="{{ raise_exception('no system turns') }}")
    with pytest.raises(ConfigError, match="no system turns.*hello"):
        tokenize_prompt(tokenizer, chat_prompt("hello"))


def test_answers_end_with_eos_on_request() -> None:
    tokenizer = make(bos=True, eos=True)
    plain = encode_answer(tokenizer, "words", append_eos=False)
    assert tokenizer.bos_token_id not in plain
    assert encode_answer(tokenizer, "words", append_eos=True) == (*plain, tokenizer.eos_token_id)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no EOS"):
        encode_answer(tokenizer, "words", append_eos=True)


@pytest.mark.parametrize(
    ("text", "stop", "strip", "seen"),
    [
        ("an answer<|endoftext|>", [], False, "an answer"),
        ("one\ntwo", ["\n"], False, "one"),
        ("one STOP two END", ["END", "STOP"], False, "one "),
        (" kept  as is ", [], False, " kept  as is "),
        ("<think>hm</think>\n\nyes", [], True, "yes"),
        ("hm</think>yes</think> no", [], True, "no"),
        ("<think>never ended", [], True, ""),
        ("no thoughts", [], True, "no thoughts"),
        ("<think>hm</think>yes", [], False, "<think>hm</think>yes"),
    ],
)
def test_what_the_judge_sees(text: str, stop: list[str], strip: bool, seen: str) -> None:
    tokenizer = make()
    ids = tokenizer(text).input_ids
    assert decode_response(tokenizer, ids, stop=stop, strip_thinking=strip) == seen


def test_thinking_ends_at_a_special_token_too() -> None:
    tokenizer = make()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
    ids = tokenizer("<think>hm</think>yes").input_ids
    assert decode_response(tokenizer, ids, strip_thinking=True) == "yes"
    assert decode_response(tokenizer, ids, strip_thinking=False) == "hmyes"


def source(path: object, **changes: Any) -> dict[str, Any]:
    given = {"name": "set", "split": "train", "prompt_field": "prompt", "answer_field": None}
    return {"path": str(path), **given, "role": "train", "weight": 1.0, **changes}


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    made: PreTrainedTokenizerBase = make(template=PLAIN_TEMPLATE)
    return made


def test_good_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "2+2=", "gold": "4", "tags": ["sum"]},
        {"prompt": [{"role": "user", "content": "hi"}], "gold": None},
    )
    prompts, problems = prepare_prompts(tokenizer, [source(path, weight=2.5)], max_tokens=50)
    assert problems == []
    first, second = (sourced.prompt for sourced in prompts)
    assert first.id == prompt_id("set", "2+2=")
    assert (first.text, first.messages) == ("2+2=", ())
    assert first.metadata == {"gold": "4", "tags": ["sum"]}
    assert first.token_ids == tokenize_prompt(tokenizer, first)
    assert second.messages == (Message("user", "hi"),)
    assert second.id == prompt_id("set", [Message("user", "hi")])
    assert [(sourced.role, sourced.weight) for sourced in prompts] == [("train", 2.5)] * 2


def test_bad_rows_are_reported_by_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "good"},
        "{broken",
        "",
        ["a list"],
        {"question": "x"},
        {"prompt": 7},
        {"prompt": "  \n"},
        {"prompt": []},
        {"prompt": [{"role": "user"}]},
        {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "good"},
        {"prompt": "x" * 99},
    )
    prompts, problems = prepare_prompts(tokenizer, [source(path)], max_tokens=20)
    assert [sourced.prompt.text for sourced in prompts] == ["good"]
    reasons = {problem.line: problem.reason for problem in problems}
    expected = {
        2: "not JSON",
        4: "the line is a list, not an object",
        5: "no 'prompt' among its fields: question",
        6: "the prompt is a number, neither a string nor a list of messages",
        7: "empty prompt",
        8: "empty prompt",
        9: "a message is not an object with a role and a content",
        10: "the last message is the assistant's",
        11: "duplicate",
        12: "99 tokens, more than prompts.max_tokens 20",
    }
    assert reasons.keys() == expected.keys()
    assert all(reasons[line].startswith(reason) for line, reason in expected.items())
    assert all(problem.source == "set" and len(problem.excerpt) <= 120 for problem in problems)
    assert next(problem.excerpt for problem in problems if problem.line == 2) == "{broken"


def test_evaluation_prompts_are_never_trained_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    train = write(tmp_path / "train.jsonl", {"prompt": "a"}, {"prompt": "b"})
    held = write(tmp_path / "eval.jsonl", {"prompt": "b"}, {"prompt": "c"}, {"prompt": "c"})
    prompts, problems = prepare_prompts(
        tokenizer,
        [source(train, name="t"), source(held, name="e", role="eval")],
        max_tokens=20,
    )
    assert [(s.prompt.text, s.role) for s in prompts] == [
        ("a", "train"),
        ("b", "eval"),
        ("c", "eval"),
    ]
    assert [(p.source, p.line, p.reason) for p in problems] == [
        ("t", 2, "also an evaluation prompt"),
        ("e", 3, "duplicate"),
    ]


def test_an_evaluation_prompt_is_known_by_its_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    held = write(tmp_path / "eval.jsonl", {"prompt": [{"role": "user", "content": "b"}]})
    train = write(tmp_path / "train.jsonl", {"prompt": "<user>b<assistant>"}, {"prompt": "b"})
    prompts, problems = prepare_prompts(
        tokenizer, [source(train), source(held, role="eval")], max_tokens=50
    )
    assert [(s.prompt.text, s.role) for s in prompts] == [("b", "train"), (None, "eval")]
    assert [(p.line, p.reason) for p in problems] == [(1, "also an evaluation prompt")]


def test_prompts_that_leave_no_room_for_an_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "x" * 12}, {"prompt": "x" * 13})
    prompts, problems = prepare_prompts(
        tokenizer, [source(path)], max_tokens=20, room=Room(20, "the model's", 8)
    )
    assert [len(s.prompt.token_ids) for s in prompts] == [12]
    reason = "13 tokens leave no room for sampling.max_new_tokens 8 in the model's 20"
    assert [(p.line, p.reason) for p in problems] == [(2, reason)]


def test_evaluation_prompts_have_room_for_their_own_answers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "x" * 9})
    room = Room(20, "the model's", 8)
    held_out = {**source(path, role="eval"), "max_new_tokens": 12}
    with pytest.raises(ConfigError, match="no room for evaluation.max_new_tokens 12 in the model"):
        prepare_prompts(tokenizer, [held_out], max_tokens=20, room=room)
    prompts, problems = prepare_prompts(
        tokenizer, [{**held_out, "max_new_tokens": 11}], max_tokens=20, room=room
    )
    assert len(prompts) == 1 and problems == []


def test_two_sources_of_a_role_need_two_names(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    first = write(tmp_path / "a.jsonl", {"prompt": "a"})
    other = write(tmp_path / "b.jsonl", {"prompt": "b"})
    said = r"two sources are both called 'set'; give one a name \(prompts.train\[1\].name\)"
    with pytest.raises(ConfigError, match=said):
        prepare_prompts(tokenizer, [source(first), source(other)], max_tokens=20)
    roles = [source(first, role="eval"), source(other)]
    assert len(prepare_prompts(tokenizer, roles, max_tokens=20)[0]) == 2


def test_answers_of_the_prompt_set(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(
        tmp_path / "a.jsonl", {"q": "x", "gold": "y", "k": 1}, {"q": "z", "gold": 5}, {"q": "w"}
    )
    options = source(path, prompt_field="q", answer_field="gold")
    prompts, problems = prepare_prompts(tokenizer, [options], max_tokens=20)
    assert [sourced.prompt.metadata for sourced in prompts] == [{"_answer": "y", "k": 1}]
    assert [problem.reason for problem in problems] == [
        "'gold' is a number, not an answer's text",
        "'gold' is null, not an answer's text",
    ]


def test_parquet_and_datasets(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "a", "level": 1}, {"prompt": None, "level": 2}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    prompts, problems = prepare_prompts(tokenizer, [source(tmp_path / "a.parquet")], max_tokens=20)
    assert [sourced.prompt.metadata for sourced in prompts] == [{"level": 1}]
    assert [(problem.line, problem.reason) for problem in problems] == [
        (2, "the prompt is null, neither a string nor a list of messages")
    ]


def test_sets_that_cannot_be_used(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "no.parquet").write_bytes(b"not parquet")
    for path, words in (
        (tmp_path / "missing.jsonl", "missing.jsonl does not exist"),
        (write(tmp_path / "empty.jsonl"), "'set' .*is empty"),
        (write(tmp_path / "bad.jsonl", "{", "{", {}), "no usable prompt in 3 rows: 2 x not JSON"),
        (tmp_path / "no.parquet", "cannot be read as parquet"),
        (tmp_path / "folder", "dataset .*folder' .split 'train'. cannot be loaded"),
    ):
        with pytest.raises(ConfigError, match=words):
            prepare_prompts(tokenizer, [source(path)], max_tokens=20)


def test_prompt_tables(tmp_path: Path, tiny_llama: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "a", "gold": "ä"},
        {"prompt": [{"role": "user", "content": "hi"}]},
        "{",
    )
    result = Trainer(settings()).tokenize_prompts(
        emit=lambda event: None,
        model=str(tiny_llama),
        sources=[source(path)],
        max_tokens=50,
        max_new_tokens=8,
        max_model_len=None,
        out=str(tmp_path / "out"),
    )
    assert result == {"train": 2, "eval": 0, "problems": 1}
    rows = pq.read_table(tmp_path / "out" / "prompts.parquet").to_pylist()
    chat = Prompt("", "", messages=(Message("user", "hi"),))
    assert rows[1] == {
        "id": prompt_id("set", chat.messages),
        "source": "set",
        "role": "train",
        "weight": 1.0,
        "text": None,
        "messages": '[{"role": "user", "content": "hi"}]',
        "metadata": "{}",
        "token_ids": list(tokenize_prompt(load_tokenizer(tiny_llama), chat)),
    }
    assert json.loads(rows[0]["metadata"]) == {"gold": "ä"}
    problem = json.loads((tmp_path / "out" / "problems.jsonl").read_text())
    assert (problem["source"], problem["line"], problem["excerpt"]) == ("set", 3, "{")


@pytest.mark.parametrize(
    ("max_model_len", "limit"), [(None, "the model's {}"), (64, "sampling.engine.max_model_len 64")]
)
def test_the_shorter_context_bounds_prompts(
    tmp_path: Path, tiny_llama: Path, max_model_len: int | None, limit: str
) -> None:
    length = json.loads((tiny_llama / "config.json").read_text())["max_position_embeddings"]
    path = write(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "a b " * length})
    Trainer(settings()).tokenize_prompts(
        emit=lambda event: None,
        model=str(tiny_llama),
        sources=[source(path)],
        max_tokens=10 * length,
        max_new_tokens=8,
        max_model_len=max_model_len,
        out=str(tmp_path / "out"),
    )
    problem = json.loads((tmp_path / "out" / "problems.jsonl").read_text())
    assert problem["line"] == 2
    assert problem["reason"].endswith(f"max_new_tokens 8 in {limit.format(length)}")
