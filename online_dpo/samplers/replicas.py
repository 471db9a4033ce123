"""Data parallel sampling: one worker for each replica of the policy, seen as a single worker."""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from online_dpo.workers import Event, OnEvent, Worker

_SLOWEST_FIRST = ("restarted", "fresh", "reloaded", "adapter", "cached")


class ReplicatedSampler:
    """A `Worker` that deals prompts and sequences to several samplers, which hold the same policy.

    Each is a process of its own: transformers cannot load two models in one at the same time.

    Request i goes to replica i modulo their number, so that the deal depends on the call alone.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = list(workers)

    def call(self, method: str, *, on_event: OnEvent | None = None, **params: Any) -> Event:
        """Run a method on all; the first failure ends every replica and is raised."""
        if method == "generate":
            return self._generate(on_event or _ignore, **params)
        if method == "score":
            dealt = self._deal(params["sequences"])
            results = self._all(method, [{"sequences": part} for part in dealt], on_event)
            return {"logps": _interleaved([result["logps"] for result in results])}
        results = self._all(method, [params] * len(self._workers), on_event)
        return _loaded(results) if method == "load" else results[0]

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def _generate(
        self,
        on_event: OnEvent,
        *,
        prompts: str | Sequence[Mapping[str, Any]],
        out: str,
        **params: Any,
    ) -> Event:
        rows = pq.read_table(prompts).to_pylist() if isinstance(prompts, str) else prompts
        dealt = [part for part in self._deal(rows) if part]
        seeds = params.pop("seeds")
        with tempfile.TemporaryDirectory(prefix="online-dpo-") as folder:
            outs = [Path(folder) / f"{i}.parquet" for i in range(len(dealt))]
            asked = [
                {
                    **params,
                    "prompts": part,
                    "seeds": {row["id"]: seeds[row["id"]] for row in part},
                    "out": str(path),
                }
                for part, path in zip(dealt, outs, strict=True)
            ]
            results = self._all("generate", asked, on_event)
            order = [row["id"] for row in rows]
            pq.write_table(
                _merged([pq.read_table(path) for path in outs], order), out, compression="zstd"
            )
        sizes = [result["batch_size"] for result in results]
        return {
            "rows": sum(result["rows"] for result in results),
            "tokens": sum(result["tokens"] for result in results),
            "batch_size": None if None in sizes else min(sizes),
            "finish": dict(sum((Counter(result["finish"]) for result in results), Counter())),
        }

    def _deal(self, items: Sequence[Any]) -> list[list[Any]]:
        return [list(items[i :: len(self._workers)]) for i in range(len(self._workers))]

    def _all(
        self, method: str, params: Sequence[Mapping[str, Any]], on_event: OnEvent | None
    ) -> list[Event]:
        """Call the first replicas, one for each set of parameters, all at once."""
        calls = [
            _Call(worker, method, one, events)
            for worker, one, events in zip(
                self._workers,
                params,
                _shared_events(on_event or _ignore, len(params)),
                strict=False,
            )
        ]
        try:
            for call in calls:
                call.start()
            pending = list(calls)
            while pending:
                pending[0].join(0.2)
                for call in [call for call in pending if not call.is_alive()]:
                    if call.error is not None:
                        raise call.error
                    pending.remove(call)
        except BaseException:
            self.close()
            raise
        return [call.result for call in calls]


class _Call(threading.Thread):
    """One replica's share of a call."""

    def __init__(
        self, worker: Worker, method: str, params: Mapping[str, Any], on_event: OnEvent
    ) -> None:
        super().__init__(daemon=True)
        self.result: Event = {}
        self.error: BaseException | None = None
        self._work: Callable[[], Event] = lambda: worker.call(method, on_event=on_event, **params)

    def run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:
            self.error = error


def _shared_events(on_event: OnEvent, num: int) -> list[OnEvent]:
    """Receivers of the replicas' events that pass on the progress of all together."""
    lock = threading.Lock()
    done, of = [0] * num, [0] * num

    def receiver(index: int) -> OnEvent:
        def receive(event: Event) -> None:
            with lock:
                if event.get("event") == "progress":
                    done[index], of[index] = event["done"], event["of"]
                    event = {**event, "done": sum(done), "of": sum(of)}
                on_event(event)

        return receive

    return [receiver(index) for index in range(num)]


def _loaded(results: Sequence[Event]) -> Event:
    """The results of a load as one: the slowest way, the longest time, the largest error."""
    hows = {result["how"] for result in results}
    checked = [result["canary"]["max_error"] for result in results if result["canary"] is not None]
    return {
        "seconds": max(result["seconds"] for result in results),
        "how": next(how for how in _SLOWEST_FIRST if how in hows),
        "canary": {"max_error": max(checked)} if checked else None,
        "deterministic": all(result["deterministic"] for result in results),
    }


def _merged(tables: Sequence[pa.Table], prompt_ids: Sequence[str]) -> pa.Table:
    """The replicas' rows in the order of the prompts, those of one prompt in their own."""
    whole = pa.concat_tables(tables)
    place = {prompt_id: i for i, prompt_id in enumerate(prompt_ids)}
    places = [place[prompt_id] for prompt_id in whole.column("prompt_id").to_pylist()]
    return whole.take(sorted(range(len(places)), key=places.__getitem__))


def _interleaved(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """The inverse of dealing items in turn."""
    num_items = sum(len(part) for part in parts)
    return [parts[i % len(parts)][i // len(parts)] for i in range(num_items)]


def _ignore(event: Event) -> None:
    """Where nobody listens to progress."""
