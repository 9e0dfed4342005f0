"""Fine-tuning jobs over OpenAI's wire format: files, jobs and models of api.openai.com or any server that speaks it.

A job carries ``metadata: {daunce_key, daunce_run, daunce_seq}``. The SDK sends no idempotency key, so a submit that
got no answer is looked up by this metadata (where a server keeps none, by the suffix, which ends with a hash of the
key) and never repeated blindly. Answers are compared with what was requested: kind of object, id, file name and bytes
here, the rest (``JobEcho``) by whoever knows the request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import Field

from ...config import RunConfig
from ...errors import RejectedError
from ..base import (
    GRACE_SECONDS,
    Closing,
    Job,
    JobRequest,
    JobStatus,
    ModelInfo,
    TrainerCapabilities,
    mark_of,
)
from ..calls import NO_REASON, cancelled
from ..contract import part_of
from ..identity import count, key_in, of_run
from ..options import TrainerOptions
from ..registry import Context
from .client import WireClient
from .job_object import KEY_FIELD, echo_of, metadata_key, names_a_parameter, names_of, reason_of, text

RUN_FIELD, SEQUENCE_FIELD = "daunce_run", "daunce_seq"
SUFFIX_CHARACTERS = 64
KeyPlace = Literal["metadata", "suffix"]
METADATA: frozenset[KeyPlace] = frozenset(("metadata",))
SUFFIX: frozenset[KeyPlace] = frozenset(("suffix",))
KEPT_CHECKPOINTS = 3
"""One an epoch, and the last three of a job are kept; the last one is the final model."""
HYPERPARAMETERS = frozenset({"n_epochs", "batch_size", "learning_rate_multiplier"})
OPENAI_GRACE_SECONDS = 600.0
"""OpenAI's guide: it may take several minutes until a model that has just been trained can be used."""
OPENAI_NOTES = (
    "OpenAI takes no new fine-tuning jobs from 6 January 2027, and shuts down gpt-4o, gpt-4o-mini, gpt-4.1, "
    "gpt-4.1-mini and their fine-tunes on 14 January 2027",
)

_JOB = "fine_tuning.job"
_JOBS_PAGE, _FILES_PAGE, _EVENTS_PAGE, _CHECKPOINTS_PAGE = 100, 1000, 50, 100
_UPLOAD_TIMEOUT = 600.0
_STATUSES = {
    "validating_files": JobStatus.QUEUED,
    "queued": JobStatus.QUEUED,
    "succeeded": JobStatus.SUCCEEDED,
    "failed": JobStatus.FAILED,
    "cancelled": JobStatus.CANCELLED,
}


class WireTrainerOptions(TrainerOptions):
    """``backend.options`` of OpenAI-wire trainers."""

    min_examples: int = Field(10, ge=1, description="fewest examples that the provider accepts in a training file")
    grace_seconds: float = Field(
        GRACE_SECONDS, ge=0, description="how long a new job, file or model may be invisible (404, not listed)"
    )
    listing_lag_seconds: float | None = Field(
        None, ge=0, description="how long a submit without an answer is looked for; default: grace_seconds"
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="fields of the provider's own in the request for a job, such as trainingType"
    )
    key_in: frozenset[KeyPlace] = Field(
        METADATA, min_length=1, description="where a job carries its key; default: metadata (OpenAI), both elsewhere"
    )

    def capabilities(self, config: RunConfig, provider: str, jobs: int, **differences: Any) -> TrainerCapabilities:
        """What a trainer on OpenAI's wire can do."""
        known = {
            "hyperparameters": HYPERPARAMETERS,
            "grace_seconds": self.grace_seconds,
            "listing_lag_seconds": self.listing_lag_seconds,
            "checkpoints": KEPT_CHECKPOINTS,
        }
        return super().capabilities(config, provider, jobs, **{**known, **differences})


def wire_options(config: RunConfig) -> WireTrainerOptions:
    """The trainer's options. A server that is not OpenAI may keep no metadata: there a job's suffix has its key too."""
    if config.backend.kind == "openai":
        return WireTrainerOptions.of(config, grace_seconds=OPENAI_GRACE_SECONDS)
    return WireTrainerOptions.of(config, key_in=METADATA | SUFFIX)


def trainer_capabilities(config: RunConfig) -> TrainerCapabilities:
    """Limits of OpenAI, or of a server of its wire format, which takes hyperparameters of its own; no network."""
    official = config.backend.kind == "openai"
    return wire_options(config).capabilities(
        config,
        "OpenAI" if official else "OpenAI-wire server",
        3,
        hyperparameters=HYPERPARAMETERS if official else frozenset(),
        accepts=frozenset({"tools", "images", "validation"} | (set() if official else {"texts"})),
        notes=OPENAI_NOTES if official else (),
    )


def open_trainer(context: Context) -> WireTrainer:
    """A trainer of the config's endpoint."""
    config, options = context.config, wire_options(context.config)
    client = WireClient.open(context.wire_endpoint, http_client=context.http_client, timeout=options.timeout)
    official = config.backend.kind == "openai"
    return WireTrainer(client, trainer_capabilities(config), options, checkpoint_is_model=not official)


class WireTrainer(Closing):
    """``Trainer`` over OpenAI's wire format. Closing it closes the client.

    ``checkpoint_is_model``: the model of a succeeded job that names none is its last checkpoint.
    """

    def __init__(
        self,
        client: WireClient,
        capabilities: TrainerCapabilities,
        options: WireTrainerOptions,
        *,
        checkpoint_is_model: bool = False,
    ) -> None:
        self._client = client
        self._files = client.sdk.files.with_raw_response
        self._jobs = client.sdk.fine_tuning.jobs.with_raw_response
        self.capabilities = capabilities
        self._options = options
        self._key_in = options.key_in
        self._checkpoint_is_model = checkpoint_is_model

    async def model_info(self, model: str) -> ModelInfo:
        """What ``GET /models/ID`` says. Raises RejectedError where the model does not exist (any more)."""
        answer = await self._client.json(
            self._client.sdk.models.with_raw_response.retrieve(model),
            doing=f"reading model {model}",
            needs={"id": str},
            kind="model",
        )
        shutdown = answer.get("shutdown_date")
        return ModelInfo(answer["id"], shutdown if isinstance(shutdown, str) else None)

    async def upload(self, name: str, content: bytes) -> str:
        """Upload a training file (purpose ``fine-tune``); its id. Raises RejectedError where the server refuses its
        content, TransientError where the answer is that of another upload or of a part of this one."""
        call = self._files.create(
            file=(name, content, "application/jsonl"), purpose="fine-tune", timeout=_UPLOAD_TIMEOUT
        )
        answer = await self._client.json(
            call,
            doing=f"uploading {name}",
            needs={"id": str},
            kind="file",
            equal={"filename": name, "bytes": len(content)},
        )
        if answer.get("status") == "error":
            reason = answer.get("status_details") or NO_REASON
            raise RejectedError(self._client.calls.clean(f"{self._client.provider} refused the file {name}: {reason}"))
        return str(answer["id"])

    async def find_file(self, name: str, size: int) -> str | None:
        """Id of a file with this name and number of bytes; one that failed the provider's check does not count."""
        query = {"purpose": "fine-tune", "limit": _FILES_PAGE}
        async for item in self._client.pages(self._files.list, doing="listing files", **query):
            if item.get("filename") == name and item.get("bytes") == size and item.get("status") != "error":
                return str(item["id"])
        return None

    async def submit(self, request: JobRequest) -> Job:
        """Create a supervised job, once. Raises AmbiguousSubmitError when no answer tells what happened."""
        call = self._jobs.create(**self._body(request))
        answer = await self._client.json(
            call, doing=f"creating job {request.key}", submit=True, needs={"id": str, "status": str}, kind=_JOB
        )
        return await self._job(answer)

    def _body(self, request: JobRequest) -> dict[str, Any]:
        """The request for a job; the provider's hyperparameters under their own names."""
        body: dict[str, Any] = {
            "model": request.model,
            "training_file": request.file_id,
            "seed": request.seed,
            "suffix": request.suffix[:SUFFIX_CHARACTERS],
            **self._recipe(dict(request.hyperparameters)),
        }
        if "suffix" in self._key_in:
            body["suffix"] = request.marked_suffix(SUFFIX_CHARACTERS)
        if "metadata" in self._key_in:
            body["metadata"] = {KEY_FIELD: request.key, RUN_FIELD: request.key.partition("-")[0]}
            if request.sequence is not None:
                body["metadata"][SEQUENCE_FIELD] = str(request.sequence)
        if request.validation_file_id is not None:
            body["validation_file"] = request.validation_file_id
        if self._options.extra_body:
            body["extra_body"] = self._options.extra_body
        return body

    def _recipe(self, hyperparameters: dict[str, Any]) -> dict[str, Any]:
        supervised = {"hyperparameters": hyperparameters} if hyperparameters else {}
        return {"method": {"type": "supervised", "supervised": supervised}}

    async def find_job(self, key: str) -> Job | None:
        """The job that carries this key. Where two do, the older one: it was submitted first."""
        jobs = self._listed_jobs({KEY_FIELD: key}, f"looking up job {key}")
        found = [job async for job in jobs if self._carries(job, key)]
        if not found:
            return None
        return await self._job(min(found, key=lambda job: count(job.get("created_at")) or 0))

    async def jobs_of(self, run_key: str) -> list[Job]:
        """Every job of a run."""
        jobs = [self._read(job) async for job in self._listed_jobs({RUN_FIELD: run_key}, "listing this run's jobs")]
        return [job for job in jobs if of_run(job.echo.key, run_key)]

    def _listed_jobs(self, metadata: dict[str, str], doing: str) -> AsyncIterator[dict[str, Any]]:
        """Listed jobs. A server may ignore the filter, so every page is read and the caller looks at each job."""
        wanted = {"metadata": metadata} if self._key_in == METADATA else {}
        return self._client.pages(self._jobs.list, doing=doing, limit=_JOBS_PAGE, **wanted)

    def _carries(self, job: dict[str, Any], key: str) -> bool:
        """Whether a listed job has the key: in its metadata, or, where it has none, as the mark in one of its names."""
        own = metadata_key(job)
        if own is not None:
            return own == key
        return "suffix" in self._key_in and any(mark_of(key) in name for name in names_of(job))

    def _key_of(self, job: dict[str, Any]) -> str | None:
        """The key of a job of any run; None where it carries none."""
        own = metadata_key(job)
        if own is not None or "suffix" not in self._key_in:
            return own
        return key_in(names_of(job))

    async def get(self, job_id: str) -> Job:
        call, needs = self._jobs.retrieve(job_id), {"id": str, "status": str}
        doing = f"reading job {job_id}"
        return await self._job(await self._client.json(call, doing=doing, needs=needs, kind=_JOB, equal={"id": job_id}))

    async def cancel(self, job_id: str) -> Job:
        """Ask for cancellation; a job that is already final is returned as it is."""
        call = self._client.content(self._jobs.cancel(job_id), doing=f"cancelling job {job_id}")
        return await cancelled(call, lambda: self.get(job_id))

    async def checkpoints(self, job_id: str) -> list[str]:
        """Models of a succeeded job from before its last epoch, ascending by step.

        The checkpoint with the highest step holds the weights of the final model, under its name or one of its own.
        """
        return (await self._checkpoints(job_id))[:-1]

    async def _checkpoints(self, job_id: str) -> list[str]:
        listing = partial(self._jobs.checkpoints.list, job_id)
        doing = f"listing checkpoints of job {job_id}"
        models: dict[int, str] = {}
        async for item in self._client.pages(listing, doing=doing, limit=_CHECKPOINTS_PAGE):
            step, made_at = count(item.get("step_number")), count(item.get("created_at"))
            order, model = made_at if step is None else step, self._checkpoint_model(job_id, item)
            if order is not None and model is not None:
                models[order] = model
        return [models[order] for order in sorted(models)]

    def _checkpoint_model(self, job_id: str, item: dict[str, Any]) -> str | None:
        """The name that a checkpoint can be scored under; None where it has none."""
        return text(item.get("fine_tuned_model_checkpoint"))

    async def delete_file(self, file_id: str) -> bool:
        return await self._client.delete(self._files.delete(file_id), doing=f"deleting file {file_id}", target=file_id)

    async def delete_model(self, model: str) -> bool:
        call = self._client.sdk.models.with_raw_response.delete(model)
        return await self._client.delete(call, doing=f"deleting model {model}")

    async def _job(self, answer: dict[str, Any]) -> Job:
        """The job in an answer. A succeeded one without a model is not final yet: whoever waits for it decides how
        long."""
        job = self._read(answer)
        if job.status is JobStatus.SUCCEEDED and job.model is None:
            error = await self._withheld(job.id)
            if error is not None:
                return replace(job, status=JobStatus.FAILED, error=self._client.calls.clean(error))
            if self._checkpoint_is_model:
                with suppress(RejectedError):  # a server without checkpoints
                    models = await self._checkpoints(job.id)
                    return replace(job, model=models[-1] if models else None)
        return job

    def _read(self, answer: dict[str, Any]) -> Job:
        """A job object; a count that cannot be one is taken as not reported."""
        raw = answer.get("status")
        status = _STATUSES.get(raw, JobStatus.RUNNING) if isinstance(raw, str) else JobStatus.RUNNING
        failed = status is JobStatus.FAILED
        return Job(
            id=str(answer["id"]),
            status=status,
            model=text(answer.get("fine_tuned_model")),
            error=self._client.calls.clean(reason_of(answer.get("error"))) if failed else None,
            trained_tokens=count(answer.get("trained_tokens")),
            refused=failed and names_a_parameter(answer.get("error")),
            echo=echo_of(answer, self._key_of(answer)),
        )

    async def _withheld(self, job_id: str) -> str | None:
        """Why a safety check keeps the model of a succeeded job for good; None where nothing says so."""
        call = self._jobs.list_events(job_id, limit=_EVENTS_PAGE)
        doing = f"reading events of job {job_id}"
        try:
            events = (await self._client.json(call, doing=doing, needs={"data": list}))["data"]
        except RejectedError:
            return None  # a server without events
        checks = [e for e in events if isinstance(e, dict) and e.get("type") == "moderation_checks"]
        # A check that was passed is an event too.
        withheld = [e for e in checks if part_of(e, "data", "blocked") is True or e.get("level") in ("warn", "error")]
        return f"the provider withholds the model: {withheld[0].get('message')}" if withheld else None

    async def close(self) -> None:
        await self._client.close()
