"""Azure OpenAI: OpenAI's wire format through ``AzureOpenAI``, and a deployment for every fine-tune that is scored.

A fine-tune answers only under a deployment, which Azure's management service makes (an address and a token of its
own) and which is paid by the hour. Deployments are made when a member is scored and deleted afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import httpx2
import openai
from pydantic import Field

from ..config import RunConfig
from ..errors import ConfigurationError, MissingExtraError, RejectedError, StopError, TransientError
from .base import Job, JobRequest, Scorer, ScorerCapabilities, TrainerCapabilities
from .calls import Calls, connections
from .contract import json_of, part_of
from .endpoint import Endpoint, api_key_from
from .hosting import Host, HostedScorer
from .openai_wire.chat_token import ChatTokenOptions, ChatTokenScorer, open_tokenizer
from .openai_wire.client import WireClient
from .openai_wire.trainer import OPENAI_GRACE_SECONDS, WireTrainer, WireTrainerOptions
from .polling import Answer, Poll, file_in_time
from .registry import Context

__all__ = ["open_scorer", "open_tokenizer", "open_trainer", "scorer_capabilities", "trainer_capabilities"]

NOTES = (
    "every model that is scored needs a deployment of its own, which Azure bills by the hour",
    "jobs are found again by their metadata; that Azure keeps it was not tested against the service",
    "by default an Azure resource runs 1 fine-tuning job at a time and keeps 100 in all, files 50 (1 GB)",
    "customers who are new since 14 October 2026 cannot train gpt-4.1, -mini and -nano at Azure",
)
MANAGEMENT_URL = "https://management.azure.com"
MANAGEMENT_VERSION = "2024-10-01"
API_VERSIONS = "a dated version, or v1 for the surface without dates (.../openai/v1, projects of Foundry)"
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

    grace_seconds: float = Field(OPENAI_GRACE_SECONDS, ge=0)
    api_version: str = Field("2025-04-01-preview", description=API_VERSIONS)
    training_type: str | None = Field(
        None, description="trainingType of jobs: Standard, GlobalStandard or developerTier (the cheap ones, by region)"
    )


def trainer_capabilities(config: RunConfig) -> TrainerCapabilities:
    """As OpenAI's own, with Azure's conditions; no network."""
    return AzureTrainerOptions.of(config).capabilities(
        config,
        "Azure OpenAI",
        JOBS_AT_ONCE,
        notes=NOTES,
        accepts=frozenset({"tools", "images", "validation"}),
    )


def open_trainer(context: Context) -> AzureTrainer:
    """The OpenAI-wire trainer on an ``AsyncAzureOpenAI``."""
    options = AzureTrainerOptions.of(context.config)
    client = _client(context, options.api_version, options.timeout)
    return AzureTrainer(client, context.config)


class AzureTrainer(WireTrainer):
    """OpenAI's, with files that Azure reads before a job may use them."""

    poll = Poll(5.0, 120)

    def __init__(self, client: WireClient, config: RunConfig) -> None:
        options = AzureTrainerOptions.of(config)
        if options.training_type is not None:
            extra = {**options.extra_body, "trainingType": options.training_type}
            options = options.model_copy(update={"extra_body": extra})
        super().__init__(client, trainer_capabilities(config), options)

    async def upload(self, name: str, content: bytes) -> str:
        """Upload a training file and wait until Azure has read it; its id.

        Raises RejectedError where Azure finds fault with the file, TransientError where it takes too long.
        """
        file_id = await super().upload(name, content)

        def ready(answer: Answer) -> bool:
            if answer.get("status") in _BROKEN:
                reason = self._client.calls.clean(str(answer.get("status_details") or answer["status"]))
                raise RejectedError(f"Azure finds fault with {name}: {reason}")
            return answer.get("status") not in _WAITING

        look = partial(self._file, file_id)
        await self.poll.until(ready, await look(), look, f"file {file_id}", late=TransientError)
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
        return await self._client.json(self._files.retrieve(file_id), doing=f"reading file {file_id}")


class AzureScorerOptions(ChatTokenOptions):
    """``backend.scorer.options`` of the Azure scorer: the one-token chat scorer's, and where deployments are made.

    Without ``subscription`` the fine-tunes are taken to be deployed already, under their own names.
    """

    together = ("subscription", "resource_group", "account")
    what = "name the Azure resource together; give all three, or none where the fine-tunes are deployed already"

    api_version: str = Field("2025-04-01-preview", description=API_VERSIONS)
    subscription: str | None = None
    resource_group: str | None = None
    account: str | None = Field(None, description="name of the Azure OpenAI resource")
    management_token_env: str = Field(
        "AZURE_MANAGEMENT_TOKEN", description="variable with a token of `az account get-access-token`"
    )
    azure_identity: bool = Field(False, description="take that token from the package azure-identity (extra azure)")
    management_token_file: Path | None = Field(
        None, description="file with such a token instead, read at every request: a token lasts for about an hour"
    )
    sku: str = Field("Standard", description="Standard, GlobalStandard (open models) or DeveloperTier (free, one day)")
    model_format: str = Field(
        "OpenAI", description="publisher of the base model: OpenAI, Microsoft, Meta, Mistral AI, Alibaba, ..."
    )
    model_version: str = "1"
    capacity: int = Field(1, ge=1, description="thousands of tokens per minute of each deployment")
    max_deployments: int = Field(1, ge=1, description="deployments at once")


def azure_options(config: RunConfig) -> AzureScorerOptions:
    """The scorer's options, checked. Raises ConfigurationError where the resource is only partly named."""
    options = AzureScorerOptions.of(config)
    if options.batch_api:
        raise ConfigurationError(
            "backend.scorer.options.batch_api: Azure runs batches only on deployments of their own kind (GlobalBatch), "
            "which are not made here. Leave it out: Azure is asked by single requests. backend.kind: openai has it."
        )
    return options


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """One token of the most likely ones, or the first token by choice; no network."""
    options = azure_options(config)
    return options.capabilities(
        "Azure one-token chat",
        NOTES[:1],
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
    scorer = ChatTokenScorer(client, config, scorer_capabilities(config), plain)
    if options.subscription is None:
        return scorer
    management_token(options)  # where there is none, nothing is started
    http = context.http_client or httpx2.AsyncClient(timeout=options.timeout)
    return HostedScorer(scorer, DeploymentHost(http, options, lambda: management_token(options)))


class DeploymentHost(Host):
    """Makes and deletes deployments. Their names follow from the models', so that one that an earlier process left is
    found again.

    ``token`` is asked before every request, since a token lasts for about an hour. Closing this closes ``http``.
    """

    poll = Poll(15.0, 240)

    def __init__(self, http: httpx2.AsyncClient, options: AzureScorerOptions, token: Callable[[], str]) -> None:
        super().__init__(options.max_deployments)
        self._http = http
        self._options = options
        self._token = token

    async def create(self, model: str) -> tuple[str, str, Answer]:
        name, options = name_of(model), self._options
        body = {
            "sku": {"name": options.sku, "capacity": options.capacity},
            "properties": {"model": {"format": options.model_format, "name": model, "version": options.model_version}},
        }
        return name, name, await self._request("PUT", name, f"deploying {model}", body)

    async def read(self, loaded: str, model: str) -> Answer:
        return await self._request("GET", loaded, f"waiting for {model}")

    def ready(self, answer: Answer, model: str) -> bool:
        state = part_of(answer, "properties", "provisioningState")
        if state in ("Failed", "Canceled", "Disabled"):
            raise RejectedError(f"Azure could not deploy {model}: {state}.")
        return bool(state == "Succeeded")

    async def delete(self, loaded: str, model: str) -> None:
        await self._request("DELETE", loaded, f"deleting the deployment of {model}")

    async def listed(self, model: str) -> list[str]:
        return [name_of(model)]

    async def close(self) -> None:
        await self._http.aclose()

    async def _request(self, method: str, name: str, doing: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        options, token = self._options, self._token()
        calls = Calls("Azure's management service", [token])
        url = (
            f"{MANAGEMENT_URL}/subscriptions/{options.subscription}/resourceGroups/{options.resource_group}/providers/"
            f"Microsoft.CognitiveServices/accounts/{options.account}/deployments/{name}"
        )
        try:
            response = await calls.request(
                self._http,
                method,
                url,
                doing=doing,
                params={"api-version": MANAGEMENT_VERSION},
                headers={"Authorization": f"Bearer {token}"},
                json=body,
            )
        except StopError as error:
            if error.status is not None:  # a refused token: it is not the API key that failed
                source = options.management_token_file or options.management_token_env
                error.args = (
                    f"{error} Here it is the token of {source} that counts, not the API key: it lasts for about an "
                    f"hour. Deployment {name} may be up, and is paid for by the hour: renew the token, then run the "
                    "same command again or `daunce clean`, which delete it.",
                )
            raise
        answer = json_of(response.content or b"{}")
        if not isinstance(answer, dict):
            raise calls.malformed(doing, False, "a body that is not a JSON object")
        return answer


def name_of(model: str) -> str:
    """The name of a model's deployment."""
    return f"daunce-{hashlib.sha256(model.encode()).hexdigest()[:24]}"


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
        return str(credential.get_token(f"{MANAGEMENT_URL}/.default").token)
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
        http_client=context.http_client or connections(openai, endpoint, timeout=timeout),
    )
    return WireClient(sdk, provider="Azure OpenAI")
