"""What a million tokens cost: a table with dates and sources, and what the config says instead."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from .._util.text import dollars
from ..config import RunConfig
from ..providers.base import ScorerCapabilities
from ..providers.endpoint import is_loopback

MILLION = 1_000_000
SAME_TOKENS = 0.01
"""Share of its tokens by which a job may be billed more or less than was counted, without a word."""
STALE_DAYS = 90
"""Age of a price from which a plan warns."""

LORA_GB = 0.0033
"""GB of LoRA weights in float32 on every linear layer of a dense model, a rank and (10^9 parameters)^(2/3): 1.1 at rank
32 for 32 billion, .42 for 8 billion."""
_OWN_MACHINE = ("embedded", "local")
_OWN_ENDPOINT = ("fireworks", "nebius", "tinker", "together")
"""Scorers that have an endpoint of their own, whoever trains."""


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens; None where a price is not known. ``source`` says where they are from."""

    training: float | None = None
    input: float | None = None
    output: float | None = None
    source: str = "not known"
    as_of: str | None = None


@dataclass(frozen=True, slots=True)
class Hosting:
    """What an endpoint costs that is paid for by the hour: US dollars per hour, and the hours; None where one is not
    known. ``source`` says what the price is the price of, and where it is from."""

    usd_per_hour: float | None
    hours: float | None
    source: str
    as_of: str | None = None

    @property
    def usd(self) -> float | None:
        """Dollars of all hours."""
        return None if self.usd_per_hour is None or self.hours is None else self.usd_per_hour * self.hours

    @property
    def text(self) -> str:
        """The price for a reader, and what to set to make it known."""
        price = "price per hour not known" if self.usd_per_hour is None else f"{dollars(self.usd_per_hour)} an hour"
        missing = []
        if self.usd_per_hour is None:
            missing.append("budget.price.hosting")
        if self.hours is None:
            missing.append("budget.hosting_hours")
        hours = "" if self.hours is None else f"{self.hours:g} hours at "
        hint = f"; set {' and '.join(missing)} to see it" if missing else ""
        return f"{hours}{price} ({self.source}){hint}"


@dataclass(frozen=True, slots=True)
class JobCosts:
    """What training jobs cost: billed tokens of each member (-1: the target model), US dollars per token."""

    tokens: Mapping[int, int]
    usd_per_token: float

    def estimate(self, member: int) -> float:
        """Dollars that the member's job is expected to be billed."""
        return self.tokens[member] * self.usd_per_token

    def billed(self, trained_tokens: int) -> float:
        """Dollars for the tokens that a provider reports."""
        return trained_tokens * self.usd_per_token

    def mismatch(self, member: int, trained_tokens: int | None) -> str | None:
        """What the reported tokens say against those that were counted; None where they agree within a hundredth."""
        counted = self.tokens[member]
        if trained_tokens is None or abs(trained_tokens - counted) <= SAME_TOKENS * counted:
            return None
        return (
            f"{trained_tokens:,} tokens are billed where {counted:,} are counted: the provider trains on another chat "
            "template than is measured, for another number of epochs, again after an interruption, or bills padding. "
            "`daunce doctor --train-one` compares them for one small job"
        )


def prices_of(config: RunConfig) -> tuple[Price, Price]:
    """Prices of training and of scoring. What runs on this machine costs nothing; ``budget.price`` wins over all.

    Together and Fireworks take nothing for the tokens of a dedicated endpoint, whose hours :func:`hosting_of` has.
    """
    backend = config.backend
    training = _at(backend.kind, backend.base_url, backend.model, lora=_trains_lora(config))
    kind, address = _scoring_place(config)
    record = _hosting_record(kind, address)
    if record is not None and record["tokens"] == 0:
        scoring = Price(input=0.0, output=0.0, source="its hours are paid for, not its tokens")
    else:
        scoring = _at(kind, address, backend.model)
    return _overridden(training, config), _overridden(scoring, config)


def prices_known(config: RunConfig, scorer: ScorerCapabilities) -> bool:
    """Whether a price is known for everything that a run of this config pays for."""
    (training, scoring), hosting = prices_of(config), hosting_of(config, scorer)
    answers = scorer.scope == "any" or scoring.output is not None  # others generate a token for each answer
    hours = hosting is None or hosting.usd is not None
    return training.training is not None and scoring.input is not None and answers and hours


def hosting_of(config: RunConfig, scorer: ScorerCapabilities) -> Hosting | None:
    """The cost of the hours of the endpoint that answers; None where it is not paid for by the hour."""
    kind, address = _scoring_place(config)
    if not scorer.hourly or _is_here(kind, address):
        return None
    record = _hosting_record(kind, address)
    price, source, as_of = None, "not known", None
    if record is not None:
        price, source = record["hour"], f"{record['per']}; {record['source']}, as of {record['as_of']}"
        as_of = record["as_of"]
    given = config.budget.price
    if given is not None and given.hosting is not None:
        price, source, as_of = given.hosting, "budget.price", None
    return Hosting(price, config.budget.hosting_hours, source, as_of)


def closing_of(config: RunConfig) -> dict[str, Any] | None:
    """When the config's provider stops taking jobs (``no_new_jobs_from``, a date) and its models end (``models_end``, a
    date or None), where that is announced."""
    provider = provider_of(config.backend.kind, config.backend.base_url)
    for entry in table_of("prices.json")["closings"]:
        named = entry["models"] == "all" or any(_is(config.backend.model, model) for model in entry["models"])
        if entry["backend"] == provider and named:
            return dict(entry)
    return None


def price_notes(config: RunConfig, today: date, *prices: Price | Hosting | None) -> list[str]:
    """What a plan says of its prices: those of the table that are older than :data:`STALE_DAYS`, and what saved models
    cost by the month."""
    notes = []
    old = sorted({p.as_of for p in prices if p is not None and p.as_of is not None and _is_stale(p.as_of, today)})
    if old:
        notes.append(
            f"prices as of {' and '.join(old)} are older than {STALE_DAYS} days: look at the provider's page, and set "
            "budget.price where they have changed"
        )
    provider = provider_of(config.backend.kind, config.backend.base_url)
    for entry in table_of("prices.json")["storage"]:
        address = config.backend.base_url  # another server of the same wire keeps models as it likes
        if entry["backend"] == provider and (address is None or "thinkingmachines" in address):
            kept = config.ensemble.keep_days
            until = "until `daunce clean`; ensemble.keep_days limits that" if kept is None else f"for {kept} days"
            notes.append(f"models are kept {until}: {_monthly(config, entry)} ({entry['source']})")
    return notes


def _monthly(config: RunConfig, entry: dict[str, Any]) -> str:
    """What the models of a run cost a month, where their size is known."""
    shape, given = config.ensemble, config.training.hyperparameters
    models = shape.members * shape.checkpoints + (shape.start_from == "target" and shape.target_model is None)
    price, rank = f"{dollars(entry['usd'])} per {entry['per']}", given.get("rank", 32)
    size = _billions(config.backend.model)
    if size is None or not isinstance(rank, int):
        return price
    gigabytes = LORA_GB * rank * size ** (2 / 3)
    return (
        f"about {dollars(models * gigabytes * entry['usd'])} a month for {models} models of some {gigabytes:.2g} GB "
        f"(by the model's size and rank; {price})"
    )


def _is_stale(as_of: str, today: date) -> bool:
    """Whether a date of the table (a year, or a year and a month: its last day counts) is too long ago."""
    year, _, month = as_of.partition("-")
    last = date(int(year), int(month or 12), 28)
    return (today - last).days > STALE_DAYS


def _scoring_place(config: RunConfig) -> tuple[str, str | None]:
    """Kind and address of what answers; the kind is empty for an address that stands for no provider."""
    backend, scorer = config.backend, config.backend.scorer
    if scorer.kind in _OWN_ENDPOINT:
        return scorer.kind, scorer.base_url or (backend.base_url if scorer.kind == backend.kind else None)
    if scorer.base_url is not None:
        return "", scorer.base_url
    return backend.kind, backend.base_url


def _is_here(kind: str, base_url: str | None) -> bool:
    return kind in _OWN_MACHINE or (base_url is not None and is_loopback(urlsplit(base_url).hostname))


def _hosting_record(kind: str, base_url: str | None) -> dict[str, Any] | None:
    provider = None if _is_here(kind, base_url) else provider_of(kind, base_url)
    return next((entry for entry in table_of("prices.json")["hosting"] if entry["backend"] == provider), None)


def _trains_lora(config: RunConfig) -> bool:
    """Whether members are adapters, which is cheaper at Together and Fireworks than training all weights."""
    given = config.training.hyperparameters
    return bool(given.get("lora", 1)) and given.get("lora_rank") != 0


def _at(kind: str, base_url: str | None, model: str, *, lora: bool = True) -> Price:
    if _is_here(kind, base_url):
        return Price(0.0, 0.0, 0.0, "runs on this machine")
    provider = provider_of(kind, base_url)
    for entry in table_of("prices.json")["prices"]:
        if entry["backend"] == provider and _fits(entry, model) and (lora or entry.get("method") != "lora"):
            source = f"{entry['source']}, as of {entry['as_of']}"
            return Price(entry["training"], entry.get("input"), entry.get("output"), source, entry["as_of"])
    return Price()


def _fits(entry: dict[str, Any], model: str) -> bool:
    if "model" in entry:
        return _is(model, entry["model"])
    size = _billions(model)
    above, to = entry["billions"]
    return size is not None and above < size <= to


def _billions(model: str) -> float | None:
    """Parameters of a model in billions, as its name tells: ``qwen2p5-7b``, ``Qwen3-30B-A3B``; None where it does
    not."""
    found = re.findall(r"(?<![a-z0-9.])(\d+(?:[.p]\d+)?)b(?![a-z0-9])", model.rsplit("/", 1)[-1].lower())
    return max((float(size.replace("p", ".")) for size in found), default=None)


def _overridden(price: Price, config: RunConfig) -> Price:
    given = config.budget.price
    if given is None:
        return price
    known = {name: value for name, value in given.model_dump(exclude={"hosting"}).items() if value is not None}
    if not known:
        return price
    whole = len(known) == 3
    source = "budget.price" if whole else f"budget.price; {price.source}"
    return replace(price, **known, source=source, as_of=None if whole else price.as_of)


def provider_of(kind: str, base_url: str | None) -> str:
    """The provider behind a kind of backend: OpenAI is reached through two kinds."""
    host = urlsplit(base_url).hostname if base_url else None
    return "openai" if host in ("api.openai.com", "eu.api.openai.com") else kind


def _is(model: str, name: str) -> bool:
    """Whether a model is the named one, a dated snapshot of it, or a fine-tune of one of those."""
    base = model.removeprefix("ft:").split(":")[0]
    return re.fullmatch(re.escape(name) + r"(-\d{4}-\d{2}-\d{2})?", base) is not None


@cache
def table_of(name: str) -> dict[str, Any]:
    """A JSON file of this package."""
    table: dict[str, Any] = json.loads((files(__package__) / name).read_text(encoding="utf-8"))
    return table
