"""Offline pairs, earlier rounds' pairs and other answers join a campaign, marked by origin."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from judge_server import JudgeServer, Request, Say
from tiny import in_child, tiny_config

from online_dpo.stages.context import read_prompts
from online_dpo.store import RoundDir, RunDir
from online_dpo.tables import read_table


def run_it(config: dict[str, Any]) -> None:
    import online_dpo

    online_dpo.run(config)


def test_offline_and_earlier_pairs_make_up_their_shares(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"red {i}:", "chosen": f" red {i} round.", "rejected": f" blue {i}."}
        for i in range(30)
    ]
    rows.append({"prompt": "red 0:", "chosen": " same", "rejected": " same"})
    offline = tmp_path / "offline.jsonl"
    offline.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    config = tiny_config(
        tmp_path / "run",
        pairs={"earlier_share": 0.25, "offline": {"path": str(offline), "share": 0.25}},
    )
    assert in_child(run_it, config) == 0
    run = RunDir(tmp_path / "run")
    assert run.round(0).manifest("offline")["rows"] == 30
    problems = (run.path / "rounds/000/offline/problems.jsonl").read_text()
    assert "identical" in problems
    pairs = read_table(run.path / "rounds/002/pairs/pairs.parquet")
    origins = Counter(row["origin"] for row in pairs)
    new = origins["round-002"]
    assert origins["offline"] == round(new / 2) and 0 < origins["round-001"] <= round(new / 2)
    assert len({row["pair_id"] for row in pairs}) == len(pairs)


def test_offline_pairs_leave_evaluation_and_training_prompts_alone(tmp_path: Path) -> None:
    """The offline set has the campaign's prompts, its file the same name."""
    offline = tmp_path / "offline" / "prompts.jsonl"
    config = tiny_config(
        tmp_path / "run",
        pairs={"offline": {"path": str(offline), "share": 0.5}},
        campaign={"rounds": 1},
    )
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.loads(line) for line in prompts.read_text().splitlines()]
    prompts.write_text("\n".join(json.dumps({**line, "level": 7}) for line in lines))
    offline.parent.mkdir()
    answers = {"chosen": " red round.", "rejected": " blue."}
    offline.write_text("\n".join(json.dumps({**line, **answers}) for line in lines))
    assert in_child(run_it, config) == 0
    run = RunDir(tmp_path / "run")
    assert run.round(0).manifest("offline")["rows"] == 16
    problems = (run.path / "rounds/000/offline/problems.jsonl").read_text().splitlines()
    assert [json.loads(p)["reason"] for p in problems] == ["also an evaluation prompt"] * 8
    table = read_prompts(run)
    held_out = {table.by_id[i].token_ids for i in table.eval["prompts"]}
    pairs = read_table(run.path / "rounds/001/pairs/pairs.parquet")
    assert any(row["origin"] == "offline" for row in pairs)
    assert not held_out & {tuple(row["prompt_token_ids"]) for row in pairs}
    campaign = [table.by_id[i] for i in (*table.train["prompts"], *table.eval["prompts"])]
    assert [prompt.metadata for prompt in campaign] == [{"level": 7}] * 24


def test_given_answers_join_the_candidates(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", campaign={"rounds": 1})
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.loads(line) for line in prompts.read_text().splitlines()]
    prompts.write_text(
        "\n".join(json.dumps({**line, "gold": " red red red red round."}) for line in lines)
    )
    config["prompts"]["train"][0]["answer_field"] = "gold"
    assert in_child(run_it, config) == 0
    shard = tmp_path / "run/rounds/001/samples/part-00000/samples.parquet"
    rows = read_table(shard)
    assert Counter(row["source"] for row in rows) == {"policy": 16, "given": 4}
    assert all(row["logprobs"] is None for row in rows if row["source"] == "given")
    pairs = read_table(tmp_path / "run/rounds/001/pairs/pairs.parquet")
    assert {row["chosen_text"] for row in pairs} == {" red red red red round."}


def test_a_second_model_joins_and_is_paid_once(tmp_path: Path) -> None:
    def answer(request: Request, number: int) -> Say:
        assert (request["top_p"], request["stop"]) == (0.5, ["END"])
        text = "<think>blue</think> red red round."
        return Say(text, finish_reason="length" if number == 0 else "stop")

    with JudgeServer(answer) as server:
        also = {"url": server.url, "model": "strong", "api_key_env": "SECOND_KEY"}
        sampling = {"also": also, "top_p": 0.5, "stop": ["END"], "strip_thinking": True}
        config = tiny_config(tmp_path / "run", sampling=sampling, campaign={"rounds": 1})
        assert in_child(run_with_key, config, "none") == 0
        assert len(server.requests) == 8
        again = tiny_config(tmp_path / "b" / "run", sampling=sampling)
        again["campaign"]["rounds"] = 1
        assert in_child(run_with_key, again, "001/samples/part-00000") == -signal.SIGKILL
        assert in_child(run_with_key, again, "none") == 0
        assert len(server.requests) == 16
    rows = read_table(tmp_path / "b/run/rounds/001/samples/part-00000/samples.parquet")
    others = [row for row in rows if row["source"] == "strong"]
    assert len(others) == 4 and all(row["logprobs"] is None for row in others)
    assert {row["text"] for row in others} == {"red red round."}
    assert {row["finish_reason"] for row in others} <= {"eos", "length"}


def run_with_key(config: dict[str, Any], artifact: str) -> None:
    """Run, and end by SIGKILL before the named artifact is committed."""
    os.environ["SECOND_KEY"] = "secret"
    finish = RoundDir.finish

    def finish_or_die(self: RoundDir, name: str, *args: Any, **kwargs: Any) -> Any:
        if f"{self.number:03d}/{name}" == artifact:
            os.kill(os.getpid(), signal.SIGKILL)
        return finish(self, name, *args, **kwargs)

    RoundDir.finish = finish_or_die  # type: ignore[method-assign]
    run_it(config)
