"""Labelled comparisons are read from the forms that data sets have; what is none is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stub_judges import write_rows

from online_dpo.errors import ConfigError
from online_dpo.records import Message
from online_dpo.report_card.comparisons import read_comparisons

PAIR = {"prompt": "Hello?", "first": "Hi!", "second": "No."}


def read(tmp_path: Path, *rows: dict[str, Any], seed: int = 0) -> Any:
    return read_comparisons(str(write_rows(tmp_path / "set.jsonl", rows)), seed=seed)


@pytest.mark.parametrize(
    ("label", "gold"),
    [
        ("first", 1.0),
        ("A", 1.0),
        ("a", 1.0),
        (1, 1.0),
        ("second", 0.0),
        ("B", 0.0),
        (2, 0.0),
        ("2", 0.0),
        ("tie", 0.5),
        ("C", 0.5),
    ],
)
def test_labels_have_well_known_spellings(label: Any, gold: float, tmp_path: Path) -> None:
    ((row,), problems) = read(tmp_path, {**PAIR, "label": label})
    assert row.gold == gold and not problems
    assert (row.first.text, row.second.text) == ("Hi!", "No.")


def test_other_columns_are_the_prompts_metadata(tmp_path: Path) -> None:
    row = {"prompt": "2+2=", "response_a": "4", "response_b": "5", "p": 0.9, "answer": "4"}
    ((found,), _) = read(tmp_path, row)
    assert found.gold == 0.9 and found.prompt.metadata == {"answer": "4"}
    assert found.prompt.text == "2+2=" and found.prompt.source == "set"


def test_llmbar_is_an_array_of_objects(tmp_path: Path) -> None:
    rows = [
        {"input": "Say A.", "output_1": "A", "output_2": "B", "label": 1},
        {"input": "Say B.", "output_1": "A", "output_2": "B", "label": 2},
    ]
    (tmp_path / "natural.json").write_text(json.dumps(rows, indent=2))
    found, problems = read_comparisons(str(tmp_path / "natural.json"), seed=0)
    assert [row.gold for row in found] == [1.0, 0.0] and not problems
    (tmp_path / "natural.json").write_text("[{]")
    with pytest.raises(ConfigError, match="begins as an array"):
        read_comparisons(str(tmp_path / "natural.json"), seed=0)


def test_a_chosen_response_is_shown_in_a_drawn_place(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {k}", "chosen": f"yes {k}", "rejected": "no"} for k in range(200)]
    found, _ = read(tmp_path, *rows)
    assert all(row.first.text.startswith("yes") == (row.gold == 1.0) for row in found)
    assert 70 < sum(row.gold for row in found) < 130
    again, other = read(tmp_path, *rows)[0], read(tmp_path, *rows, seed=1)[0]
    assert [row.gold for row in again] == [row.gold for row in found]
    assert [row.gold for row in other] != [row.gold for row in found]


def test_chosen_may_be_a_conversation(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hello?"}]
    sides = {
        side: [*turns, {"role": "assistant", "content": text}]
        for side, text in (("chosen", "Hi!"), ("rejected", "No."))
    }
    ((row,), _) = read(tmp_path, sides)
    assert row.prompt.messages == (Message("user", "Hello?"),)
    assert {row.first.text, row.second.text} == {"Hi!", "No."}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**PAIR, "label": "perhaps"}, "not first, second or tie"),
        ({**PAIR, "label": 3}, "not first, second or tie"),
        ({**PAIR, "label": True}, "not first, second or tie"),
        ({**PAIR, "label": 0.5}, "not first, second or tie"),
        ({**PAIR, "p": 1.5}, "not a probability"),
        (PAIR, "either a 'label' or a 'p'"),
        ({**PAIR, "label": 1, "p": 1.0}, "either a 'label' or a 'p'"),
        ({**PAIR, "second": "Hi!", "label": 1}, "identical"),
        ({**PAIR, "second": None, "label": 1}, "'second' is null"),
        ({**PAIR, "prompt": "", "label": 1}, "empty prompt"),
        ({"prompt": "Hello?", "chosen": "Hi!"}, "'rejected'"),
        ({"first": "Hi!", "second": "No.", "label": 1}, "neither a string"),
        ({**PAIR, "first": "No.", "second": "Hi!", "label": 2}, "of line 1 again"),
    ],
)
def test_a_row_that_is_no_comparison_is_named_by_line(
    row: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    found, (problem,) = read(tmp_path, {**PAIR, "label": "first"}, row)
    assert len(found) == 1
    assert problem.line == 2 and reason in problem.reason


def test_a_file_without_any_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no labelled comparison: line 1"):
        read(tmp_path, PAIR)


def test_labels_of_zero_and_one_alone_are_asked_about(tmp_path: Path) -> None:
    other = {**PAIR, "prompt": "Bye?"}
    with pytest.raises(ConfigError, match="0 and 1 alone"):
        read(tmp_path, {**PAIR, "label": 0}, {**other, "label": 1})
    found, _ = read(tmp_path, {**PAIR, "label": 0}, {**other, "label": 2})
    assert [row.gold for row in found] == [0.5, 0.0]
