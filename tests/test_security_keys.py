"""The key of an API: from the environment to its endpoint alone, and nowhere else on any path."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from judge_cases import pair
from judge_server import (
    BAD_GATEWAY,
    BAD_KEY,
    HTML,
    NO_CHOICES,
    NO_JSON,
    NO_MODEL,
    NO_QUOTA,
    NO_SCHEMA,
    RATE_LIMIT,
    SERVER_ERROR,
    TOO_LONG,
    Answer,
    JudgeServer,
    Raw,
    Reset,
    Say,
)  # fmt: skip  # isort: skip
from labellers import MakeLabeller, serve
from run_fixture import make_run
from tiny import in_child

from online_dpo.config import Endpoint
from online_dpo.endpoint_urls import check_url, is_loopback
from online_dpo.errors import CampaignError, ConfigError, JudgeError
from online_dpo.paid import door
from online_dpo.paid.ledger_table import row_hash
from online_dpo.paid.openai_client import OpenAIChat
from online_dpo.report.build import build_report
from online_dpo.samplers import openai_server
from online_dpo.views import Campaign

KEY = "sk-canary/+=7f3a9c5e1b"
VARIABLE = "CANARY_API_KEY"
FORMS = {
    "plain": KEY,
    "base64": base64.b64encode(KEY.encode()).decode().rstrip("="),
    "base64 of a header": base64.b64encode(f"Bearer {KEY}".encode()).decode().rstrip("=")[8:],
    "URL-encoded": urllib.parse.quote(KEY, safe=""),
    "hexadecimal": KEY.encode().hex(),
    "its end": KEY[-12:],
}

REDIRECT = Raw("", 302, {"Location": "http://localhost:9/elsewhere"})
ECHO = Raw(json.dumps({"error": {"message": f"Incorrect API key: {KEY}"}}), 401)
ECHO_QUOTED = Raw(json.dumps({"error": {"message": urllib.parse.quote(KEY, safe="")}}), 403)
PATHS: dict[str, Answer] = {
    "success": Say('{"verdict": "A"}'),
    "rate limit": RATE_LIMIT,
    "no quota": NO_QUOTA,
    "server error": SERVER_ERROR,
    "bad gateway": BAD_GATEWAY,
    "bad key": BAD_KEY,
    "no model": NO_MODEL,
    "no schema": NO_SCHEMA,
    "too long": TOO_LONG,
    "page": HTML,
    "no JSON": NO_JSON,
    "no choices": NO_CHOICES,
    "reset": Reset(),
    "redirect": REDIRECT,
    "the key in an error": ECHO,
    "the key in another form": ECHO_QUOTED,
    "the key in a page": Raw(f"<p>{KEY}</p>", content_type="text/html"),
    "the key in a verdict": Say(f'{{"verdict": "A", "reason": "{KEY}"}}'),
    "the key in the model's name": Say('{"verdict": "A"}', model=KEY),
}


def label_all(places: list[tuple[str, str]]) -> None:
    """Label one pair in each folder by the server at its address."""
    for folder, url in places:
        label_and_look(folder, url)


def label_and_look(folder: str, url: str) -> None:
    """Label one pair, as a campaign's process does, its output and its children's in files."""
    from online_dpo.config import JudgeConfig
    from online_dpo.judging import Labeller

    log = os.open(f"{folder}/output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ[VARIABLE] = KEY
    events = open(f"{folder}/events.txt", "a")  # noqa: SIM115
    door.BACKOFF_S = 0.001
    options = {
        "model": "m", "base_url": url, "api_key_env": VARIABLE, "price_per_million": [1.0, 2.0],
    }  # fmt: skip
    labeller = Labeller(
        JudgeConfig(name="llm_pairwise", options=options, retries=1),
        base=None, ledger_path=Path(folder) / "judgments.sqlite", seed=3, round=1,
        on_event=lambda event: print(json.dumps(event, default=str), file=events),
    )  # fmt: skip
    try:
        for comparison in labeller.compare_pairs([pair(0)], purpose="label"):
            print(comparison)
    except CampaignError as error:
        print(error, error.remedy, error.safe)
        import traceback

        traceback.print_exc()
    finally:
        labeller.close()
        events.close()


def found_in(folder: Path) -> list[str]:
    """Where the key stands, in which form."""
    return [
        f"{name} in {path.name}: {path.read_bytes()[max(0, at - 60) : at + 60]!r}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for name, form in FORMS.items()
        if (at := path.read_bytes().find(form.encode())) >= 0
    ]


def test_the_key_stands_nowhere_after_success_and_every_failure(tmp_path: Path) -> None:
    assert len(PATHS) >= 16
    seen: list[str] = []
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(serve(answer)) for name, answer in PATHS.items()}
        places = []
        for server in servers.values():
            _record_keys(server, seen)
            folder = tmp_path / f"{len(places):02d}"
            folder.mkdir()
            places.append((str(folder), server.url))
        assert in_child(label_all, places) == 0
    for (folder_name, _), (name, server) in zip(places, servers.items(), strict=True):
        folder = Path(folder_name)
        assert (folder / "output.txt").stat().st_size and server.requests, name
        assert found_in(folder) == [], name
    assert set(seen) == {f"Bearer {KEY}"}, "it must have been sent"


def _record_keys(server: JudgeServer, seen: list[str]) -> None:
    handler: Any = server._server.RequestHandlerClass
    post = handler.do_POST

    def do_POST(self: Any) -> None:
        seen.append(self.headers["Authorization"])
        post(self)

    handler.do_POST = do_POST


def test_children_are_not_told_the_key_by_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arguments are shown to every user of a machine; the environment is its owner's alone."""
    from online_dpo import workers

    monkeypatch.setenv(VARIABLE, KEY)
    started: list[list[str]] = []
    popen = subprocess.Popen

    def record(arguments: list[str], **options: Any) -> Any:
        started.append(arguments)
        return popen(arguments, **options)

    monkeypatch.setattr(workers.subprocess, "Popen", record)
    worker = workers.ChildWorker(
        "judge", "online_dpo.asking.judge_worker:JudgeHandler",
        {"name": "judge_cases:length", "options": {}, "base": None},
        run=tmp_path, log=tmp_path / "judge.log",
        env={"PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    worker.call("describe")
    worker.close()
    assert started and KEY not in json.dumps(started)
    assert found_in(tmp_path) == []


def test_a_report_shows_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    options = {"model": "m", "api_key_env": VARIABLE, "api_key": KEY, "headers": {"token": KEY}}
    config = {"judge": {"name": "llm_pairwise", "options": options}}
    run = make_run(tmp_path / "made", rounds=1, config=config)
    text = build_report(Campaign(run), tmp_path / "report.html").read_text()
    assert not [name for name, form in FORMS.items() if form in text]


def test_a_key_in_the_config_is_no_option() -> None:
    from judges.llm_pairwise import LLMPairwise

    with pytest.raises(TypeError):
        LLMPairwise("m", api_key=KEY)  # type: ignore[call-arg]


# --- where it may go


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://127.9.9.9/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://localhost:8000/v1", True),
        ("http://LOCALHOST/v1", True),
        ("http://localhost.evil.test/v1", False),
        ("http://127.0.0.1.evil.test/v1", False),
        ("http://127.0.0.1@evil.test/v1", False),
        ("http://0.0.0.0:8000/v1", False),
        ("http://10.0.0.1/v1", False),
        ("http://[fe80::1]/v1", False),
    ],
)
def test_loopback_is_this_machine_alone(url: str, loopback: bool) -> None:
    assert is_loopback(url) == loopback
    if loopback:
        check_url(url, key_env="K")
    else:
        with pytest.raises(ConfigError):
            check_url(url, key_env="K")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://x/v1",
        "file:///etc/passwd",
        "x",
        "",
        "//x/v1",
        "https://",
        "http://[x",
        "javascript:1",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="no endpoint's address"):
        check_url(url, key_env=None)


def test_addresses_hold_no_passwords() -> None:
    with pytest.raises(ConfigError, match="holds a name or password") as caught:
        check_url(f"https://user:{KEY[:9]}@api.test/v1", key_env=None)
    assert KEY[:9] not in str(caught.value)


def test_a_key_crosses_no_network_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    with pytest.raises(
        ConfigError, match=f"key in {VARIABLE} would cross the network in the clear"
    ):
        OpenAIChat("http://gpu1:8000/v1", VARIABLE)
    with pytest.raises(ConfigError, match="in the clear"):
        openai_server._Server(Endpoint(url="http://gpu1:8000/v1", api_key_env=VARIABLE))
    OpenAIChat("https://gpu1:8000/v1", VARIABLE)
    OpenAIChat("http://127.0.0.1:8000/v1", VARIABLE)
    monkeypatch.delenv(VARIABLE)
    OpenAIChat("http://gpu1:8000/v1", VARIABLE)  # Nothing secret is sent.
    monkeypatch.setenv("OPENAI_BASE_URL", "http://gpu1:8000/v1")
    monkeypatch.setenv(VARIABLE, KEY)
    with pytest.raises(ConfigError, match="in the clear"):
        OpenAIChat(None, VARIABLE)


@pytest.fixture
def trap() -> Iterator[tuple[str, list[str]]]:
    """An address that redirects lead to, and what arrives there."""
    arrived: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            arrived.append(f"{self.command} {self.headers.get('Authorization')}")
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1/chat/completions", arrived
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(
    make: MakeLabeller, trap: tuple[str, list[str]], status: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(door, "BACKOFF_S", 0.001)
    url, arrived = trap
    with (
        serve(Raw("", status, {"Location": url})) as server,
        pytest.raises(JudgeError, match=f"HTTP {status}"),
    ):
        make(server, retries=1).compare_pairs([pair(0)], purpose="label")
    assert arrived == []


def test_a_ledgers_batch_is_asked_about_where_the_config_says(
    make: MakeLabeller, tmp_path: Path, trap: tuple[str, list[str]]
) -> None:
    """A ledger that somebody sent names the address of a batch; no key goes there."""
    import sqlite3

    from batch_server import BatchServer

    url, arrived = trap
    batch = {"max_requests": 2, "poll_s": 0.05}
    with BatchServer(lambda request, number: Say('{"verdict": "A"}')) as server:
        labeller = make(server, batch=batch)
        labeller.compare_pairs([pair(0)], purpose="label")
    with sqlite3.connect(tmp_path / "judgments.sqlite") as db:
        db.execute("UPDATE batches SET base_url = ?, api_key_env = 'HOME'", (url,))
        for row in db.execute("SELECT * FROM calls").fetchall():
            forged = [*row[:2], "sent", *row[3:-1]]
            db.execute("DELETE FROM calls WHERE key = ? AND attempt = ?", row[:2])
            marks = ", ".join("?" * len(row))
            db.execute(f"INSERT INTO calls VALUES ({marks})", (*forged, row_hash(tuple(forged))))
    db.close()
    with serve(Say("[[A]]")) as server, pytest.raises(ConfigError, match="Ask as it was"):
        make(server, batch=batch).compare_pairs([pair(0)], purpose="label")
    assert arrived == []
