"""The pointwise LLM judge: rubrics, weights and gold answers, through the paid door."""

from __future__ import annotations

from pathlib import Path

import pytest
from judge_server import NO_SCHEMA, TOO_LONG, Answer, JudgeServer, Request, Say
from labellers import MakeLabeller, rows, serve
from vllm_processes import VllmServer

from online_dpo.records import Prompt, Response

PROMPT = Prompt("p", "test", text="What is 6 times 7?")
RESPONSES = [Response(f"r{i}", "p", f"It is {40 + i}.", (i,), "eos") for i in range(3)]
CRITERIA = [
    {"name": "right", "weight": 3, "description": "The number is right."},
    {"name": "clear"},
]


def by_last_digit(request: Request, number: int) -> Answer:
    return Say(f'{{"score": {1 + "012".index(shown(request)[-2])}}}')


def shown(request: Request) -> str:
    """The response that a request holds."""
    text = request["messages"][-1]["content"]
    return str(text.split("<<<response ")[1].split(">>>\n")[1].split("\n<<<end")[0])


def test_each_response_is_graded_by_itself_and_bought_once(
    make: MakeLabeller, tmp_path: Path
) -> None:
    with JudgeServer(by_last_digit) as server:
        labeller = make(server, name="llm_pointwise")
        assert labeller.kind == "score"
        (scores,) = labeller.score([(PROMPT, RESPONSES)], purpose="label")
        assert [score.value for score in scores] == [1.0, 2.0, 3.0]
        again = make(server, name="llm_pointwise")
        assert again.score([(PROMPT, RESPONSES)], purpose="label") == [scores]
        assert [shown(request) for request in server.requests] == [r.text for r in RESPONSES]
    (schema,) = {str(request["response_format"]) for request in server.requests}
    assert "'enum': [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]" in schema
    fences = {r["messages"][1]["content"].split(">>>")[0] for r in server.requests}
    assert len(fences) == 3, "a word of its own for each call"
    assert rows(tmp_path, "judge, state") == [("llm_pointwise", "settled")] * 3


def test_the_additive_rubric_has_five_points(make: MakeLabeller) -> None:
    with serve(Say('{"score": 5}'), Say('{"score": 0}'), Say('{"score": 6}')) as server:
        labeller = make(server, name="llm_pointwise", also={"rubric": "additive"})
        (scores,) = labeller.score([(PROMPT, RESPONSES)], purpose="label")
        system = server.requests[0]["messages"][0]["content"]
    assert [score.value for score in scores] == [5.0, 0.0, None]
    assert scores[2].reason == "a score that the rubric does not have"
    assert "adding up points, from 0 to 5" in system


@pytest.mark.parametrize("structured", [True, False])
def test_criteria_are_weighted(make: MakeLabeller, structured: bool) -> None:
    answer = Say('{"right": 2, "clear": 10}' if structured else "Hm.\nright: 2\nclear: 10")
    with serve(answer) as server:
        also = {"rubric": "criteria", "criteria": CRITERIA, "structured": structured}
        labeller = make(server, name="llm_pointwise", also=also)
        (scores,) = labeller.score([(PROMPT, RESPONSES[:1])], purpose="label")
        system, user = (message["content"] for message in server.requests[0]["messages"])
        asked = server.requests[0].get("response_format")
    assert scores[0].value == (3 * 2 + 1 * 10) / 4
    assert "- right: The number is right.\n- clear\n" in system
    if structured:
        assert list(asked["json_schema"]["schema"]["properties"]) == ["right", "clear"]
        assert '{"right": N, "clear": N}' in user
    else:
        assert asked is None
        assert user.endswith("right: N\nclear: N")


def test_a_gold_answer_guides_the_grading(make: MakeLabeller) -> None:
    gold = Prompt("g", "test", text=PROMPT.text, metadata={"answer": "42"})
    with serve(Say('{"score": 1}')) as server:
        labeller = make(server, name="llm_pointwise")
        labeller.score([(gold, RESPONSES[:1]), (PROMPT, RESPONSES[1:2])], purpose="label")
        guided, plain = sorted(
            (request["messages"][1]["content"] for request in server.requests), key=len
        )[::-1]
    assert "<<<correct answer" in guided and "gets 3 at most" in guided
    assert "correct answer" not in plain


def test_a_server_without_schemas_grades_in_words(make: MakeLabeller) -> None:
    def words_only(request: Request, number: int) -> Answer:
        return NO_SCHEMA if "response_format" in request else Say("Fine.\n\nScore: 8/10")

    with JudgeServer(words_only) as server:
        labeller = make(server, name="llm_pointwise", concurrency=1)
        (scores,) = labeller.score([(PROMPT, RESPONSES)], purpose="label")
        assert [score.value for score in scores] == [8.0] * 3
        assert len(server.requests) == 1 + 3, "refused once, then remembered"


def test_a_response_that_is_too_long_has_no_score(make: MakeLabeller) -> None:
    with serve(TOO_LONG) as server:
        labeller = make(server, name="llm_pointwise")
        (scores,) = labeller.score([(PROMPT, RESPONSES[:1])], purpose="label")
    assert (scores[0].value, scores[0].reason) == (None, "too long for the judge")


def test_a_real_server_grades_by_schema(
    vllm_server: VllmServer, make: MakeLabeller, tmp_path: Path
) -> None:
    template = tmp_path / "short.jinja"
    template.write_text("{% block user %}{{ response }}{% endblock %}")
    options = {
        "model": vllm_server.model,
        "base_url": vllm_server.base_url,
        "rubric": "criteria",
        "criteria": CRITERIA,
        "template": str(template),
        "max_tokens": 48,
    }
    with serve() as unused:
        labeller = make(unused, name="llm_pointwise", options=options, timeout_s=120)
        (scores,) = labeller.score([(PROMPT, RESPONSES)], purpose="label")
    for score in scores:
        assert score.value is not None and 1.0 <= score.value <= 10.0
        assert score.value * 4 == round(score.value * 4), "three parts and one"
