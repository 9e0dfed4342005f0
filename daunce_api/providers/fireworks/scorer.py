"""Exact log-probabilities at Fireworks: completions with ``echo``, members as adapters on one deployment.

The truncation that Fireworks does by default would shift every position; ``context_length_exceeded_behavior: error``
is always sent, and the ids that the server read are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field

from ..._util.clock import Clock, SystemClock
from ...config import RunConfig
from ...errors import RejectedError
from ..base import Scorer, ScorerCapabilities
from ..hosting import Polling, hosted
from ..openai_wire.dialects import presets
from ..openai_wire.echo import EchoOptions, EchoScorer, echo_capabilities
from ..openai_wire.wire_scorer import open_client
from ..options import parse_options
from ..refusals import NO_REASON, gone_already
from ..registry import Context
from ..sdk_calls import SdkCalls
from .trainer import open_sdk

_POLL_SECONDS = 5.0
_PAGE = 200


class FireworksScorerOptions(EchoOptions):
    """``backend.scorer.options`` of the Fireworks scorer: the echo scorer's, and where adapters are loaded."""

    account_id: str | None = Field(None, description="account of the deployment; default: the trainer's")
    deployment: str | None = Field(None, description="accounts/ACCOUNT/deployments/ID of the base model, with addons")
    max_adapters: int = Field(100, ge=1, description="adapters that the deployment holds at once")


def fireworks_options(config: RunConfig) -> FireworksScorerOptions:
    """The scorer's options, with what Fireworks' dialect of echo needs."""
    given = {**presets("fireworks", None), **config.backend.scorer.options}
    return parse_options(FireworksScorerOptions, given, "backend.scorer.options")


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """Any completion, exactly; no network."""
    note = "fine-tunes answer only on a dedicated deployment, which is paid by the GPU second"
    capabilities = echo_capabilities(fireworks_options(config), provider="Fireworks", notes=(note,))
    return replace(capabilities, hourly=True)


def open_scorer(context: Context) -> Scorer:
    """An echo scorer of Fireworks' completions; with a deployment, members are loaded on it in turn."""
    config = context.config
    options = fireworks_options(config)
    client = open_client(context, timeout=options.timeout, concurrency=options.concurrency)
    scorer = EchoScorer(client, scorer_capabilities(config), options)
    if options.deployment is None:
        return scorer
    account = options.account_id or config.backend.options.get("account_id")
    sdk, calls = open_sdk(context, account_id=account, timeout=options.timeout)
    host = DeploymentHost(sdk, calls, options.deployment, options.max_adapters, base=config.backend.model)
    return hosted(scorer, host)


class DeploymentHost:
    """Loads fine-tunes on a deployment of their base model ``base``, which answers there as it is, and unloads them.
    ``polls`` are five seconds apart."""

    def __init__(
        self,
        sdk: Any,
        calls: SdkCalls,
        deployment: str,
        limit: int,
        *,
        base: str,
        clock: Clock | None = None,
        polls: int = 240,
    ) -> None:
        self.limit = limit
        self._sdk = sdk
        self._calls = calls
        self._deployment = deployment
        self._base = base
        self._polling = Polling(clock or SystemClock(), _POLL_SECONDS, polls)
        self._known: dict[str, str] = {}

    async def load(self, model: str) -> str:
        """Load the adapter and wait until it is deployed: the name ``MODEL#DEPLOYMENT`` that it answers under."""
        served = f"{model}#{self._deployment}"
        if model == self._base:
            return served

        def ready(answer: Mapping[str, Any]) -> bool:
            if answer.get("state") == "UNDEPLOYING":
                found = answer.get("status")
                said = found.get("message") if isinstance(found, dict) else None
                raise RejectedError(
                    self._calls.failures.clean(f"Fireworks could not load {model}: {said or NO_REASON}")
                )
            return answer.get("state") == "DEPLOYED"

        async def look() -> dict[str, Any]:
            return await self._calls.fields(self._sdk.lora.get(deployed), doing=f"waiting for {model}")

        call = self._sdk.lora.load(model=model, deployment=self._deployment)
        answer = await self._calls.fields(call, doing=f"loading {model}")
        self._known[model] = deployed = _id_of(answer.get("name"))
        await self._polling.until(ready, answer, look, f"the deployment of {model}")
        return served

    async def unload(self, model: str) -> None:
        """Unload it, whoever loaded it here; one that is gone already is no error."""
        if model == self._base:
            return
        known = self._known.pop(model, None)
        found = [known] if known else await self._calls.call(self._listed(model), doing="listing what is loaded")
        for deployed in found:
            with gone_already():
                await self._calls.call(self._sdk.lora.unload(deployed), doing=f"unloading {model}")

    async def _listed(self, model: str) -> list[str]:
        """Ids under which a model is loaded on the deployment."""
        where = _id_of(self._deployment)
        found = [item async for item in self._sdk.lora.list(page_size=_PAGE)]
        return [_id_of(item.name) for item in found if item.model == model and _id_of(item.deployment) == where]

    async def close(self) -> None:
        await self._sdk.close()


def _id_of(resource: object) -> str:
    """The last part of a resource's name."""
    return str(resource or "").rsplit("/", 1)[-1]
