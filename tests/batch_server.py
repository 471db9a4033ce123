"""A scripted judge server with the files and batches of an OpenAI-compatible API."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from email import message_from_bytes
from typing import Any

from judge_server import Answer, JudgeServer, Raw, Request, Say, completion

Finish = Callable[[int], str]
"""Gives the status in which a batch, by its number from 0, ends."""


@dataclass
class _Batch:
    """A batch as the server knows it."""

    id: str
    lines: list[dict[str, Any]]
    metadata: dict[str, str]
    looks_left: int
    status: str = "in_progress"
    files: dict[str, str | None] = field(default_factory=dict)


class BatchServer(JudgeServer):
    """Works through a batch once it has been looked at `looks` times.

    An expired batch got half of its lines done, a failed one none. `fail_next` is given in place of
    the next replies about batches and files, in turn. `watch(method, path)` is called when such a
    request has been worked on and not yet answered.
    """

    def __init__(
        self,
        answer: Callable[[Request, int], Answer],
        *,
        looks: int = 2,
        finish: Finish = lambda number: "completed",
    ) -> None:
        super().__init__(answer)
        self.batches: list[_Batch] = []
        self.calls: list[str] = []
        self.fail_next: list[Raw | None] = []
        self.watch: Callable[[str, str], None] = lambda method, path: None
        self._looks = looks
        self._finish = finish
        self._files: dict[str, str] = {}
        self._turn = threading.Lock()

    def other(self, method: str, path: str, content_type: str, body: bytes) -> Raw:
        path = path.partition("/v1")[2]
        with self._turn:
            self.calls.append(f"{method} {path.partition('?')[0]}")
            fault = self.fail_next.pop(0) if self.fail_next else None
            reply = fault or self._worked(method, path, content_type, body)
        self.watch(method, path)
        return reply

    def _worked(self, method: str, path: str, content_type: str, body: bytes) -> Raw:
        name = path.partition("?")[0].split("/")[2:]
        if (method, path) == ("POST", "/files"):
            return _json({"id": self._store(_uploaded(content_type, body)), "object": "file"})
        if (method, path) == ("POST", "/batches"):
            return _json(self._shown(self._create(json.loads(body))))
        if path.startswith("/batches/"):
            (batch,) = (batch for batch in self.batches if batch.id == name[0])
            return _json(self._shown(self._looked_at(batch)))
        if path.startswith("/batches"):
            listed = [self._shown(batch) for batch in reversed(self.batches)]
            return _json({"object": "list", "data": listed, "has_more": False})
        return Raw(self._files[name[0]], content_type="application/jsonl")

    def _store(self, content: str) -> str:
        self._files[f"file-{len(self._files)}"] = content
        return f"file-{len(self._files) - 1}"

    def _create(self, asked: dict[str, Any]) -> _Batch:
        assert asked["endpoint"] == "/v1/chat/completions"
        lines = [json.loads(line) for line in self._files[asked["input_file_id"]].splitlines()]
        batch = _Batch(f"batch-{len(self.batches)}", lines, asked["metadata"], self._looks)
        self.batches.append(batch)
        return batch

    def _looked_at(self, batch: _Batch) -> _Batch:
        batch.looks_left -= 1
        if batch.looks_left == 0:
            batch.status = self._finish(self.batches.index(batch))
            self._work(batch)
        return batch

    def _work(self, batch: _Batch) -> None:
        count = {"completed": len(batch.lines), "expired": len(batch.lines) // 2}
        done = batch.lines[: count.get(batch.status, 0)]
        rows = [self._line(line) for line in reversed(done)]
        if batch.status == "expired":
            error = {"code": "batch_expired", "message": "This request was not executed."}
            rows += [
                {"custom_id": line["custom_id"], "response": None, "error": error}
                for line in batch.lines[len(done) :]
            ]
        for name, good in (("output_file_id", True), ("error_file_id", False)):
            texts = [json.dumps(row) for row in rows if _is_good(row) == good]
            batch.files[name] = self._store("\n".join(texts)) if texts else None

    def _line(self, line: dict[str, Any]) -> dict[str, Any]:
        answer = self.take(line["body"])
        if isinstance(answer, Say):
            response = {"status_code": 200, "body": completion(answer)}
        else:
            assert isinstance(answer, Raw)
            response = {"status_code": answer.status, "body": json.loads(answer.body)}
        return {"custom_id": line["custom_id"], "response": response, "error": None}

    def _shown(self, batch: _Batch) -> dict[str, Any]:
        errors = {"data": [{"message": "line 1 is no request", "code": "invalid"}]}
        return {
            "id": batch.id,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "status": batch.status,
            "metadata": batch.metadata,
            "errors": errors if batch.status == "failed" else None,
            **batch.files,
        }


def _is_good(row: dict[str, Any]) -> bool:
    return row["response"] is not None and row["response"]["status_code"] == 200


def _uploaded(content_type: str, body: bytes) -> str:
    message = message_from_bytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    for part in message.walk():
        if part.get_filename():
            content = part.get_payload(decode=True)
            assert isinstance(content, bytes)
            return content.decode()
    raise AssertionError("no file was uploaded")


def _json(value: dict[str, Any]) -> Raw:
    return Raw(json.dumps(value))
