"""Azure OpenAI: OpenAI's wire format through ``AzureOpenAI``, and a deployment for every fine-tune that is scored.

A fine-tune answers only under a deployment, which Azure's management service makes (an address and a token of its
own) and which is paid by the hour. Deployments are made when a member is scored and deleted afterwards.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import httpx2
import openai
from pydantic import Field

from ..config import RunConfig
from ..errors import ConfigurationError, MissingExtraError, RejectedError, TransientError
from .azure_deployments import API_VERSIONS, AzureScorerOptions, DeploymentHost
from .base import Job, JobRequest, Scorer, ScorerCapabilities, TrainerCapabilities
from .endpoint import Endpoint, api_key_from
from .hosting import HostedScorer
from .openai_wire.chat_token import chat_capabilities, open_tokenizer, scorer_on
from .openai_wire.client import WireClient
from .openai_wire.trainer import OPENAI_GRACE_SECONDS, WireTrainer, WireTrainerOptions, wire_capabilities
from .options import all_or_none
from .polling import Answer, Poll, file_in_time
from .registry import Context

__all__ = ["open_scorer", "open_tokenizer", "open_trainer", "scorer_capabilities", "trainer_capabilities"]

NOTES = (
    "every model that is scored needs a deployment of its own, which Azure bills by the hour",
    "jobs are found again by their metadata; that Azure keeps it was not tested against the service",
    "by default an Azure resource runs 1 fine-tuning job at a time and keeps 100 in all, files 50 (1 GB)",
    "customers who are new since 14 October 2026 cannot train gpt-4.1, -mini and -nano at Azure",
)
DEVELOPER_SKU = "developertier"
"""Deployments of this kind cost nothing by the hour; Azure removes them after a day."""
JOBS_AT_ONCE = 1
"""Fine-tuning jobs that one Azure OpenAI resource runs at a time; 20 more may queue, 100 are kept in all
(https://learn.microsoft.com/azure/ai-foundry/openai/quotas-limits, a copy of 2025)."""
_WAITING = {"uploaded", "pending", "running", "notRunning"}
"""States of a file that is not read yet; jobs on it are refused."""
_BROKEN = {"error", "failed", "canceled", "deleting", "deleted"}


class AzureTrainerOptions(WireTrainerOptions):
    """``backend.options`` of the Azure trainer."""

    api_version: str = Field("2025-04-01-preview", description=API_VERSIONS)
    training_type: str | None = Field(
        None, description="trainingType of jobs: Standard, GlobalStandard or developerTier (the cheap ones, by region)"
    )


def trainer_capabilities(config: RunConfig) -> TrainerCapabilities:
    """As OpenAI's own, with Azure's conditions; no network."""
    options = AzureTrainerOptions.of(config)
    return wire_capabilities(
        config,
        options,
        provider="Azure OpenAI",
        max_concurrent_jobs=JOBS_AT_ONCE,
        grace_seconds=OPENAI_GRACE_SECONDS,
        notes=NOTES,
        accepts=frozenset({"tools", "images", "validation"}),
    )


def open_trainer(context: Context) -> AzureTrainer:
    """The OpenAI-wire trainer on an ``AsyncAzureOpenAI``."""
    options = AzureTrainerOptions.of(context.config)
    client = _client(context, options.api_version, options.timeout)
    return AzureTrainer(client, trainer_capabilities(context.config), options)


class AzureTrainer(WireTrainer):
    """OpenAI's, with files that Azure reads before a job may use them."""

    def __init__(
        self,
        client: WireClient,
        capabilities: TrainerCapabilities,
        options: AzureTrainerOptions | None = None,
        *,
        poll: Poll | None = None,
    ) -> None:
        options = options or AzureTrainerOptions()
        if options.training_type is not None:
            extra = {**options.extra_body, "trainingType": options.training_type}
            options = options.model_copy(update={"extra_body": extra})
        super().__init__(client, capabilities, options)
        self._poll = poll or Poll(5.0, 120)

    async def upload(self, name: str, content: bytes) -> str:
        """Upload a training file and wait until Azure has read it; its id.

        Raises RejectedError where Azure finds fault with the file, TransientError where it takes too long.
        """
        file_id = await super().upload(name, content)

        def ready(answer: Answer) -> bool:
            if answer.get("status") in _BROKEN:
                reason = self._client.clean(str(answer.get("status_details") or answer["status"]))
                raise RejectedError(f"Azure finds fault with {name}: {reason}")
            return answer.get("status") not in _WAITING

        look = partial(self._file, file_id)
        await self._poll.until(ready, await look(), look, f"file {file_id}", late=TransientError)
        return file_id

    async def submit(self, request: JobRequest) -> Job:
        """Create a supervised job, once. Raises AmbiguousSubmitError when no answer tells what happened, and
        TransientError where the file is not read yet."""
        async with file_in_time(partial(self._waits, request.file_id)):
            return await super().submit(request)

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
    options = AzureScorerOptions.of(config)
    what = "name the Azure resource together; give all three, or none where the fine-tunes are deployed already"
    all_or_none(options, ("subscription", "resource_group", "account"), what)
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
    own = context.http_client is None
    http = context.http_client or httpx2.AsyncClient(timeout=options.timeout)
    return HostedScorer(scorer, DeploymentHost(http, options, lambda: management_token(options), own_http=own))


def management_token(options: AzureScorerOptions) -> str:
    """The management service's token as it is now. Raises ConfigurationError where there is none, MissingExtraError
    where Azure's own sign-in is configured and not installed."""
    if options.azure_identity:
        return identity_token()
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


def identity_token() -> str:
    """A token from whatever signs in to Azure on this machine: environment, managed identity, ``az login``."""
    credential = _credential()
    try:
        return str(credential.get_token("https://management.azure.com/.default").token)
    except Exception as error:  # the package raises errors of its own and of its transport
        raise ConfigurationError(
            f"Azure's sign-in gave no token ({type(error).__name__}). Run `az login`, or set "
            "backend.scorer.options.management_token_file."
        ) from None


@lru_cache(maxsize=1)
def _credential() -> Any:
    try:
        from azure.identity import DefaultAzureCredential
    except ImportError as error:
        raise MissingExtraError("signing in to Azure", "azure") from error
    return DefaultAzureCredential()


def _client(context: Context, api_version: str, timeout: float) -> WireClient:
    endpoint = context.wire_endpoint
    address = endpoint.base_url.removesuffix("/v1").removesuffix("/openai")
    if api_version == "v1":
        whole = Endpoint(f"{address}/openai/v1", endpoint.api_key, "Azure OpenAI")
        return WireClient.open(whole, http_client=context.http_client, timeout=timeout)
    sdk = openai.AsyncAzureOpenAI(
        azure_endpoint=address,
        api_version=api_version,
        api_key=endpoint.api_key,
        max_retries=0,
        timeout=timeout,
        http_client=context.http_client,
    )
    return WireClient(sdk, provider="Azure OpenAI")
