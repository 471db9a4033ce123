"""A kill before every durable step that the code takes, all of which are known by name.

A fault point is a call that writes, syncs, renames or removes: `file:function:call`, with a number
where a function has several. They are enumerated from the code, so that a new one must be listed.
"""

from __future__ import annotations

import ast
import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from kills import PACKAGE, assert_same, copy_until, kill_config, message, run_or_resume
from tiny import in_child

CALLS = {
    "begin", "event", "finish", "fsync", "fsync_path", "mkdir", "remove", "remove_tree", "rename",
    "rmtree", "save_file", "save_pretrained", "truncate", "unlink", "write", "write_atomic",
    "write_bytes", "write_plan", "write_table", "write_text",
}  # fmt: skip

FILES = (
    "campaign.py", "files.py", "integrity.py", "locks.py", "loop.py", "metrics_log.py",
    "store.py", "tidying.py",
    "models/loading.py", "samplers/handler.py", "stages/canary.py", "stages/evaluate.py",
    "stages/label.py", "stages/origin.py", "stages/pair.py", "stages/promote.py",
    "stages/sample.py", "stages/train.py", "tables.py", "training/checkpoints.py",
    "training/handler.py", "training/prompts.py", "training/reference.py",
)  # fmt: skip
"""What a campaign writes by; paid, asked and offline work have tests of their own."""

POINTS = (
    "campaign.py:_create:mkdir",
    "files.py:fsync_path:fsync",
    "files.py:remove_tree:rmtree",
    "files.py:remove_tree:unlink",
    "files.py:write_atomic:fsync",
    "files.py:write_atomic:fsync_path",
    "files.py:write_atomic:rename",
    "files.py:write_atomic:unlink",
    "files.py:write_atomic:write",
    "integrity.py:write_start:write_text",
    "integrity.py:write_start:write_text#2",
    "locks.py:RunLock._acquire:truncate",
    "locks.py:RunLock._acquire:write",
    "loop.py:Loop._heard:event",
    "loop.py:Loop._origin:write_plan",
    "loop.py:Loop._round:write_plan",
    "loop.py:Loop._timed:event",
    "loop.py:Loop._timed:event#2",
    "loop.py:Loop.run:event",
    "loop.py:Loop.run:event#2",
    "metrics_log.py:append_metrics:write",
    "metrics_log.py:rebuild_metrics:write_text",
    "models/loading.py:copy_tokenizer:mkdir",
    "models/loading.py:save_model:mkdir",
    "models/loading.py:save_model:save_pretrained",
    "samplers/handler.py:SamplerHandler.generate:write_table",
    "stages/canary.py:write_canary:write_text",
    "stages/evaluate.py:_answer:begin",
    "stages/evaluate.py:_answer:remove",
    "stages/evaluate.py:evaluate:write_table",
    "stages/evaluate.py:evaluate:write_text",
    "stages/label.py:label_shard:write_table",
    "stages/label.py:label_shard:write_text",
    "stages/origin.py:_commit_prompts:write_table",
    "stages/origin.py:_commit_sft:begin",
    "stages/origin.py:_commit_sft:remove",
    "stages/pair.py:_commit:write_table",
    "stages/pair.py:_commit:write_text",
    "stages/sample.py:_sample_shard:event",
    "stages/sample.py:_sample_shard:write_text",
    "stages/sample.py:load_policy:event#2",
    "stages/train.py:commit_checkpoint:finish",
    "stages/train.py:commit_checkpoint:remove",
    "stages/train.py:commit_training:finish",
    "stages/train.py:commit_training:unlink",
    "stages/train.py:commit_training:write_bytes",
    "stages/train.py:commit_training:write_text",
    "stages/train.py:score_reference:write_text",
    "stages/train.py:train:remove",
    "stages/train.py:train:remove#2",
    "stages/train.py:train_policy:begin",
    "stages/train.py:train_policy:begin#2",
    "stages/train.py:train_policy:finish",
    "store.py:RoundDir.begin:mkdir",
    "store.py:RoundDir.begin:remove_tree",
    "store.py:RoundDir.close:write_atomic",
    "store.py:RoundDir.commit:begin",
    "store.py:RoundDir.commit:finish",
    "store.py:RoundDir.finish:fsync_path",
    "store.py:RoundDir.finish:fsync_path#3",
    "store.py:RoundDir.finish:rename",
    "store.py:RoundDir.finish:write_atomic",
    "store.py:RoundDir.remove:remove_tree",
    "store.py:RoundDir.remove:remove_tree#2",
    "store.py:RoundDir.remove:fsync_path",
    "store.py:RoundDir.remove:rename",
    "store.py:RoundDir.write_plan:fsync_path",
    "store.py:RoundDir.write_plan:mkdir",
    "store.py:RoundDir.write_plan:write_atomic",
    "store.py:RunDir.event:write",
    "store.py:RunDir.write_text:write_atomic",
    "tables.py:write_table:write_table",
    "tidying.py:_delete:event",
    "tidying.py:_delete:remove",
    "training/checkpoints.py:save_checkpoint:mkdir",
    "training/checkpoints.py:save_checkpoint:save_file",
    "training/checkpoints.py:save_checkpoint:write_text",
    "training/checkpoints.py:save_optimizer:mkdir",
    "training/checkpoints.py:save_optimizer:save_file",
    "training/checkpoints.py:write_jsonl:write_text",
    "training/handler.py:Trainer._add_records:write_text",
    "training/handler.py:Trainer.init_model:save_pretrained",
    "training/prompts.py:write_prompts:mkdir",
    "training/prompts.py:write_prompts:write_table",
    "training/reference.py:write_reference_logps:mkdir",
    "training/reference.py:write_reference_logps:write_table",
)

ELSEWHERE = {
    "campaign.py:_make_way:remove_tree": "a refused config, before anything is committed",
    "models/loading.py:copy_tokenizer:write_text": "a tokenizer with a template of its own",
    "stages/origin.py:_commit_model:write_text": "a given model instead of model.init",
    "stages/evaluate.py:_rescore:write_table": "a judge that has changed",
    "stages/sample.py:_add:write_table": "answers of a second model",
    "stages/sample.py:_other_answers:event": "answers of a second model",
    "stages/sample.py:load_policy:event": "a canary that fails",
    "stages/train.py:checkpoint_listener.listen:event": "a trainer that reports seconds",
    "store.py:RoundDir.finish:fsync_path#2": "an artifact with folders inside",
    "store.py:_cut_torn_line:truncate": "an event after a torn one",
    "store.py:_set_aside:remove_tree": "an artifact whose successor was not committed",
    "store.py:_set_aside:rename": "an artifact whose successor was not committed",
    "store.py:_set_aside:remove_tree#2": "an artifact whose successor was not committed",
    "tidying.py:_temporaries.remove:remove_tree": "a start after a kill",
    "training/handler.py:Trainer.tokenize_offline:write_table": "offline pairs",
    "training/handler.py:Trainer.tokenize_offline:write_table#2": "offline pairs",
}
"""Points that this campaign does not come to, and why."""

SECTIONS: dict[str, dict[str, Any]] = {
    "compute": {"workers": "inline"},
    "train": {"optimizer": "carry", "batch_size": 2, "micro_batch_size": 2},
    "reference": {"promote": "never"},
    "campaign": {"rounds": 2, "prompts_per_round": 4, "retention": {"last": 1}},
}


class _Finder(ast.NodeVisitor):
    """The fault points of a file: their names by first and last line and the call's name."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.scope: list[str] = []
        self.found: dict[str, tuple[int, int, str]] = {}

    def _inside(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()

    visit_FunctionDef = _inside
    visit_ClassDef = _inside

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name in CALLS:
            stem = f"{self.file}:{'.'.join(self.scope)}:{name}"
            number = sum(key.split("#")[0] == stem for key in self.found)
            key = f"{stem}#{number + 1}" if number else stem
            self.found[key] = (node.lineno, node.end_lineno or node.lineno, name)
        self.generic_visit(node)


def points_in_code() -> dict[str, tuple[str, int, int, str]]:
    """Every fault point of the files above: its file, lines and the call's name."""
    points = {}
    for file in FILES:
        path = Path(PACKAGE) / file
        finder = _Finder(file)
        finder.visit(ast.parse(path.read_text(encoding="utf-8")))
        points |= {key: (str(path), *place) for key, place in finder.found.items()}
    return points


class _Watch:
    """Counts each fault point by round; at the one that is wanted, the process dies before it."""

    def __init__(self, wanted: tuple[str, int, int] | None, run: Path) -> None:
        self.wanted = wanted
        self.run = run
        self.counts: Counter[tuple[str, int]] = Counter()
        self.round = -1
        self.by_call: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for key, (path, first, last, name) in points_in_code().items():
            self.by_call.setdefault((path, name), []).append((first, last, key))

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self._see(frame.f_back, frame.f_code.co_name)
            if frame.f_code.co_qualname == "Loop._timed":
                self._enter(frame.f_locals["number"])
        elif event == "c_call":
            self._see(frame, argument.__name__)

    def _enter(self, number: int) -> None:
        """A round begins; what there is then is kept beside the run, for cases that begin there."""
        self.round = number
        if self.wanted is None and number > 0:
            sys.setprofile(None)
            copy_until(self.run, self.run.with_name(f"before-{number}"), number)
            sys.setprofile(self)

    def _see(self, caller: FrameType | None, name: str) -> None:
        if caller is None or name not in CALLS:
            return
        for first, last, key in self.by_call.get((caller.f_code.co_filename, name), ()):
            if first <= caller.f_lineno <= last:
                self.counts[key, self.round] += 1
                if self.wanted == (key, self.round, self.counts[key, self.round]):
                    os.kill(os.getpid(), signal.SIGKILL)


def run_watched(config: dict[str, Any], wanted: tuple[str, int, int] | None, out: str) -> None:
    """Run or resume; die before a wanted fault point, or write how often each was passed."""
    import threading

    from online_dpo.errors import CampaignError

    watch = _Watch(wanted, Path(config["campaign"]["run_dir"]))
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        run_or_resume(config)
    except CampaignError as error:
        Path(config["campaign"]["run_dir"]).with_suffix(".txt").write_text(str(error))
        raise SystemExit(error.exit_code) from None
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    Path(out).write_text(json.dumps([[*place, n] for place, n in watch.counts.items()]))


class Clean:
    """An uninterrupted campaign, and how often it passed each fault point in which round."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        config = kill_config(self.run, **SECTIONS)
        assert in_child(run_watched, config, None, str(folder / "counts")) == 0, message(config)
        rows = json.loads((folder / "counts").read_text())
        self.passed: dict[str, list[tuple[int, int]]] = {}
        for key, number, count in rows:
            self.passed.setdefault(key, []).append((number, count))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Clean:
    return Clean(tmp_path_factory.mktemp("clean"))


def test_every_fault_point_of_the_code_is_listed_and_reached(clean: Clean) -> None:
    assert len(POINTS) >= 25
    assert sorted(points_in_code()) == sorted({*POINTS, *ELSEWHERE})
    assert sorted(clean.passed) == sorted(POINTS)


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_before_a_fault_point_changes_nothing(
    clean: Clean, tmp_path: Path, point: str
) -> None:
    rng = random.Random(point)
    number, count = rng.choice(clean.passed[point])
    wanted = (point, number, rng.randint(1, count))
    config = kill_config(tmp_path / "run", **SECTIONS)
    if number > 0:
        copy_until(clean.run.with_name(f"before-{number}"), tmp_path / "run", number)
    assert in_child(run_watched, config, wanted, str(tmp_path / "out")) == -signal.SIGKILL, wanted
    assert in_child(run_or_resume, config) == 0, wanted
    assert_same(tmp_path / "run", clean.run, f"{wanted}")
