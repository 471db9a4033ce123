"""Stage 2: the judge's verdicts on each shard, beginning while later shards are sampled."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from online_dpo.endings import redo_command
from online_dpo.errors import DriftError, WaitingError
from online_dpo.paid.ledger import ledger_facts
from online_dpo.progress import Bar
from online_dpo.records import Prompt, Response
from online_dpo.stages.context import Context
from online_dpo.stages.implicit_rewards import reference_logps
from online_dpo.stages.sample import budget_of_shard
from online_dpo.store import RoundDir
from online_dpo.tables import read_table, responses_by_prompt, write_table

if TYPE_CHECKING:
    from online_dpo.judging import Labeller, Labels

Row = dict[str, Any]

CANCEL_TIMEOUT_S = 10.0
"""How long labelling that was cancelled may take to end; a judge that blocks is killed later."""


class Labelling:
    """Labels shards in a thread of its own, in the order they are submitted."""

    def __init__(self, context: Context, *, total: int) -> None:
        self._context = context
        self._total = total
        self._shards: queue.Queue[str | None] = queue.Queue()
        self._failure: BaseException | None = None
        self._labeller: Labeller
        self._thread = threading.Thread(target=self._run, name="label", daemon=True)
        # Waited for instead of the thread: a signal that interrupts Thread.join makes CPython
        # before 3.13 take a thread that still runs for ended.
        self._ended = threading.Event()

    def __enter__(self) -> Labelling:
        self._labeller = self._context.make_labeller(False)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._shards.put(None)
            while error is None and not self._ended.wait(timeout=0.2):
                pass
        except BaseException:
            self._cancel()
            raise
        if error is not None:
            self._cancel()
        else:
            self.check()

    def submit(self, shard: str) -> None:
        """Queue a committed shard. Raises what made an earlier one fail."""
        self.check()
        self._shards.put(shard)

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _cancel(self) -> None:
        """End labelling before the run directory is let go, even where a signal comes meanwhile."""
        deadline = time.monotonic() + CANCEL_TIMEOUT_S
        try:
            self._labeller.cancel()
        finally:
            try:
                self._ended.wait(timeout=CANCEL_TIMEOUT_S)
            except BaseException:
                self._ended.wait(timeout=max(deadline - time.monotonic(), 0.0))
                raise

    def _run(self) -> None:
        try:
            with self._context.progress.stage("label", total=self._total, unit="prompts") as bar:
                waiting = []
                while (shard := self._shards.get()) is not None:
                    try:
                        label_shard(self._context, shard, bar)
                    except WaitingError:
                        waiting.append(shard)
                # All is sampled and asked; people may have answered meanwhile.
                for shard in waiting:
                    label_shard(self._context, shard, bar)
        except BaseException as error:
            self._failure = error
        finally:
            self._ended.set()


def label_shard(context: Context, shard: str, bar: Bar) -> None:
    """Commit the labels of one shard of samples, if they are missing; `bar` counts prompts."""
    name = shard.replace("samples/", "labels/")
    rows = read_table(context.round.verify(shard) / "samples.parquet")
    prompts = context.load_prompts().by_id
    items = [(prompts[i], responses) for i, responses in responses_by_prompt(rows).items()]
    before = bar.done
    if context.round.has(name):
        bar.set(before + len(items))
        return
    labeller = context.make_labeller(False)
    with context.working("label"):
        labels = labeller.label(
            items,
            purpose=f"round-{context.round.number:03d}",
            on_share=lambda share: bar.set(before + int(share * len(items))),
            reference_logps=reference_logps(context, shard),
            budget=budget_of_shard(context, shard),
        )
        table = [r for item, label in zip(items, labels, strict=True) for r in _rows(item, label)]
    check_judge(context.round, labeller.identity)
    inputs = {"samples": context.round.manifest(shard)["sha256"]}
    with context.round.commit(name, inputs=inputs) as draft:
        write_table(draft.path / "labels.parquet", "labels", table)
        (draft.path / "metrics.json").write_text(json.dumps(_counts(table), indent=2) + "\n")
        draft.rows = len(table)
        judge = {"judge": labeller.identity, "kind": labeller.kind}
        draft.facts = {**judge, **ledger_facts(context.run.path)}
    bar.set(before + len(items))


def check_judge(round_dir: RoundDir, judge: Mapping[str, str]) -> None:
    """Raise DriftError where another judge, or version of it, has labelled a part of the round."""
    for part in round_dir.children("labels"):
        earlier = round_dir.manifest(part).get("judge", judge)
        if earlier != judge:
            raise DriftError(
                f"{round_dir.path / part} was labelled by {earlier['name']!r} in version "
                f"{earlier['version']}, and the judge is now {judge['name']!r} in version "
                f"{judge['version']}; one round has one judge. Bring the earlier one back, or have "
                "all of the round labelled anew.",
                remedy=redo_command(round_dir, "labels"),
            )


def _rows(item: tuple[Prompt, list[Response]], labels: Labels) -> list[Row]:
    """One row a score or a comparison; an invalid one has its reason and no value."""
    prompt, responses = item
    empty: Row = {"prompt_id": prompt.id, "prompt_source": prompt.source, "second_id": None}
    empty |= {"score": None, "p": None, "orders": 0, "raws": [], "order_ps": [], "vote_ps": []}
    if labels.scores is not None:
        return [
            {**empty, "first_id": response.id, "score": score.value, "reason": score.reason}
            for response, score in zip(responses, labels.scores, strict=True)
        ]
    assert labels.comparisons is not None
    return [
        {
            **empty,
            "first_id": c.first_id,
            "second_id": c.second_id,
            "p": c.p,
            "reason": c.reason,
            "orders": c.orders,
            "raws": list(c.raws),
            "order_ps": list(c.order_ps),
            "vote_ps": list(c.vote_ps),
        }
        for c in labels.comparisons
    ]


def _counts(table: list[Row]) -> dict[str, Any]:
    """How many verdicts are valid, and why the others are not."""
    reasons = Counter(str(r["reason"]) for r in table if r["score"] is None and r["p"] is None)
    scores = [r["score"] for r in table if r["score"] is not None]
    return {
        "verdicts": len(table),
        "valid": len(table) - sum(reasons.values()),
        "ties": sum(r["p"] == 0.5 for r in table),
        "order_conflicts": sum(_conflicts(r["order_ps"]) for r in table),
        "invalid": dict(sorted(reasons.items())),
        "mean_score": sum(scores) / len(scores) if scores else None,
    }


def _conflicts(order_ps: Sequence[float]) -> bool:
    """Whether one order prefers the first response and the other the second."""
    return len(order_ps) == 2 and min(order_ps) < 0.5 < max(order_ps)
