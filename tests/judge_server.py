"""A local OpenAI-compatible server that says what a test tells it to, faults included."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

TOKENS_IN, TOKENS_OUT = 100, 10
"""What every proper reply is billed at."""

Request = dict[str, Any]


@dataclass(frozen=True)
class Say:
    """A proper chat completion."""

    text: str | None
    finish_reason: str = "stop"
    refusal: str | None = None
    logprobs: Sequence[tuple[str, dict[str, float]]] | None = None
    """Each token with the log-probs of the likeliest ones in its place, its own among them."""
    model: str = "m-002"
    tokens: tuple[int, int] = (TOKENS_IN, TOKENS_OUT)
    cached: int | None = None
    """Tokens in that are said to come from a cache."""
    tier: str | None = None


@dataclass(frozen=True)
class Raw:
    """Any other reply: a status, a body, headers."""

    body: str
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    tokens: tuple[int, int] | None = None
    """What it is billed at all the same."""


@dataclass(frozen=True)
class Hang:
    """Nothing comes, or with `drip` a byte of a proper reply now and then, until the end."""

    drip: bool = False
    tokens: tuple[int, int] | None = None


@dataclass(frozen=True)
class Reset:
    """The connection is cut."""


Answer = Say | Raw | Hang | Reset
RATE_LIMIT = Raw(
    '{"error": {"message": "slow down", "code": "rate_limit_exceeded"}}',
    429,
    {"Retry-After": "0.01"},
)
NO_QUOTA = Raw('{"error": {"message": "no money left", "code": "insufficient_quota"}}', 429)
SERVER_ERROR = Raw('{"error": {"message": "oops"}}', 500, {"Retry-After": "0.01"})
BAD_GATEWAY = Raw("<html>bad gateway</html>", 502, {"Retry-After": "0.01"}, "text/html")
BAD_KEY = Raw('{"error": {"message": "bad key", "code": "invalid_api_key"}}', 401)
NO_MODEL = Raw('{"error": {"message": "no such model", "code": "model_not_found"}}', 404)
NO_SCHEMA = Raw('{"error": {"message": "response_format is not supported"}}', 400)
TOO_LONG = Raw('{"error": {"message": "too long", "code": "context_length_exceeded"}}', 400)
HTML = Raw("<html>welcome</html>", content_type="text/html")
NO_JSON = Raw('{"id": "x", "choi')
NO_CHOICES = Raw('{"id": "x", "object": "chat.completion", "model": "m", "choices": []}')


class JudgeServer:
    """Serves on a port of its own while used as a context manager.

    `answer(request, number)` gives the reply to the number-th request, counted from 0. `requests`
    holds every request's body, `num_billed` counts the proper replies, `bill` is what all replies
    that were paid for came to, in tokens in and out.
    """

    def __init__(self, answer: Callable[[Request, int], Answer]) -> None:
        self.requests: list[Request] = []
        self.num_billed = 0
        self.bill = (0, 0)
        self._answer = answer
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def take(self, request: Request) -> Answer:
        """Count a request and find its reply."""
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
        answer = self._answer(request, number)
        used = getattr(answer, "tokens", None)
        with self._lock:
            self.num_billed += isinstance(answer, Say)
            if used is not None:
                self.bill = (self.bill[0] + used[0], self.bill[1] + used[1])
        return answer

    def other(self, method: str, path: str, content_type: str, body: bytes) -> Raw:
        """The reply to a request for anything but a chat completion."""
        return Raw('{"error": {"message": "no such path"}}', 404)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 20.0

            def do_GET(self) -> None:
                self._reply(server.other("GET", self.path, "", b""))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if not self.path.endswith("/chat/completions"):
                    kind = self.headers["Content-Type"]
                    self._reply(server.other("POST", self.path, kind, body))
                    return
                answer = server.take(json.loads(body))
                if isinstance(answer, Reset):
                    self.close_connection = True
                elif isinstance(answer, Hang):
                    self._hang(answer)
                else:
                    self._reply(answer if isinstance(answer, Raw) else _whole(answer))

            def _reply(self, raw: Raw) -> None:
                body = raw.body.encode()
                headers = {
                    "Content-Type": raw.content_type,
                    "Content-Length": str(len(body)),
                    **raw.headers,
                }
                self.send_response(raw.status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def _hang(self, hang: Hang) -> None:
                self.close_connection = True
                if not hang.drip:
                    server._ending.wait(20.0)
                    return
                body = _whole(Say("[[A]]")).body.encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                for byte in body:
                    if server._ending.wait(0.1):
                        return
                    self.wfile.write(bytes([byte]))

            def log_message(self, format: str, *args: Any) -> None:
                """Stay silent."""

        return Handler


def _whole(say: Say) -> Raw:
    return Raw(json.dumps(completion(say)))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is part of the tests."""


def completion(say: Say) -> dict[str, Any]:
    """The body of a reply."""
    message = {"role": "assistant", "content": say.text, "refusal": say.refusal}
    choice = {"index": 0, "message": message, "finish_reason": say.finish_reason}
    if say.logprobs is not None:
        tokens = [_token(token, top[token]) for token, top in say.logprobs]
        for token, (_, top) in zip(tokens, say.logprobs, strict=True):
            token["top_logprobs"] = [_token(*other) for other in top.items()]
        choice["logprobs"] = {"content": tokens, "refusal": None}
    body: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": say.model,
        "choices": [choice],
        "usage": usage_of(*say.tokens),
    }
    if say.tier is not None:
        body["service_tier"] = say.tier
    if say.cached is not None:
        body["usage"]["prompt_tokens_details"] = {"cached_tokens": say.cached}
    return body


def usage_of(tokens_in: int, tokens_out: int) -> dict[str, Any]:
    total = tokens_in + tokens_out
    return {
        "prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": total
    }  # fmt: skip


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
