"""vcrpy's cassette with an index, strict about what it does not hold, and the files it is kept in."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from vcr.cassette import Cassette
from vcr.filters import decode_response
from vcr.record_mode import RecordMode
from vcr.request import Request

from ...errors import ReplayError
from . import scrub

Key = tuple[str, str, bytes]

SKIPPED = ("httplib", "requests", "boto3", "urllib3", "httplib2", "tornado")
"""Libraries that no provider's SDK here speaks; what they load (a tokenizer's table) is no API traffic."""


_JOB_LIST = "/fine_tuning/jobs"


class Tape(Cassette):  # type: ignore[misc]
    """All exchanges of a run in the order in which they were answered.

    Requests match by method, address and body (see ``scrub``); equal ones are answered in recorded order, whatever
    other requests come in between, so concurrent requests replay in any order.
    """

    def __init__(self, **options: Any) -> None:
        self._secrets: set[bytes] = set()
        self._index: dict[Key, list[int]] = defaultdict(list)
        super().__init__(**options, before_record_request=self._clean_request)

    def append(self, request: Request, response: dict[str, Any]) -> None:
        """Keep an exchange, cleaned."""
        self._secrets |= scrub.secrets_of(request.headers)
        before = len(self.data)
        super().append(request, self._clean_response(response))
        if len(self.data) > before:
            self._index[_key(self.data[-1][0])].append(before)

    def can_play_response_for(self, request: Request) -> bool:
        """Whether an answer is left for the request. Raises ReplayError in a replay that has none left."""
        if self.record_mode == RecordMode.ALL:
            return False
        if request in self:
            return True
        cleaned = self._clean_request(request)
        known = self._index.get(_key(cleaned), [])
        asked = f"{cleaned.method} {cleaned.uri}"
        detail = (
            f"it was recorded {len(known)} time{'s' * (len(known) != 1)} and is asked once more"
            if known
            else self._nearest(cleaned)
        )
        raise ReplayError(
            f"the recording does not answer {asked}: {detail}. Config, data and versions must be those of the "
            "recording, and the run folder new. Record again where they changed."
        )

    def unplayed(self) -> list[str]:
        """Method and address of the recorded requests that nobody made, but for lists of jobs: a replay does not
        compare them with its store, and no loss follows from them."""
        missed = [r for i, (r, _) in enumerate(self.data) if not self.play_counts[i]]
        return [f"{r.method} {r.uri}" for r in missed if (r.method, r.path.endswith(_JOB_LIST)) != ("GET", True)]

    def _responses(self, request: Request) -> Iterator[tuple[int, Any]]:
        for position in self._index.get(_key(self._clean_request(request)), ()):
            yield position, self.data[position][1]

    def _nearest(self, request: Request) -> str:
        same_path = [r for r, _ in self.data if (r.method, r.uri) == (request.method, request.uri)]
        if same_path:
            return f"{len(same_path)} requests to this address were recorded, all with other contents"
        hosts = sorted({r.host for r, _ in self.data})
        return f"no request to this address was recorded (hosts: {', '.join(hosts) or 'none'})"

    @staticmethod
    def _clean_request(request: Request) -> Request:
        body = request.body_bytes or b""
        content_type = str(request.headers.get("content-type", ""))
        return Request(
            request.method,
            scrub.uri(request.uri),
            scrub.request_body(body, content_type),
            scrub.request_headers(dict(request.headers.items())),
        )

    def _clean_response(self, response: dict[str, Any]) -> dict[str, Any]:
        plain = decode_response(response)
        return {
            "status": plain["status"],
            "headers": scrub.response_headers(plain["headers"], self._secrets),
            "body": {"string": scrub.without_secrets(plain["body"]["string"] or b"", self._secrets)},
        }


def _key(request: Request) -> Key:
    return request.method, request.uri, request.body_bytes or b""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Request(_Strict):
    method: str
    uri: str
    body: str | bytes | None
    headers: dict[str, list[str]]


class _Status(_Strict):
    code: int
    message: str | None


class _Body(_Strict):
    string: str | bytes


class _Response(_Strict):
    status: _Status
    headers: dict[str, list[str]]
    body: _Body


class _Exchange(_Strict):
    request: _Request
    response: _Response


class _File(_Strict):
    version: int
    interactions: list[_Exchange]


class JsonLines:
    """Serializer of a cassette: JSON, one exchange a line, bodies that are not UTF-8 in base64."""

    @staticmethod
    def serialize(cassette: dict[str, Any]) -> str:
        lines = [json.dumps(item, default=_encode_bytes, separators=(",", ":")) for item in cassette["interactions"]]
        return '{"version":1,"interactions":[\n' + ",\n".join(lines) + "\n]}\n"

    @staticmethod
    def deserialize(text: str) -> dict[str, Any]:
        """Raises ReplayError where the file has another shape than ``serialize`` gives it."""
        try:
            return _File.model_validate(json.loads(text, object_hook=_decode_bytes)).model_dump()
        except (ValidationError, ValueError, RecursionError) as error:
            raise ReplayError(
                f"the recording is not readable ({type(error).__name__}); nothing was run. Record it again."
            ) from None


def _encode_bytes(value: object) -> dict[str, str]:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    raise TypeError(f"{type(value).__name__} in a recording")


def _decode_bytes(value: dict[str, Any]) -> Any:
    if value.keys() == {"base64"} and isinstance(value["base64"], str):
        return base64.b64decode(value["base64"], validate=True)
    return value


def open_tape(path: Path, *, recording: bool) -> Any:
    """vcrpy's context manager that puts a tape between the HTTP clients and the network."""
    return Tape.use(
        path=path,
        serializer=JsonLines,
        record_mode=RecordMode.ALL if recording else RecordMode.NONE,
        skip_patchers=SKIPPED,
    )
