"""Nebius Token Factory: OpenAI's jobs, whose models are registered as LoRA adapters and served by the token.

A succeeded job names no model but has checkpoints. Registering one (``POST /v0/models``) gives the name that it answers
under; the provider checks it for some minutes first. From its documentation, as of May 2026; not tested with a key.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from urllib.parse import quote

from pydantic import Field

from ..config import RunConfig
from ..errors import RejectedError
from .base import Job, JobStatus, ScorerCapabilities, TrainerCapabilities
from .calls import NO_REASON
from .contract import json_of
from .openai_wire.client import WireClient, open_client
from .openai_wire.echo import EchoScorer, echo_options
from .openai_wire.trainer import SUFFIX, KeyPlace, WireTrainer, WireTrainerOptions
from .registry import Context

DEFAULTS: dict[str, Any] = {"lora": True, "packing": False}
"""Sent where the config gives none: full fine-tunes are not served by the token, and packed examples see each other."""
NOTES = (
    "not tested against Nebius: written from its documentation",
    "jobs are found again by a hash in their suffix, since Nebius keeps no metadata",
    "sent where not given: lora: true (full fine-tunes are not served by the token), packing: false",
)
UNVERIFIED = (
    "Nebius documents echo, but not for LoRA models: the first finished member tests it before the second is submitted"
)


class NebiusOptions(WireTrainerOptions):
    """``backend.options`` of the Nebius trainer."""

    key_in: frozenset[KeyPlace] = SUFFIX
    project_id: str | None = Field(None, description="ai_project_id of the registered models; default: the key's own")


def trainer_capabilities(config: RunConfig) -> TrainerCapabilities:
    """Limits of Nebius's fine-tuning; no network. Its limit on jobs at once is not published: 4 is cautious."""
    return NebiusOptions.of(config).capabilities(
        config,
        "Nebius",
        4,
        hyperparameters=frozenset(),
        epochs=3,
        starts_from_fine_tune=False,
        checkpoints=1,
        notes=NOTES,
    )


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """Any completion, exactly, once the first member has shown it; no network."""
    return echo_options(config).capabilities("Nebius", notes=(UNVERIFIED,), fine_tunes_verified=False)


def open_trainer(context: Context) -> NebiusTrainer:
    """The wire trainer, with registration of models."""
    timeout = NebiusOptions.of(context.config).timeout
    client = WireClient.open(context.wire_endpoint, http_client=context.http_client, timeout=timeout)
    return NebiusTrainer(client, context.config)


def open_scorer(context: Context) -> EchoScorer:
    """Completions with echo."""
    options = echo_options(context.config)
    return EchoScorer(open_client(context, options), scorer_capabilities(context.config), options)


class NebiusTrainer(WireTrainer):
    """``Trainer`` at Nebius. The model of a job is the registered name of its last checkpoint."""

    def __init__(self, client: WireClient, config: RunConfig) -> None:
        options = NebiusOptions.of(config)
        super().__init__(client, trainer_capabilities(config), options, checkpoint_is_model=True)
        self._base_model = config.backend.model
        self._models = str(client.sdk.base_url).rstrip("/").removesuffix("/v1") + "/v0/models"
        self._query = "" if options.project_id is None else f"?ai_project_id={quote(options.project_id)}"

    def _recipe(self, hyperparameters: dict[str, Any]) -> dict[str, Any]:
        return {"hyperparameters": {**DEFAULTS, **hyperparameters}}

    def _checkpoint_model(self, job_id: str, item: dict[str, Any]) -> str | None:
        """What a checkpoint is registered from."""
        return f"{job_id}:{item['id']}"

    async def checkpoints(self, job_id: str) -> list[str]:
        """None: each would have to be registered, and served, as a model of its own."""
        return []

    async def _job(self, answer: dict[str, Any]) -> Job:
        """As OpenAI's; the model of a succeeded job is there once its registration is active. Where it is refused, the
        other members' would be too."""
        job = await super()._job(answer)
        if job.status is not JobStatus.SUCCEEDED or job.model is None:
            return job
        source = job.model
        try:
            model = await self._registered(source) or await self._register(source)
            reason = str(model.get("status_reason") or NO_REASON) if model.get("status") == "error" else None
        except RejectedError as error:
            reason = str(error)
        if reason is not None:
            blocked = (
                f"Nebius does not serve {source}: {self._client.calls.clean(reason)} The other members' models would "
                "be refused too. Everything so far is kept. Find out why in its console and delete that model there, "
                "then run the same command again; or train with other hyperparameters in a new run folder."
            )
            return replace(job, model=None, blocked=blocked)
        return replace(job, model=str(model["name"]) if model.get("status") == "active" else None)

    async def _registered(self, source: str) -> dict[str, Any] | None:
        """The registration of a checkpoint, if there is one that was not deleted."""
        for model in await self._listed():
            own = source in (model.get("source"), f"{model.get('job_id')}:{model.get('checkpoint_id')}")
            if own and model.get("status") != "deleted" and isinstance(model.get("name"), str):
                return model
        return None

    async def _listed(self) -> list[dict[str, Any]]:
        call = self._client.raw("GET", self._models + self._query)
        listed = json_of(await self._client.content(call, doing="listing models"))
        if isinstance(listed, dict):  # its documentation shows a bare list, its other routes an object with one
            listed = listed.get("data")
        if not isinstance(listed, list):
            raise self._client.calls.malformed("listing models", False, "a body that is not a list")
        return [model for model in listed if isinstance(model, dict)]

    async def _register(self, source: str) -> dict[str, Any]:
        name = "daunce-" + "".join(c for c in source.lower() if c.isalnum())[-40:]
        body = {"name": name, "base_model": self._base_model, "source": source}
        doing = f"registering {source}"
        return await self._client.json(
            self._client.raw("POST", self._models + self._query, body), doing=doing, needs={"name": str, "status": str}
        )

    async def delete_model(self, model: str) -> bool:
        """Takes the model out of serving. Its checkpoint stays with the job."""
        call = self._client.raw("DELETE", f"{self._models}/{quote(model)}{self._query}")
        return await self._client.calls.delete(call, doing=f"deleting model {model}")
