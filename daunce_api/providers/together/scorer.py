"""Exact log-probabilities at Together: completions with ``echo``, answered in a top-level ``prompt`` list.

Together takes text only, so the ids that it read come back and must be those of the example. A fine-tune answers on
a dedicated endpoint; with ``endpoint_id`` and ``deployment_id`` the members' adapters are attached to one and taken
off again within its limit.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ...config import RunConfig
from ...data.tokenizers import EncodedExample, Tokenizer
from ...errors import ConfigurationError, ContractError, RejectedError
from ..base import ProbeReport, Scorer, ScorerCapabilities
from ..contract import check_model
from ..hosting import HostedScorer, PolledHost
from ..openai_wire.client import WireClient
from ..openai_wire.wire_scorer import open_client
from ..options import ScorerOptions, parse_options
from ..polling import Answer, Poll
from ..registry import Context
from ..sdk_calls import SdkCalls
from ..tokenizers import tokenizer_of
from .text import Reading, TextScorer
from .trainer import open_sdk, weights_of

IGNORED = (
    "It did not echo the prompt. Check that the model runs on a dedicated endpoint that returns log-probabilities."
)


class TogetherScorerOptions(ScorerOptions):
    """``backend.scorer.options`` of the Together scorer."""

    leading_tokens: int = Field(0, ge=0, le=4, description="special tokens in front that members were trained without")
    project_id: str | None = Field(None, description="project of the dedicated endpoint")
    endpoint_id: str | None = Field(None, description="dedicated endpoint that adapters are attached to")
    deployment_id: str | None = Field(None, description="its deployment of the base model")
    max_adapters: int = Field(16, ge=1, description="adapters that the deployment holds at once")


def together_options(config: RunConfig) -> TogetherScorerOptions:
    """The scorer's options, checked. Raises ConfigurationError where a dedicated endpoint is named by halves."""
    options = parse_options(TogetherScorerOptions, config.backend.scorer.options, "backend.scorer.options")
    named = [options.project_id, options.endpoint_id, options.deployment_id]
    if any(named) and not all(named):
        raise ConfigurationError(
            "backend.scorer.options: project_id, endpoint_id and deployment_id name a dedicated endpoint together; "
            "give all three, or none where every fine-tune has an endpoint of its own."
        )
    return options


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """Any completion, exactly; no network."""
    options = together_options(config)
    return ScorerCapabilities(
        provider="Together",
        scope="any",
        max_context_tokens=options.max_context_tokens,
        max_concurrent_requests=options.concurrency,
        hourly=True,
        tried_on="fine_tune",
        notes=("a fine-tune answers only on a dedicated endpoint, which is paid by the minute",),
    )


def open_scorer(context: Context) -> Scorer:
    """A scorer of Together's completions; with a dedicated endpoint, members are attached to it in turn."""
    config = context.config
    options = together_options(config)
    client = open_client(context, timeout=options.timeout, concurrency=options.concurrency)
    tokenizer, base = tokenizer_of(config), config.backend.model
    scorer = TogetherScorer(client, scorer_capabilities(config), options, tokenizer, base)
    if options.endpoint_id is None:
        return scorer
    sdk, calls = open_sdk(context, timeout=options.timeout, project_id=options.project_id)
    return HostedScorer(scorer, AdapterHost(sdk, calls, options))


class TogetherScorer(TextScorer):
    """``Scorer`` over ``POST /completions`` with text, of fine-tunes of ``base``. Closing it closes the client."""

    def __init__(
        self,
        client: WireClient,
        capabilities: ScorerCapabilities,
        options: TogetherScorerOptions,
        tokenizer: Tokenizer,
        base: str,
    ) -> None:
        leading, limit = options.leading_tokens, options.max_context_tokens
        super().__init__(client, capabilities, tokenizer, leading=leading, limit=limit, hint=IGNORED)
        self._options = options
        self._base = base

    @property
    def fingerprint(self) -> str:
        return f"together-echo leading={self._options.leading_tokens}"

    async def probe(self, model: str, example: EncodedExample) -> ProbeReport:
        """As other scorers of texts. Raises RejectedError for the base model too: what answers for it, if anything
        does, is not the endpoint that fine-tunes answer on."""
        if model == self._base:
            raise RejectedError(
                f"Together serves fine-tunes on endpoints of their own, of which {model} tells nothing."
            )
        return await super().probe(model, example)

    async def _read(self, model: str, text: str, *, doing: str, count: int = 1) -> Reading:
        call = self.client.sdk.completions.with_raw_response.create(
            model=model, prompt=text, echo=True, logprobs=1, max_tokens=count, temperature=0
        )
        answer = await self.client.json(call, doing=doing)
        check_model(self.client.provider, model, answer.get("model"))
        prompt = _logprobs(answer.get("prompt"))
        values, ids = prompt.get("token_logprobs"), prompt.get("token_ids")
        if not isinstance(values, list) or not values:
            return Reading([], [])
        if not isinstance(ids, list):
            raise ContractError(
                f"{self.client.provider} did not say which tokens it read ({doing}). It tokenizes the text by itself, "
                "so without ids no value can be trusted; nothing was used."
            )
        made = _logprobs(answer.get("choices"))
        lists = [made.get(name) or [] for name in ("token_ids", "token_logprobs", "tokens")]
        said = zip(*lists, strict=False) if all(isinstance(part, list) for part in lists) else ()
        return Reading(
            [_whole(i) for i in ids], values, [(_whole(token), value, str(piece)) for token, value, piece in said]
        )


def _whole(number: object) -> object:
    """Together writes ids as floating-point numbers."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _logprobs(items: object) -> dict[str, Any]:
    """``[0].logprobs`` of a list with one item; nothing for any other shape."""
    item = items[0] if isinstance(items, list) and len(items) == 1 else None
    found = item.get("logprobs") if isinstance(item, dict) else None
    return found if isinstance(found, dict) else {}


class AdapterHost(PolledHost):
    """Attaches fine-tunes' adapters to a deployment of their base model, and detaches them."""

    def __init__(self, sdk: Any, calls: SdkCalls, options: TogetherScorerOptions, *, poll: Poll | None = None) -> None:
        super().__init__(options.max_adapters, poll or Poll(5.0, 240))
        self._sdk = sdk
        self._adapters = sdk.endpoints.adapters
        self._calls = calls
        self._where = {"endpoint_id": options.endpoint_id, "deployment_id": options.deployment_id}

    async def create(self, model: str) -> tuple[str, str, Answer]:
        weights = await weights_of(self._sdk, self._calls, model)
        if weights is None or weights.adapter is None:
            raise RejectedError(f"Together knows no adapter of {model!r}: it was deleted, or is another project's.")
        call = self._adapters.create(adapter_model_id=weights.adapter, **self._where)
        answer = await self._calls.fields(call, doing=f"attaching {model}")
        return weights.name, str(answer.get("id") or ""), answer

    async def read(self, loaded: str, model: str) -> Answer:
        call = self._adapters.retrieve(id=loaded, **self._where)
        return await self._calls.fields(call, doing=f"waiting for {model}")

    def ready(self, answer: Answer, model: str) -> bool:
        states = [str(c.get("state", "")) for c in answer.get("perCluster") or () if isinstance(c, dict)]
        if any(state.endswith("FAILED") for state in states):
            raise RejectedError(f"Together could not load adapter {model!r} on the endpoint.")
        return bool(states) and all(state.endswith("READY") for state in states)

    async def delete(self, loaded: str, model: str) -> None:
        answer = await self.read(loaded, model)
        call = self._adapters.delete(id=loaded, etag=str(answer.get("etag", "")), **self._where)
        await self._calls.call(call, doing=f"detaching {model}")

    async def listed(self, model: str) -> list[str]:
        weights = await weights_of(self._sdk, self._calls, model)
        if weights is None or weights.adapter is None:
            return []

        async def read() -> list[str]:
            attached = self._adapters.list(**self._where)
            return [str(a.id) async for a in attached if a.adapter_model_id == weights.adapter]

        return await self._calls.call(read(), doing="listing what is attached")

    async def close(self) -> None:
        await self._sdk.close()
