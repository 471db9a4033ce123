"""The checkable instructions: each followed and not, by hand, and what a prompt may carry."""

from __future__ import annotations

from typing import Any

import pytest

from judges.verifiers_ifeval import Instructions
from judges.verifiers_ifeval_checks import CHECKS, count_sentences
from online_dpo.errors import ConfigError
from online_dpo.records import Prompt, Response, Score

FRENCH = "Les enfants jouent dans le jardin, et leur mère prépare le dîner."
ENGLISH = "The children are playing in the garden, and their mother is making dinner."

# id, arguments, a text that follows, a text that does not
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["Sea", "c++"]}, "I saw the SEAside and C++.", "The sea."),
    (
        "keywords:frequency",
        {"keyword": "sea", "frequency": 2, "relation": "at least"},
        "Sea to sea",
        "One sea",
    ),
    (
        "keywords:frequency",
        {"keyword": "sea", "frequency": 2, "relation": "less than"},
        "One sea",
        "Sea to sea",
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", "dog"]}, "A category", "A Cat!"),
    (
        "keywords:letter_frequency",
        {"letter": "q", "let_frequency": 3, "let_relation": "at least"},
        "Quick, quiet queen",
        "Quick queen",
    ),
    ("language:response_language", {"language": "fr"}, FRENCH, ENGLISH),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        "One here. Two there!",
        "One. Two! Three?",
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "a\n***\nb\n***",
        "a\n***\n***\nb",
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "at least"},
        "it's three, four",
        "only three words",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        'First this.\n\n"Then, that.',
        "First this.\n\nNext that.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [date]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye\n\np. s. Hi", "Bye. PS"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye\nP.P.S. Hi", "Bye P.S."),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        "* a\n- b\n**c**",
        "* a\n- b\n* c",
    ),
    ("detectable_format:constrained_response", {}, "Well. My answer is no.", "No."),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*one* and **two**",
        "*one* and ****",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\nfoo\nSECTION 2\nbar",
        "SECTION 1\nfoo\nSECTION two",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "a: 1"),
    ("detectable_format:title", {}, "<<Ode to joy>>\nJoy!", "<<  >>\n<Joy>"),
    ("combination:two_responses", {}, "One.\n******\nTwo.", "One.\n******\nOne."),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Write it. "},
        "write IT. So:",
        "So: write it.",
    ),
    ("startend:end_checker", {"end_phrase": "The end."}, 'So it goes. the end."', "The end. Not."),
    ("startend:quotation", {}, ' "All of it." ', '"All" of it.'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "The BIG RED-HOT bus",
        "The BIG Red bus",
    ),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH),
    ("change_case:english_capital", {}, ENGLISH.upper(), FRENCH.upper()),
    ("change_case:english_lowercase", {}, ENGLISH.lower(), ENGLISH),
    ("punctuation:no_comma", {}, "No pause here.", "Here, a pause."),
]


def judged(text: str, *asked: tuple[str, Any], level: Any = "instruction") -> Score:
    metadata = {
        "instruction_id_list": [name for name, _ in asked],
        "kwargs": [arguments for _, arguments in asked],
    }
    prompt = Prompt("p", "test", text="Write.", metadata=metadata)
    (score,) = Instructions(level).score(prompt, [Response("r", "p", text, (1,), "eos")])
    return score


@pytest.mark.parametrize(("name", "arguments", "follows", "fails"), CASES)
def test_each_instruction(name: str, arguments: dict[str, Any], follows: str, fails: str) -> None:
    # The data set gives every argument that any instruction has, null where it is not its own.
    given = {"num_words": None, "language": None, "keywords": None, **arguments}
    assert judged(follows, (name, given)) == Score(1.0)
    assert judged(fails, (name, given)) == Score(0.0)
    assert judged(" \n", (name, given)) == Score(0.0)


def test_every_instruction_has_a_case() -> None:
    assert {name for name, *_ in CASES} == set(CHECKS)
    assert len(CHECKS) == 25


def test_the_share_that_is_followed_or_all_of_them() -> None:
    asked = (
        ("punctuation:no_comma", {}),
        ("startend:quotation", None),
        ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}),
    )
    assert judged("One two three", *asked) == Score(2 / 3)
    assert judged("One two three", *asked, level="prompt") == Score(0.0)
    assert judged('"One two three"', *asked, level="prompt") == Score(1.0)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "no instructions in its field 'instruction_id_list'"),
        ({"instruction_id_list": []}, "no instructions"),
        ({"instruction_id_list": ["sing:aloud"]}, "no check for the instruction 'sing:aloud'"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "'kwargs' is no list"),
        (
            {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{}]},
            "number_words cannot be checked with {}: .*num_words",
        ),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 3, "relation": "about"}],
            },
            "a relation is one of less than, at least, .*, not 'about'",
        ),
    ],
)
def test_what_cannot_be_checked_is_no_score(metadata: dict[str, Any], reason: str) -> None:
    import re

    prompt = Prompt("p", "test", text="Write.", metadata=metadata)
    (score,) = Instructions().score(prompt, [Response("r", "p", "text", (1,), "eos")])
    assert score.value is None and re.search(reason, str(score.reason)), score


def test_kwargs_may_be_left_out_where_none_takes_any() -> None:
    prompt = Prompt("p", "t", text="x", metadata={"instruction_id_list": ["punctuation:no_comma"]})
    (score,) = Instructions().score(prompt, [Response("r", "p", "text", (1,), "eos")])
    assert score == Score(1.0)


def test_a_wrong_level_is_named() -> None:
    with pytest.raises(ConfigError, match="instruction or prompt, not 'all'"):
        Instructions("all")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("One", 1),
        ("One. Two! Three? Four", 4),
        ("Dr. Low paid 3.50 euros, i.e. too much. He left.", 2),
        ('She said: "Go!" He went... Then nothing.', 3),
        ("Wait?! Yes.", 2),
        ("今日は。いい天気。", 2),
        ("1. ... !", 1),
    ],
)
def test_sentences_are_counted_by_their_ends(text: str, count: int) -> None:
    assert count_sentences(text) == count
