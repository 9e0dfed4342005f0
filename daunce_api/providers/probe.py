"""Does an endpoint report the log-probabilities of the tokens it says it does?

Lengths and ids can all be right while every value belongs to the token beside it. A generation tells: its tokens have
log-probabilities that the endpoint gives when it makes them, and scoring them must give the same values.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..data.tokenizers import EncodedExample
from ..errors import ContractError, RejectedError, ReplayError, StopError
from .base import ProbeReport, Probing, Scorer
from .contract import part_of

GENERATED = 8
"""Tokens that the endpoint is asked to generate."""
LOST, DEVIATIONS = 0.1, 6.0
"""Least part of an adapter whose loss is reported, and standard errors that it has to be away from 0."""
RESOLUTION = 1e-4
"""Differences of log-probabilities below this say nothing of a model (nats)."""
REQUESTS = 4
"""A test is priced as this many prompts, each with ``GENERATED`` tokens more: no test sends more than that."""
TOLERANCE = 0.2
"""Generation and echo run through different kernels, so bfloat16 servers differ by some hundredths (nats)."""


Pairs = Sequence[tuple[int, object, object]]
"""Positions, with the log-probability that was given when the token was made and when it was scored."""


@dataclass(frozen=True, slots=True)
class Generated:
    """Tokens that an endpoint made, with the log-probability (nats) that it gave for each."""

    ids: tuple[int, ...]
    values: tuple[object, ...]


def tokens_of_test(prompt: int) -> int:
    """Tokens of the test of one model on an example of ``prompt`` tokens, at most."""
    return REQUESTS * (prompt + GENERATED)


def generated(ids: object, values: object) -> Generated | None:
    """What an endpoint made; None where it does not tell every token's id and value."""
    if not isinstance(ids, list) or not isinstance(values, list) or len(values) != len(ids) or not ids:
        return None
    return Generated(tuple(ids), tuple(values)) if all(type(i) is int for i in ids) else None


async def probe_generated(
    scorer: Scorer,
    model: str,
    example: EncodedExample,
    generate: Callable[[str, tuple[int, ...]], Awaitable[Generated | None]],
    *,
    otherwise: Callable[[str, EncodedExample], Awaitable[ProbeReport]] | None = None,
    hint: str = "",
) -> ProbeReport:
    """Test one model of a scorer of token ids: ``generate`` continues a prompt by up to ``GENERATED`` tokens, which
    are then scored and must have the same log-probabilities.
    ``otherwise`` tests an endpoint that does not tell ids and log-probabilities of what it generates; ``hint`` says
    what to do about values that stand one position too early.

    Raises ContractError where they differ by more than ``TOLERANCE`` nats, and RejectedError where the endpoint does
    not know the model.
    """
    limit = scorer.capabilities.max_context_tokens
    prompt = example.ids[: example.targets[0]]
    if limit is not None:  # as much of it as leaves room to generate
        prompt = prompt[: max(1, limit - GENERATED - 1)]
    try:
        made = await generate(model, prompt)
    except RejectedError as error:
        await scorer.score(model, [example])  # where it is the model that is refused, another one has to be tested
        return not_generating(error)
    if made is None:
        if otherwise is not None:
            return await otherwise(model, example)
        return ProbeReport(False, "the endpoint does not tell ids and log-probabilities of what it generates")
    ids = (*prompt, *made.ids)
    positions = tuple(range(len(prompt), len(ids)))
    # With the position before them, if it has a value: then values that stand one too early are called so.
    before = positions if len(prompt) == 1 else (len(prompt) - 1, *positions[:-1])
    asked = replace(example, ids=ids, targets=tuple(sorted({*before, *positions})), boundary_moved=False)
    (scores,) = await scorer.score(model, [asked])
    value = dict(zip(asked.targets, scores.logprobs, strict=True))
    report = compare(
        scorer.capabilities.provider,
        [(t, v, value[t]) for t, v in zip(positions, made.values, strict=True)],
        [(t, v, value[t]) for t, v in zip(before, made.values, strict=True)],
        hint,
    )
    made_T = tuple(map(float, made.values))  # type: ignore[arg-type]
    scored_T = tuple(value[t] for t in positions)
    return replace(report, generated=(replace(asked, targets=positions), made_T, scored_T))


def not_generating(error: RejectedError) -> ProbeReport:
    """The report on an endpoint that scores a model and refused to generate with it."""
    return ProbeReport(False, f"the endpoint does not generate, so its alignment could not be tested: {error}")


async def probe_model(scorer: Scorer, model: str, example: EncodedExample, *, base: str | None) -> ProbeReport | None:
    """Test an endpoint with one model, a fine-tune beside its base; None where the scorer has no test.

    Raises ContractError where the endpoint fails, RejectedError where it does not know the model. A base model that is
    not served, or that a recording has no answer of, is left out.
    """
    if not isinstance(scorer, Probing):
        return None
    report = await scorer.probe(model, example)
    if base is not None and model != base:
        with suppress(RejectedError, StopError, ReplayError):
            return replace(report, from_base=await distance_from_base(scorer, base, model, report))
    return report


async def distance_from_base(scorer: Scorer, base: str, model: str, report: ProbeReport) -> float | None:
    """How far a fine-tune that passed its test is from the base model (``ProbeReport.from_base``), and whether it is
    scored as a whole.

    A server may apply a part of an adapter when it generates and not when it scores prompts: then what it scores lies
    between fine-tune and base model, closer to the former than any tolerance for kernels that round. With g, e and b
    the log-probabilities of the generated tokens when made, when scored, and under the base model, the part that is
    lost is the slope of g - e on g - b; rounding has none. Raises ContractError where it is at least ``LOST`` and
    beyond ``DEVIATIONS`` standard errors, RejectedError where the base model is not served.
    """
    if report.generated is None:
        return None
    whole, made, scored = report.generated
    (plain,) = await scorer.score(base, [whole])
    g_T, e_T, b_T = (np.array(side) for side in (made, scored, plain.logprobs))
    far_T, off_T = g_T - b_T, g_T - e_T
    square, from_base = float(far_T @ far_T), float(np.sqrt(np.mean((e_T - b_T) ** 2)))
    if len(g_T) < 3 or square == 0:
        return from_base
    lost = float(off_T @ far_T) / square
    error = float(np.sqrt(np.mean((off_T - lost * far_T) ** 2) / square)) + RESOLUTION / math.sqrt(square)
    if lost > max(LOST, DEVIATIONS * error):
        raise ContractError(
            f"the log-probabilities that are given for prompts of {model} lie {lost:.0%} of the way from the fine-tune "
            f"to {base}, though it generates as the fine-tune: the server loses a part of the adapter when it scores "
            "(vLLM issue 51594: LoRA on lm_head). Nothing was scored; the models are kept. Update the server and run "
            "the same command again, or train without that module."
        )
    return from_base


def compare(provider: str, pairs: Pairs, before: Pairs = (), hint: str = "") -> ProbeReport:
    """The report on (position, log-probability when generated, log-probability when scored).

    Raises ContractError where two differ by more than ``TOLERANCE`` nats; it says so, with the ``hint``, where the
    values of the position ``before`` agree.
    """
    differences = [_difference(made, echoed) for _, made, echoed in pairs]
    for (position, made, echoed), difference in zip(pairs, differences, strict=True):
        if difference > TOLERANCE:
            problem = (
                f"{provider} generates token {position} with log-probability {made} and echoes {echoed} for it: "
                "its echoed values belong to other positions (some servers are off by one), or to another model. "
                "Nothing was scored. Use another server, or update this one."
            )
            if before and all(_difference(made, echoed) <= TOLERANCE for _, made, echoed in before):
                problem += f" Every value stands one position too early. {hint}"
            raise ContractError(problem.rstrip())
    tokens = f"{len(pairs)} token{'s' * (len(pairs) > 1)}"
    report = f"scores agree with the endpoint's own generation at {tokens}"
    return ProbeReport(True, report, max(differences, default=0.0))


def _difference(made: object, scored: object) -> float:
    return abs(made - scored) if is_number(made) and is_number(scored) else math.inf  # type: ignore[operator]


def values_of(choice: dict[str, Any]) -> list[object]:
    """The log-probabilities of a completions choice; none where it has none."""
    values = part_of(choice, "logprobs", "token_logprobs")
    return values if isinstance(values, list) else []


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
