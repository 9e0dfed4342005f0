"""Azure OpenAI: OpenAI's wire format through ``AzureOpenAI``, and a deployment for every fine-tune that is scored.

A fine-tune answers only under a deployment, which Azure's management service makes (an address and a token of its
own) and which is paid by the hour. Deployments are made when a member is scored and deleted afterwards.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import httpx2
import openai
from pydantic import Field

from ..clock import Clock, SystemClock
from ..config import RunConfig
from ..errors import ConfigurationError, ProviderError, RejectedError
from .base import Scorer, ScorerCapabilities, TrainerCapabilities
from .failures import Failures
from .hosting import hosted
from .openai_wire.chat_token import ChatTokenOptions, chat_capabilities, open_tokenizer, scorer_on
from .openai_wire.client import WireClient, api_key_from
from .openai_wire.trainer import HYPERPARAMETERS, KEPT_CHECKPOINTS, WireTrainer, WireTrainerOptions
from .options import parse_options
from .registry import Context

__all__ = ["open_scorer", "open_tokenizer", "open_trainer", "scorer_capabilities", "trainer_capabilities"]

MANAGEMENT_URL = "https://management.azure.com"
MANAGEMENT_VERSION = "2024-10-01"
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
_POLL_SECONDS = 15.0


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
    )


def open_trainer(context: Context) -> WireTrainer:
    """The OpenAI-wire trainer on an ``AsyncAzureOpenAI``."""
    options = parse_options(AzureTrainerOptions, context.config.backend.options, "backend.options")
    client = _client(context, options.api_version, options.timeout)
    return WireTrainer(client, trainer_capabilities(context.config), job_events=options.job_events)


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
    return replace(capabilities, hourly=options.sku.lower() != DEVELOPER_SKU)


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
    token = api_key_from(options.management_token_env)
    http = context.http_client or httpx2.AsyncClient(timeout=options.timeout)
    return hosted(scorer, DeploymentHost(http, options, token))


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


class DeploymentHost:
    """Makes and deletes deployments through Azure's management service. ``polls`` are 15 seconds apart."""

    def __init__(
        self,
        http: httpx2.AsyncClient,
        options: AzureScorerOptions,
        token: str,
        *,
        clock: Clock | None = None,
        polls: int = 240,
    ) -> None:
        self.limit = options.max_deployments
        self._http = http
        self._options = options
        self._token = token
        self._failures = Failures("Azure's management service", [token])
        self._clock = clock or SystemClock()
        self._polls = polls

    async def load(self, model: str) -> str:
        """Deploy a fine-tune and wait until it answers: the deployment's name."""
        name = f"daunce-{hashlib.sha256(model.encode()).hexdigest()[:24]}"
        body = {
            "sku": {"name": self._options.sku, "capacity": self._options.capacity},
            "properties": {"model": {"format": "OpenAI", "name": model, "version": "1"}},
        }
        answer = await self._request("PUT", name, f"deploying {model}", body)
        for _ in range(self._polls):
            properties = answer.get("properties")
            state = properties.get("provisioningState") if isinstance(properties, dict) else None
            if state == "Succeeded":
                return name
            if state in ("Failed", "Canceled", "Disabled"):
                raise RejectedError(f"Azure could not deploy {model}: {state}.")
            await self._clock.sleep(_POLL_SECONDS)
            answer = await self._request("GET", name, f"waiting for {model}")
        raise RejectedError(f"{model} was not deployed after {self._polls * _POLL_SECONDS / 60:.0f} minutes.")

    async def unload(self, model: str, served: str) -> None:
        """Delete the deployment; one that is gone already is no error. The fine-tune stays."""
        try:
            await self._request("DELETE", served, f"deleting the deployment of {model}")
        except RejectedError as error:
            if error.status != 404:
                raise

    async def close(self) -> None:
        await self._http.aclose()

    async def _request(self, method: str, name: str, doing: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        options = self._options
        url = (
            f"{MANAGEMENT_URL}/subscriptions/{options.subscription}/resourceGroups/{options.resource_group}/providers/"
            f"Microsoft.CognitiveServices/accounts/{options.account}/deployments/{name}"
        )
        failure: ProviderError
        try:
            response = await self._http.request(
                method,
                url,
                params={"api-version": MANAGEMENT_VERSION},
                headers={"Authorization": f"Bearer {self._token}"},
                json=body,
            )
        except httpx2.TransportError as error:
            failure = self._failures.unreachable(doing, timed_out=isinstance(error, httpx2.TimeoutException))
        else:
            if response.status_code >= 400:
                raise self._failures.from_status(response.status_code, response, doing)
            try:
                answer = response.json() if response.content else {}
            except ValueError:
                answer = None
            if isinstance(answer, dict):
                return answer
            failure = self._failures.malformed(doing, False, "a body that is not a JSON object")
        raise failure
