"""Exact log-probabilities of any completion on Tinker (``SamplingClient.compute_logprobs``)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from pydantic import Field

from ...config import RunConfig
from ...data.tokenizers import EncodedExample
from ...errors import RejectedError, StopError
from ..base import Closing, ProbeReport, ScorerCapabilities, TokenScores
from ..contract import BEFORE_TARGETS, refuse_long, scores_of
from ..options import ScorerOptions
from ..probe import GENERATED, Generated, generated, probe_generated
from ..registry import Context
from .loops import AGAIN, path_of, state_path
from .service import DAY, Service, accepts, is_tinker, name_of, open_service

Answer = TypeVar("Answer")
_TAIL = "prompt_logprobs_last_n"


class TinkerScorerOptions(ScorerOptions):
    """``backend.scorer.options`` of the Tinker scorer."""

    concurrency: int = Field(32, ge=1, description="requests at once")


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """Any completion, exactly; no network."""
    return TinkerScorerOptions.of(config).capabilities(name_of(_address(config)))


def _address(config: RunConfig) -> str | None:
    return config.backend.scorer.base_url or config.backend.base_url


def open_scorer(context: Context) -> TinkerScorer:
    """A scorer on the run's service client."""
    return TinkerScorer(open_service(context), context.config)


class TinkerScorer(Closing):
    """``Scorer`` on Tinker's wire. Its models are ``tinker://`` paths, or the base model's name.

    Other servers than Tinker's own may omit the first position, which has no log-probability, instead of sending null
    for it (SkyRL does). Their answers are then one value shorter; the probe against a sample distinguishes that from
    shifted values.
    """

    fingerprint = "tinker-compute-logprobs"

    def __init__(self, service: Service, config: RunConfig) -> None:
        self._service = service.enter()
        self.capabilities = scorer_capabilities(config)
        self._base_model = config.backend.model
        self._first_left_out = not is_tinker(_address(config))
        self._clients: dict[str, asyncio.Task[Any]] = {}
        self._held: list[Any] = []
        self._tail_only = True
        """Whether only the positions that are needed are requested."""

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        """Log-probabilities (nats) of each example's targets, a request each.

        Raises RejectedError for an example over the context length and for a model that the server has forgotten and
        cannot load again, ContractError for an answer that does not hold what was requested.
        """
        for example in batch:
            refuse_long(example, 1, self.capabilities.max_context_tokens)
        return [await self._with_client(model, partial(self._asked, model, example)) for example in batch]

    async def _with_client(self, model: str, ask: Callable[[Any], Awaitable[Answer]]) -> Answer:
        """The answer of ``ask`` for the model's sampling client; a model that the server has forgotten is reloaded."""
        opening = self._opening(model)
        try:
            return await ask(await self._opened(model, opening))
        except RejectedError as error:
            if "not loaded" not in str(error).lower() or model == self._base_model:
                raise
            forgotten = error
        if self._clients.get(model) is opening:  # otherwise another request has done it
            self._clients[model] = asyncio.create_task(self._open_again(model, forgotten))
        return await ask(await self._opened(model, self._opening(model)))

    async def _asked(self, model: str, example: EncodedExample, client: Any) -> TokenScores:
        import tinker

        prompt = tinker.ModelInput.from_ints(list(example.ids))
        last = min(len(example.ids) - 1, len(example.ids) - example.targets[0] + BEFORE_TARGETS)

        async def values(**tail: int) -> Any:
            doing = f"scoring example {example.example.id!r} under {model}"
            answer = await self._service.start(lambda: client.compute_logprobs(prompt, **tail), doing=doing)
            return list(answer) if isinstance(answer, Sequence) else answer

        if self._tail_only and accepts(client.compute_logprobs, _TAIL):
            try:
                listed = await values(**{_TAIL: last})
            except StopError as error:
                if _TAIL not in str(error):
                    raise
                self._tail_only = False  # the server is older than this field
            else:
                return scores_of(self._service.name, example, listed, asked_from=len(example.ids) - last)
        listed = await values()
        if self._first_left_out and isinstance(listed, list) and len(listed) == len(example.ids) - 1:
            listed = [None, *listed]
        return scores_of(self._service.name, example, listed, asked_from=1)

    async def _open_again(self, model: str, error: RejectedError) -> Any:
        """A client of a model that the server forgot with its session, reloaded from the training state beside it."""
        service, client = self._service, await self._service.client()
        try:
            state = state_path(model)
            training = await service.start(
                lambda: client.create_training_client_from_state(state), doing=f"loading {state}"
            )
            self._held.append(training)  # the server keeps the model as long as the session lives
            save = partial(training.save_weights_for_sampler, AGAIN, ttl_seconds=DAY)
            await service.start(save, doing=f"saving {state} to be scored")
            return await self._open({"model_path": path_of(str(training.model_id), "sampler_weights", AGAIN)}, model)
        except RejectedError as again:
            raise RejectedError(
                f"{service.name} no longer holds {model} ({error}), and it could not be loaded from its training state "
                f"({again}). Its kept scores stay usable. To ask new questions, raise the number of models that the "
                "server holds at once, or train in a new run folder."
            ) from None

    async def probe(self, model: str, example: EncodedExample) -> ProbeReport:
        """Compare log-probabilities with those of a sample. Raises as :func:`..probe.probe_generated`."""
        return await probe_generated(self, model, example, self._sample)

    async def _sample(self, model: str, prompt: tuple[int, ...]) -> Generated | None:
        import tinker

        # At temperature 1 a sample's log-probabilities are the model's own, whichever way a service reports them.
        how = tinker.SamplingParams(max_tokens=GENERATED, temperature=1.0, seed=1, stop=[])
        ids = tinker.ModelInput.from_ints(list(prompt))

        async def ask(client: Any) -> Any:
            return await self._service.start(
                lambda: client.sample(ids, num_samples=1, sampling_params=how), doing=f"testing {model}"
            )

        answer = await self._with_client(model, ask)
        made = answer.sequences[0] if answer.sequences else None
        return None if made is None else generated(made.tokens, made.logprobs)

    def _opening(self, model: str) -> asyncio.Task[Any]:
        if model not in self._clients:
            which = {"base_model": model} if model == self._base_model else {"model_path": model}
            self._clients[model] = asyncio.create_task(self._open(which, model))
        return self._clients[model]

    async def _opened(self, model: str, opening: asyncio.Task[Any]) -> Any:
        try:
            return await asyncio.shield(opening)
        except Exception:
            if self._clients.get(model) is opening:
                del self._clients[model]
            raise

    async def _open(self, which: dict[str, str], model: str) -> Any:
        from tinker.lib.retry_handler import RetryConfig

        client = await self._service.client()
        # Retries are the scoring client's, which knows what else is waiting and what was spent.
        once = RetryConfig(enable_retry_logic=False)
        return await self._service.start(
            lambda: client.create_sampling_client(**which, retry_config=once), doing=f"opening {model}"
        )

    async def close(self) -> None:
        await self._service.leave()
