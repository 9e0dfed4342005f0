"""Exact log-probabilities from this machine or a Ray cluster, behind the interface of every scorer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from ...config import RunConfig
from ...data.tokenizers import EncodedExample
from ...errors import DaunceError, RejectedError, TransientError
from ..base import ScorerCapabilities, TokenScores
from .kits import kit_of
from .options import options_of
from .workshop import Workshop, adapter_files


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """Exact log-probabilities of any completion."""
    kit = kit_of(config)
    return ScorerCapabilities(
        provider="this machine",
        scope="any",
        max_context_tokens=kit.context_tokens,
        max_prompts_per_request=kit.prompts_per_request,
        max_concurrent_requests=2 * options_of(config).worker_count,
    )


class LocalScorer:
    """Exact log-probabilities from this machine's workers; on a CPU the same to the last bit however examples are
    batched, on other devices as far as their kernels go by shapes alone.

    A member's examples go through its adapter and the frozen base several at a time, in passes whose shape follows
    from an example's own length (:class:`daunce_api.providers.local.passes.ScoringPasses`). Members are not mixed in a
    pass: which of them wait together is a matter of timing, and a full pass of one member has read the base's weights
    for as many tokens as a mixed one.
    """

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop

    @property
    def capabilities(self) -> ScorerCapabilities:
        return scorer_capabilities(self._workshop.config)

    @property
    def fingerprint(self) -> str:
        return self._workshop.kit.fingerprint

    async def __aenter__(self) -> Self:
        self._workshop.enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.to_thread(self._workshop.leave)

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        """Raises RejectedError for an unknown model or an example that the model cannot read."""
        folder = self._workshop.adapter(model)
        engine = await asyncio.to_thread(lambda: self._workshop.engine)
        adapter = folder if engine.shares_files else await asyncio.to_thread(adapter_files, folder)
        work = self._workshop.kit.score(adapter, batch)
        try:
            answers = await asyncio.wrap_future(engine.submit(work.function, work.task))
        except DaunceError as error:
            if isinstance(error, TransientError):
                raise
            raise RejectedError(f"{model} could not score the batch: {error}") from error
        return [TokenScores(answer) for answer in answers]
