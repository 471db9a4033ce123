"""The labelling page's server: one annotator, on this machine alone, behind a token."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import secrets
import sys
import threading
from collections.abc import Callable
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from online_dpo.annotation.desk import Desk, Refused
from online_dpo.errors import CampaignError, ConfigError

HOST = "127.0.0.1"
TOKEN_HEADER = "X-Label-Token"
MAX_BODY = 4096
"""Bytes of the longest request that the page makes, and more."""

_TIMEOUT_S = 30.0
_FOLDER = Path(__file__).parent / "page"


class LabelServer(ThreadingHTTPServer):
    """Serves a desk. Every start has a token of its own, which the address carries."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, desk: Desk, *, port: int = 0) -> None:
        """Raises ConfigError where the port is taken."""
        self.desk = desk
        self.token = secrets.token_urlsafe(32)
        self.lock = threading.Lock()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"Port {port} of {HOST} is not to be had ({error.strerror}); give another --port, "
                "or none for any that is free."
            ) from None

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        """The page's address. What stands behind # never leaves the browser."""
        return f"http://{HOST}:{self.port}/#{self.token}"

    def settle(self) -> None:
        """Wait for the verdict that is being saved, and take no further one."""
        self.lock.acquire()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no fault worth a traceback."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: LabelServer
    protocol_version = "HTTP/1.1"
    server_version = "online-dpo"
    sys_version = ""
    timeout = _TIMEOUT_S

    def do_GET(self) -> None:
        if not self._from_this_machine():
            self._refuse(HTTPStatus.FORBIDDEN, "This page is served under its own address only.")
        elif self.path == "/":
            body, policy = page()
            self._send(HTTPStatus.OK, body, "text/html; charset=utf-8", policy)
        elif self.path != "/api/state":
            self._refuse(HTTPStatus.NOT_FOUND, "There is no such page.")
        elif not self._knows_the_token():
            self._refuse(HTTPStatus.FORBIDDEN, "Open the address that the command has printed.")
        else:
            self._answer(lambda desk: None)

    def do_POST(self) -> None:
        own = {f"http://{host}" for host in self._hosts()}
        if not self._from_this_machine() or self.headers.get("Origin") not in own:
            self._refuse(HTTPStatus.FORBIDDEN, "Only the page itself may do this.")
        elif not self._knows_the_token():
            self._refuse(HTTPStatus.FORBIDDEN, "Open the address that the command has printed.")
        elif self.path not in ("/api/verdict", "/api/undo"):
            self._refuse(HTTPStatus.NOT_FOUND, "There is no such page.")
        elif (data := self._body()) is None:
            self._refuse(HTTPStatus.BAD_REQUEST, "A small JSON object was expected.")
        elif self.path == "/api/undo":
            self._answer(Desk.undo)
        else:
            self._answer(
                lambda desk: desk.give(
                    str(data.get("task")), data.get("choice"), data.get("seconds")
                )
            )

    def _answer(self, work: Callable[[Desk], None]) -> None:
        """Do the work, then tell the page where things stand; saved means synced to the disk."""
        status, problem, state = HTTPStatus.OK, None, None
        with self.server.lock:
            try:
                work(self.server.desk)
            except Refused as error:
                status, problem = HTTPStatus.CONFLICT, str(error)
            except CampaignError as error:
                status, problem = HTTPStatus.INTERNAL_SERVER_ERROR, error.message
            with contextlib.suppress(CampaignError):
                state = self.server.desk.state()
        if state is None and problem is None:
            status, problem = HTTPStatus.INTERNAL_SERVER_ERROR, "The run directory is damaged."
        body = json.dumps({"state": state, "problem": problem}, allow_nan=False)
        self._send(status, body.encode(), "application/json")

    def _refuse(self, status: HTTPStatus, problem: str) -> None:
        """Say why not; the connection ends, for what was not read of the request."""
        self.close_connection = True
        body = json.dumps({"state": None, "problem": problem})
        self._send(status, body.encode(), "application/json")

    def _send(
        self, status: HTTPStatus, body: bytes, kind: str, policy: str = "default-src 'none'"
    ) -> None:
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": f"{policy}; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
        if self.close_connection:
            headers["Connection"] = "close"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _hosts(self) -> set[str]:
        return {f"{name}:{self.server.port}" for name in (HOST, "localhost")}

    def _from_this_machine(self) -> bool:
        """Whether the browser meant this server: a name that was bent to 127.0.0.1 is another."""
        return self.headers.get_all("Host", []) in [[host] for host in self._hosts()]

    def _knows_the_token(self) -> bool:
        given = self.headers.get(TOKEN_HEADER, "")
        return hmac.compare_digest(given.encode(), self.server.token.encode())

    def _body(self) -> dict[str, Any] | None:
        length = self.headers.get("Content-Length", "")
        kind = self.headers.get("Content-Type", "").split(";")[0].strip()
        if kind != "application/json" or not length.isascii() or not length.isdigit():
            return None
        if int(length) > MAX_BODY:
            return None
        try:
            data = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            return None
        return data if isinstance(data, dict) else None

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not worth a line each."""


@cache
def page() -> tuple[bytes, str]:
    """The page with its style and script inside, and the policy that allows these two alone."""
    style, script = ((_FOLDER / f"label.{kind}").read_text("utf-8") for kind in ("css", "js"))
    text = (_FOLDER / "label.html").read_text("utf-8")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "connect-src 'self'; img-src data:"
    )
    return text.replace("{style}", style).replace("{script}", script).encode(), policy


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
