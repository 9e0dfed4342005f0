"""Does an echo endpoint report the log-probabilities of the tokens it says it does?

Lengths and ids can all be right while every value belongs to the token beside it. A greedy generation tells: its
tokens are the most likely ones, with known log-probabilities, and echo must report the same values for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import ContractError, RejectedError
from ...tokens import EncodedExample
from ..base import ProbeReport

if TYPE_CHECKING:
    from .echo import EchoScorer

GENERATED = 8
"""Tokens that the endpoint is asked to generate."""
TOLERANCE = 0.2
"""Generation and echo run through different kernels, so bfloat16 servers differ by some hundredths (nats)."""

Value = tuple[int, float]


async def probe_echo(scorer: EchoScorer, model: str, example: EncodedExample) -> ProbeReport:
    """Test one model on the prompt of one example, with two to four small requests.

    Where the server returns token ids, it generates a continuation greedily and then scores it: both must agree.
    Where it does not, the most likely token at some positions of the example must be what greedy generation gives
    there. Raises ContractError where they differ by more than ``TOLERANCE`` nats.
    """
    prompt = list(example.ids[: example.targets[0]])
    limit = scorer.options.max_context_tokens
    if limit is not None:
        prompt = prompt[: max(1, limit - GENERATED - 1)]
    try:
        choice = (await scorer.complete(model, [prompt], max_tokens=GENERATED, echo=False))[0]
    except RejectedError as error:
        return ProbeReport(False, f"the endpoint does not generate, so its alignment could not be tested: {error}")
    ids, values = choice.get("token_ids"), _values(choice)
    if isinstance(ids, list) and ids and all(type(i) is int for i in ids) and len(values) == len(ids):
        return await _by_generated_text(scorer, model, prompt, ids, values)
    return await _by_most_likely(scorer, model, example)


async def _by_generated_text(
    scorer: EchoScorer, model: str, prompt: list[int], ids: list[int], generated: Sequence[object]
) -> ProbeReport:
    choice = (await scorer.complete(model, [[*prompt, *ids]]))[0]
    echoed = _values(choice)
    if len(echoed) < len(prompt) + len(ids):
        raise ContractError(
            f"{scorer.client.provider} echoes {len(echoed)} log-probabilities for {len(prompt) + len(ids)} tokens. "
            "Use an endpoint that echoes prompts with their log-probabilities, or scorer option max_tokens: 1."
        )
    pairs = [(len(prompt) + i, value, echoed[len(prompt) + i]) for i, value in enumerate(generated)]
    return _compare(scorer.client.provider, pairs)


async def _by_most_likely(scorer: EchoScorer, model: str, example: EncodedExample) -> ProbeReport:
    if not scorer.options.logprobs:
        return ProbeReport(False, "the endpoint returns neither token ids nor lists of likely tokens (logprobs: 0)")
    n = len(example.ids)
    positions = sorted({max(1, n // 2), n - 1})
    choices = [
        (await scorer.complete(model, [example.ids[:position]], max_tokens=1, echo=False))[0] for position in positions
    ]
    whole = (await scorer.complete(model, [example.ids]))[0]
    listed = (whole.get("logprobs") or {}).get("top_logprobs") if isinstance(whole.get("logprobs"), dict) else None
    if not isinstance(listed, list) or len(listed) < n:
        return ProbeReport(False, "the endpoint does not list likely tokens of the prompt")
    pairs = []
    for position, choice in zip(positions, choices, strict=True):
        entry = listed[position]
        top = [v for v in entry.values() if _number(v)] if isinstance(entry, dict) else []
        value = (_values(choice) or [None])[0]
        if top and value is not None:
            pairs.append((position, value, max(top)))
    if not pairs:
        return ProbeReport(False, "the endpoint generated nothing that could be compared")
    return _compare(scorer.client.provider, pairs)


def _compare(provider: str, pairs: Sequence[tuple[int, object, object]]) -> ProbeReport:
    largest = 0.0
    for position, generated, echoed in pairs:
        difference = abs(generated - echoed) if _number(generated) and _number(echoed) else math.inf  # type: ignore[operator]
        largest = max(largest, difference)
        if difference > TOLERANCE:
            raise ContractError(
                f"{provider} generates token {position} with log-probability {generated} and echoes {echoed} for it: "
                "its echoed values belong to other positions (some servers are off by one), or to another model. "
                "Nothing was scored. Use another server, or update this one."
            )
    return ProbeReport(True, f"echo agrees with greedy generation at {len(pairs)} tokens", largest)


def _values(choice: dict[str, Any]) -> list[object]:
    logprobs = choice.get("logprobs")
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    return values if isinstance(values, list) else []


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
