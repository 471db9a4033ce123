"""What has no end is bounded: YAML bombs, deep JSON, NaN, giant replies, slow patterns."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judge_cases import pair
from judge_server import Raw, Say, completion
from labellers import MakeLabeller, rows, serve

from judges.llm_replies import Scale, read_scores, read_verdict
from online_dpo import endpoints
from online_dpo.config_file import MAX_BYTES, load_config, load_yaml
from online_dpo.errors import ConfigError, CorruptError, JudgeError
from online_dpo.files import read_json
from online_dpo.paid import door
from online_dpo.paid.chat import ChatReply
from online_dpo.strict_json import loads

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "aliases repeat"),
        ("a: &a [*a]\n", "nested too deeply"),
        ("a: &a {b: *a}\n", "nested too deeply"),
        ("a: " + "[" * 5_000 + "]" * 5_000, "nested too deeply"),
        ("a: " + "{b: " * 5_000, "nested too deeply"),
        ("a: " + "9" * 10_000, "not usable"),
        ("x" * (MAX_BYTES + 1), "larger than 1 MiB"),
        ("a: !!python/object/apply:os.system [id]\n", "the tag .* is not allowed"),
        ("a: !!python/name:os.system ''\n", "the tag .* is not allowed"),
        ("a: !!binary aGk=\n", "the tag .* is not allowed"),
        ("? &a [*a]\n: x\n", "not"),
        ("a: \x00\n", "not valid YAML"),
        ("--- a\n--- b\n", "not valid YAML"),
    ],
    ids=str,
)
def test_yaml_bombs_are_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "campaign.yaml"
    file.write_text(text)
    for load in (load_config, load_yaml):
        with pytest.raises(ConfigError, match=said):
            load(file)
    if len(text) < 1000:
        with pytest.raises(ConfigError):
            load_config("quickstart.yaml", [f"judge.options={text}"])


DEEP = "[" * 200_000


@pytest.mark.parametrize(
    "text", ["NaN", "[Infinity]", '{"a": -Infinity}', "1e999", DEEP, DEEP + "]" * 200_000, "{", ""]
)
def test_json_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError):
        loads(text)
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CorruptError, match="not valid JSON"):
        read_json(tmp_path / "state.json")


def test_json_that_is_some_is_read_as_ever() -> None:
    text = '{"a": [1, -2.5e3, "\\u2028", null, true], "\u2028": 1e-400}'
    assert loads(text) == json.loads(text)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "BACKOFF_S", 0.001)
    monkeypatch.setattr(endpoints, "MAX_REPLY_BYTES", 1 << 16)


def with_usage(**usage: Any) -> Raw:
    body = completion(Say('{"verdict": "A"}'))
    return Raw(json.dumps({**body, "usage": {**body["usage"], **usage}}))


def shaped(change: Callable[[dict[str, Any]], object]) -> Raw:
    body = completion(Say("[[A]]"))
    change(body)
    return Raw(json.dumps(body))


NO_REPLIES = {
    "giant": Raw(json.dumps(completion(Say("x" * (1 << 17))))),
    "giant page": Raw("<html>" + "x" * (1 << 17), content_type="text/html"),
    "deep": Raw('{"choices": ' + DEEP),
    "a list": Raw("[1, 2]"),
    "choices is text": shaped(lambda body: body.update(choices="abc")),
    "choices is a number": shaped(lambda body: body.update(choices=7)),
    "message is text": shaped(lambda body: body["choices"][0].update(message="x")),
    "content is a list": shaped(lambda body: body["choices"][0]["message"].update(content=["x"])),
    "content is a number": shaped(lambda body: body["choices"][0]["message"].update(content=7)),
    "model is an object": shaped(lambda body: body.update(model={"a": 1})),
    "finish_reason is a list": shaped(lambda body: body["choices"][0].update(finish_reason=[1])),
}


@pytest.mark.parametrize("name", NO_REPLIES)
def test_a_reply_that_is_none_is_an_error_of_the_judge(
    make: MakeLabeller, quick: None, name: str
) -> None:
    with serve(NO_REPLIES[name]) as server:
        labeller = make(server, retries=1)
        with pytest.raises(JudgeError):
            labeller.compare_pairs([pair(0)], purpose="label")
        assert len(server.requests) <= 4


@pytest.mark.parametrize("value", [float("nan"), -5, 1e300, 10**30, "many", [1], {"a": 1}])
def test_odd_counts_of_tokens_are_paid_by_the_reservation(
    make: MakeLabeller, tmp_path: Path, value: Any
) -> None:
    with serve(with_usage(prompt_tokens=value, completion_tokens=value)) as server:
        make(server).compare_pairs([pair(0)], purpose="label")
    for cost, reserved, tokens in rows(tmp_path, "cost, reserved, tokens_in"):
        assert cost == reserved > 0 and tokens is None


def test_a_packed_bomb_is_bounded_by_what_it_unpacks_to(
    make: MakeLabeller, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from http.server import BaseHTTPRequestHandler

    packed = gzip.compress(b" " * (1 << 24))
    assert len(packed) < 1 << 15

    def reply(self: BaseHTTPRequestHandler, raw: Raw) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(packed)))
        self.end_headers()
        self.wfile.write(packed)

    server = serve(Say("[[A]]"))
    monkeypatch.setattr(server._server.RequestHandlerClass, "_reply", reply)
    with server, pytest.raises(JudgeError, match="ReplyTooLarge"):
        make(server, retries=0).compare_pairs([pair(0)], purpose="label")


@pytest.mark.parametrize("score", ["NaN", "1e999", "-Infinity", "9" * 400, "true", '"10"', "[9]"])
def test_a_score_that_is_no_number_is_no_score(score: str) -> None:
    reply = ChatReply(f'{{"score": {score}}}', "stop", "m", 1, 1)
    scores, reason = read_scores(reply, ["score"], Scale(1, 10), "0123456789abcdef")
    assert scores == [] and reason is not None


@pytest.mark.parametrize(
    "piece",
    ["\n", "the ", '"', "`", "<<<", "> ", "[[", "verdict ", "\u201c", ".\n", "- verdict\n", "a. "],
)
def test_long_replies_take_time_in_proportion(piece: str) -> None:
    """A pattern that backtracks would need hours for a megabyte; the suite's limit would tell."""
    reply = ChatReply(piece * (60_000 // len(piece)), "stop", "m", 1, 1)
    assert read_verdict(reply, "0123456789abcdef").p is None
