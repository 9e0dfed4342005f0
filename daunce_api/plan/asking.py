"""``AskPlan``: what further questions cost under the members that exist, before anything is sent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from .._util.text import dollars
from ..config import RunConfig
from ..data.tokenizers import EncodedExample
from ..errors import BudgetError, CapabilityError, DataError, DaunceError, NotEnoughMembersError
from ..providers.base import ScorerCapabilities, within_scope
from ..providers.probe import tokens_of_test
from ..store import name_of
from .prices import MILLION, Hosting, hosting_of, prices_of

FEWEST_MEMBERS = 3
"""Members without which no question is answered; half of those of the run, besides."""
FEW_MEMBERS = 8
"""Members below which an answer comes with a warning."""
HOSTING_MINUTES = 10
"""Minutes for which a model that has to be loaded or deployed is taken to be billed, where it goes by the hour."""
ANSWER_TOKENS = 256
"""Longest answer that is generated, in tokens."""


_JSON = (
    *("questions", "input_tokens", "output_tokens", "usd", "hosting_usd", "saving_usd", "spent_usd", "max_usd"),
    "members",
)
"""Attributes of a plan that its JSON form has under the same name."""


@dataclass(frozen=True, slots=True)
class AskPlan:
    """What asking costs. Dollars are None where they are not known.

    ``questions``: how many lack an answer; ``requests``: (model, question) pairs to be scored, by member (-1: the
    target, -2: the base). ``gone``: members whose model the run no longer has. ``refusals`` are the reasons not to
    send anything; :meth:`check` raises the first.
    """

    questions: int
    requests: Mapping[int, int]
    input_tokens: int
    output_tokens: int
    tokens_usd: float | None
    hosting_usd: float | None
    hosting: Hosting | None
    spent_usd: float
    max_usd: float | None
    members: int
    gone: tuple[int, ...]
    refusals: tuple[DaunceError, ...] = field(default=(), compare=False)

    @property
    def usd(self) -> float | None:
        """Dollars of everything that is missing."""
        if not self.requests:
            return 0.0
        return None if self.tokens_usd is None or self.hosting_usd is None else self.tokens_usd + self.hosting_usd

    @property
    def usd_per_token(self) -> float:
        """Dollars per token that is sent, hosting and answers included; 0 where a price is not known."""
        return (self.usd or 0.0) / self.input_tokens if self.input_tokens else 0.0

    @property
    def costs_money(self) -> bool:
        """False only where everything is known to cost nothing."""
        return self.usd != 0.0

    @property
    def saving_usd(self) -> float:
        """Dollars that asking several questions at once saves: each model is loaded once."""
        return (self.hosting_usd or 0.0) * max(0, self.questions - 1)

    def check(self) -> None:
        """Raises the first reason not to ask: DataError, CapabilityError, NotEnoughMembersError or BudgetError."""
        if self.refusals:
            raise self.refusals[0]

    def text(self) -> str:
        """The plan for a reader."""
        if not self.requests:
            return "Nothing has to be scored: these questions were answered before."
        models = len(self.requests)
        price = "an unknown price" if self.usd is None else "$0" if self.usd == 0 else f"about {dollars(self.usd)}"
        text = (
            f"{self.questions} question{'' if self.questions == 1 else 's'} under {models} "
            f"model{'' if models == 1 else 's'}: "
            f"{sum(self.requests.values()):,} short requests, {self.input_tokens:,} tokens, for {price}."
        )
        if self.hosting is not None:
            hours = models * HOSTING_MINUTES / 60
            text += f" Hosting: about {hours:.1f} hours ({HOSTING_MINUTES} minutes a model; {self.hosting.source})."
            if self.saving_usd:
                text += f" Asking them together saves {dollars(self.saving_usd)}: each model is loaded once."
        if self.gone:
            text += f" {gone_text(self.gone)}"
        return text

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data; what is not known is null."""
        return {name: getattr(self, name) for name in _JSON} | {
            "models": len(self.requests),
            "requests": sum(self.requests.values()),
            "members_gone": list(self.gone),
            "refused": [str(error) for error in self.refusals],
        }


def generation_usd(config: RunConfig, prompt: str | Sequence[Mapping[str, Any]]) -> float | None:
    """The most that one model's own answer to a prompt costs, in dollars: a token for each of its characters, and the
    longest answer. None where a price is not known."""
    _, price = prices_of(config)
    if price.input is None or price.output is None:
        return None
    return (len(json.dumps(prompt)) * price.input + ANSWER_TOKENS * price.output) / MILLION


def plan_asking(
    config: RunConfig,
    questions: Sequence[EncodedExample],
    missing: Mapping[int, Sequence[EncodedExample]],
    scorer: ScorerCapabilities,
    *,
    trained: Sequence[int],
    gone: Sequence[int],
    spent_usd: float,
    untested: Mapping[int, int] = MappingProxyType({}),
) -> AskPlan:
    """Plan to ask ``questions``; ``missing`` are those that each model lacks, every checkpoint of a member counted.

    ``trained``: members whose training examples are scored; ``gone``: those of them without a model. ``untested``: how
    many models of each member the endpoint was not tested with.
    """
    refusals: list[DaunceError] = []
    limit = scorer.max_context_tokens
    for question in questions:
        try:
            within_scope(question, scorer)
        except CapabilityError as error:
            refusals.append(error)
        if limit is not None and len(question.ids) > limit:
            refusals.append(
                DataError(
                    f"question {question.example.id!r} has {len(question.ids):,} tokens, and {scorer.provider} takes "
                    f"{limit:,} at most. Nothing was sent. Shorten it."
                )
            )
    able = len(trained) - len(gone)
    if shortfall := too_few(able, len(trained)):
        refusals.append(NotEnoughMembersError(f"{shortfall} {gone_text(gone)}".strip()))
    one_token = scorer.scope != "any"
    sent = sum((e.targets[0] if one_token else len(e.ids)) for asked in missing.values() for e in asked)
    answered = sum(map(len, missing.values())) if one_token else 0
    if not one_token:
        sent += sum(untested.get(k, 0) * tokens_of_test(min(len(e.ids) for e in asked)) for k, asked in missing.items())
    _, price = prices_of(config)
    tokens_usd: float | None = None
    if price.input is not None and (price.output is not None or not answered):
        tokens_usd = (sent * price.input + answered * (price.output or 0.0)) * scorer.price_factor / MILLION
    hosting = hosting_of(config, scorer)
    hosted: float | None = 0.0
    if hosting is not None:
        per_hour = hosting.usd_per_hour
        hosted = None if per_hour is None else per_hour * len(missing) * HOSTING_MINUTES / 60
    plan = AskPlan(
        questions=len({e.key for asked in missing.values() for e in asked}),
        requests={member: len(asked) for member, asked in missing.items() if asked},
        input_tokens=sent,
        output_tokens=answered,
        tokens_usd=tokens_usd,
        hosting_usd=hosted,
        hosting=hosting,
        spent_usd=spent_usd,
        max_usd=config.budget.max_usd,
        members=len(trained),
        gone=tuple(gone),
    )
    refusals += _budget(plan)
    return replace(plan, refusals=tuple(refusals))


def _budget(plan: AskPlan) -> list[DaunceError]:
    if plan.max_usd is None or not plan.requests:
        return []
    if plan.usd is None:
        return [
            BudgetError(
                "budget.max_usd is set, but the price of scoring is not known. Nothing was sent. Set budget.price (US "
                "dollars per million tokens; hosting per hour), or take max_usd out."
            )
        ]
    if plan.usd + plan.spent_usd > plan.max_usd:
        left = max(0.0, plan.max_usd - plan.spent_usd)
        return [
            BudgetError(
                f"asking costs about {dollars(plan.usd)}, and {dollars(left)} of budget.max_usd "
                f"({dollars(plan.max_usd)}) are left. Nothing was sent. Ask fewer questions, or raise the cap for this "
                "command with --max-usd."
            )
        ]
    return []


def too_few(able: int, trained: int) -> str | None:
    """Why these members are too few to answer; None where they are enough."""
    need = max(FEWEST_MEMBERS, -(-trained // 2))
    if able >= need:
        return None
    return (
        f"{able} of {trained} members can answer, and a question needs at least {need} (three, and half of the "
        "members). Nothing is lost: earlier questions stay answered."
    )


def gone_text(members: Sequence[int]) -> str:
    """A sentence that names members whose models are gone; "" where there are none."""
    names = [name_of(k) for k in members[:10]] + ([f"{len(members) - 10} more"] if len(members) > 10 else [])
    return f"The models of {', '.join(names)} are gone." if names else ""
