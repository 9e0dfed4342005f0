"""Fine-tuning jobs at Together (SDK ``together`` 3).

Jobs have no metadata; a run's jobs are found by the suffix of the model's name, which carries the run's key, the member
and a hash of the job's key. ``random_seed`` is always sent: left out, every member of an ensemble gets Together's
default of 42.
"""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ...config import RunConfig
from ..base import (
    EchoField,
    Hyperparameters,
    Job,
    JobEcho,
    JobRequest,
    JobStatus,
    ModelInfo,
    TrainerCapabilities,
    mark_of,
)
from ..calls import NO_REASON, Calls, SdkTrainer, cancelled, open_sdk
from ..identity import count, key_in, of_run
from ..options import TrainerOptions
from ..registry import Context

if TYPE_CHECKING:
    from together import AsyncTogether

SUFFIX_CHARACTERS = 40
HYPERPARAMETERS = frozenset(
    {
        "n_epochs",
        "batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_scheduler_type",
        "min_lr_ratio",
        "scheduler_num_cycles",
        "warmup_ratio",
        "max_grad_norm",
        "weight_decay",
        "max_seq_length",
        "packing",
        "lora",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_trainable_modules",
    }
)
SWITCHES = frozenset({"lora", "packing"})
DEFAULTS: Hyperparameters = {"n_epochs": 3, "learning_rate": 1e-4, "batch_size": 8}
"""Sent where the config gives none. Together's own (1 epoch, rate 1e-5, the largest batch) are one or two steps for a
small file, after which a member answers as the base model does."""
NOTES = (
    "a fine-tune answers only on a dedicated endpoint, which is paid by the minute",
    "jobs are found again by a hash in the model's name: do not rename models while a run is going on",
)
UNPACKED = "without packing Together bills every example as max_seq_length tokens; this plan counts its own tokens only"
_STATUSES = {
    "pending": JobStatus.QUEUED,
    "queued": JobStatus.QUEUED,
    "completed": JobStatus.SUCCEEDED,
    "cancelled": JobStatus.CANCELLED,
    "error": JobStatus.FAILED,
    "user_error": JobStatus.FAILED,
}


class TogetherOptions(TrainerOptions):
    """``backend.options`` of the Together trainer."""

    project_id: str | None = Field(None, description="project of the account; needed to delete models")
    echoes: frozenset[EchoField] = frozenset(("key", "file_id", "seed"))


def trainer_capabilities(config: RunConfig) -> TrainerCapabilities:
    """Limits of Together's fine-tuning; no network. Its limit on jobs at once is not published: 4 is cautious."""
    packed = bool(config.training.hyperparameters.get("packing", 1))
    return TogetherOptions.of(config).capabilities(
        config,
        "Together",
        4,
        hyperparameters=HYPERPARAMETERS,
        epochs=int(DEFAULTS["n_epochs"]),
        switches=SWITCHES,
        notes=(*NOTES, *_defaults_note(config), *(() if packed else (UNPACKED,))),
        accepts=frozenset({"tools", "texts", "weights", "validation"}),
    )


def _defaults_note(config: RunConfig) -> tuple[str, ...]:
    given = config.training.hyperparameters
    used = ", ".join(f"{name}: {value}" for name, value in DEFAULTS.items() if name not in given)
    return (f"not given, so set here: {used} (Together's own would hardly train a small file)",) if used else ()


def open_trainer(context: Context) -> TogetherTrainer:
    """A trainer on the SDK's own client, without its retries."""
    options = TogetherOptions.of(context.config)
    sdk, calls = open_together(context, timeout=options.timeout, project_id=options.project_id)
    return TogetherTrainer(sdk, calls, context.config)


def open_together(context: Context, *, timeout: float, project_id: str | None) -> tuple[AsyncTogether, Calls]:
    """The SDK's client for the config's endpoint. Raises MissingExtraError where the SDK is not installed."""
    endpoint = context.wire_endpoint
    own = {"project_id": project_id, "base_url": endpoint.base_url.removesuffix("/v1")}
    return open_sdk("together", "AsyncTogether", "Together", endpoint, timeout=timeout, **own)


async def maker_of(sdk: AsyncTogether, calls: Calls, model: str) -> dict[str, Any]:
    """The job that made a fine-tune, with the ids of the model and its adapter; empty where no job did."""
    for item in await listed(calls, sdk.fine_tuning.list(), doing=f"looking for the job of {model}"):
        if item.get("model_output_name") == model:
            return await calls.fields(sdk.fine_tuning.retrieve(item["id"]), doing=f"reading job {item['id']}")
    return {}


class TogetherTrainer(SdkTrainer):
    """``Trainer`` at Together."""

    _sdk: AsyncTogether

    def __init__(self, sdk: AsyncTogether, calls: Calls, config: RunConfig) -> None:
        super().__init__(sdk, calls, config, trainer_capabilities(config))
        self._limits: dict[str, Any] = {}

    async def model_info(self, model: str) -> ModelInfo:
        """Raises RejectedError where Together does not fine-tune this model."""
        await self._limits_of(model)
        return ModelInfo(model)

    async def upload(self, name: str, content: bytes) -> str:
        """Upload a training file; its id. Together answers an upload of equal content with the file it has."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            call = self._sdk.files.upload(path, purpose="fine-tune", check=False)
            answer = await self._calls.fields(call, doing=f"uploading {name}", needs={"id": str})
        return str(answer["id"])

    async def find_file(self, name: str, size: int) -> str | None:
        """Id of a file with this name and number of bytes; one that failed the provider's check does not count."""
        for item in await listed(self._calls, self._sdk.files.list(), doing="listing files"):
            broken = item.get("processing_status") in ("FAILED", "INVALID_FORMAT")
            if item.get("filename") == name and item.get("bytes") == size and not broken:
                return str(item["id"])
        return None

    async def submit(self, request: JobRequest) -> Job:
        """Create a job, once. Raises AmbiguousSubmitError when no answer tells what happened."""
        continued = request.model != self._base_model
        options: dict[str, Any] = _typed(request.hyperparameters)
        options["from_checkpoint" if continued else "model"] = request.model
        limits = await self._limits_of(request.model)
        call = self._sdk.fine_tuning.create(
            training_file=request.file_id,
            **({"validation_file": request.validation_file_id} if request.validation_file_id else {}),
            random_seed=request.seed,
            suffix=request.marked_suffix(SUFFIX_CHARACTERS),
            train_on_inputs=False,  # the loss is on the completion, as it is measured
            model_limits=limits,
            **options,
        )
        # The SDK asks for an estimate of the price first; only the request after that one makes a job.
        return await self._one(call, f"creating job {request.key}", submit="/fine-tunes")

    async def find_job(self, key: str) -> Job | None:
        """The job whose model carries the hash of this key; of two, the older one."""
        jobs, mark = await self._listed(f"looking up job {key}"), mark_of(key)
        found = [item for item in jobs if any(mark in name for name in _names(item))]
        if not found:
            return None
        return await self.get(min(found, key=lambda item: str(item.get("created_at") or ""))["id"])

    async def jobs_of(self, run_key: str) -> list[Job]:
        """Every job of a run, by the suffixes of their models."""
        jobs = [self._job(item) for item in await self._listed("listing this run's jobs")]
        return [job for job in jobs if of_run(job.echo.key, run_key)]

    async def _listed(self, doing: str) -> list[dict[str, Any]]:
        return await listed(self._calls, self._sdk.fine_tuning.list(), doing=doing)

    async def get(self, job_id: str) -> Job:
        return await self._one(self._sdk.fine_tuning.retrieve(job_id), f"reading job {job_id}")

    async def cancel(self, job_id: str) -> Job:
        """Ask for cancellation; a job that is already final is returned as it is."""
        call = self._calls.call(self._sdk.fine_tuning.cancel(job_id), doing=f"cancelling job {job_id}")
        return await cancelled(call, lambda: self.get(job_id))

    async def _one(self, call: Awaitable[Any], doing: str, submit: bool | str = False) -> Job:
        needs = {"id": str, "status": str}
        return self._job(await self._calls.fields(call, doing=doing, submit=submit, needs=needs))

    async def delete_file(self, file_id: str) -> bool:
        return await self._calls.delete(self._sdk.files.delete(file_id), doing=f"deleting file {file_id}")

    async def delete_model(self, model: str) -> bool:
        """Deletes a fine-tune and its adapter from the project's registry, by their ids; False without ``project_id``,
        for which Together asks, and where a deployment still uses it."""
        job = await maker_of(self._sdk, self._calls, model) if self._sdk.project_id else {}
        ids = [i for name in ("adapter_object_id", "model_object_id") if isinstance(i := job.get(name), str) and i]
        gone = [await self._calls.delete(self._sdk.models.delete(i), doing=f"deleting model {model}") for i in ids]
        return bool(gone) and all(gone)

    async def _limits_of(self, model: str) -> Any:
        if model not in self._limits:
            call = self._sdk.fine_tuning.model_limits(model_name=model)
            self._limits[model] = await self._calls.call(call, doing=f"reading the limits of {model}")
        return self._limits[model]

    def _job(self, answer: dict[str, Any]) -> Job:
        status = _STATUSES.get(str(answer.get("status")), JobStatus.RUNNING)
        model = answer.get("model_output_name")
        return Job(
            id=str(answer["id"]),
            status=status,
            model=model if status is JobStatus.SUCCEEDED and isinstance(model, str) else None,
            error=self._calls.clean(_reason(answer)) if status is JobStatus.FAILED else None,
            trained_tokens=count(answer.get("token_count")) or None,
            refused=answer.get("status") == "user_error",
            echo=JobEcho(
                key=key_in(_names(answer)),
                file_id=answer.get("training_file"),
                seed=count(answer.get("random_seed")),
            ),
        )


def _names(item: dict[str, Any]) -> list[str]:
    return [name for field in ("suffix", "model_output_name") if isinstance(name := item.get(field), str)]


def _typed(hyperparameters: Hyperparameters) -> dict[str, Any]:
    """Hyperparameters by the SDK's names, with :data:`DEFAULTS`; switches arrive as 0 and 1."""
    return {k: bool(v) if k in SWITCHES else v for k, v in {**DEFAULTS, **hyperparameters}.items()}


def _reason(answer: dict[str, Any]) -> str:
    events = [event for event in answer.get("events") or () if isinstance(event, dict)]
    errors = [event for event in events if str(event.get("type", "")).endswith("ERROR") and event.get("message")]
    return str(errors[-1]["message"]) if errors else NO_REASON


async def listed(calls: Calls, call: Awaitable[Any], *, doing: str) -> list[dict[str, Any]]:
    """The jobs or files in a list. An answer without a list is no empty one: what it does not show may be there."""
    answer = await calls.fields(call, doing=doing, needs={"data": list})
    return [item for item in answer["data"] if isinstance(item, dict) and isinstance(item.get("id"), str)]
