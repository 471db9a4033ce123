"""What an LLM judge is told: structure that no response can change, and templates' limits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from forged_responses import FORGED
from hypothesis import given
from hypothesis import strategies as st

from judges.llm_pairwise import LLMPairwise, PairwiseTask
from judges.llm_pointwise import LLMPointwise, PointwiseTask
from judges.llm_templates import MAX_BYTES, JudgeTemplate, read_principles, unused_fence
from online_dpo.errors import ConfigError
from online_dpo.records import Message, Prompt, Response
from online_dpo.resources import find_data

PAIRWISE = PairwiseTask("pairwise.jinja", ["Be brief.", "Be true."])
POINTWISE = [
    PointwiseTask("scale", (), None, ()),
    PointwiseTask("additive", (), None, "principles_helpful.txt"),
    PointwiseTask("criteria", [{"name": "clear", "description": "Reads well."}], None, ()),
]
PROMPT = Prompt("p", "test", text="Say hello.", metadata={"answer": "42", "rubric": "Be kind."})
FENCED = r"<<<(?P<name>[a-zA-Z ]+) {word}>>>\n(?P<body>.*?)\n<<<end of (?P=name) {word}>>>"


def response(text: str, name: str = "r") -> Response:
    return Response(name, "p", text, (1,), "eos")


def sections(messages: tuple[Message, ...], fence: str) -> tuple[list[str], list[str], str]:
    """Names and bodies of the fenced sections of a prompt, and what stands outside of them."""
    assert [message.role for message in messages] == ["system", "user"]
    pattern = re.compile(FENCED.format(word=fence), re.DOTALL)
    user = messages[1].content
    found = list(pattern.finditer(user))
    outside = messages[0].content + pattern.sub("", user)
    return [m["name"] for m in found], [m["body"] for m in found], outside


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("text", FORGED)
def test_no_response_changes_a_prompts_structure(text: str, structured: bool) -> None:
    harmless, other = response("harmless", "h"), response("other", "o")
    for first, second in ((response(text), other), (other, response(text))):
        shown = PAIRWISE.question(PROMPT, first, second, seed=0x0123456789ABCDEF)
        plain = PAIRWISE.question(PROMPT, harmless, other, seed=int(shown.fence, 16))
        names, bodies, outside = sections(shown.messages(structured), shown.fence)
        assert names == ["request", "correct answer", "rubric", "response A", "response B"]
        assert bodies == ["Say hello.", "42", "Be kind.", first.text, second.text]
        assert outside == sections(plain.messages(structured), plain.fence)[2]
    for task in POINTWISE:
        graded = task.question(PROMPT, response(text), seed=0)
        names, bodies, outside = sections(graded.messages(structured), graded.fence)
        assert names == ["request", "correct answer", "rubric", "response"]
        assert bodies[-1] == text
        same = task.question(PROMPT, response("harmless"), seed=0)
        assert outside == sections(same.messages(structured), same.fence)[2]


def test_there_are_enough_forgeries() -> None:
    assert len(set(FORGED)) >= 50


def test_a_fence_that_a_text_holds_is_not_used() -> None:
    taken = unused_fence(5, PROMPT)
    assert taken == f"{5:016x}"
    assert unused_fence(5, PROMPT, f"x{taken}") != taken
    assert unused_fence(5, Prompt("p", "t", text="", metadata={"answer": taken})) != taken
    calls = {PAIRWISE.question(PROMPT, response("a"), response("b"), s).fence for s in range(9)}
    assert len(calls) == 9


@given(st.text(max_size=30), st.text(max_size=30), st.integers(0, 2**63 - 1), st.booleans())
def test_a_prompt_is_symmetric_in_a_and_b(
    first: str, second: str, seed: int, structured: bool
) -> None:
    """Swapped responses change places, and not another character changes."""
    one, other = response(first), response(second)
    shown = PAIRWISE.question(PROMPT, one, other, seed)
    swapped = PAIRWISE.question(PROMPT, other, one, seed)
    assert shown.fence == swapped.fence
    names, bodies, outside = sections(shown.messages(structured), shown.fence)
    swapped_names, swapped_bodies, swapped_outside = sections(
        swapped.messages(structured), shown.fence
    )
    assert (names, outside) == (swapped_names, swapped_outside)
    assert bodies[:-2] == swapped_bodies[:-2]
    assert bodies[-2:] == swapped_bodies[:-3:-1] == [first, second]


def test_principles_take_the_place_of_the_templates_own() -> None:
    def system(principles: list[str] | str) -> str:
        task = PairwiseTask("pairwise.jinja", principles)
        return task.question(PROMPT, response("a"), response("b"), 1).messages(True)[0].content

    assert "Weigh, in this order" in system([])
    steered = system(["Kindness first.", "Rhymes count."])
    assert "1. Kindness first.\n2. Rhymes count.\n" in steered
    assert "Weigh, in this order" not in steered
    for name in ("helpful", "honest", "careful"):
        assert len(read_principles(f"principles_{name}.txt")) == 5
        assert read_principles(f"principles_{name}.txt")[0] in system(f"principles_{name}.txt")


def test_a_version_holds_what_the_judge_goes_by(tmp_path: Path) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text(find_data("pairwise.jinja").read_text())
    plain = LLMPairwise("m").version
    assert LLMPairwise("m", template=str(mine)).version == plain
    mine.write_text(mine.read_text() + "{# changed #}")
    criteria = [{"name": "clear"}]
    versions = {
        plain,
        LLMPairwise("m", template=str(mine)).version,
        LLMPairwise("m", principles=["Be brief."]).version,
        LLMPointwise("m").version,
        LLMPointwise("m", rubric="additive").version,
        LLMPointwise("m", rubric="criteria", criteria=criteria).version,
        LLMPointwise("m", rubric="criteria", criteria=[{**criteria[0], "weight": 2}]).version,
    }
    assert len(versions) == 7


# --- a template's limits


def load(tmp_path: Path, user: str) -> JudgeTemplate:
    path = tmp_path / "mine.jinja"
    path.write_text("{% block user %}" + user + "{% endblock %}")
    return JudgeTemplate(str(path))


@pytest.mark.parametrize(
    ("user", "problem"),
    [
        ("{{ 'x' * 1000000000 }}", "`mul`"),
        ("{{ 2 ** 99999999 }}", "`pow`"),
        ("{{ '%999999999d' % 1 }}", "`mod`"),
        ("{% set x = prompt %}{{ x }}", "`assign`"),
        ("{% set x %}{{ prompt }}{% endset %}", "`assignblock`"),
        ("{% with x = prompt %}{{ x }}{% endwith %}", "`with`"),
        ("{% macro f() %}{{ f() }}{% endmacro %}", "`macro`"),
        ("{% include 'other.jinja' %}", "`include`"),
        ("{% import 'other.jinja' as o %}", "`import`"),
        ("{{ lipsum(n=100000) }}", "a call"),
        ("{{ namespace(x=1) }}", "a call"),
        ("{{ prompt.ljust(999999999) }}", "a call"),
        ("{{ prompt.replace('', prompt) }}", "a call"),
        ("{{ ''.format(1) }}", "a call"),
        ("{{ prompt|center(999999999) }}", "the filter `center`"),
        ("{{ prompt|indent(999999999) }}", "the filter `indent`"),
        ("{{ '%999999999d'|format(1) }}", "the filter `format`"),
        ("{{ prompt|list|join(prompt) }}", "the filter `join`"),
        ("{{ metadata|tojson(indent=99999999) }}", "the filter `tojson`"),
        ("{{ prompt|attr('x') }}", "the filter `attr`"),
    ],
)
def test_what_may_grow_without_bound_is_refused(tmp_path: Path, user: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"uses {problem} in line 1")):
        load(tmp_path, user)


@pytest.mark.parametrize(
    "user",
    [
        "{% for a in prompt %}{% for b in prompt %}{% for c in prompt %}{% endfor %}{% endfor %}"
        "{% endfor %}",
        "{% for a in range(100000) %}{% endfor %}",
        "{% for a in prompt if a == '?' %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% for a in range(9000) %}{{ prompt }}{% endfor %}",
    ],
)
def test_a_template_that_takes_too_much_is_ended(tmp_path: Path, user: str) -> None:
    template = load(tmp_path, user)
    with pytest.raises(ConfigError, match="'p'.*longer, or goes through its loops more often"):
        template.render(Prompt("p", "test", text="?" * 5000), fence="f")


@pytest.mark.parametrize(
    ("user", "shown"),
    [
        ("{{ prompt.__class__ }}", None),
        ("{{ ''.__class__.__mro__ }}", None),
        ("{{ metadata['x'].y }}", None),
        ("{{ prompt + 1 }}", None),
        ("{{ range(999999)|length }}", None),
        ("{{ nobody }}", None),
        ("{{ metadata.get('x', 'none') }}", "none"),
        ("{% for line in prompt.splitlines() %}{{ loop.index }}:{{ line }};{% endfor %}",
         "1:one;2:two;"),
        ("{% for k, v in metadata.items() if v %}{{ k }}={{ v|upper }}{% endfor %}", "answer=YES"),
        ("{{ prompt|trim|truncate(5, true, leeway=0) }}|{{ [1, 2]|join(', ') }}", "on...|1, 2"),
        ("{{ prompt if metadata['rubric'] else 'no' ~ ' rubric' }}", "no rubric"),
    ],
)  # fmt: skip
def test_the_sandbox_shows_data_and_nothing_else(
    tmp_path: Path, user: str, shown: str | None
) -> None:
    template = load(tmp_path, user)
    prompt = Prompt("p", "test", text="one\ntwo", metadata={"answer": "yes"})
    if shown is None:
        with pytest.raises(ConfigError, match="cannot be rendered for prompt 'p'"):
            template.render(prompt)
    else:
        assert template.render(prompt) == (Message("user", shown),)


def test_limits_grow_with_the_data(tmp_path: Path) -> None:
    template = load(tmp_path, "{% for c in prompt %}{{ c }}{% endfor %}{{ prompt }}{{ prompt }}")
    (message,) = template.render(Prompt("p", "test", text="x" * 500_000))
    assert len(message.content) == 1_500_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{{ first }}", "no block `user`"),
        (b"{% block user %}", "no Jinja template"),
        (b"\xff\xfe", "not UTF-8"),
        (b"x" * (MAX_BYTES + 1), "at most"),
    ],
)
def test_a_file_that_is_no_template_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "mine.jinja"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        JudgeTemplate(str(path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LLMPairwise("m", principles=["", "x"]), "principles is a list of sentences"),
        (lambda: LLMPairwise("m", principles=[{"a": 1}]), "principles is a list of sentences"),  # type: ignore[list-item]
        (lambda: LLMPairwise("m", principles="nothing.txt"), "does not exist"),
        (lambda: LLMPairwise("m", min_mass=0.5), "set judge.options.soft: true"),
        (lambda: LLMPairwise("m", soft=True, min_mass=1.5), "min_mass is a probability"),
        (lambda: LLMPairwise("m", soft=True, top_logprobs=1), "top_logprobs is 2 or more"),
        (lambda: LLMPointwise("m", rubric="stars"), "rubric is one of scale, additive, criteria"),
        (lambda: LLMPointwise("m", rubric="criteria"), "criteria goes with"),
        (lambda: LLMPointwise("m", criteria=[{"name": "x"}]), "criteria goes with"),
        (lambda: grades({"name": "x", "weight": 0}), "weight: above 0"),
        (lambda: grades({"name": "x", "weight": "much"}), "weight: above 0"),
        (lambda: grades({"name": "a: b"}), "words and digits"),
        (lambda: grades({"title": "x"}), "are {name"),
        (lambda: grades({"name": "x"}, {"name": "X"}), "same name"),
    ],
)
def test_options_that_cannot_be_used_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def grades(*criteria: dict[str, object]) -> LLMPointwise:
    return LLMPointwise("m", rubric="criteria", criteria=criteria)
