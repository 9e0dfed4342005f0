"""Supervised fine-tuning jobs at Fireworks (SDK ``fireworks-ai`` 1).

The client chooses a job's id, so the id is a hash of the job's key: a repeated submit is refused by the provider, and
a lost job is read by its id; a run's jobs are found by their display names. Jobs take no seed, so two members on one
subset would differ for reasons unknown.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Awaitable
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx2
from pydantic import Field

from ...config import RunConfig
from ...errors import ConfigurationError, RejectedError, TransientError
from ..base import EchoField, Job, JobEcho, JobRequest, JobStatus, ModelInfo, TrainerCapabilities
from ..calls import NO_REASON, Calls, SdkTrainer, cancelled, gone_already, open_sdk, plain, refusal
from ..contract import part_of
from ..identity import key_in, of_run
from ..options import TrainerOptions
from ..polling import Answer, Poll, file_in_time
from ..registry import Context
from ..tokenizers import chat_template

if TYPE_CHECKING:
    from fireworks import AsyncFireworks

ACCOUNT_VARIABLE = "FIREWORKS_ACCOUNT_ID"
DISPLAY_CHARACTERS, PAGE = 63, 200
READY = "READY"
"""State of a data set that jobs may use."""
LARGEST_UPLOAD = 150_000_000
"""Bytes that Fireworks takes in one request; larger files go to an address that it signs."""
UPLOAD_TIMEOUT = 600.0
FILE_FAULTS = {"INVALID_ARGUMENT", "OUT_OF_RANGE", "DATA_LOSS"}
"""Codes of a status that says that the file itself is at fault."""
HYPERPARAMETERS = frozenset(
    {
        "epochs",
        "batch_size",
        "batch_size_samples",
        "gradient_accumulation_steps",
        "learning_rate",
        "learning_rate_warmup_steps",
        "lora_rank",
        "max_context_length",
        "optimizer_weight_decay",
    }
)
NOTES = (
    "Fireworks takes no seed: what differs between two members of one subset cannot be repeated",
    "fine-tunes answer only on a dedicated deployment, paid by the GPU second; one holds up to 100 of them",
)
_QUEUED = {"CREATING", "PENDING", "VALIDATING", "RE_QUEUEING", "CREATING_INPUT_DATASET"}
_FINAL = {
    "COMPLETED": JobStatus.SUCCEEDED,
    "EARLY_STOPPED": JobStatus.SUCCEEDED,
    "FAILED": JobStatus.FAILED,
    "EXPIRED": JobStatus.FAILED,
    "CANCELLED": JobStatus.CANCELLED,
    "DELETING": JobStatus.CANCELLED,
    "DELETING_CLEANING_UP": JobStatus.CANCELLED,
}


class FireworksOptions(TrainerOptions):
    """``backend.options`` of the Fireworks trainer."""

    account_id: str | None = Field(None, description=f"account; default: the environment variable {ACCOUNT_VARIABLE}")
    min_examples: int = Field(3, ge=1, description="fewest examples that the provider accepts in a training file")
    echoes: frozenset[EchoField] = frozenset(("key", "file_id"))
    send_template: bool = Field(
        True, description="have jobs render chats with the chat template of backend.tokenizer, as they are measured"
    )


def trainer_capabilities(config: RunConfig) -> TrainerCapabilities:
    """Limits of Fireworks' fine-tuning; no network. Its limit on jobs at once is not published: 4 is cautious."""
    return FireworksOptions.of(config).capabilities(
        config,
        "Fireworks",
        4,
        honours_seed=False,
        hyperparameters=HYPERPARAMETERS,
        grace_seconds=120.0,
        notes=NOTES,
        accepts=frozenset({"tools"}),
    )


def open_trainer(context: Context) -> FireworksTrainer:
    """A trainer on the SDK's own client, without its retries."""
    options = FireworksOptions.of(context.config)
    sdk, calls = open_fireworks(context, account_id=options.account_id, timeout=options.timeout)
    return FireworksTrainer(sdk, calls, context.config)


def open_fireworks(context: Context, *, account_id: str | None, timeout: float) -> tuple[AsyncFireworks, Calls]:
    """The SDK's client for the config's endpoint.

    Raises MissingExtraError where the SDK is not installed, ConfigurationError where no account is named.
    """
    account = account_id or os.environ.get(ACCOUNT_VARIABLE, "").strip()
    if not account:
        raise ConfigurationError(
            f"Fireworks needs the account's id: set backend.options.account_id or the variable {ACCOUNT_VARIABLE}."
        )
    endpoint = context.wire_endpoint
    own = {"account_id": account, "base_url": endpoint.base_url.removesuffix("/v1").removesuffix("/inference")}
    return open_sdk("fireworks", "AsyncFireworks", "Fireworks", endpoint, timeout=timeout, **own)


def dataset_id_of(name: str) -> str:
    """The id of the data set that holds a file: lower case, letters, digits and hyphens."""
    stem = name.removesuffix(".jsonl").lower()
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in stem)


def job_id_of(key: str) -> str:
    """The id that a job with this key is created under; the model gets the same."""
    return f"daunce-{hashlib.sha256(key.encode()).hexdigest()[:32]}"


class FireworksTrainer(SdkTrainer):
    """``Trainer`` at Fireworks. Files are data set resources, whose ids follow from the files' names."""

    _sdk: AsyncFireworks
    poll = Poll(5.0, 120)

    def __init__(self, sdk: AsyncFireworks, calls: Calls, config: RunConfig) -> None:
        super().__init__(sdk, calls, config, trainer_capabilities(config))
        self._jobs = sdk.supervised_fine_tuning_jobs
        sends_template = FireworksOptions.of(config).send_template
        self._template = chat_template(config.backend.tokenizer) if sends_template else None

    async def model_info(self, model: str) -> ModelInfo:
        """Raises RejectedError where the model (``accounts/ACCOUNT/models/ID``) does not exist."""
        account, model_id = split_model(model)
        call = self._sdk.models.get(model_id, account_id=account)
        await self._calls.call(call, doing=f"reading model {model}")
        return ModelInfo(model)

    async def upload(self, name: str, content: bytes) -> str:
        """Create a data set, upload its one file and wait until jobs may use it; the data set's resource name.

        Raises RejectedError where Fireworks finds fault with the file, TransientError where it takes too long.
        """
        dataset = dataset_id_of(name)
        lines = content.count(b"\n")
        chat = content.lstrip().startswith(b'{"messages"')
        create = self._sdk.datasets.create(
            dataset_id=dataset,
            dataset={"user_uploaded": {}, "example_count": str(lines), "format": "CHAT" if chat else "COMPLETION"},
        )
        conflict = await refusal(self._calls.call(create, doing=f"creating data set {dataset}"))
        if conflict is not None and conflict.status != 409:
            raise conflict
        # A conflict: it exists, from an upload that was interrupted. Its file is sent again, and may be there already.
        unsent = await refusal(self._send(dataset, name, content))
        if unsent is not None and conflict is None:
            raise unsent
        validate = self._sdk.datasets.validate_upload(dataset, body={})
        unchecked = await refusal(self._calls.call(validate, doing=f"validating data set {dataset}"))

        def ready(latest: Answer) -> bool:
            code = part_of(latest, "status", "code")
            if latest.get("state") != READY and code in FILE_FAULTS:
                reason = self._calls.clean(str(part_of(latest, "status", "message") or code))
                raise RejectedError(f"Fireworks finds fault with data set {dataset}: {reason}")
            return latest.get("state") == READY

        answer, late = await self._read(dataset), unsent or unchecked
        try:
            await self.poll.until(
                ready, answer, lambda: self._read(dataset), f"data set {dataset}", late=TransientError
            )
        except TransientError:
            if late is not None:
                raise late from None
            raise
        return self._resource("datasets", dataset)

    async def _send(self, dataset: str, name: str, content: bytes) -> None:
        """Send the file: in one request to Fireworks, or, where it is too large for that, to the address it signs."""
        datasets, doing = self._sdk.datasets, f"uploading {name}"
        if len(content) <= LARGEST_UPLOAD:
            call = datasets.upload(dataset, file=(name, content, "application/jsonl"), timeout=UPLOAD_TIMEOUT)
            await self._calls.call(call, doing=doing)
            return
        size = str(len(content))
        signed = datasets.get_upload_endpoint(dataset, filename_to_size={name: size})
        urls = (await self._calls.fields(signed, doing=doing)).get("filenameToSignedUrls")
        url = urls.get(name) if isinstance(urls, dict) else None
        if not isinstance(url, str):
            raise self._calls.malformed(doing, False, "no address for the file")
        headers = {"content-type": "application/octet-stream", "x-goog-content-length-range": f"{size},{size}"}
        async with httpx2.AsyncClient(timeout=UPLOAD_TIMEOUT) as http:
            await self._calls.request(http, "PUT", url, doing=doing, content=content, headers=headers)

    async def _read(self, dataset: str) -> dict[str, Any]:
        return await self._calls.fields(self._sdk.datasets.get(dataset), doing=f"reading data set {dataset}")

    async def _state_of_data(self, dataset: str) -> str | None:
        """A data set's state; None where there is none of this id."""
        with gone_already():
            return str((await self._read(dataset)).get("state"))
        return None

    async def find_file(self, name: str, size: int) -> str | None:
        """The data set of this name, where its file arrived whole (the name carries the content's hash)."""
        dataset = dataset_id_of(name)
        return self._resource("datasets", dataset) if await self._state_of_data(dataset) == READY else None

    async def submit(self, request: JobRequest) -> Job:
        """Create a job, once; one of the same id is refused by Fireworks. Raises AmbiguousSubmitError when no answer
        tells what happened, TransientError where the data set is not ready yet."""
        job_id = job_id_of(request.key)
        options: dict[str, Any] = dict(request.hyperparameters)
        if self._template is not None:
            options["jinja_template"] = self._template
        options["base_model" if request.model == self._base_model else "warm_start_from"] = request.model
        call = self._jobs.create(
            dataset=request.file_id,
            supervised_fine_tuning_job_id=job_id,
            output_model=self._resource("models", job_id),
            display_name=request.marked_suffix(DISPLAY_CHARACTERS),
            eval_auto_carveout=False,  # every example of the subset is trained on
            early_stop=False,
            **options,
        )
        async with file_in_time(partial(self._is_read, request.file_id)):
            return await self._one(job_id, call, f"creating job {request.key}", submit=True)

    async def _is_read(self, file_id: str) -> bool:
        return await self._state_of_data(id_of(file_id)) not in (None, READY)

    async def find_job(self, key: str) -> Job | None:
        """The job with this key, by its id."""
        with gone_already():
            return await self.get(job_id_of(key))
        return None

    async def jobs_of(self, run_key: str) -> list[Job]:
        """Every job of a run, by their display names."""
        items = await self._calls.listed(self._jobs.list(page_size=PAGE), doing="listing this run's jobs")
        jobs = [self._job(id_of(item.get("name")), item) for each in items if (item := plain(each)) is not None]
        return [job for job in jobs if of_run(job.echo.key, run_key)]

    async def get(self, job_id: str) -> Job:
        return await self._one(job_id, self._jobs.get(job_id), f"reading job {job_id}")

    async def _one(self, job_id: str, call: Awaitable[Any], doing: str, *, submit: bool = False) -> Job:
        """The job in an answer, which has to be this one."""
        answer = await self._calls.fields(call, doing=doing, submit=submit, needs={"name": str})
        if id_of(answer["name"]) != job_id:
            raise self._calls.malformed(doing, submit, f"the job {id_of(answer['name'])}")
        return self._job(job_id, answer)

    async def cancel(self, job_id: str) -> Job:
        """Ask for cancellation; a job that is already final is returned as it is."""
        call = self._calls.call(self._jobs.cancel(job_id, body={}), doing=f"cancelling job {job_id}")
        return await cancelled(call, lambda: self.get(job_id))

    async def delete_file(self, file_id: str) -> bool:
        dataset = id_of(file_id)
        return await self._calls.delete(self._sdk.datasets.delete(dataset), doing=f"deleting data set {dataset}")

    async def delete_model(self, model: str) -> bool:
        account, model_id = split_model(model)
        return await self._calls.delete(
            self._sdk.models.delete(model_id, account_id=account), doing=f"deleting model {model}"
        )

    def _resource(self, kind: str, name: str) -> str:
        return f"accounts/{self._sdk.account_id}/{kind}/{name}"

    def _job(self, job_id: str, answer: dict[str, Any]) -> Job:
        state = str(answer.get("state") or "").removeprefix("JOB_STATE_")
        reason = self._calls.clean(str(part_of(answer, "status", "message") or NO_REASON))
        paused = (
            f"Fireworks has paused job {job_id} ({reason}): the account is suspended, or somebody paused it. "
            "Everything so far is kept; settle that at Fireworks (billing, or resume the job), then run the same "
            "command again."
        )
        status = _FINAL.get(state, JobStatus.QUEUED if state in _QUEUED else JobStatus.RUNNING)
        model = answer.get("outputModel") or self._resource("models", job_id)
        return Job(
            id=job_id,
            status=status,
            model=str(model) if status is JobStatus.SUCCEEDED else None,
            error=reason if status is JobStatus.FAILED else None,
            refused=status is JobStatus.FAILED and part_of(answer, "status", "code") in FILE_FAULTS,
            blocked=paused if state == "PAUSED" else None,
            echo=JobEcho(key=key_in([answer.get("displayName")]), file_id=answer.get("dataset")),
        )


def id_of(resource: object) -> str:
    """The last part of a resource's name."""
    return str(resource or "").rsplit("/", 1)[-1]


def split_model(model: str) -> tuple[str, str]:
    """Account and id of ``accounts/ACCOUNT/models/ID``. Raises RejectedError for any other form."""
    parts = model.split("/")
    if len(parts) != 4 or parts[0] != "accounts" or parts[2] != "models":
        raise RejectedError(f"{model!r} is not a model of Fireworks; its names are accounts/ACCOUNT/models/ID.")
    return parts[1], parts[3]
