"""Fine-tuning jobs over OpenAI's wire format: files, jobs and models of api.openai.com or any server that speaks it.

A job carries ``metadata: {daunce_key, daunce_run}``. The SDK sends no idempotency key, so a submit that got no answer
is looked up by this metadata and never repeated blindly.
"""

from __future__ import annotations

from collections.abc import Awaitable
from types import TracebackType
from typing import Any, Self

from pydantic import Field

from ...config import RunConfig
from ...errors import RejectedError, TransientError
from ..base import Job, JobRequest, JobStatus, ModelInfo, TrainerCapabilities
from ..options import Options, parse_options
from ..refusals import cancelled
from ..registry import Context
from .client import RawResponse, WireClient
from .job_answers import JobEvent, event_of, names_a_parameter, number, reason_of

KEY_FIELD, RUN_FIELD = "daunce_key", "daunce_run"
SUFFIX_CHARACTERS = 64
KEPT_CHECKPOINTS = 3
"""One an epoch, and the last three of a job are kept; the last one is the final model."""
HYPERPARAMETERS = frozenset({"n_epochs", "batch_size", "learning_rate_multiplier"})
OPENAI_NOTES = (
    "OpenAI takes no new fine-tuning jobs from 6 January 2027, and shuts down gpt-4o, gpt-4o-mini, gpt-4.1, "
    "gpt-4.1-mini and their fine-tunes on 14 January 2027",
)

_JOBS_PAGE, _FILES_PAGE, _EVENTS_PAGE, _CHECKPOINTS_PAGE = 100, 1000, 50, 100
_UPLOAD_TIMEOUT = 600.0
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
    listing_lag_seconds: float | None = Field(
        None, ge=0, description="how long a new job may be missing from the provider's list; default: 15 (OpenAI), 2"
    )
    job_events: bool = Field(False, description="also read a running job's events, for progress; doubles the polls")


def trainer_capabilities(config: RunConfig) -> TrainerCapabilities:
    """Limits of OpenAI, or of a server of its wire format; no network."""
    options = parse_options(WireTrainerOptions, config.backend.options, "backend.options")
    official = config.backend.kind == "openai"
    lag = options.listing_lag_seconds
    if lag is None:
        lag = 15.0 if official else 2.0
    return TrainerCapabilities(
        provider="OpenAI" if official else "OpenAI-wire server",
        max_concurrent_jobs=config.backend.max_concurrent_jobs or 3,
        min_examples=options.min_examples,
        hyperparameters=HYPERPARAMETERS,
        listing_lag_seconds=lag,
        checkpoints=KEPT_CHECKPOINTS,
        accepts=frozenset({"tools", "images"}) if official else frozenset({"tools", "images", "texts"}),
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
            self._sdk.models.with_raw_response.retrieve(model), doing=f"reading model {model}", needs={"id": str}
        )
        shutdown = answer.get("shutdown_date")
        return ModelInfo(answer["id"], shutdown if isinstance(shutdown, str) else None)

    async def upload(self, name: str, content: bytes) -> str:
        """Upload a training file (purpose ``fine-tune``); its id."""
        call = self._sdk.files.with_raw_response.create(
            file=(name, content, "application/jsonl"), purpose="fine-tune", timeout=_UPLOAD_TIMEOUT
        )
        answer = await self._client.json(call, doing=f"uploading {name}", needs={"id": str})
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
            metadata={KEY_FIELD: request.key, RUN_FIELD: request.key.partition("-")[0]},
        )
        answer = await self._client.json(
            call, doing=f"creating job {request.key}", submit=True, needs={"id": str, "status": str}
        )
        return await self._job(answer)

    async def find_job(self, key: str) -> Job | None:
        """The job that carries this key. Where two do, the older one: it was submitted first."""

        def page(after: dict[str, Any]) -> Awaitable[RawResponse]:
            return self._sdk.fine_tuning.jobs.with_raw_response.list(
                metadata={KEY_FIELD: key}, limit=_JOBS_PAGE, **after
            )

        # A server may ignore the filter, so every page is read and every job's own metadata decides.
        found = [
            job
            async for job in self._client.pages(page, doing=f"looking up job {key}")
            if isinstance(job.get("metadata"), dict) and job["metadata"].get(KEY_FIELD) == key
        ]
        if not found:
            return None
        return await self._job(min(found, key=lambda job: number(job.get("created_at")) or 0))

    async def get(self, job_id: str) -> Job:
        answer = await self._client.json(
            self._sdk.fine_tuning.jobs.with_raw_response.retrieve(job_id),
            doing=f"reading job {job_id}",
            needs={"id": str, "status": str},
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
        return await self._client.delete(call, doing=f"deleting file {file_id}")

    async def delete_model(self, model: str) -> bool:
        call = self._sdk.models.with_raw_response.delete(model)
        return await self._client.delete(call, doing=f"deleting model {model}")

    async def _job(self, answer: dict[str, Any]) -> Job:
        job_id = str(answer["id"])
        status = _STATUSES.get(answer["status"], JobStatus.RUNNING)
        model = answer.get("fine_tuned_model")
        error = reason_of(answer.get("error")) if status is JobStatus.FAILED else None
        progress = None
        if status is JobStatus.SUCCEEDED and not isinstance(model, str):
            # Either the name follows in a moment, or a safety check withholds the model for good.
            events = await self.events(job_id)
            withheld = [e.message for e in events if e.kind == "moderation_checks"]
            status = JobStatus.FAILED if withheld else JobStatus.RUNNING
            error = f"the provider withholds the model: {withheld[0]}" if withheld else None
        elif status is JobStatus.RUNNING and self._job_events:
            progress = await self._progress(job_id)
        return Job(
            id=job_id,
            status=status,
            model=model if isinstance(model, str) else None,
            error=None if error is None else self._client.clean(error),
            trained_tokens=number(answer.get("trained_tokens")),
            progress=progress,
            refused=status is JobStatus.FAILED and names_a_parameter(answer.get("error")),
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
