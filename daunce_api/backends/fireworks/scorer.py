"""Exact log-probabilities at Fireworks: completions with ``echo``, members as adapters on one deployment.

The truncation that Fireworks does by default would shift every position; ``context_length_exceeded_behavior: error``
is always sent, and the ids that the server read are compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field

from ...clock import Clock, SystemClock
from ...config import RunConfig
from ...errors import RejectedError
from ..base import Scorer, ScorerCapabilities
from ..hosting import hosted
from ..openai_wire.dialects import presets
from ..openai_wire.echo import EchoOptions, EchoScorer, echo_capabilities
from ..openai_wire.wire_scorer import open_client
from ..options import parse_options
from ..registry import Context
from ..sdk_calls import SdkCalls
from .trainer import open_sdk

_POLL_SECONDS = 5.0


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
        self._clock = clock or SystemClock()
        self._polls = polls
        self._loaded: dict[str, str] = {}

    async def load(self, model: str) -> str:
        """Load the adapter and wait until it is deployed: the name ``MODEL#DEPLOYMENT`` that it answers under."""
        served = f"{model}#{self._deployment}"
        if model == self._base:
            return served
        call = self._sdk.lora.load(model=model, deployment=self._deployment)
        answer = await self._calls.fields(call, doing=f"loading {model}")
        deployed = str(answer.get("name") or "").rsplit("/", 1)[-1]
        for _ in range(self._polls):
            if answer.get("state") == "DEPLOYED":
                self._loaded[served] = deployed
                return served
            found = answer.get("status")
            if answer.get("state") == "UNDEPLOYING":
                said = found.get("message") if isinstance(found, dict) else None
                raise RejectedError(
                    self._calls.failures.clean(f"Fireworks could not load {model}: {said or 'no reason'}")
                )
            await self._clock.sleep(_POLL_SECONDS)
            answer = await self._calls.fields(self._sdk.lora.get(deployed), doing=f"waiting for {model}")
        raise RejectedError(f"{model} was not deployed after {self._polls * _POLL_SECONDS:.0f} seconds.")

    async def unload(self, model: str, served: str) -> None:
        """Unload it; one that is gone already is no error."""
        deployed = self._loaded.pop(served, None)
        if deployed is None:
            return
        try:
            await self._calls.call(self._sdk.lora.unload(deployed), doing=f"unloading {model}")
        except RejectedError as error:
            if error.status != 404:
                raise

    async def close(self) -> None:
        await self._sdk.close()
