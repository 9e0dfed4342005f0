"""How noisy and how fast an endpoint is: one example, alone and among others."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from .._util.retry import Retrier, RetryPolicy
from ..data.tokenizers import EncodedExample
from ..errors import TransientError
from ..providers.base import Scorer, TokenScores
from .findings import Findings

REPEATS = 5
"""Times that the one example is scored, to measure noise."""
BURST = 8
"""Most requests sent at once, to measure speed."""
NOISY = 0.003
"""Noise of an example's loss (nats) above which runs should be made robust against it."""
RETRIES = RetryPolicy(first=1.0, longest=4.0, attempts=3, total=60.0)
Answer = TypeVar("Answer")


async def noise(scorer: Scorer, model: str, example: EncodedExample, findings: Findings) -> TokenScores:
    """Score the example several times, one after the other."""
    answers, seconds = [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        answers += await patient(lambda: scorer.score(model, [example]))
        seconds.append(time.perf_counter() - start)
    findings.seconds_per_request = statistics.median(seconds)
    loss = statistics.fmean(-statistics.fmean(answer.logprobs) for answer in answers)
    if any(a.any_censored for a in answers):
        findings.add(
            "log-probabilities",
            True,
            f"the example's token is not among those listed: its loss is at least {loss:.3f} nats (censored)",
        )
        findings.advice.append(
            "the base model does not list the answer; fine-tunes usually do. If many examples stay censored (the run "
            "reports the rate), use an endpoint with echo."
        )
        return answers[0]
    findings.sigma_token, findings.sigma_example = _sigmas(answers)
    tokens = f"{len(example.targets)} of {len(example.ids)} tokens"
    findings.add("log-probabilities", True, f"{tokens} of a short example, loss {loss:.3f} nats per token")
    findings.add(
        "noise",
        True,
        f"the same example {REPEATS} times: standard deviation {findings.sigma_example:.2g} nats of its loss, "
        f"{findings.sigma_token:.2g} of the noisiest token",
    )
    return answers[0]


async def burst(
    scorer: Scorer, model: str, examples: Sequence[EncodedExample], alone: TokenScores, findings: Findings
) -> None:
    """Several requests at once, as a run sends them: how fast they are, and how noisy an example is among others.

    A server that batches may give an example other values beside others than alone. A rate limit is a finding, not a
    failure.
    """
    count = min(BURST, scorer.capabilities.max_concurrent_requests)
    sent = [examples[0] if i % 2 == 0 else examples[i // 2 % len(examples)] for i in range(count)]
    start = time.perf_counter()
    answers = await asyncio.gather(*(scorer.score(model, [example]) for example in sent), return_exceptions=True)
    seconds = time.perf_counter() - start
    answered = sum(isinstance(answer, list) for answer in answers)
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    others = [f for f in failures if not isinstance(f, TransientError)]
    if others:
        raise others[0]
    findings.requests_per_second = answered / seconds if seconds > 0 else None
    single = findings.seconds_per_request or 0.0
    findings.add(
        "speed",
        None,
        f"{single * 1000:.0f} ms a request; {count} at once: {answered} answered, "
        f"{answered / max(seconds, 1e-9):.1f} a second",
    )
    if failures:
        findings.advice.append(
            f"{len(failures)} of {count} requests at once were turned away: set scoring.concurrency to "
            f"{max(1, answered)}."
        )
    same = [a[0] for e, a in zip(sent, answers, strict=True) if e is examples[0] and isinstance(a, list)]
    _noise_under_load([alone, *same], findings)


def _noise_under_load(answers: Sequence[TokenScores], findings: Findings) -> None:
    """Add the noise of one example over requests that were sent together, where it was measured alone before."""
    if findings.sigma_example is None or len(answers) < 3 or any(a.any_censored for a in answers):
        return
    token, example = _sigmas(answers)
    findings.add(
        "noise under load",
        True,
        f"the same example {len(answers)} times among others: standard deviation {example:.2g} nats of its loss, "
        f"{token:.2g} of the noisiest token",
    )
    findings.sigma_token = max(findings.sigma_token or 0.0, token)
    findings.sigma_example = max(findings.sigma_example, example)
    if findings.sigma_example > NOISY:
        findings.advice.append(
            "this endpoint is noisy. Prefer ensemble.start_from: base with subset_ratio .3 to .5 and a larger learning "
            "rate over many weak members, and keep scoring.noise_probe on: the estimators use the measured noise."
        )


def _sigmas(answers: Sequence[TokenScores]) -> tuple[float, float]:
    """Standard deviations over answers: of the noisiest token, and of the loss."""
    values = [answer.logprobs for answer in answers]
    token = max(statistics.stdev(column) for column in zip(*values, strict=True))
    return token, statistics.stdev([statistics.fmean(v) for v in values])


async def patient(request: Callable[[], Awaitable[Answer]]) -> Answer:
    """A request, repeated twice where the provider is only busy."""
    return await Retrier(RETRIES)(request, "ask the endpoint")
