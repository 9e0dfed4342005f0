"""A deployment for every fine-tune that is scored at Azure, made and deleted through its management service.

The service has an address and a token of its own. A deployment is paid for by the hour until it is deleted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from pydantic import Field

from ..errors import ProviderError, RejectedError, StopError
from .failures import Failures
from .hosting import PolledHost
from .openai_wire.chat_token import ChatTokenOptions
from .polling import Answer, Poll

MANAGEMENT_URL = "https://management.azure.com"
MANAGEMENT_VERSION = "2024-10-01"


API_VERSIONS = "a dated version, or v1 for the surface without dates (.../openai/v1, projects of Foundry)"


class AzureScorerOptions(ChatTokenOptions):
    """``backend.scorer.options`` of the Azure scorer: the one-token chat scorer's, and where deployments are made.

    Without ``subscription`` the fine-tunes are taken to be deployed already, under their own names.
    """

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


class DeploymentHost(PolledHost):
    """Makes and deletes deployments. Their names follow from the models', so that one that an earlier process left is
    found again.

    ``token`` is asked before every request, since a token lasts for about an hour. ``http`` is closed by its owner.
    """

    def __init__(
        self,
        http: httpx2.AsyncClient,
        options: AzureScorerOptions,
        token: Callable[[], str],
        *,
        poll: Poll | None = None,
        own_http: bool = False,
    ) -> None:
        super().__init__(options.max_deployments, poll or Poll(15.0, 240))
        self._http = http
        self._own_http = own_http
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
        properties = answer.get("properties")
        state = properties.get("provisioningState") if isinstance(properties, dict) else None
        if state in ("Failed", "Canceled", "Disabled"):
            raise RejectedError(f"Azure could not deploy {model}: {state}.")
        return state == "Succeeded"

    async def delete(self, loaded: str, model: str) -> None:
        await self._request("DELETE", loaded, f"deleting the deployment of {model}")

    async def listed(self, model: str) -> list[str]:
        return [name_of(model)]

    async def close(self) -> None:
        if self._own_http:
            await self._http.aclose()

    async def _request(self, method: str, name: str, doing: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        options, token = self._options, self._token()
        failures = Failures("Azure's management service", [token])
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
                headers={"Authorization": f"Bearer {token}"},
                json=body,
            )
        except httpx2.TransportError as error:
            failure = failures.unreachable(doing, error, timed_out=isinstance(error, httpx2.TimeoutException))
        else:
            if response.status_code >= 400:
                failure = failures.from_status(response.status_code, response, doing)
                raise _with_advice(failure, name, options) if isinstance(failure, StopError) else failure
            try:
                answer = response.json() if response.content else {}
            except ValueError:
                answer = None
            if isinstance(answer, dict):
                return answer
            failure = failures.malformed(doing, False, "a body that is not a JSON object")
        raise failure


def name_of(model: str) -> str:
    """The name of a model's deployment."""
    return f"daunce-{hashlib.sha256(model.encode()).hexdigest()[:24]}"


def _with_advice(failure: StopError, name: str, options: AzureScorerOptions) -> StopError:
    """A refused token in words of its own: it is not the API key that failed, and a deployment may be left."""
    source = options.management_token_file or options.management_token_env
    advised = StopError(
        f"{failure} Here it is the token of {source} that counts, not the API key: it lasts for about an hour. "
        f"Deployment {name} may be up, and is paid for by the hour: renew the token, then run the same command again "
        "or `daunce clean`, which delete it."
    )
    advised.status = failure.status
    return advised
