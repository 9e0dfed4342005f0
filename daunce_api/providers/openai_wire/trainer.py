"""Fine-tuning jobs over OpenAI's wire format: files, jobs and models of api.openai.com or any server that speaks it.

A job carries ``metadata: {daunce_key, daunce_run}``, a hash of the key in its suffix, or both. The SDK sends no
idempotency key, so a submit that got no answer is looked up by these and never repeated blindly.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import Field

from ...config import RunConfig
from ...errors import RejectedError, TransientError
from ..base import Job, JobRequest, JobStatus, ModelInfo, TrainerCapabilities, mark_of
from ..failures import NO_REASON, cancelled
from ..options import Options, parse_options
from ..registry import Context
from .client import RawResponse, WireClient

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
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="fields of the provider's own in the request for a job, such as trainingType"
    )
    key_in: frozenset[Literal["metadata", "suffix"]] | None = Field(
        None, min_length=1, description="where a job carries its key; default: metadata (OpenAI), both elsewhere"
    )


def trainer_capabilities(config: RunConfig) -> TrainerCapabilities:
    """Limits of OpenAI, or of a server of its wire format, which takes hyperparameters of its own; no network."""
    options = parse_options(WireTrainerOptions, config.backend.options, "backend.options")
    official = config.backend.kind == "openai"
    lag = options.listing_lag_seconds
    if lag is None:
        lag = 15.0 if official else 2.0
    return TrainerCapabilities(
        provider="OpenAI" if official else "OpenAI-wire server",
        max_concurrent_jobs=config.backend.max_concurrent_jobs or 3,
        min_examples=options.min_examples,
        hyperparameters=HYPERPARAMETERS if official else frozenset(),
        listing_lag_seconds=lag,
        checkpoints=KEPT_CHECKPOINTS,
        accepts=frozenset({"tools", "images"}) if official else frozenset({"tools", "images", "texts"}),
        notes=OPENAI_NOTES if official else (),
    )


def open_trainer(context: Context) -> WireTrainer:
    """A trainer of the config's endpoint."""
    options = parse_options(WireTrainerOptions, context.config.backend.options, "backend.options")
    official = context.config.backend.kind == "openai"
    if options.key_in is None and not official:
        options = options.model_copy(update={"key_in": frozenset({"metadata", "suffix"})})
    client = WireClient.open(context.wire_endpoint, http_client=context.http_client, timeout=options.timeout)
    capabilities = trainer_capabilities(context.config)
    return WireTrainer(client, capabilities, options, checkpoint_is_model=not official)


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One line of a job's log. ``step`` of ``total_steps`` where the event tells of training steps."""

    message: str
    kind: str
    created_at: int
    step: int | None = None
    total_steps: int | None = None


class WireTrainer:
    """``Trainer`` over OpenAI's wire format. Closing it closes the client.

    ``checkpoint_is_model``: the model of a succeeded job that names none is its last checkpoint.
    """

    def __init__(
        self,
        client: WireClient,
        capabilities: TrainerCapabilities,
        options: WireTrainerOptions | None = None,
        *,
        checkpoint_is_model: bool = False,
    ) -> None:
        self._client = client
        self._sdk = client.sdk
        self._capabilities = capabilities
        self._options = options or WireTrainerOptions()
        self._key_in = self._options.key_in or frozenset({"metadata"})
        self._checkpoint_is_model = checkpoint_is_model

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
        call = self._sdk.fine_tuning.jobs.with_raw_response.create(**self._body(request))
        answer = await self._client.json(
            call, doing=f"creating job {request.key}", submit=True, needs={"id": str, "status": str}
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
        if self._options.extra_body:
            body["extra_body"] = dict(self._options.extra_body)
        return body

    def _recipe(self, hyperparameters: dict[str, Any]) -> dict[str, Any]:
        supervised = {"hyperparameters": hyperparameters} if hyperparameters else {}
        return {"method": {"type": "supervised", "supervised": supervised}}

    async def find_job(self, key: str) -> Job | None:
        """The job that carries this key. Where two do, the older one: it was submitted first."""
        wanted: Any = {"metadata": {KEY_FIELD: key}} if self._key_in == {"metadata"} else {}

        def page(after: dict[str, Any]) -> Awaitable[RawResponse]:
            return self._sdk.fine_tuning.jobs.with_raw_response.list(limit=_JOBS_PAGE, **wanted, **after)

        # A server may ignore the filter, so every page is read and every job itself decides.
        jobs = self._client.pages(page, doing=f"looking up job {key}")
        found = [job async for job in jobs if self._carries(job, key)]
        if not found:
            return None
        return await self._job(min(found, key=lambda job: number(job.get("created_at")) or 0))

    def _carries(self, job: dict[str, Any], key: str) -> bool:
        """Whether a listed job has the key: in its metadata, or, where it has none, as the mark in one of its names."""
        metadata = job.get("metadata")
        if isinstance(metadata, dict) and metadata.get(KEY_FIELD) is not None:
            return bool(metadata[KEY_FIELD] == key)
        names = [job.get(name) for name in ("suffix", "user_provided_suffix", "fine_tuned_model")]
        return "suffix" in self._key_in and any(mark_of(key) in name for name in names if isinstance(name, str))

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
        return (await self._checkpoints(job_id))[:-1]

    async def _checkpoints(self, job_id: str) -> list[str]:
        def page(after: dict[str, Any]) -> Awaitable[RawResponse]:
            return self._sdk.fine_tuning.jobs.checkpoints.with_raw_response.list(
                job_id, limit=_CHECKPOINTS_PAGE, **after
            )

        models: dict[int, str] = {}
        async for item in self._client.pages(page, doing=f"listing checkpoints of job {job_id}"):
            step, model = number(item.get("step_number")), self._checkpoint_model(job_id, item)
            if step is not None and model is not None:
                models[step] = model
        return [models[step] for step in sorted(models)]

    def _checkpoint_model(self, job_id: str, item: dict[str, Any]) -> str | None:
        """The name that a checkpoint can be scored under; None where it has none."""
        model = item.get("fine_tuned_model_checkpoint")
        return model if isinstance(model, str) and model else None

    async def delete_file(self, file_id: str) -> bool:
        call = self._sdk.files.with_raw_response.delete(file_id)
        return await self._client.delete(call, doing=f"deleting file {file_id}")

    async def delete_model(self, model: str) -> bool:
        call = self._sdk.models.with_raw_response.delete(model)
        return await self._client.delete(call, doing=f"deleting model {model}")

    async def _job(self, answer: dict[str, Any]) -> Job:
        """The job in an answer. A succeeded one without a model is not final yet: whoever waits for it decides how
        long."""
        job_id = str(answer["id"])
        status = _STATUSES.get(answer["status"], JobStatus.RUNNING)
        named = answer.get("fine_tuned_model")
        model = named if isinstance(named, str) and named else None
        error = reason_of(answer.get("error")) if status is JobStatus.FAILED else None
        progress = None
        if status is JobStatus.SUCCEEDED and model is None:
            error = await self._withheld(job_id)
            if error is not None:
                status = JobStatus.FAILED
            elif self._checkpoint_is_model:
                model = next(iter(reversed(await self._checkpoints_if_any(job_id))), None)
        elif status is JobStatus.RUNNING and self._options.job_events:
            progress = await self._progress(job_id)
        return Job(
            id=job_id,
            status=status,
            model=model,
            error=None if error is None else self._client.clean(error),
            trained_tokens=number(answer.get("trained_tokens")),
            progress=progress,
            refused=status is JobStatus.FAILED and names_a_parameter(answer.get("error")),
        )

    async def _withheld(self, job_id: str) -> str | None:
        """Why a safety check keeps the model of a succeeded job for good; None where nothing says so."""
        try:
            events = await self.events(job_id)
        except RejectedError:
            return None  # a server without events
        withheld = [e.message for e in events if e.kind == "moderation_checks"]
        return f"the provider withholds the model: {withheld[0]}" if withheld else None

    async def _checkpoints_if_any(self, job_id: str) -> list[str]:
        try:
            return await self._checkpoints(job_id)
        except RejectedError:
            return []  # a server without checkpoints

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


def reason_of(error: object) -> str:
    """Text of a failed job's ``error``, which may be ``{}``, null or hold nulls only."""
    if isinstance(error, dict):
        parts = [str(error[name]) for name in ("code", "message", "param") if error.get(name)]
        if parts:
            return ": ".join(parts)
    return NO_REASON


def names_a_parameter(error: object) -> bool:
    """Whether a failed job names the parameter that was invalid (``training_file``, most often)."""
    return isinstance(error, dict) and isinstance(error.get("param"), str)


def event_of(item: dict[str, Any]) -> JobEvent:
    """A ``fine_tuning.job.event``."""
    raw = item.get("data")
    data: dict[str, Any] = raw if isinstance(raw, dict) else {}
    return JobEvent(
        message=str(item.get("message", "")),
        kind=str(item.get("type", "")),
        created_at=number(item.get("created_at")) or 0,
        step=number(data.get("step")),
        total_steps=number(data.get("total_steps")),
    )


def number(value: object) -> int | None:
    """A whole number, or None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
