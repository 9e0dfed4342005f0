"""Exact log-probabilities at Together: completions with ``echo``, answered in a top-level ``prompt`` list.

Together takes text only, so the ids that it read come back and must be those of the example. A fine-tune answers on
a dedicated endpoint; with ``endpoint_id`` and ``deployment_id`` the members' adapters are attached to one and taken
off again within its limit.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ...clock import Clock, SystemClock
from ...config import RunConfig
from ...errors import ConfigurationError, ContractError, RejectedError
from ...tokens import EncodedExample, Tokenizer
from ..base import Scorer, ScorerCapabilities, TokenScores
from ..hosting import hosted
from ..openai_wire.client import WireClient
from ..openai_wire.contract import check_ids, check_model, scores_of
from ..openai_wire.prompt_logprobs import refuse_long
from ..openai_wire.wire_scorer import OneByOneScorer, open_client
from ..options import Options, parse_options
from ..plain_text import text_of
from ..registry import Context
from ..sdk_calls import SdkCalls
from ..tokenizers import tokenizer_of
from .trainer import names_of, open_sdk, registered

IGNORED = (
    "It did not echo the prompt. Check that the model runs on a dedicated endpoint that returns log-probabilities."
)


class TogetherScorerOptions(Options):
    """``backend.scorer.options`` of the Together scorer."""

    leading_tokens: int = Field(0, ge=0, le=4, description="special tokens put in front of every text (BOS: 1)")
    max_context_tokens: int | None = Field(None, ge=1)
    concurrency: int = Field(8, ge=1, description="requests that the endpoint takes at once")
    timeout: float = Field(120.0, gt=0, description="seconds that a request may take")
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
        notes=("a fine-tune answers only on a dedicated endpoint, which is paid by the minute",),
    )


def open_scorer(context: Context) -> Scorer:
    """A scorer of Together's completions; with a dedicated endpoint, members are attached to it in turn."""
    config = context.config
    options = together_options(config)
    client = open_client(context, timeout=options.timeout, concurrency=options.concurrency)
    scorer = TogetherScorer(client, scorer_capabilities(config), options, tokenizer_of(config))
    if options.endpoint_id is None:
        return scorer
    sdk, calls = open_sdk(context, timeout=options.timeout, project_id=options.project_id)
    return hosted(scorer, AdapterHost(sdk, calls, options))


class TogetherScorer(OneByOneScorer):
    """``Scorer`` over ``POST /completions`` with text. Closing it closes the client."""

    def __init__(
        self,
        client: WireClient,
        capabilities: ScorerCapabilities,
        options: TogetherScorerOptions,
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__(client, capabilities)
        self._options = options
        self._tokenizer = tokenizer

    @property
    def fingerprint(self) -> str:
        return f"together-echo leading={self._options.leading_tokens}"

    async def _score(self, model: str, example: EncodedExample) -> TokenScores:
        refuse_long(example, 1 + self._options.leading_tokens, self._options.max_context_tokens)
        call = self.client.sdk.completions.with_raw_response.create(
            model=model,
            prompt=text_of(example.example, self._tokenizer),
            echo=True,
            logprobs=1,
            max_tokens=1,
            temperature=0,
        )
        answer = await self.client.json(call, doing=f"scoring example {example.example.id!r} under {model}")
        check_model(self.client.provider, model, answer.get("model"))
        return prompt_scores(self.client.provider, example, answer.get("prompt"), self._options.leading_tokens)


def prompt_scores(provider: str, example: EncodedExample, prompt: object, leading: int) -> TokenScores:
    """The targets' log-probabilities in ``prompt[0].logprobs``, behind ``leading`` special tokens of the server's own.

    Raises ContractError where no ids come with them, or ids or values break the contract.
    """
    item = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else None
    found = item.get("logprobs") if isinstance(item, dict) else None
    logprobs: dict[str, Any] = found if isinstance(found, dict) else {}
    values, ids = logprobs.get("token_logprobs"), logprobs.get("token_ids")
    if not isinstance(values, list) or not values:
        return scores_of(provider, example, None, hint=IGNORED)
    if not isinstance(ids, list):
        raise ContractError(
            f"{provider} did not say which tokens it read of example {example.example.id!r}. It tokenizes the text by "
            "itself, so without ids no value can be trusted; nothing was used."
        )
    check_ids(provider, example, ids[leading:])
    return scores_of(provider, example, values[leading:], hint=IGNORED)


class AdapterHost:
    """Attaches fine-tunes' adapters to a deployment of their base model, and detaches them."""

    def __init__(
        self, sdk: Any, calls: SdkCalls, options: TogetherScorerOptions, clock: Clock | None = None, polls: int = 240
    ) -> None:
        self.limit = options.max_adapters
        self._sdk = sdk
        self._calls = calls
        self._where = {"endpoint_id": options.endpoint_id, "deployment_id": options.deployment_id}
        self._clock = clock or SystemClock()
        self._polls = polls
        self._attached: dict[str, str] = {}

    async def load(self, model: str) -> str:
        """Attach the adapter and wait until it is ready in every cluster: the adapter's name."""
        known = dict(await registered(self._sdk, self._calls))
        name = next((n for n in reversed(names_of(model)) if n in known), None)
        if name is None:
            raise RejectedError(f"Together's registry has no model {model!r}: it was deleted, or is another project's.")
        resource = self._sdk.endpoints.adapters
        call = resource.create(adapter_model_id=known[name], **self._where)
        answer = await self._calls.fields(call, doing=f"attaching {name}")
        for _ in range(self._polls):
            states = [str(c.get("state", "")) for c in answer.get("perCluster") or () if isinstance(c, dict)]
            if any(state.endswith("FAILED") for state in states):
                raise RejectedError(f"Together could not load adapter {name!r} on the endpoint.")
            if states and all(state.endswith("READY") for state in states):
                self._attached[name] = str(answer["id"])
                return name
            await self._clock.sleep(5.0)
            call = resource.retrieve(id=str(answer["id"]), **self._where)
            answer = await self._calls.fields(call, doing=f"waiting for {name}")
        raise RejectedError(f"adapter {name!r} was not ready after {self._polls * 5} seconds.")

    async def unload(self, model: str, served: str) -> None:
        """Detach it; one that is gone already is no error."""
        attached = self._attached.pop(served, None)
        if attached is None:
            return
        resource = self._sdk.endpoints.adapters
        try:
            call = resource.retrieve(id=attached, **self._where)
            answer = await self._calls.fields(call, doing=f"reading {served}")
            call = resource.delete(id=attached, etag=str(answer.get("etag", "")), **self._where)
            await self._calls.call(call, doing=f"detaching {served}")
        except RejectedError as error:
            if error.status != 404:
                raise

    async def close(self) -> None:
        await self._sdk.close()
