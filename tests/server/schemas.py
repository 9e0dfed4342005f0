"""OpenAI's JSON Schemas (``openai_schemas.json`` names their origin and licence in ``$comment``) as validators."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

_DOCUMENT = json.loads((Path(__file__).parent / "openai_schemas.json").read_text())
_URI = "urn:openai"
_REGISTRY: Any = Registry().with_resource(_URI, Resource(_DOCUMENT, DRAFT202012))


@lru_cache(maxsize=64)
def _validator(name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"{_URI}#/components/schemas/{name}"}, registry=_REGISTRY)


def check(name: str, body: Any) -> None:
    """Raises jsonschema.ValidationError where a body does not have the shape ``name``."""
    _validator(name).validate(body)


_BY_ROUTE = {
    ("POST", "files"): "OpenAIFile",
    ("GET", "files"): "ListFilesResponse",
    ("GET", "files/*"): "OpenAIFile",
    ("DELETE", "files/*"): "DeleteFileResponse",
    ("POST", "fine_tuning/jobs"): "FineTuningJob",
    ("GET", "fine_tuning/jobs"): "ListPaginatedFineTuningJobsResponse",
    ("GET", "fine_tuning/jobs/*"): "FineTuningJob",
    ("POST", "fine_tuning/jobs/*/cancel"): "FineTuningJob",
    ("GET", "fine_tuning/jobs/*/events"): "ListFineTuningJobEventsResponse",
    ("GET", "fine_tuning/jobs/*/checkpoints"): "ListFineTuningJobCheckpointsResponse",
    ("GET", "models"): "ListModelsResponse",
    ("GET", "models/*"): "Model",
    ("DELETE", "models/*"): "DeleteModelResponse",
    ("POST", "completions"): "CreateCompletionResponse",
    ("POST", "chat/completions"): "CreateChatCompletionResponse",
}


def check_response(method: str, path: str, status: int, body: bytes) -> None:
    """Validate an answer of the API by what was asked. ``path`` begins with ``/v1/``."""
    if path.endswith("/content") and status == 200:
        return
    parsed = json.loads(body)
    if status >= 400:
        check("ErrorResponse", parsed)
        return
    parts = path.removeprefix("/v1/").split("/")
    depth = {"files": 1, "fine_tuning": 2, "models": 1}.get(parts[0])
    if depth is not None and len(parts) > depth:
        parts[depth] = "*"
    check(_BY_ROUTE[(method, "/".join(parts))], parsed)
