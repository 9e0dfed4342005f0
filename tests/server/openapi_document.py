"""An OpenAPI description of the server for the fuzzer, from the route table and the request models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from daunce_api.server.requests import CreateChatCompletion, CreateCompletion, CreateJob

BODIES: dict[str, type[BaseModel]] = {
    "/v1/fine_tuning/jobs": CreateJob,
    "/v1/completions": CreateCompletion,
    "/v1/chat/completions": CreateChatCompletion,
}

_TEXT = {"type": "string"}
_QUERIES: dict[str, dict[str, Any]] = {
    "/v1/files": {
        "purpose": _TEXT,
        "after": _TEXT,
        "limit": {"type": "integer", "minimum": 1, "maximum": 10_000},
        "order": {"enum": ["asc", "desc"]},
    },
    "/v1/fine_tuning/jobs": {"after": _TEXT, "limit": {"type": "integer", "minimum": 1, "maximum": 100}},
    "/v1/fine_tuning/jobs/{job_id}/events": {
        "after": _TEXT,
        "limit": {"type": "integer", "minimum": 1, "maximum": 1000},
    },
    "/v1/fine_tuning/jobs/{job_id}/checkpoints": {
        "after": _TEXT,
        "limit": {"type": "integer", "minimum": 1, "maximum": 1000},
    },
}
_ERRORS = {
    "400": "The request is wrong",
    "401": "The key is missing or wrong",
    "403": "Not allowed",
    "404": "No such object",
    "413": "The body is too large",
    "429": "Too many requests, or the daily limit of jobs",
    "503": "Busy, or the disk is full; try again",
}
_UPLOAD = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["file", "purpose"],
            "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"const": "fine-tune"}},
        }
    }
}
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(routes: Iterable[tuple[str, str, str]]) -> dict[str, Any]:
    """OpenAPI 3.1 of (method, path, handler name) rows."""
    models: list[tuple[type[BaseModel], Literal["validation"]]] = [(m, "validation") for m in BODIES.values()]
    _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")
    paths: dict[str, dict[str, Any]] = {}
    for method, pattern, name in routes:
        path = pattern.replace(":path}", "}")
        paths.setdefault(path, {})[method.lower()] = _operation(method, path, name)
    return {
        "openapi": "3.1.0",
        "info": {"title": "daunce serve: OpenAI's wire format over a local model", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": {**schemas["$defs"], "Error": _ERROR_SCHEMA},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _operation(method: str, path: str, name: str) -> dict[str, Any]:
    parameters = [
        {"name": p, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for p in re.findall(r"{(\w+)}", path)
    ]
    if method == "GET":
        parameters += [{"name": n, "in": "query", "schema": s} for n, s in _QUERIES.get(path, {}).items()]
    content = "application/octet-stream" if name == "content" else "application/json"
    answer = {} if name == "content" else {"schema": {"type": "object", "required": ["object"]}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}{re.sub(r'[^a-z]+', '_', path)}",
        "parameters": parameters,
        "responses": {
            "200": {"description": "Done", "content": {content: answer}},
            **{status: {"description": text, "content": error} for status, text in _ERRORS.items()},
        },
    }
    if method == "POST" and path == "/v1/files":
        operation["requestBody"] = {"required": True, "content": _UPLOAD}
    elif method == "POST" and path in BODIES:
        schema = {"$ref": f"#/components/schemas/{BODIES[path].__name__}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation
