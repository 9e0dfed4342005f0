"""Azure OpenAI: OpenAI's wire format through ``AzureOpenAI``, and a deployment for every fine-tune that is scored.

A fine-tune answers only under a deployment, which Azure's management service makes (an address and a token of its
own) and which is paid by the hour. Deployments are made when a member is scored and deleted afterwards.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
from pydantic import Field

from .._util.clock import Clock, SystemClock
from ..config import RunConfig
from ..errors import ConfigurationError, RejectedError, TransientError
from .azure_deployments import DeploymentHost
from .base import Job, JobRequest, Scorer, ScorerCapabilities, TrainerCapabilities
from .hosting import hosted
from .openai_wire.chat_token import ChatTokenOptions, chat_capabilities, open_tokenizer, scorer_on
from .openai_wire.client import WireClient, api_key_from
from .openai_wire.trainer import HYPERPARAMETERS, KEPT_CHECKPOINTS, WireTrainer, WireTrainerOptions
from .options import parse_options
from .registry import Context

__all__ = ["open_scorer", "open_tokenizer", "open_trainer", "scorer_capabilities", "trainer_capabilities"]

NOTES = (
    "every model that is scored needs a deployment of its own, which Azure bills by the hour",
    "jobs are found again by their metadata; that Azure keeps it was not tested against the service",
    "by default an Azure resource runs 1 fine-tuning job at a time and keeps 100 in all, files 50 (1 GB)",
)
DEVELOPER_SKU = "developertier"
"""Deployments of this kind cost nothing by the hour; Azure removes them after a day."""
JOBS_AT_ONCE = 1
"""Fine-tuning jobs that one Azure OpenAI resource runs at a time; 20 more may queue, 100 are kept in all
(https://learn.microsoft.com/azure/ai-foundry/openai/quotas-limits, a copy of 2025)."""
_FILE_POLL_SECONDS = 5.0
_WAITING = {"uploaded", "pending", "running", "notRunning"}
"""States of a file that is not read yet; jobs on it are refused."""
_BROKEN = {"error", "failed", "canceled", "deleting", "deleted"}


class AzureTrainerOptions(WireTrainerOptions):
    """``backend.options`` of the Azure trainer."""

    api_version: str = "2025-04-01-preview"


class AzureScorerOptions(ChatTokenOptions):
    """``backend.scorer.options`` of the Azure scorer: the one-token chat scorer's, and where deployments are made.

    Without ``subscription`` the fine-tunes are taken to be deployed already, under their own names.
    """

    api_version: str = "2025-04-01-preview"
    subscription: str | None = None
    resource_group: str | None = None
    account: str | None = Field(None, description="name of the Azure OpenAI resource")
    management_token_env: str = Field(
        "AZURE_MANAGEMENT_TOKEN", description="variable with a token of `az account get-access-token`"
    )
    management_token_file: Path | None = Field(
        None, description="file with such a token instead, read at every request: a token lasts for about an hour"
    )
    sku: str = "Standard"
    capacity: int = Field(1, ge=1, description="thousands of tokens per minute of each deployment")
    max_deployments: int = Field(1, ge=1, description="deployments at once")


def trainer_capabilities(config: RunConfig) -> TrainerCapabilities:
    """As OpenAI's own, with Azure's conditions; no network."""
    options = parse_options(AzureTrainerOptions, config.backend.options, "backend.options")
    return TrainerCapabilities(
        provider="Azure OpenAI",
        max_concurrent_jobs=config.backend.max_concurrent_jobs or JOBS_AT_ONCE,
        min_examples=options.min_examples,
        hyperparameters=HYPERPARAMETERS,
        checkpoints=KEPT_CHECKPOINTS,
        notes=NOTES,
        accepts=frozenset({"tools", "images"}),
    )


def open_trainer(context: Context) -> AzureTrainer:
    """The OpenAI-wire trainer on an ``AsyncAzureOpenAI``."""
    options = parse_options(AzureTrainerOptions, context.config.backend.options, "backend.options")
    client = _client(context, options.api_version, options.timeout)
    return AzureTrainer(client, trainer_capabilities(context.config), job_events=options.job_events)


class AzureTrainer(WireTrainer):
    """OpenAI's, with files that Azure reads before a job may use them. ``polls`` of a file are five seconds apart."""

    def __init__(
        self,
        client: WireClient,
        capabilities: TrainerCapabilities,
        *,
        job_events: bool = False,
        clock: Clock | None = None,
        polls: int = 120,
    ) -> None:
        super().__init__(client, capabilities, job_events=job_events)
        self._clock = clock or SystemClock()
        self._polls = polls

    async def upload(self, name: str, content: bytes) -> str:
        """Upload a training file and wait until Azure has read it; its id.

        Raises RejectedError where Azure finds fault with the file, TransientError where it takes too long.
        """
        file_id = await super().upload(name, content)
        for _ in range(self._polls):
            answer = await self._file(file_id)
            if answer.get("status") not in _WAITING:
                break
            await self._clock.sleep(_FILE_POLL_SECONDS)
        else:
            raise TransientError(f"file {file_id} was not read after {self._polls * _FILE_POLL_SECONDS:.0f} seconds.")
        if answer.get("status") in _BROKEN:
            said = self._client.clean(str(answer.get("status_details") or answer["status"]))
            raise RejectedError(f"Azure finds fault with {name}: {said}")
        return file_id

    async def submit(self, request: JobRequest) -> Job:
        """Create a supervised job, once. Raises AmbiguousSubmitError when no answer tells what happened, and
        TransientError where the file is not read yet."""
        try:
            return await super().submit(request)
        except RejectedError as error:
            if error.status == 400 and await self._waits(request.file_id):
                raise TransientError(f"{error} Its file is not read yet.") from error
            raise

    async def _waits(self, file_id: str) -> bool:
        try:
            return (await self._file(file_id)).get("status") in _WAITING
        except RejectedError:
            return False  # it is gone, which is not a matter of time

    async def _file(self, file_id: str) -> dict[str, Any]:
        call = self._sdk.files.with_raw_response.retrieve(file_id)
        return await self._client.json(call, doing=f"reading file {file_id}")


def azure_options(config: RunConfig) -> AzureScorerOptions:
    """The scorer's options, checked. Raises ConfigurationError where the resource is named by halves."""
    options = parse_options(AzureScorerOptions, config.backend.scorer.options, "backend.scorer.options")
    named = [options.subscription, options.resource_group, options.account]
    if any(named) and not all(named):
        raise ConfigurationError(
            "backend.scorer.options: subscription, resource_group and account name the Azure resource together; give "
            "all three, or none where the fine-tunes are deployed already."
        )
    if options.batch_api:
        raise ConfigurationError(
            "backend.scorer.options.batch_api: Azure runs batches only on deployments of their own kind (GlobalBatch), "
            "which are not made here. Leave it out: Azure is asked by single requests. backend.kind: openai has it."
        )
    return options


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """One token of the most likely ones, or the first token by choice; no network."""
    options = azure_options(config)
    capabilities = chat_capabilities(options, provider="Azure one-token chat", notes=NOTES[:1])
    return replace(
        capabilities,
        hourly=options.sku.lower() != DEVELOPER_SKU,
        tried_on="fine_tune" if options.subscription is None else "nothing",
    )


def open_scorer(context: Context) -> Scorer:
    """The one-token chat scorer on an ``AsyncAzureOpenAI``; deployments are made and deleted as members are scored."""
    config = context.config
    options = azure_options(config)
    client = _client(context, options.api_version, options.timeout)
    # A deployment answers as its base model.
    plain = options.model_copy(update={"check_model_name": False})
    scorer = scorer_on(client, config, plain, scorer_capabilities(config))
    if options.subscription is None:
        return scorer
    management_token(options)  # where there is none, nothing is started
    http = context.http_client or httpx2.AsyncClient(timeout=options.timeout)
    return hosted(scorer, DeploymentHost(http, options, lambda: management_token(options)))


def management_token(options: AzureScorerOptions) -> str:
    """The management service's token as it is now. Raises ConfigurationError where there is none."""
    path = options.management_token_file
    if path is None:
        return api_key_from(options.management_token_env)
    try:
        token = path.expanduser().read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the token file {path} cannot be read: {type(error).__name__}.") from None
    if not token.isprintable() or not token or " " in token:
        raise ConfigurationError(f"the file {path} holds no token. `az account get-access-token` prints one.")
    return token


def _client(context: Context, api_version: str, timeout: float) -> WireClient:
    endpoint = context.wire_endpoint
    address = endpoint.base_url.removesuffix("/v1").removesuffix("/openai")
    sdk = openai.AsyncAzureOpenAI(
        azure_endpoint=address,
        api_version=api_version,
        api_key=endpoint.api_key,
        max_retries=0,
        timeout=timeout,
        http_client=context.http_client,
    )
    return WireClient(sdk, provider="Azure OpenAI")
