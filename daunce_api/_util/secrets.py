"""Recognizing and removing secrets: API keys in texts, and in any part of an address."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

_PREFIXED = r"(?:sk|rk|pk|tml|fw|tgp|hf|nvapi|gsk|xai)[-_][A-Za-z0-9_-]{12,}|eyJ[A-Za-z0-9_-]{16,}(?:\.[A-Za-z0-9_-]+)*"
_SHAPES = re.compile(rf"(?i:(bearer\s+)\S+)|\b(?:{_PREFIXED})")
_PREFIXED_WHOLE = re.compile(rf"(?:{_PREFIXED})\S*")
_MIXED = re.compile(r"(?=.*[a-z])(?=.*[A-Z])(?=(?:.*\d){3})[A-Za-z0-9]{32,}")
"""Random letters of both cases and digits: no model or option is named like that."""
_HEXADECIMAL = re.compile(r"(?i)[0-9a-f]{32,}")


def redacted(text: str) -> str:
    """The text without anything that looks like a key, and without the values of ``*_KEY``, ``*_TOKEN`` and
    ``*_SECRET`` environment variables."""
    for name, value in _environment():
        text = text.replace(value, f"<{name}>")
    return _SHAPES.sub(lambda m: f"{m.group(1) or ''}<secret>", text)


def looks_like_key(text: str, *, hexadecimal: bool = True) -> bool:
    """Whether a whole text looks like an API key. ``hexadecimal``: long hexadecimal numbers count, too; in addresses
    they are often account ids."""
    if any(value in text for _, value in _environment()):
        return True
    shapes = [_PREFIXED_WHOLE, _MIXED, *([_HEXADECIMAL] if hexadecimal else [])]
    return any(shape.fullmatch(text) for shape in shapes)


def address_problem(address: str) -> str | None:
    """Why an address cannot be used or must not be stored; None where it can. The address is not repeated: part of it
    may be secret."""
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or not address.isprintable() or " " in address:
        return "is not an address like http://127.0.0.1:8000/v1"
    if part := secret_part(address):
        return (
            f"carries {part}, and addresses are stored with the run. Put the secret into an environment variable and "
            "name that with api_key_env"
        )
    return None


def secret_part(address: str) -> str | None:
    """The part of an address that holds a secret, or may hold one; None where there is none."""
    parts = urlsplit(address)
    if "@" in parts.netloc:
        return "a user name or password"
    if parts.query or "?" in address:
        return "a query"
    if parts.fragment or "#" in address:
        return "a fragment"
    segments = re.split(r"[/;,:=]", unquote(parts.path))
    return "a key in its path" if any(looks_like_key(s, hexadecimal=False) for s in segments if s) else None


def _environment() -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        if name.endswith(("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")) and len(value.strip()) >= 8:
            yield name, value.strip()
