"""Where requests go and with which key: addresses and keys are checked here, and a key is never part of a message."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from ipaddress import ip_address
from urllib.parse import urlsplit

from .._util.secrets import address_problem
from ..errors import ConfigurationError

ANONYMOUS = "no-key"
"""Sent as the bearer token to servers without keys; the SDK insists on one."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go. ``api_key`` is not part of the representation; ``provider`` is used in messages."""

    base_url: str
    api_key: str = field(default=ANONYMOUS, repr=False)
    provider: str = "the server"

    @property
    def loopback(self) -> bool:
        return is_loopback(urlsplit(self.base_url).hostname)


def is_loopback(host: str | None) -> bool:
    """Whether a name or an address is one that only this machine can reach."""
    try:
        return host == "localhost" or ip_address(host or "").is_loopback
    except ValueError:
        return False


def api_key_from(variable: str) -> str:
    """The key in an environment variable. Raises ConfigurationError that names the variable, never the key."""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigurationError(
            f"the environment variable {variable} holds no API key. Set it (export {variable}=...), or name another "
            "one with backend.api_key_env. `daunce plan` works without a key."
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigurationError(
            f"the environment variable {variable} holds characters that no API key has (spaces, line breaks or "
            "letters outside ASCII). Copy the key again."
        )
    return key


def checked_base_url(base_url: str) -> str:
    """The URL without a trailing slash. Raises ConfigurationError where it is not http(s), or may carry a secret."""
    if problem := address_problem(base_url):
        raise ConfigurationError(f"base_url {problem}.")
    return base_url.rstrip("/")
