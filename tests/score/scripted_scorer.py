"""A scorer whose answers follow from model and ids, with failures on order."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from daunce_api.data.dataset import Example
from daunce_api.data.tokenizers import EncodedExample
from daunce_api.providers.base import ProbeReport, ScorerCapabilities, TokenScores

Script = Callable[[str, Sequence[EncodedExample]], Exception | None]


def example(name: str, ids: Sequence[int], targets: Sequence[int] = (1,)) -> EncodedExample:
    return EncodedExample(Example(name, prompt="p", completion="c"), tuple(ids), tuple(targets))


def value(model: str, item: EncodedExample, position: int) -> float:
    digest = hashlib.sha256(f"{model}{item.ids[: position + 1]}".encode()).digest()
    return -1.0 - digest[0] / 256


def scores(model: str, item: EncodedExample) -> TokenScores:
    return TokenScores(tuple(value(model, item, t) for t in item.targets))


class ScriptedScorer:
    """``script(model, batch)`` returns the error of a request, or None. Every request takes a few loop turns."""

    fingerprint = "scripted"

    def __init__(self, script: Script | None = None, *, prompts: int = 4, tokens: int | None = None) -> None:
        self.capabilities = ScorerCapabilities(
            "scripted", "any", max_prompts_per_request=prompts, max_tokens_per_request=tokens, max_concurrent_requests=3
        )
        self.script = script
        self.sent: list[tuple[str, list[str]]] = []
        self.running = 0
        self.most_running = 0

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        self.sent.append((model, [e.example.id for e in batch]))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for _ in range(3):
                await asyncio.sleep(0)
            error = self.script(model, batch) if self.script else None
            if error is not None:
                raise error
            return [scores(model, item) for item in batch]
        finally:
            self.running -= 1

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class ProbingScorer(ScriptedScorer):
    """With a self-test that answers what it is told."""

    def __init__(self, outcomes: Sequence[ProbeReport | Exception]) -> None:
        super().__init__()
        self.outcomes = list(outcomes)
        self.probed: list[tuple[str, str]] = []

    async def probe(self, model: str, item: EncodedExample) -> ProbeReport:
        self.probed.append((model, item.example.id))
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome
