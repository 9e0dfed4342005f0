"""A scripted server behind httpx2's mock transport, and short ways to make the objects under test."""

from __future__ import annotations

from typing import Any

import httpx2

from daunce_api.providers.base import ScorerCapabilities, TrainerCapabilities
from daunce_api.providers.openai_wire.echo import EchoOptions, EchoScorer
from daunce_api.providers.openai_wire.trainer import WireTrainer, WireTrainerOptions
from tests.scripted_server import KEY, Handler, ScriptedServer, encoded

__all__ = ["KEY", "Server", "encoded", "failing", "job_object", "openai_error"]


class Server(ScriptedServer):
    def trainer(self, **options: Any) -> WireTrainer:
        return WireTrainer(self.client(), TrainerCapabilities("test", 3), WireTrainerOptions(**options))

    def echo(self, **options: Any) -> EchoScorer:
        return EchoScorer(
            self.client(), ScorerCapabilities("test", "any", max_prompts_per_request=8), EchoOptions(**options)
        )


def failing(status: int, body: Any = None, headers: dict[str, str] | None = None) -> Handler:
    def handler(_: httpx2.Request) -> httpx2.Response:
        if isinstance(body, bytes):
            return httpx2.Response(status, content=body, headers=headers)
        return httpx2.Response(status, json=body, headers=headers)

    return handler


def openai_error(
    message: str, code: Any = None, kind: str = "invalid_request_error", param: Any = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def job_object(**changes: Any) -> dict[str, Any]:
    """A job as OpenAI sends it."""
    return {
        "object": "fine_tuning.job",
        "id": "ftjob-1",
        "model": "base",
        "created_at": 1,
        "fine_tuned_model": None,
        "organization_id": "org-x",
        "result_files": [],
        "status": "validating_files",
        "training_file": "file-1",
        "hyperparameters": {"n_epochs": 1},
        "trained_tokens": None,
        "error": {},
        "seed": 0,
        "metadata": {"daunce_key": "abc-m0-a0"},
        **changes,
    }
