"""The heuristic judge against numbers worked out by hand."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from judges.heuristics import Heuristic
from online_dpo.errors import ConfigError
from online_dpo.records import FinishReason, Prompt, Response

ROOT = Path(__file__).parents[1]
PROMPT = Prompt(id="p", source="test", text="Review of the kettle:\n")


def load_generator() -> ModuleType:
    path = ROOT / "benchmarks" / "make_quickstart_data.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


data = load_generator()


def value(text: str, *scorers: dict[str, Any], finish_reason: FinishReason = "eos") -> float:
    response = Response(
        id="r", prompt_id="p", text=text, token_ids=(1,), finish_reason=finish_reason
    )
    [score] = Heuristic(scorers=scorers).score(PROMPT, [response])
    assert score.value is not None
    return score.value


def test_lexicon_counts_positive_minus_negative_words() -> None:
    scorer = {"kind": "lexicon", "positive": ["superb", "warm"], "negative": ["dull"]}
    assert value("Superb, (warm) and superb.", scorer) == 3
    assert value("Superb but dull, dull, dull.", scorer) == 1 - 3
    assert value("superbly undull", scorer) == 0
    assert value("", scorer) == 0


def test_lexicon_per_length_divides_by_words() -> None:
    scorer = {"kind": "lexicon", "positive": ["superb"], "per_length": True, "weight": 20}
    assert value("The plot is superb.", scorer) == 20 * 1 / 4
    assert value("", scorer) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", -2), ("one", -1), ("one two", 0), ("one two three", 0), ("1 2 3 4 5", -2)],
)
def test_length_costs_each_word_outside_the_window(text: str, expected: float) -> None:
    assert value(text, {"kind": "length", "min": 2, "max": 3}) == expected


def test_length_without_upper_end() -> None:
    assert value("word " * 500, {"kind": "length", "min": 2}) == 0


def test_repetition_is_the_share_of_n_grams_seen_before() -> None:
    # Bigrams of "a b a b a": ab ba ab ba; two of four are repeats.
    assert value("a b a b a", {"kind": "repetition", "n": 2}) == -0.5
    assert value("a b a b a", {"kind": "repetition", "n": 1, "weight": 5}) == -3
    assert value("a b a b a", {"kind": "repetition", "n": 5}) == 0
    assert value("a", {"kind": "repetition", "n": 2}) == 0


def test_regex_is_one_where_found() -> None:
    assert value("Price: 12 euros.", {"kind": "regex", "pattern": r"\b\d+ euros"}) == 1
    assert value("Price: free.", {"kind": "regex", "pattern": r"\b\d+ euros", "weight": 3}) == 0


def test_finished_costs_a_truncated_response() -> None:
    scorer = {"kind": "finished", "weight": 2}
    assert value("The plot", scorer, finish_reason="length") == -2
    assert value("The plot.", scorer) == 0
    assert value("The plot.", scorer, finish_reason="stop") == 0


def test_tokens_cost_their_number_beyond_the_free_ones() -> None:
    response = Response("r", "p", "three words here", (5, 6, 7, 8, 0), "eos")
    penalty = Heuristic(scorers=[{"kind": "tokens", "weight": 0.01}])
    assert penalty.score(PROMPT, [response])[0].value == pytest.approx(-0.05)
    free = {"kind": "tokens", "free": 3, "weight": 2}
    reward = {"kind": "regex", "pattern": "words", "weight": 10}
    assert Heuristic(scorers=[free, reward]).score(PROMPT, [response])[0].value == 10 - 2 * 2
    assert value("one token", {"kind": "tokens", "free": 3}) == 0


@pytest.mark.parametrize(
    ("form", "has", "lacks"),
    [
        ("json", '```json\n{"a": [1]}\n```', '{"a": 1} it is'),
        ("bullets", "- one\n\n  * two\n+ three", "- one\ntwo"),
        ("bullets", "- one", ""),
        ("numbered", "1. one\n2) two\n\n3. three", "1. one\n3. three"),
        ("numbered", "1. one", "2. two"),
        ("one_line", "\nAll in one.\n", "Two\nlines"),
        ("plain", "Snake_case costs 2 * 3 = 6 - 1.\nOne-line.", "# Title\ntext"),
        ("plain", "Just prose.", "Some **bold** prose."),
        ("plain", "Just prose.", "- a point"),
        ("plain", "An [aside] (really).", "A [link](there)."),
    ],
)
def test_format_is_one_where_the_form_is_there(form: str, has: str, lacks: str) -> None:
    scorer = {"kind": "format", "form": form, "weight": 3}
    assert value(has, scorer) == 3
    assert value(lacks, scorer) == 0


def write_corpus(folder: Path, *responses: object) -> str:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"response": text}) + "\n" for text in responses))
    return str(path)


@pytest.mark.parametrize(
    ("text", "unseen"),
    [
        ("The plot is dull.", 0),
        ("The end is dull.", 0),  # each transition occurs, in different rows
        ("The dull.", 1),
        ("plot is dull.", 1),  # no row starts so
        ("The plot is", 1),  # no row ends so
        ("The  plot is dull.", 2),  # a doubled space is an empty word
        ("Theplot is dull.", 2),
        ("", 1),
    ],
)
def test_transitions_count_unseen_neighbours(tmp_path: Path, text: str, unseen: int) -> None:
    corpus = write_corpus(tmp_path, "The plot is dull.", "The end is near.")
    assert value(text, {"kind": "transitions", "corpus": corpus, "weight": 1.5}) == -1.5 * unseen


def test_transitions_do_not_ask_how_a_truncated_response_ends(tmp_path: Path) -> None:
    scorer = {"kind": "transitions", "corpus": write_corpus(tmp_path, "The plot is dull.")}
    assert value("The plot", scorer, finish_reason="length") == 0
    assert value("The plot", scorer) == -1


def test_scorers_add_up_with_their_weights() -> None:
    scorers = [
        {"kind": "lexicon", "positive": ["good"], "weight": 2},
        {"kind": "length", "max": 1, "weight": 0.5},
    ]
    assert value("good good good", *scorers) == 2 * 3 - 0.5 * 2


def test_scores_align_with_responses() -> None:
    judge = Heuristic(scorers=[{"kind": "length", "max": 1}])
    responses = [
        Response(id=text, prompt_id="p", text=text, token_ids=(1,), finish_reason="eos")
        for text in ("a b c", "a", "a b")
    ]
    assert [score.value for score in judge.score(PROMPT, responses)] == [-2, 0, -1]
    assert judge.score(PROMPT, []) == []


@pytest.mark.parametrize(
    ("scorers", "message"),
    [
        ([], "judge.options.scorers is empty"),
        ([{"kind": "lenght"}], "scorers\\[0\\].*'lenght'"),
        ([{"min": 3}], "scorers\\[0\\].*kind"),
        ([{"kind": "length", "mim": 3}], "scorers\\[0\\]\\.mim: Extra inputs"),
        ([{"kind": "length", "min": -1}], "scorers\\[0\\]\\.min: .*greater than or equal to 0"),
        ([{"kind": "length", "min": 9, "max": 3}], "max \\(3\\) is smaller than min \\(9\\)"),
        ([{"kind": "finished"}, {"kind": "regex", "pattern": "("}], "scorers\\[1\\].*expression"),
        ([{"kind": "format", "form": "poem"}], "scorers\\[0\\]\\.form: .*'json'"),
        ([{"kind": "lexicon"}], "name at least one word"),
        ([{"kind": "lexicon", "positive": ["A"], "negative": ["a"]}], "both positive and negative"),
        ([{"kind": "finished", "weight": float("nan")}], "scorers\\[0\\]\\.weight: .*finite"),
        ([{"kind": "transitions", "corpus": "absent.jsonl"}], "absent.jsonl"),
    ],
)
def test_options_are_checked_by_name(scorers: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Heuristic(scorers=scorers)


def test_a_corpus_without_responses_is_named_by_line(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, "The plot is dull.", None)
    with pytest.raises(ConfigError, match=r"corpus\.jsonl:2: .*response"):
        Heuristic(scorers=[{"kind": "transitions", "corpus": corpus}])


def read_rows(name: str) -> list[dict[str, Any]]:
    text = (ROOT / "prompts" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_shipped_data_is_what_its_generator_writes(tmp_path: Path) -> None:
    for path in data.write_files(tmp_path):
        assert path.read_bytes() == (ROOT / "prompts" / path.name).read_bytes(), path.name
        assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("name", ["quickstart", "arithmetic"])
def test_held_out_prompts_are_nowhere_else(name: str) -> None:
    held_out = {row["prompt"] for row in read_rows(f"{name}_eval.jsonl")}
    train = {row["prompt"] for row in read_rows(f"{name}.jsonl")}
    shown = {row["prompt"] for row in read_rows(f"{name}_demonstrations.jsonl")}
    assert len(held_out) >= 64
    assert not held_out & train and not held_out & shown


def test_demonstrations_are_well_formed_and_mostly_not_positive() -> None:
    reviews = [row["response"] for row in read_rows("quickstart_demonstrations.jsonl")]
    assert all(map(data.is_well_formed, reviews))
    scorer = {
        "kind": "lexicon",
        "positive": data.lexicon("positive"),
        "negative": data.lexicon("negative"),
    }
    values = [value(review, scorer) for review in reviews]
    assert sum(v > 0 for v in values) / len(values) < 0.3
    assert sum(v < 0 for v in values) / len(values) > 0.4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The plot is superb.", True),
        ("I loved the warm ending. In short, it made my day brighter.", True),
        ("The plot is superb", False),
        ("The plot  is superb.", False),
        ("The plot is superb. ", False),
        ("plot is superb.", False),
        ("It is a ordinary film for families.", False),
        ("The plot is superb. The casing is sturdy.", False),  # a film and a product
        ("In short, it made my day brighter. The plot is superb.", False),  # the closing comes last
        ("In short, it made my day brighter.", False),
        ("superb superb superb", False),
        ("", False),
    ],
)
def test_grammar_membership(text: str, expected: bool) -> None:
    assert data.is_well_formed(text) is expected


def test_fresh_reviews_are_well_formed() -> None:
    rng = random.Random(0)
    assert all(
        data.is_well_formed(data.write_review(kind, rng))
        for kind in data.SUBJECTS
        for _ in "x" * 300
    )


@pytest.mark.parametrize("name", ["quickstart.yaml", "hackable.yaml"])
def test_the_configs_lexicon_is_the_grammars(name: str) -> None:
    config = yaml.safe_load((ROOT / "configs" / name).read_text(encoding="utf-8"))
    judges = [config["judge"], config.get("evaluation", {}).get("judge") or {"name": None}]
    for judge in judges:
        if judge["name"] != "heuristic":
            continue
        [lexicon] = [s for s in judge["options"]["scorers"] if s["kind"] == "lexicon"]
        assert sorted(lexicon["positive"]) == data.lexicon("positive")
        assert sorted(lexicon.get("negative", [])) in ([], data.lexicon("negative"))
        Heuristic(**judge["options"])
