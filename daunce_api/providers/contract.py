"""What an answer with log-probabilities has to hold before any number of it is used.

Servers exist that ignore ``echo``, add a template, shift by one, truncate the context or answer with another model,
and all of them return numbers that look right. Each check here raises ContractError in plain words; nothing is
repaired, aligned or guessed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from ..data.tokenizers import EncodedExample
from ..errors import ContractError, RejectedError
from .base import TokenScores

IMPOSSIBLE = -9000.0
"""Log-probabilities at or below this are stand-ins (-9999) for "not known", never measurements (nats)."""
ROUNDING = 1e-6
"""A log-probability may exceed zero by this much, for round-off in the server (nats)."""
BEFORE_TARGETS = 16
"""Positions before the targets that are requested where a scorer chooses: an answer that is certain, and ended by a
token that is certain, has the log-probability 0 by right, and the prompt before it tells that from a server's zeros."""
TOP_TOLERANCE = 1e-3
"""Both values come from one softmax; they differ by how they are rounded for the answer (nats)."""

_NUMBERS = (float, int)
_DATED = re.compile(r"-\d{4}-?\d{2}-?\d{2}")


def json_of(content: bytes) -> Any:
    """The JSON in a body; None where it is none, or holds half of a surrogate pair, which cannot be stored or sent."""
    try:
        answer = json.loads(content)
        if b"\\ud" in content.lower():
            json.dumps(answer, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return answer


def part_of(answer: object, *path: str | int) -> Any:
    """What stands at a path inside an answer in JSON; None where it holds no such thing.

    Example:
        >>> part_of({"choices": [{"text": "no"}]}, "choices", 0, "text"), part_of({"choices": None}, "choices", 0)
        ('no', None)
    """
    found: Any = answer
    for step in path:
        try:
            found = found[step]
        except (KeyError, IndexError, TypeError):
            return None
    return found


def refuse_long(example: EncodedExample, generated: int, limit: int | None) -> None:
    """Raises RejectedError for an example that does not fit the context ``limit`` with ``generated`` tokens behind
    it: a server would truncate it in silence."""
    if limit is not None and len(example.ids) + generated > limit:
        raise RejectedError(
            f"example {example.example.id!r} has {len(example.ids):,} tokens and the model takes {limit:,}; it was not "
            "sent, since a truncated prompt shifts every position. Shorten it or leave it out."
        )


def check_model(provider: str, asked: str, answered: object) -> None:
    """The answer's ``model`` field, where there is one, must name what was requested.

    A date at the end (``gpt-x`` answered as ``gpt-x-2026-01-31``) and a path in front (``org/model``) are accepted.
    """
    if not isinstance(answered, str) or not answered or answered == asked:
        return
    dated = answered.startswith(asked) and _DATED.fullmatch(answered[len(asked) :])
    if dated or answered.endswith("/" + asked) or asked.endswith("/" + answered):
        return
    raise ContractError(
        f"{provider} was asked for model {asked!r} and answered as {answered[:100]!r}: it serves another model than "
        "the fine-tune. Nothing of the answer was used. Check that the adapter is loaded under this name."
    )


def by_index(provider: str, choices: object, count: int) -> list[dict[str, Any]]:
    """The choices of a batch answer in the order of its prompts; exactly one a prompt."""
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise ContractError(f"{provider} sent no list of choices. Is base_url the address of a completions API?")
    if len(choices) != count:
        raise ContractError(
            f"{provider} sent {len(choices)} choices for {count} prompts; nothing was used. If it takes one prompt a "
            "request only, set scorer option prompts_per_request: 1."
        )
    indices = [c.get("index") for c in choices]
    if any(type(i) is not int for i in indices) or sorted(indices) != list(range(count)):
        raise ContractError(f"{provider} numbered its choices {indices[:8]}, not 0 to {count - 1}; nothing was used.")
    return sorted(choices, key=lambda choice: int(choice["index"]))


def check_ids(provider: str, example: EncodedExample, returned: Sequence[object]) -> None:
    """Ids that the server says it read must be the ids that were sent."""
    if list(returned) == list(example.ids):
        return
    position = next(
        (i for i, (a, b) in enumerate(zip(returned, example.ids, strict=False)) if a != b),
        min(len(returned), len(example.ids)),
    )
    raise ContractError(
        f"{provider} read other tokens than were sent for {_name(example)} (first difference at position {position}, "
        f"{len(returned)} ids for {len(example.ids)}): it adds a template or special tokens, or truncates. Nothing "
        "was used. Switch that off in the server, or use an endpoint that takes token ids as they are."
    )


def scores_of(
    provider: str,
    example: EncodedExample,
    logprobs: object,
    *,
    generated: int = 0,
    asked_from: int | None = None,
    hint: str = "",
) -> TokenScores:
    """The log-probabilities of the targets, from one entry a sent token (the first may be null).

    ``generated`` tokens at the end that were requested besides are dropped. ``asked_from``: the first of the positions
    that were requested, none of which may be null; a null among them says that the values are shifted. ``hint`` says
    what to use instead when nothing was echoed. Raises ContractError where length or values break the contract.
    """
    sent = len(example.ids)
    if not isinstance(logprobs, list) or not logprobs:
        raise ContractError(
            f"{provider} sent no log-probabilities for {_name(example)}. {hint or 'Use an endpoint that returns them.'}"
        )
    if len(logprobs) != sent + generated:
        ignored = len(logprobs) <= max(generated, 1) < sent
        problem = (
            "it returned generated tokens only, so it ignores echo"
            if ignored
            else "it adds, drops or truncates tokens, and no position can be trusted"
        )
        raise ContractError(
            f"{provider} sent {len(logprobs)} log-probabilities for {sent + generated} tokens of {_name(example)}: "
            f"{problem}. Nothing was used. {hint}".rstrip()
        )
    known = [value for value in logprobs[1:sent] if value is not None]  # some servers leave most of the prompt out
    if len(known) > 1 and all(value == 0 for value in known):
        raise ContractError(
            f"{provider} sent the log-probability 0 for every token of {_name(example)}: these are not measurements. "
            f"Nothing was used. {hint}".rstrip()
        )
    if asked_from is not None and None in logprobs[asked_from:sent]:
        _checked(provider, example, logprobs.index(None, asked_from), None)
    return TokenScores(tuple(_checked(provider, example, t, logprobs[t]) for t in example.targets))


def check_top(provider: str, example: EncodedExample, scores: TokenScores, listed: object) -> None:
    """No target may be more likely than the most likely token that is listed for its position.

    It is where log-probabilities and positions are shifted against each other. Positions without a list are passed.
    """
    if not isinstance(listed, list):
        return
    for position, value in zip(example.targets, scores.logprobs, strict=True):
        entry = listed[position] if position < len(listed) else None
        if not isinstance(entry, dict) or not entry:
            continue
        top = max([v for v in entry.values() if type(v) in _NUMBERS], default=math.inf)
        refuse_shifted(provider, example, position, value, top)


def refuse_shifted(provider: str, example: EncodedExample, position: int, value: object, top: object) -> None:
    """Raises ContractError where a token is more likely than the most likely one at its position."""
    if isinstance(value, float) and isinstance(top, int | float) and value > top + TOP_TOLERANCE:
        raise ContractError(
            f"{provider} lists {top:.4f} as the highest log-probability at token {position} of {_name(example)} and "
            f"{value:.4f} for the token itself: values and positions are shifted against each other. Nothing of the "
            "answer was used."
        )


def _checked(provider: str, example: EncodedExample, position: int, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        problem = "it is no number"
    elif value <= IMPOSSIBLE:
        problem = "it is a stand-in for a value that is not known, not a measurement"
    elif value > ROUNDING:
        problem = "a log-probability is never above 0"
    else:
        return min(float(value), 0.0)
    raise ContractError(
        f"{provider} sent {str(value)[:40]!r} as log-probability of token {position} of {_name(example)}: {problem}. "
        "Nothing of the answer was used."
    )


def _name(example: EncodedExample) -> str:
    return f"example {example.example.id!r}"
