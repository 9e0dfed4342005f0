"""Exact log-probabilities of any completion on Tinker (``SamplingClient.compute_logprobs``)."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from pydantic import Field

from ...config import RunConfig
from ...data.tokenizers import EncodedExample
from ..base import ProbeReport, ScorerCapabilities, TokenScores
from ..contract import BEFORE_TARGETS, refuse_long, scores_of
from ..options import ScorerOptions, parse_options
from ..probe import GENERATED, Generated, generated, probe_generated
from ..registry import Context
from .service import Service, open_service

_CLIENTS = 64
"""Sampling clients kept; each stands for one model."""


class TinkerScorerOptions(ScorerOptions):
    """``backend.scorer.options`` of the Tinker scorer."""

    concurrency: int = Field(32, ge=1, description="requests at once")


def tinker_options(config: RunConfig) -> TinkerScorerOptions:
    """The scorer's options, checked."""
    return parse_options(TinkerScorerOptions, config.backend.scorer.options, "backend.scorer.options")


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """Any completion, exactly; no network."""
    options = tinker_options(config)
    return ScorerCapabilities(
        provider="Tinker",
        scope="any",
        max_context_tokens=options.max_context_tokens,
        max_concurrent_requests=options.concurrency,
    )


def open_scorer(context: Context) -> TinkerScorer:
    """A scorer on the run's service client."""
    return TinkerScorer(
        open_service(context),
        scorer_capabilities(context.config),
        tinker_options(context.config),
        base_model=context.config.backend.model,
    )


class TinkerScorer:
    """``Scorer`` on Tinker. Its models are ``tinker://`` paths, or the base model's name."""

    def __init__(
        self, service: Service, capabilities: ScorerCapabilities, options: TinkerScorerOptions, *, base_model: str
    ) -> None:
        self._service = service
        self._capabilities = capabilities
        self._options = options
        self._base_model = base_model
        self._clients: OrderedDict[str, asyncio.Task[Any]] = OrderedDict()

    @property
    def capabilities(self) -> ScorerCapabilities:
        return self._capabilities

    @property
    def fingerprint(self) -> str:
        return "tinker-compute-logprobs"

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        """Log-probabilities (nats) of each example's targets, a request each.

        Raises RejectedError for an example over the context length, ContractError for an answer that does not hold
        what was asked for.
        """
        import tinker

        for example in batch:
            refuse_long(example, 1, self._options.max_context_tokens)
        client = await self._client(model)
        scores = []
        for example in batch:
            prompt = tinker.ModelInput.from_ints(list(example.ids))
            last = min(len(example.ids) - 1, len(example.ids) - example.targets[0] + BEFORE_TARGETS)
            values = await self._service.calls.call(
                client.compute_logprobs(prompt, prompt_logprobs_last_n=last),
                doing=f"scoring example {example.example.id!r} under {model}",
            )
            listed = list(values) if isinstance(values, Sequence) else values
            scores.append(scores_of("Tinker", example, listed, asked_from=len(example.ids) - last))
        return scores

    async def probe(self, model: str, example: EncodedExample) -> ProbeReport:
        """Compare log-probabilities with those of a sample. Raises as :func:`..openai_wire.probe.probe_generated`."""
        return await probe_generated(
            self,
            model,
            example,
            provider="Tinker",
            generate=lambda prompt: self._sample(model, prompt),
            limit=self._options.max_context_tokens,
        )

    async def _sample(self, model: str, prompt: tuple[int, ...]) -> Generated | None:
        import tinker

        client = await self._client(model)
        # At temperature 1 a sample's log-probabilities are the model's own, whichever way a service reports them.
        how = tinker.SamplingParams(max_tokens=GENERATED, temperature=1.0, seed=1, stop=[])
        call = client.sample(tinker.ModelInput.from_ints(list(prompt)), num_samples=1, sampling_params=how)
        answer = await self._service.calls.call(call, doing=f"testing {model}")
        made = answer.sequences[0] if answer.sequences else None
        return None if made is None else generated(made.tokens, made.logprobs)

    async def _client(self, model: str) -> Any:
        if model not in self._clients:
            self._clients[model] = asyncio.create_task(self._open(model))
            while len(self._clients) > _CLIENTS:
                self._clients.popitem(last=False)
        self._clients.move_to_end(model)
        task = self._clients[model]
        try:
            return await asyncio.shield(task)
        except Exception:
            if self._clients.get(model) is task:
                del self._clients[model]
            raise

    async def _open(self, model: str) -> Any:
        client = await self._service.client()
        which = {"base_model": model} if model == self._base_model else {"model_path": model}
        return await self._service.start(lambda: client.create_sampling_client(**which), doing=f"opening {model}")

    async def __aenter__(self) -> Self:
        self._service.enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._service.leave()
