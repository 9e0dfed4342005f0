"""Does an endpoint report the log-probabilities of the tokens it says it does?

Lengths and ids can all be right while every value belongs to the token beside it. A generation tells: its tokens have
log-probabilities that the endpoint gives when it makes them, and scoring them must give the same values.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ..data.tokenizers import EncodedExample
from ..errors import ContractError, RejectedError, ReplayError, StopError
from .base import ProbeReport, Probing, Scorer, TokenScores

GENERATED = 8
"""Tokens that the endpoint is asked to generate."""
FIRST_LEFT_OUT = (
    "If the server has no entry for the first token of a prompt (Modular MAX), set backend.scorer.options.dialect: max."
)
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
    known = isinstance(ids, list) and ids and all(type(i) is int for i in ids)
    if not known or not isinstance(values, list) or not isinstance(ids, list) or len(values) != len(ids):
        return None
    return Generated(tuple(ids), tuple(values))


async def probe_generated(
    scorer: Scorer,
    model: str,
    example: EncodedExample,
    generate: Callable[[str, tuple[int, ...]], Awaitable[Generated | None]],
    *,
    score: Callable[[str, Sequence[EncodedExample]], Awaitable[list[TokenScores]]] | None = None,
) -> ProbeReport:
    """Test one model of a scorer of token ids: ``generate`` continues a prompt by up to ``GENERATED`` tokens, which
    are then scored (by ``score`` where the scorer's own does not take ids) and must have the same log-probabilities.

    Raises ContractError where they differ by more than
    ``TOLERANCE`` nats, and RejectedError where the endpoint does not know the model.
    """
    prompt = _prompt_of(scorer, example)
    try:
        made = await generate(model, prompt)
    except RejectedError as error:
        return await does_not_generate(scorer, model, example, error)
    if made is None:
        return ProbeReport(False, "the endpoint does not tell ids and log-probabilities of what it generates")
    positions = tuple(range(len(prompt), len(prompt) + len(made.ids)))
    whole = replace(example, ids=(*prompt, *made.ids), targets=positions, boundary_moved=False)
    (scores,) = await (score or scorer.score)(model, [whole])
    report = compare(scorer.capabilities.provider, list(zip(positions, made.values, scores.logprobs, strict=True)))
    return _with(report, whole, made, scores.logprobs)


def _prompt_of(scorer: Scorer, example: EncodedExample) -> tuple[int, ...]:
    """The example's prompt, as much of it as leaves room to generate."""
    prompt, limit = example.ids[: example.targets[0]], scorer.capabilities.max_context_tokens
    return prompt if limit is None else prompt[: max(1, limit - GENERATED - 1)]


async def does_not_generate(scorer: Scorer, model: str, example: EncodedExample, error: RejectedError) -> ProbeReport:
    """The report on an endpoint that refused to generate. Raises RejectedError where it is the model that it refuses:
    then another one has to be tested."""
    await scorer.score(model, [example])
    return not_generating(error)


def not_generating(error: RejectedError) -> ProbeReport:
    """The report on an endpoint that scores a model and refused to generate with it."""
    return ProbeReport(False, f"the endpoint does not generate, so its alignment could not be tested: {error}")


class Completions(Scorer, Protocol):
    """What :func:`probe_echo` asks of a scorer on a completions endpoint with ``echo``."""

    @property
    def provider(self) -> str: ...
    @property
    def lists_likely(self) -> bool:
        """Whether most likely tokens are listed."""
        ...

    async def complete(
        self, model: str, prompts: Sequence[Sequence[int]], *, max_tokens: int | None = None, echo: bool = True
    ) -> list[dict[str, Any]]: ...


async def probe_echo(scorer: Completions, model: str, example: EncodedExample) -> ProbeReport:
    """Test one model on the prompt of one example, with two to four small requests.

    Where the server returns token ids, it generates a continuation greedily and then scores it: both must agree.
    Where it does not, the most likely token at some positions of the example must be what greedy generation gives
    there. Raises ContractError where they differ by more than ``TOLERANCE`` nats, and RejectedError where the
    endpoint does not know the model.
    """
    prompt = list(_prompt_of(scorer, example))
    try:
        choice = (await scorer.complete(model, [prompt], max_tokens=GENERATED, echo=False))[0]
    except RejectedError as error:
        return await does_not_generate(scorer, model, example, error)
    made = generated(choice.get("token_ids"), values_of(choice))
    if made is not None:
        return await _by_generated_text(scorer, model, example, prompt, made)
    return await _by_most_likely(scorer, model, example)


async def _by_generated_text(
    scorer: Completions, model: str, example: EncodedExample, prompt: list[int], made: Generated
) -> ProbeReport:
    # The bare values, since the contract's own checks would only say that something is wrong.
    choice = (await scorer.complete(model, [[*prompt, *made.ids]]))[0]
    echoed = values_of(choice)
    if len(echoed) < len(prompt) + len(made.ids):
        raise ContractError(
            f"{scorer.provider} echoes {len(echoed)} log-probabilities for {len(prompt) + len(made.ids)} "
            "tokens. Use an endpoint that echoes prompts with their log-probabilities, or scorer option max_tokens: 1."
        )
    pairs = [(len(prompt) + i, value, echoed[len(prompt) + i]) for i, value in enumerate(made.values)]
    before = [(position, value, echoed[position - 1]) for position, value, _ in pairs]
    report = _compared(scorer.provider, pairs, before)
    positions = tuple(position for position, _, _ in pairs)
    whole = replace(example, ids=(*prompt, *made.ids), targets=positions, boundary_moved=False)
    return _with(report, whole, made, [value for _, _, value in pairs])


def _with(report: ProbeReport, whole: EncodedExample, made: Generated, scored: Sequence[object]) -> ProbeReport:
    made_T, scored_T = (tuple(map(float, side)) for side in (made.values, scored))  # type: ignore[arg-type]
    return replace(report, generated=(whole, made_T, scored_T))


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


async def _by_most_likely(scorer: Completions, model: str, example: EncodedExample) -> ProbeReport:
    if not scorer.lists_likely:
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

    def top(entry: object) -> float | None:
        return max((v for v in entry.values() if _number(v)), default=None) if isinstance(entry, dict) else None

    pairs, before = [], []
    for position, choice in zip(positions, choices, strict=True):
        value = (values_of(choice) or [None])[0]
        if value is not None and (highest := top(listed[position])) is not None:
            pairs.append((position, value, highest))
            before.append((position, value, top(listed[position - 1])))
    if not pairs:
        return ProbeReport(False, "the endpoint generated nothing that could be compared")
    return _compared(scorer.provider, pairs, before)


def _compared(provider: str, pairs: Pairs, before: Pairs) -> ProbeReport:
    """As :func:`compare`; the error says so where the values of the position ``before`` each one agree."""
    try:
        return compare(provider, pairs)
    except ContractError as error:
        try:
            compare(provider, before)
        except ContractError:
            raise error from None
        raise ContractError(f"{error} Every value stands one position too early. {FIRST_LEFT_OUT}") from None


def compare(provider: str, pairs: Pairs) -> ProbeReport:
    """The report on (position, log-probability when generated, log-probability when scored).

    Raises ContractError where two differ by more than ``TOLERANCE`` nats.
    """
    largest = 0.0
    for position, made, echoed in pairs:
        difference = abs(made - echoed) if _number(made) and _number(echoed) else math.inf  # type: ignore[operator]
        largest = max(largest, difference)
        if difference > TOLERANCE:
            raise ContractError(
                f"{provider} generates token {position} with log-probability {made} and echoes {echoed} for it: "
                "its echoed values belong to other positions (some servers are off by one), or to another model. "
                "Nothing was scored. Use another server, or update this one."
            )
    tokens = f"{len(pairs)} token{'s' * (len(pairs) > 1)}"
    return ProbeReport(True, f"scores agree with the endpoint's own generation at {tokens}", largest)


def values_of(choice: dict[str, Any]) -> list[object]:
    """The log-probabilities of a completions choice; none where it has none."""
    logprobs = choice.get("logprobs")
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    return values if isinstance(values, list) else []


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
