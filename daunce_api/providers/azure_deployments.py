"""A deployment for every fine-tune that is scored at Azure, made and deleted through its management service.

The service has an address and a token of its own. A deployment is paid for by the hour until it is deleted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx2

from .._util.clock import Clock, SystemClock
from ..errors import ProviderError, RejectedError, StopError
from .failures import Failures
from .hosting import Polling
from .refusals import gone_already

if TYPE_CHECKING:
    from .azure import AzureScorerOptions

MANAGEMENT_URL = "https://management.azure.com"
MANAGEMENT_VERSION = "2024-10-01"
_POLL_SECONDS = 15.0


class DeploymentHost:
    """Makes and deletes deployments. Their names follow from the models', so that one that an earlier process left is
    found again.

    ``token`` is asked before every request, since a token lasts for about an hour. ``polls`` are 15 seconds apart.
    """

    def __init__(
        self,
        http: httpx2.AsyncClient,
        options: AzureScorerOptions,
        token: Callable[[], str],
        *,
        clock: Clock | None = None,
        polls: int = 240,
    ) -> None:
        self.limit = options.max_deployments
        self._http = http
        self._options = options
        self._token = token
        self._polling = Polling(clock or SystemClock(), _POLL_SECONDS, polls)

    async def load(self, model: str) -> str:
        """Deploy a fine-tune and wait until it answers: the deployment's name."""
        name = name_of(model)
        body = {
            "sku": {"name": self._options.sku, "capacity": self._options.capacity},
            "properties": {"model": {"format": "OpenAI", "name": model, "version": "1"}},
        }

        def ready(answer: Mapping[str, Any]) -> bool:
            properties = answer.get("properties")
            state = properties.get("provisioningState") if isinstance(properties, dict) else None
            if state in ("Failed", "Canceled", "Disabled"):
                raise RejectedError(f"Azure could not deploy {model}: {state}.")
            return state == "Succeeded"

        answer = await self._request("PUT", name, f"deploying {model}", body)
        look = partial(self._request, "GET", name, f"waiting for {model}")
        await self._polling.until(ready, answer, look, f"the deployment of {model}")
        return name

    async def unload(self, model: str) -> None:
        """Delete the deployment of a model; one that is gone already is no error. The fine-tune stays."""
        with gone_already():
            await self._request("DELETE", name_of(model), f"deleting the deployment of {model}")

    async def close(self) -> None:
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
            failure = failures.unreachable(doing, timed_out=isinstance(error, httpx2.TimeoutException))
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
