"""Fine-tuning jobs over OpenAI's wire format: files, jobs and models of api.openai.com or any server that speaks it.

A job carries ``metadata: {daunce_key, daunce_run, daunce_seq}``. The SDK sends no idempotency key, so a submit that
got no answer is looked up by this metadata (where a server keeps none, by the suffix, which ends with the same key) and
never repeated blindly. Answers are compared with what was requested: kind of object, id, file name and bytes here, the rest
(``JobEcho``) by whoever knows the request.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from pydantic import Field

from ...config import RunConfig
from ...errors import RejectedError, TransientError
from ..base import GRACE_SECONDS, EchoField, Job, JobEcho, JobRequest, JobStatus, ModelInfo, TrainerCapabilities
from ..identity import count
from ..options import Options, parse_options
from ..refusals import NO_REASON, cancelled
from ..registry import Context
from .client import RawResponse, WireClient
from .job_answers import JobEvent, event_of, names_a_parameter, number, reason_of

KEY_FIELD, RUN_FIELD, SEQUENCE_FIELD = "daunce_key", "daunce_run", "daunce_seq"
SUFFIX_CHARACTERS = 64
KEPT_CHECKPOINTS = 3
"""One an epoch, and the last three of a job are kept; the last one is the final model."""
HYPERPARAMETERS = frozenset({"n_epochs", "batch_size", "learning_rate_multiplier"})
OPENAI_GRACE_SECONDS = 600.0
"""OpenAI's guide: it may take several minutes until a model that has just been trained can be used."""
ECHOES: frozenset[EchoField] = frozenset(("key", "file_id", "model", "seed", "hyperparameters"))
OPENAI_NOTES = (
    "OpenAI takes no new fine-tuning jobs from 6 January 2027, and shuts down gpt-4o, gpt-4o-mini, gpt-4.1, "
    "gpt-4.1-mini and their fine-tunes on 14 January 2027",
)

_JOB = "fine_tuning.job"
_JOBS_PAGE, _FILES_PAGE, _EVENTS_PAGE, _CHECKPOINTS_PAGE = 100, 1000, 50, 100
_UPLOAD_TIMEOUT = 600.0
_KEY_IN_SUFFIX = re.compile(r"(?:^|-)([0-9a-f]{3,64}-m-?\d+-a\d+)(?:-s\d+)?$")
_STATUSES = {
    "validating_files": JobStatus.QUEUED,
    "queued": JobStatus.QUEUED,
    "succeeded": JobStatus.SUCCEEDED,
    "failed": JobStatus.FAILED,
    "cancelled": JobStatus.CANCELLED,
}


class WireTrainerOptions(Options):
    """``backend.options`` of OpenAI-wire trainers."""

    timeout: float = Field(120.0, gt=0, description="seconds that a request may take (uploads: at least 600)")
    min_examples: int = Field(10, ge=1, description="fewest examples that the provider accepts in a training file")
    grace_seconds: float | None = Field(
        None,
        ge=0,
        description="how long a new job, file or model may be invisible (404, not listed); default: 600 (OpenAI), 300",
    )
    listing_lag_seconds: float | None = Field(
        None, ge=0, description="how long a submit without an answer is looked for; default: grace_seconds"
    )
    echoes: frozenset[EchoField] = Field(
        ECHOES, description="fields of a job that the server repeats as they were sent; the others are not compared"
    )
    job_events: bool = Field(False, description="also read a running job's events, for progress; doubles the polls")


def trainer_capabilities(config: RunConfig) -> TrainerCapabilities:
    """Limits of OpenAI, or of a server of its wire format; no network."""
    options = parse_options(WireTrainerOptions, config.backend.options, "backend.options")
    official = config.backend.kind == "openai"
    grace = options.grace_seconds
    if grace is None:
        grace = OPENAI_GRACE_SECONDS if official else GRACE_SECONDS
    return TrainerCapabilities(
        provider="OpenAI" if official else "OpenAI-wire server",
        max_concurrent_jobs=config.backend.max_concurrent_jobs or 3,
        min_examples=options.min_examples,
        hyperparameters=HYPERPARAMETERS,
        grace_seconds=grace,
        listing_lag_seconds=options.listing_lag_seconds,
        echoes=options.echoes,
        checkpoints=KEPT_CHECKPOINTS,
        notes=OPENAI_NOTES if official else (),
    )


def open_trainer(context: Context) -> WireTrainer:
    """A trainer of the config's endpoint."""
    options = parse_options(WireTrainerOptions, context.config.backend.options, "backend.options")
    client = WireClient.open(context.wire_endpoint, http_client=context.http_client, timeout=options.timeout)
    return WireTrainer(client, trainer_capabilities(context.config), job_events=options.job_events)


class WireTrainer:
    """``Trainer`` over OpenAI's wire format. Closing it closes the client."""

    def __init__(self, client: WireClient, capabilities: TrainerCapabilities, *, job_events: bool = False) -> None:
        self._client = client
        self._sdk = client.sdk
        self._capabilities = capabilities
        self._job_events = job_events

    @property
    def capabilities(self) -> TrainerCapabilities:
        return self._capabilities

    async def model_info(self, model: str) -> ModelInfo:
        """What ``GET /models/ID`` says. Raises RejectedError where the model does not exist (any more)."""
        answer = await self._client.json(
            self._sdk.models.with_raw_response.retrieve(model),
            doing=f"reading model {model}",
            needs={"id": str},
            kind="model",
        )
        shutdown = answer.get("shutdown_date")
        return ModelInfo(answer["id"], shutdown if isinstance(shutdown, str) else None)

    async def upload(self, name: str, content: bytes) -> str:
        """Upload a training file (purpose ``fine-tune``); its id. Raises RejectedError where the server refuses its
        content, TransientError where the answer is that of another upload or of a part of this one."""
        call = self._sdk.files.with_raw_response.create(
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
            raise RejectedError(self._client.clean(f"{self._client.provider} refused the file {name}: {reason}"))
        return str(answer["id"])

    async def find_file(self, name: str, size: int) -> str | None:
        """Id of a file with this name and number of bytes; one that failed the provider's check does not count."""

        def page(after: dict[str, Any]) -> Awaitable[RawResponse]:
            return self._sdk.files.with_raw_response.list(purpose="fine-tune", limit=_FILES_PAGE, **after)

        async for item in self._client.pages(page, doing="listing files"):
            if item.get("filename") == name and item.get("bytes") == size and item.get("status") != "error":
                return str(item["id"])
        return None

    async def submit(self, request: JobRequest) -> Job:
        """Create a supervised job, once. Raises AmbiguousSubmitError when no answer tells what happened."""
        supervised: Any = {"hyperparameters": dict(request.hyperparameters)} if request.hyperparameters else {}
        call = self._sdk.fine_tuning.jobs.with_raw_response.create(
            model=request.model,
            training_file=request.file_id,
            seed=request.seed,
            suffix=request.suffix[:SUFFIX_CHARACTERS],
            method={"type": "supervised", "supervised": supervised},
            metadata={
                KEY_FIELD: request.key,
                RUN_FIELD: request.key.partition("-")[0],
                **({} if request.sequence is None else {SEQUENCE_FIELD: str(request.sequence)}),
            },
        )
        answer = await self._client.json(
            call, doing=f"creating job {request.key}", submit=True, needs={"id": str, "status": str}, kind=_JOB
        )
        return await self._job(answer)

    async def find_job(self, key: str) -> Job | None:
        """The job that carries this key. Where two do, the older one: it was submitted first."""
        found = [job async for job in self._listed({KEY_FIELD: key}, f"looking up job {key}") if _key_of(job) == key]
        if not found:
            return None
        return await self._job(min(found, key=lambda job: number(job.get("created_at")) or 0))

    async def jobs_of(self, run_key: str) -> list[Job]:
        """Every job of a run. Raises as every list does."""
        jobs = self._listed({RUN_FIELD: run_key}, "listing this run's jobs")
        return [self._read(job) async for job in jobs if (_key_of(job) or "").partition("-")[0] == run_key]

    async def reach_jobs(self) -> None:
        """``GET /fine_tuning/jobs?limit=1``."""
        call = self._sdk.fine_tuning.jobs.with_raw_response.list(limit=1)
        await self._client.json(call, doing="listing fine-tuning jobs", needs={"data": list}, kind="list")

    def _listed(self, metadata: dict[str, str], doing: str) -> AsyncIterator[dict[str, Any]]:
        """Jobs by metadata. A server may ignore the filter, so every page is read and the caller looks at each job."""

        def page(after: dict[str, Any]) -> Awaitable[RawResponse]:
            return self._sdk.fine_tuning.jobs.with_raw_response.list(metadata=metadata, limit=_JOBS_PAGE, **after)

        return self._client.pages(page, doing=doing)

    async def get(self, job_id: str) -> Job:
        answer = await self._client.json(
            self._sdk.fine_tuning.jobs.with_raw_response.retrieve(job_id),
            doing=f"reading job {job_id}",
            needs={"id": str, "status": str},
            kind=_JOB,
            equal={"id": job_id},
        )
        return await self._job(answer)

    async def cancel(self, job_id: str) -> Job:
        """Ask for cancellation; a job that is already final is returned as it is."""
        return await cancelled(self._cancel(job_id), lambda: self.get(job_id))

    async def _cancel(self, job_id: str) -> Job:
        answer = await self._client.json(
            self._sdk.fine_tuning.jobs.with_raw_response.cancel(job_id),
            doing=f"cancelling job {job_id}",
            needs={"id": str, "status": str},
            kind=_JOB,
            equal={"id": job_id},
        )
        return await self._job(answer)

    async def events(self, job_id: str) -> list[JobEvent]:
        """The latest events of a job, newest first."""
        answer = await self._client.json(
            self._sdk.fine_tuning.jobs.with_raw_response.list_events(job_id, limit=_EVENTS_PAGE),
            doing=f"reading events of job {job_id}",
            needs={"data": list},
        )
        return [event_of(item) for item in answer["data"] if isinstance(item, dict)]

    async def checkpoints(self, job_id: str) -> list[str]:
        """Models of a succeeded job from before its last epoch, ascending by step.

        The checkpoint with the highest step holds the weights of the final model, under its name or one of its own.
        """

        def page(after: dict[str, Any]) -> Awaitable[RawResponse]:
            return self._sdk.fine_tuning.jobs.checkpoints.with_raw_response.list(
                job_id, limit=_CHECKPOINTS_PAGE, **after
            )

        models: dict[int, str] = {}
        async for item in self._client.pages(page, doing=f"listing checkpoints of job {job_id}"):
            step, model = number(item.get("step_number")), item.get("fine_tuned_model_checkpoint")
            if step is not None and isinstance(model, str):
                models[step] = model
        return [models[step] for step in sorted(models)[:-1]]

    async def delete_file(self, file_id: str) -> bool:
        call = self._sdk.files.with_raw_response.delete(file_id)
        return await self._client.delete(call, doing=f"deleting file {file_id}", target=file_id)

    async def delete_model(self, model: str) -> bool:
        call = self._sdk.models.with_raw_response.delete(model)
        return await self._client.delete(call, doing=f"deleting model {model}")

    async def _job(self, answer: dict[str, Any]) -> Job:
        job = self._read(answer)
        if job.status is JobStatus.SUCCEEDED and job.model is None:
            # Either the name follows in a moment, or a safety check withholds the model for good.
            withheld = [e.message for e in await self.events(job.id) if e.kind == "moderation_checks"]
            if withheld:
                error = self._client.clean(f"the provider withholds the model: {withheld[0]}")
                return replace(job, status=JobStatus.FAILED, error=error)
        elif job.status is JobStatus.RUNNING and self._job_events:
            return replace(job, progress=await self._progress(job.id))
        return job

    def _read(self, answer: dict[str, Any]) -> Job:
        """A job object; a count that cannot be one is taken as not reported."""
        raw = answer.get("status")
        status = _STATUSES.get(raw, JobStatus.RUNNING) if isinstance(raw, str) else JobStatus.RUNNING
        model = answer.get("fine_tuned_model")
        return Job(
            id=str(answer["id"]),
            status=status,
            model=model if isinstance(model, str) and model else None,
            error=self._client.clean(reason_of(answer.get("error"))) if status is JobStatus.FAILED else None,
            trained_tokens=count(answer.get("trained_tokens")),
            refused=status is JobStatus.FAILED and names_a_parameter(answer.get("error")),
            echo=echo_of(answer),
        )

    async def _progress(self, job_id: str) -> float | None:
        try:
            events = await self.events(job_id)
        except (TransientError, RejectedError):
            return None  # progress is a courtesy; the job's state was read all the same
        steps = [e.step / e.total_steps for e in events if e.step is not None and e.total_steps]
        return min(max(steps), 1.0) if steps else None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()


def echo_of(answer: dict[str, Any]) -> JobEcho:
    """What a job object repeats of its request. The hyperparameters of the method win over the older top-level ones."""
    method = answer.get("method")
    kind = method.get(method.get("type")) if isinstance(method, dict) and isinstance(method.get("type"), str) else None
    settings = kind.get("hyperparameters") if isinstance(kind, dict) else None
    if not isinstance(settings, dict):
        settings = answer.get("hyperparameters")
    return JobEcho(
        key=_key_of(answer),
        file_id=_text(answer.get("training_file")),
        model=_text(answer.get("model")),
        seed=number(answer.get("seed")),
        hyperparameters=(
            {str(k): v for k, v in settings.items() if isinstance(v, int | float | str) and not isinstance(v, bool)}
            if isinstance(settings, dict)
            else None
        ),
    )


def _key_of(job: dict[str, Any]) -> str | None:
    """The run's key of a job: from its metadata, or from its suffix where the server keeps no metadata."""
    metadata = job.get("metadata")
    if isinstance(metadata, dict) and metadata:
        return _text(metadata.get(KEY_FIELD))
    match = _KEY_IN_SUFFIX.search(_text(job.get("suffix")) or _text(job.get("user_provided_suffix")) or "")
    return None if match is None else match.group(1)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
