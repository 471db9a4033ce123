"""Which addresses an endpoint may have, and where its key may be sent; pure."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from online_dpo.errors import ConfigError


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own, which nobody else can listen in on."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_url(url: str, *, key_env: str | None) -> None:
    """Raise ConfigError for an address that is none, holds a password or would show the key around.

    `key_env` names the environment variable of the key that is sent along, if one is.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        held = parts.username is not None or parts.password is not None
    except ValueError:
        usable = held = False
    if not usable:
        raise ConfigError(f"{url!r} is no endpoint's address: it begins with http:// or https://.")
    if held:
        raise ConfigError(
            f"The endpoint's address at {parts.hostname} holds a name or password, and addresses "
            "are written to files. Put the key into an environment variable (api_key_env)."
        )
    if key_env is not None and parts.scheme == "http" and not is_loopback(url):
        raise ConfigError(
            f"The key in {key_env} would cross the network in the clear to {url}. Use https, a "
            "tunnel to this machine (http://127.0.0.1:PORT), or, for a server that asks for no "
            "key, an api_key_env that is not set."
        )
