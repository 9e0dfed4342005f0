"""What a recording keeps of a request and of an answer: what decides the outcome, and nothing that identifies anyone.

Headers go through allow-lists, so a new kind of secret header is dropped without anybody having to know it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from ..endpoint import is_loopback

LOCAL_HOST = "local-server"
"""Stands for every loopback address and port, so that a server on another port replays."""

BOUNDARY = "daunce-boundary"

_REQUEST_HEADERS = frozenset({"content-type"})
_RESPONSE_HEADERS = frozenset({"content-type", "retry-after", "retry-after-ms", "x-request-id"})
_RATE_LIMIT = "x-ratelimit-"
_SEQUENCE = "daunce_seq"
"""How far the run's store was when a job was submitted: it depends on how long answers took."""
_SECRET_HEADERS = ("authorization", "api-key", "x-api-key", "cookie", "proxy-authorization")
_SECRET_PARAMETERS = frozenset({"key", "api_key", "api-key", "access_token", "token", "sig", "signature"})
_IDENTITIES = (
    (re.compile(rb"\borg-[A-Za-z0-9]{6,}"), b"org-removed"),
    (re.compile(rb"\bproj_[A-Za-z0-9]{6,}"), b"proj_removed"),
    (re.compile(rb"\buser-[A-Za-z0-9]{12,}"), b"user-removed"),
    (re.compile(rb"\bsk-[A-Za-z0-9_*.-]{6,}"), b"sk-removed"),
    (re.compile(rb'("organization_id"\s*:\s*)"[^"]*"'), rb'\1"org-removed"'),
)


def uri(address: str) -> str:
    """A request's address: loopback host and port by one name, parameters sorted and without secrets."""
    parts = urlsplit(address)
    local = parts.hostname == "0.0.0.0" or is_loopback(parts.hostname)
    host = LOCAL_HOST if local else parts.netloc.rpartition("@")[2]
    query = sorted((k, v) for k, v in parse_qsl(parts.query, keep_blank_values=True) if k not in _SECRET_PARAMETERS)
    return urlunsplit((parts.scheme, host, parts.path, urlencode(query), ""))


def request_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The content type alone, its multipart boundary by a fixed name."""
    return {
        name.lower(): re.sub(r"boundary=[^;]+", f"boundary={BOUNDARY}", value)
        for name, value in headers.items()
        if name.lower() in _REQUEST_HEADERS
    }


def response_headers(headers: Mapping[str, list[str]], secrets: Iterable[bytes] = ()) -> dict[str, list[str]]:
    """Content type, waiting times, request id and rate limits, without the given secrets, organizations and users."""
    secrets = [*secrets]
    return {
        name.lower(): [without_secrets(value.encode(), secrets).decode() for value in values]
        for name, values in headers.items()
        if name.lower() in _RESPONSE_HEADERS or name.lower().startswith(_RATE_LIMIT)
    }


def request_body(body: bytes, content_type: str) -> bytes:
    """A body that is equal whenever the request means the same: JSON in one form, multipart with one boundary."""
    match = re.search(r"boundary=\"?([^;\"]+)", content_type)
    if match:
        body = body.replace(match[1].encode(), BOUNDARY.encode())
    elif "json" in content_type:
        with contextlib.suppress(ValueError, RecursionError):  # not JSON after all: compared byte by byte
            content = json.loads(body)
            if isinstance(content, dict) and isinstance(content.get("metadata"), dict):
                content["metadata"].pop(_SEQUENCE, None)
            body = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    return body


def without_secrets(body: bytes, secrets: Iterable[bytes]) -> bytes:
    """An answer's body without the given secrets, organization, project and user ids."""
    for secret in secrets:
        body = body.replace(secret, b"key-removed")
    for pattern, replacement in _IDENTITIES:
        body = pattern.sub(replacement, body)
    return body


def secrets_of(headers: Mapping[str, str]) -> set[bytes]:
    """What a request sends to prove who it is, to be looked for in everything that comes back."""
    found = set()
    for name, value in headers.items():
        if name.lower() in _SECRET_HEADERS:
            secret = value.removeprefix("Bearer ").strip()
            if len(secret) >= 6:
                found.add(secret.encode())
    return found
