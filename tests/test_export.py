"""Exporting a policy and the preferences that made it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_fixture import make_run

from online_dpo.errors import ConfigError, CorruptError
from online_dpo.export import export_campaign
from online_dpo.tables import read_table
from online_dpo.views import Campaign


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), policy=tiny_qwen2)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def pairs_of(run: Path, number: int) -> list[dict[str, Any]]:
    return read_table(run / "rounds" / f"{number:03d}" / "pairs" / "pairs.parquet")


def front_matter(card: Path) -> dict[str, Any]:
    _, front, _ = card.read_text(encoding="utf-8").split("---\n", 2)
    fields: dict[str, Any] = yaml.safe_load(front)
    return fields


def test_transformers_loads_the_policy(run: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_campaign(Campaign(run), tmp_path / "out")
    folder = tmp_path / "out" / "policy"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the lazy dog", return_tensors="pt")
    exported = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = exported(**ids).logits
        expected = AutoModelForCausalLM.from_pretrained(tiny_qwen2)(**ids).logits
    assert torch.equal(logits, expected)
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in tiny_qwen2.iterdir()} | {"README.md"}


@pytest.mark.parametrize("form", ["text", "messages"])
def test_datasets_reads_the_preferences(tmp_path: Path, form: str) -> None:
    from datasets import load_dataset

    run = make_run(tmp_path, form=form)
    written = export_campaign(Campaign(run), tmp_path / "out")
    assert [p.name for p in written] == ["policy", "preferences.jsonl", "preferences.parquet"]
    pairs = [pair for number in (1, 2, 3) for pair in pairs_of(run, number)]
    for kind, file in (("json", "preferences.jsonl"), ("parquet", "preferences.parquet")):
        data = load_dataset(
            kind, data_files=str(tmp_path / "out" / file), split="train", cache_dir=str(tmp_path)
        )
        assert {"prompt", "chosen", "rejected"} <= set(data.column_names)
        assert len(data) == len(pairs)
        row, pair = data[0], pairs[0]
        if form == "text":
            assert row["prompt"].startswith("Review of ") and row["chosen"] == pair["chosen_text"]
        else:
            assert [message["role"] for message in row["prompt"]] == ["user"]
            assert row["rejected"] == [{"role": "assistant", "content": pair["rejected_text"]}]
        assert data["pair_id"] == [pair["pair_id"] for pair in pairs]


def test_prompts_of_both_forms_make_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a dataset holds one form"):
        Campaign(make_run(tmp_path, rounds=1, form="both")).pairs()


def test_texts_and_messages_go_to_files_of_their_own(tmp_path: Path) -> None:
    run = make_run(tmp_path, form="both")
    written = export_campaign(Campaign(run), tmp_path / "out")
    assert [p.name for p in written[1:]] == [
        "preferences-text.jsonl",
        "preferences-text.parquet",
        "preferences-messages.jsonl",
        "preferences-messages.parquet",
    ]
    texts, chats = lines(written[1]), lines(written[3])
    assert all(isinstance(row["prompt"], str) for row in texts)
    assert all(isinstance(row["prompt"], list) for row in chats)
    assert len(texts) + len(chats) == sum(len(pairs_of(run, n)) for n in (1, 2, 3))


def test_an_earlier_round_comes_with_the_pairs_up_to_it(run: Path, tmp_path: Path) -> None:
    export_campaign(Campaign(run), tmp_path / "out", 2)
    rows = lines(tmp_path / "out" / "preferences.jsonl")
    assert [row["round"] for row in rows] == [n for n in (1, 2) for _ in pairs_of(run, n)]
    assert "# `demo`, round 2\n" in (tmp_path / "out" / "policy" / "README.md").read_text()


def test_the_card_says_how_the_policy_was_made_and_how_it_did(run: Path, tmp_path: Path) -> None:
    export_campaign(Campaign(run), tmp_path / "out")
    card = tmp_path / "out" / "policy" / "README.md"
    fields = front_matter(card)
    assert fields["library_name"] == "transformers"
    assert {"dpo", "online-dpo"} <= set(fields["tags"]) and "license" not in fields
    text = card.read_text(encoding="utf-8")
    assert "# license: fill in\n" in text
    assert "3 rounds of DPO" in text and "beta 0.1" in text
    assert "- Judge: `heuristic`\n" in text
    assert "`reviews` (12); held out: `reviews` (12)" in text
    assert len([line for line in text.splitlines() if line.startswith(("| 0 |", "| 3 |"))]) == 2
    assert "After 3 rounds the policy wins" in text
    assert str(tmp_path) not in text and str(run.parent) not in text


def test_the_card_names_a_base_model_of_the_hub(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=1, pinned=True)
    export_campaign(Campaign(run), tmp_path / "out")
    card = tmp_path / "out" / "policy" / "README.md"
    assert front_matter(card)["base_model"] == "acme/tiny"
    assert "`acme/tiny` at commit `abc123`" in card.read_text()


def test_names_cannot_break_out_of_the_card(tmp_path: Path) -> None:
    config = {"judge": {"name": "`</p>\n# Free text\n---"}}
    run = make_run(tmp_path, rounds=1, config=config)
    export_campaign(Campaign(run), tmp_path / "out")
    text = (tmp_path / "out" / "policy" / "README.md").read_text()
    assert "\n# Free" not in text and "- Judge: `'</p> # Free text ---`\n" in text


def test_a_given_model_that_was_not_trained_is_not_exported(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=1, pinned=True, finished=0)
    with pytest.raises(ConfigError, match="trained nothing: its policy is the given model"):
        export_campaign(Campaign(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_sft_policy_is_exported_without_preferences(tmp_path: Path) -> None:
    run = make_run(tmp_path, finished=0)
    assert export_campaign(Campaign(run), tmp_path / "out") == [tmp_path / "out" / "policy"]


def test_a_round_that_is_not_there_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished round 7 .finished: 0, 1, 2, 3"):
        export_campaign(Campaign(run), tmp_path / "out", 7)


def test_a_policy_that_retention_deleted_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=1)
    shutil.rmtree(run / "rounds" / "001" / "policy")
    with pytest.raises(ConfigError, match="deleted"):
        export_campaign(Campaign(run), tmp_path / "out", 1)


def test_a_folder_in_use_is_refused_and_an_empty_one_taken(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_campaign(Campaign(run), tmp_path / "out")
    with pytest.raises(ConfigError, match="not empty"):
        export_campaign(Campaign(run), tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        export_campaign(Campaign(run), tmp_path / "file")
    with pytest.raises(ConfigError, match="does not exist"):
        export_campaign(Campaign(run), tmp_path / "no" / "out")


def test_changed_weights_are_not_exported(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=1)
    (run / "rounds" / "001" / "policy" / "config.json").write_text("{}")
    with pytest.raises(CorruptError):
        export_campaign(Campaign(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_an_interrupted_export_left_is_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "policy").mkdir(parents=True)
    (tmp_path / "out.partial" / "stray").touch()
    export_campaign(Campaign(run), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert not (tmp_path / "out" / "stray").exists()


def test_a_row_is_a_line_whatever_it_holds(tmp_path: Path) -> None:
    run = make_run(tmp_path, rounds=1, odd_answer="one\u2028two\u0085three\nfour é")
    export_campaign(Campaign(run), tmp_path / "out")
    text = (tmp_path / "out" / "preferences.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert rows[0]["chosen"] == "one\u2028two\u0085three\nfour é"
