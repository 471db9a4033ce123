"""Regular expressions and JSON schemas: what fits, what does not, and what cannot be checked."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from judges.limited import Limited, NoResult
from judges.verifiers_text import JsonSchema, Regex
from online_dpo.errors import ConfigError
from online_dpo.records import Prompt, Response, Score

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.fixture
def judges() -> Iterator[list[Any]]:
    """Closes the judges that a test puts into it."""
    made: list[Any] = []
    yield made
    for judge in made:
        judge.close()


def judged(judge: Any, *texts: str, **metadata: Any) -> list[Score]:
    prompt = Prompt("p", "test", text="Write.", metadata=metadata)
    scores: list[Score] = judge.score(
        prompt, [Response(str(i), "p", text, (1,), "eos") for i, text in enumerate(texts)]
    )
    judge.close()
    return scores


def values(scores: list[Score]) -> list[float | None]:
    return [score.value for score in scores]


def test_a_pattern_of_the_config_is_searched_or_matched_in_full() -> None:
    texts = ("order AB-12 came", "AB-12", "ab-12", "")
    assert values(judged(Regex(r"[A-Z]{2}-\d+"), *texts)) == [1, 1, 0, 0]
    assert values(judged(Regex(r"[A-Z]{2}-\d+", match="full"), *texts)) == [0, 1, 0, 0]
    assert values(judged(Regex(r"[A-Z]{2}-\d+", ignore_case=True), *texts)) == [1, 1, 1, 0]


def test_each_prompt_may_have_its_own_pattern() -> None:
    assert values(judged(Regex(), "yes", "no", pattern="^yes$")) == [1, 0]
    assert values(judged(Regex(field="must"), "no", must="no")) == [1]
    (score,) = judged(Regex(), "yes")
    assert score.value is None and "'pattern'" in str(score.reason)
    (score,) = judged(Regex(), "yes", pattern="(")
    assert score.value is None and "no regular expression" in str(score.reason)


def test_a_pattern_that_takes_forever_gives_no_score_and_the_next_text_has_one() -> None:
    scores = judged(Regex(r"^(a|aa)+$", timeout_s=0.5), "a" * 80 + "!", "aaa")
    assert values(scores) == [None, 1]
    assert "took longer than 0.5 s" in str(scores[0].reason)


def test_a_response_fits_a_schema_as_a_whole() -> None:
    texts = (
        '{"name": "Ada", "age": 36}',
        '```json\n{"name": "Ada"}\n```',
        '{"age": 36}',
        '{"name": "Ada", "age": -1}',
        '{"name": "Ada", "born": 1815}',
        'Here it is: {"name": "Ada"}',
        '{"name": "Ada"',
        '{"name": NaN}',
        "[" * 100_000,
        "",
    )
    assert values(judged(JsonSchema(PERSON), *texts)) == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]


def test_each_prompt_may_have_its_own_schema() -> None:
    assert values(judged(JsonSchema(), "3", '"3"', schema={"type": "integer"})) == [1, 0]
    assert values(judged(JsonSchema(), "3", schema='{"type": "integer"}')) == [1]
    (score,) = judged(JsonSchema(), "3")
    assert score.value is None and "'schema'" in str(score.reason)
    (score,) = judged(JsonSchema(), "3", schema={"type": "whole"})
    assert score.value is None and "no JSON schema" in str(score.reason)


def test_a_schema_fetches_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        schema = {"$ref": f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"}
        (score,) = judged(JsonSchema(), "3", schema=schema)
        assert score.value is None and "Unresolvable" in str(score.reason)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has come
            server.accept()
    inside = {"$defs": {"count": {"type": "integer"}}, "$ref": "#/$defs/count"}
    assert values(judged(JsonSchema(), "3", '"3"', schema=inside)) == [1, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Regex("("), r"judge\.options\.pattern: '\(' is no regular expression"),
        (lambda: Regex("a", match="part"), "search or full, not 'part'"),  # type: ignore[arg-type]
        (lambda: JsonSchema({"type": "whole"}), r"judge\.options\.schema: no JSON schema"),
    ],
)
def test_options_are_checked_by_name(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_missing_package_is_named_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from judges.verifiers_math import MathAnswer

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for judge, package in ((JsonSchema, "jsonschema"), (MathAnswer, "math-verify")):
        with pytest.raises(ConfigError, match=rf"{package}: pip install 'online-dpo\[verifiers\]'"):
            judge()


# --- the process with a limit


def test_a_function_is_called_in_another_process_and_its_faults_come_back() -> None:
    double = Limited("operator:add", timeout_s=30)
    try:
        assert double(2, 3) == 5
        with pytest.raises(NoResult, match="TypeError"):
            double(2, "3")
        assert double([1], ["ü"]) == [1, "ü"]
    finally:
        double.close()


def test_a_call_inside_one_c_function_ends_and_so_does_one_that_takes_all_memory() -> None:
    power = Limited("operator:pow", timeout_s=0.5)
    repeat = Limited("operator:mul", timeout_s=30)
    try:
        start = time.monotonic()
        with pytest.raises(NoResult, match=r"longer than 0\.5 s"):
            power(7, 10**9)
        assert time.monotonic() - start < 60
        assert power(2, 10) == 1024
        with pytest.raises(NoResult, match="MemoryError"):
            repeat("x", 2**33)
        assert repeat("x", 3) == "xxx"
    finally:
        power.close()
        repeat.close()


def test_the_limit_is_on_the_call_and_not_on_the_pause_between_calls() -> None:
    add = Limited("operator:add", timeout_s=0.5)
    assert add(1, 1) == 2
    process = add._process
    assert process is not None
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=0.7)
    assert process.poll() is None
    process.kill()  # as the system would, short of memory
    process.wait()
    assert add(1, 2) == 3
    add.close()


def test_a_process_that_dies_is_named_and_replaced() -> None:
    leave = Limited("os:_exit", timeout_s=30)
    try:
        for _ in range(2):
            with pytest.raises(NoResult, match="exit code 3"):
                leave(3)
    finally:
        leave.close()


def test_nothing_is_left_behind() -> None:
    add = Limited("operator:add", timeout_s=30)
    assert add(1, 1) == 2
    process = add._process
    del add
    assert process is not None and process.poll() is not None
