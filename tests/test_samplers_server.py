"""The server sampler against a server of the tests' own: faults that a real one will not show."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from online_dpo.config import Endpoint, ModelConfig, SamplingConfig
from online_dpo.errors import EngineError
from online_dpo.records import ModelRef, Prompt, Response, SamplingParams, SamplingRequest
from online_dpo.samplers import openai_server
from online_dpo.samplers.openai_server import OpenAIServerSampler

Reply = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


def completion(body: dict[str, Any], **choice: Any) -> tuple[int, dict[str, Any]]:
    """Three tokens that tell the server's own story: the seed, the prompt's length, and an EOS."""
    whole = {
        "index": 0,
        "text": "abc",
        "finish_reason": "stop",
        "token_ids": [body["seed"] % 300, len(body["prompt"]), 0],
        "logprobs": {
            "token_logprobs": [-1.0, -2.0, -3.0],
            "tokens": ["a", "b", "c"],
            "text_offset": [0, 1, 2],
            "top_logprobs": None,
        },
        **choice,
    }
    answer = {"id": "1", "object": "text_completion", "created": 0, "model": "policy"}
    return 200, {**answer, "choices": [whole]}


class Server:
    """Counts what it is asked and answers as it is told."""

    def __init__(self, reply: Reply) -> None:
        self.completions: list[dict[str, Any]] = []
        self.reloads: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = 0
        self.reply = reply
        self.reload_status = 200
        self.url = ""
        self._lock = threading.Lock()

    def handle(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/reload":
            self.reloads.append(body)
            return self.reload_status, {"detail": "no such folder here"}
        if path == "/v1/models":
            model = {"id": "policy", "object": "model", "created": 0, "owned_by": "test"}
            return 200, {"object": "list", "data": [{**model, "max_model_len": 64}]}
        with self._lock:
            self.completions.append(body)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return self.reply(body)
        finally:
            with self._lock:
                self.in_flight -= 1


@contextmanager
def serving(reply: Reply = completion) -> Iterator[Server]:
    server = Server(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer({})

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, body: dict[str, Any]) -> None:
            status, reply = server.handle(self.path, body)
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def sampler(folder: Path, *servers: Server) -> OpenAIServerSampler:
    endpoints = [Endpoint(url=f"{s.url}/v1", reload_url=f"{s.url}/reload") for s in servers]
    made = OpenAIServerSampler(
        ModelConfig(path="tiny"), SamplingConfig(sampler="openai_server", endpoints=endpoints)
    )
    made.load(ModelRef(str(folder), "0"), folder)
    return made


def answers(made: OpenAIServerSampler, num: int = 6, n: int = 2) -> list[Response]:
    requests = [
        SamplingRequest(
            Prompt(f"p{i}", "test", token_ids=(5,) * (i + 1)), tuple(range(10 * i, 10 * i + n))
        )
        for i in range(num)
    ]
    params = SamplingParams(n, 0.9, 0.8, 7, 30, ("\n\n",))
    return [r for group in made.generate(requests, params) for r in group]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_server, "WAITS_S", (0.01, 0.01, 0.01))


def test_endpoints_take_turns_and_answers_keep_their_order(tiny_llama: Path) -> None:
    with serving() as one, serving() as two:
        responses = answers(sampler(tiny_llama, one, two))
        assert [s.reloads for s in (one, two)] == [[{"path": str(tiny_llama)}]] * 2
        assert len(one.completions) == len(two.completions) == 6
    assert [r.id for r in responses] == [f"p{i}:{k:02d}" for i in range(6) for k in range(2)]
    for r in responses:
        i, k = int(r.prompt_id[1:]), int(r.id[-2:])
        assert r.token_ids == (10 * i + k, i + 1, 0)[: 3 if 10 * i + k else 1]
        assert r.finish_reason == "eos"


def test_every_parameter_is_sent(tiny_llama: Path) -> None:
    with serving() as server:
        answers(sampler(tiny_llama, server), num=1, n=1)
        body = server.completions[0]
    assert body == {
        "model": "policy", "prompt": [5], "n": 1, "seed": 0, "max_tokens": 30, "logprobs": 0,
        "temperature": 0.9, "top_p": 0.8, "top_k": 7, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop": ["\n\n"],
        "stop_token_ids": [0], "ignore_eos": False, "min_tokens": 0, "skip_special_tokens": True,
        "return_token_ids": True,
    }  # fmt: skip


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(tiny_llama: Path, status: int) -> None:
    failures = iter([status, status, status])

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        code = next(failures, None)
        return completion(body) if code is None else (code, {"error": {"message": "busy"}})

    with serving(reply) as server:
        assert len(answers(sampler(tiny_llama, server), num=1, n=1)) == 1
        assert len(server.completions) == 4


def test_a_server_that_stays_busy_is_an_engine_error(tiny_llama: Path) -> None:
    busy = (503, {"error": {"message": "queue full"}})
    with (
        serving(lambda body: busy) as server,
        pytest.raises(EngineError, match="HTTP 503.*queue full"),
    ):
        answers(sampler(tiny_llama, server), num=1, n=1)


def test_a_refused_request_is_not_repeated(tiny_llama: Path) -> None:
    refusal = (400, {"error": {"message": "temperature too high"}})
    with serving(lambda body: refusal) as server:
        with pytest.raises(EngineError, match="HTTP 400.*temperature too high"):
            answers(sampler(tiny_llama, server), num=1, n=1)
        assert len(server.completions) == 1


def test_a_server_that_is_gone_is_an_engine_error(tiny_llama: Path) -> None:
    with serving() as server:
        made = sampler(tiny_llama, server)
    with pytest.raises(EngineError, match="cannot be reached in 4 attempts"):
        answers(made, num=1, n=1)


def test_a_server_without_token_ids_is_refused(tiny_llama: Path) -> None:
    with (
        serving(lambda body: completion(body, token_ids=None)) as server,
        pytest.raises(EngineError, match="returns no token ids"),
    ):
        answers(sampler(tiny_llama, server))


def test_a_server_that_ignores_the_check_of_its_weights_is_refused(tiny_llama: Path) -> None:
    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return completion({**body, "seed": 3})

    with (
        serving(reply) as server,
        pytest.raises(EngineError, match="does not know allowed_token_ids"),
    ):
        sampler(tiny_llama, server).probe([((3, 4), (5,))])


def test_a_failing_reload_hook_is_an_engine_error(tiny_llama: Path) -> None:
    with serving() as server:
        server.reload_status = 404
        with pytest.raises(EngineError, match="HTTP 404.*no such folder here"):
            sampler(tiny_llama, server)


def test_concurrency_is_bounded(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_server, "CONCURRENCY", 3)
    with serving() as server:
        assert len(answers(sampler(tiny_llama, server), num=20)) == 40
        assert server.most_in_flight <= 3
