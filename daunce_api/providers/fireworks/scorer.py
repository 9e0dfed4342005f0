"""Exact log-probabilities at Fireworks: completions with ``echo``, members as adapters on one deployment.

The truncation that Fireworks does by default would shift every position; ``context_length_exceeded_behavior: error``
is always sent, and the ids that the server read are compared. ``echo_last`` is left out: it shortens answers, which
nobody is billed for, and the whole prompt's ids and values are what shows that nothing was shifted.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ...config import RunConfig
from ...errors import RejectedError
from ..base import Scorer, ScorerCapabilities
from ..calls import NO_REASON, Calls
from ..contract import part_of
from ..hosting import Host, HostedScorer
from ..openai_wire.client import open_client
from ..openai_wire.echo import EchoOptions, EchoScorer, presets
from ..polling import Answer
from ..registry import Context
from .trainer import PAGE, id_of, open_fireworks


class FireworksScorerOptions(EchoOptions):
    """``backend.scorer.options`` of the Fireworks scorer: the echo scorer's, and where adapters are loaded."""

    account_id: str | None = Field(None, description="account of the deployment; default: the trainer's")
    deployment: str | None = Field(None, description="accounts/ACCOUNT/deployments/ID of the base model, with addons")
    serverless: bool = Field(
        False, description="fine-tunes answer without a deployment (models that Fireworks serves LoRA for by the token)"
    )
    max_adapters: int = Field(100, ge=1, description="adapters that the deployment holds at once")


def fireworks_options(config: RunConfig) -> FireworksScorerOptions:
    """The scorer's options, with what Fireworks' dialect of echo needs."""
    return FireworksScorerOptions.of(config, **presets("fireworks", None))


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """Any completion, exactly; no network."""
    options = fireworks_options(config)
    if options.serverless:
        note = "echo of a serverless LoRA was not tested against Fireworks: the first finished member tests it"
        return options.capabilities("Fireworks", notes=(note,), fine_tunes_verified=False, tried_on="fine_tune")
    note = "fine-tunes answer only on a dedicated deployment, which is paid by the GPU second"
    return options.capabilities("Fireworks", notes=(note,), hourly=True)


def open_scorer(context: Context) -> Scorer:
    """An echo scorer of Fireworks' completions; with a deployment, members are loaded on it in turn."""
    config = context.config
    options = fireworks_options(config)
    scorer = EchoScorer(open_client(context, options), scorer_capabilities(config), options)
    if options.deployment is None or options.serverless:
        return scorer
    account = options.account_id or config.backend.options.get("account_id")
    sdk, calls = open_fireworks(context, account_id=account, timeout=options.timeout)
    return HostedScorer(scorer, DeploymentHost(sdk, calls, options, config.backend.model))


class DeploymentHost(Host):
    """Loads fine-tunes on a deployment of their base model ``base``, which answers there as it is."""

    def __init__(self, sdk: Any, calls: Calls, options: FireworksScorerOptions, base: str) -> None:
        super().__init__(options.max_adapters)
        self._sdk = sdk
        self._calls = calls
        self._deployment = options.deployment
        self._base = base

    def always_served(self, model: str) -> str | None:
        return self._served(model) if model == self._base else None

    async def create(self, model: str) -> tuple[str, str, Answer]:
        call = self._sdk.lora.load(model=model, deployment=self._deployment)
        answer = await self._calls.fields(call, doing=f"loading {model}")
        return self._served(model), id_of(answer.get("name")), answer

    async def read(self, loaded: str, model: str) -> Answer:
        return await self._calls.fields(self._sdk.lora.get(loaded), doing=f"waiting for {model}")

    def ready(self, answer: Answer, model: str) -> bool:
        if answer.get("state") == "UNDEPLOYING":
            reason = part_of(answer, "status", "message")
            raise RejectedError(self._calls.clean(f"Fireworks could not load {model}: {reason or NO_REASON}"))
        return answer.get("state") == "DEPLOYED"

    async def delete(self, loaded: str, model: str) -> None:
        await self._calls.call(self._sdk.lora.unload(loaded), doing=f"unloading {model}")

    async def listed(self, model: str) -> list[str]:
        where = id_of(self._deployment)
        items = await self._calls.listed(self._sdk.lora.list(page_size=PAGE), doing="listing what is loaded")
        return [id_of(item.name) for item in items if item.model == model and id_of(item.deployment) == where]

    async def close(self) -> None:
        await self._sdk.close()

    def _served(self, model: str) -> str:
        return f"{model}#{self._deployment}"
