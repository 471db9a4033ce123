"""Connections to OpenAI-compatible endpoints: no redirects, bounded replies, a key to its host."""

from __future__ import annotations

import base64
import json
import urllib.parse
from typing import Any

import openai

from online_dpo.endpoint_urls import check_url

NO_KEY = "none"
"""What is sent to a server that asks for no key; the client refuses to send nothing."""

MAX_REPLY_BYTES = 1 << 24
"""Of a reply, unpacked: a hundred times what a judge says at its longest."""

MAX_FILE_BYTES = 1 << 30
"""Of a batch's file, unpacked."""


def connect(base_url: str | None, key: str | None, *, key_env: str | None) -> openai.AsyncOpenAI:
    """A pool of connections to one endpoint, OpenAI's own where `base_url` is None.

    Retries and deadlines are the caller's. Raises ConfigError where the key would not be safe.
    """
    client = openai.AsyncOpenAI(
        api_key=key or NO_KEY,
        base_url=base_url,
        max_retries=0,
        timeout=None,
        http_client=_Client(_spellings(key) if key else (), follow_redirects=False, timeout=None),
    )
    # The environment may name another address than OpenAI's own.
    check_url(str(client.base_url), key_env=key_env if key else None)
    return client


class ReplyTooLarge(Exception):
    """A reply of more bytes than any honest one has."""


MIN_SECRET = 8
"""Characters of a key from which on it is a secret, and no word that replies hold by chance."""


def _spellings(key: str) -> tuple[bytes, ...]:
    """The key as a server may say it back: as it is, in JSON, in an address, in base64."""
    if len(key) < MIN_SECRET:
        return ()
    quoted = json.dumps(key)[1:-1]
    texts = {key, quoted, quoted.replace("/", "\\/"), urllib.parse.quote(key, safe="")}
    coded = {base64.b64encode(text.encode()).rstrip(b"=") for text in (key, f"Bearer {key}")}
    return (*sorted((text.encode() for text in texts), key=len, reverse=True), *sorted(coded))


class _Client(openai.DefaultAsyncHttpxClient):
    """Reads every reply whole, up to its bound: what it unpacks to counts, not what was sent.

    Replies and errors are kept in files and shown; `secrets` are taken out of them first.
    """

    def __init__(self, secrets: tuple[bytes, ...], **options: Any) -> None:
        super().__init__(**options)
        self._secrets = secrets

    async def send(self, request: Any, **options: Any) -> Any:
        response = await super().send(request, **{**options, "stream": True})
        limit = MAX_FILE_BYTES if "/files/" in request.url.path else MAX_REPLY_BYTES
        body = bytearray()
        try:
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > limit:
                    raise ReplyTooLarge(f"a reply of more than {limit >> 20} MiB")
        finally:
            await response.aclose()
        content = bytes(body)
        for secret in self._secrets:
            content = content.replace(secret, b"(key)")
        packed = ("content-encoding", "content-length", "transfer-encoding")
        headers = [pair for pair in response.headers.multi_items() if pair[0].lower() not in packed]
        return type(response)(
            response.status_code, headers=headers, content=content, request=request
        )
