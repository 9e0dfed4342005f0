"""What a million tokens cost: a table with dates and sources, and what the config says instead."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from ..config import RunConfig

MILLION = 1_000_000

_OWN_MACHINE = ("embedded", "local")
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_OWN_ENDPOINT = ("fireworks", "tinker", "together")
"""Scorers that have an endpoint of their own, whoever trains."""


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens; None where a price is not known. ``source`` says where they are from."""

    training: float | None = None
    input: float | None = None
    output: float | None = None
    source: str = "not known"


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


@dataclass(frozen=True, slots=True)
class Closing:
    """Dates (``YYYY-MM-DD``) on which a provider stops taking jobs, and on which its models end."""

    no_new_jobs_from: str
    models_end: str | None
    source: str


def prices_of(config: RunConfig) -> tuple[Price, Price]:
    """Prices of training and of scoring. What runs on this machine costs nothing; ``budget.price`` wins over all."""
    backend = config.backend
    training = _at(backend.kind, backend.base_url, backend.model)
    if backend.scorer.base_url is not None:
        scoring = _at("", backend.scorer.base_url, backend.model)
    elif backend.scorer.kind in _OWN_ENDPOINT and backend.scorer.kind != backend.kind:
        scoring = Price()
    else:
        scoring = training
    return _overridden(training, config), _overridden(scoring, config)


def closing_of(config: RunConfig) -> Closing | None:
    """When the config's provider and model close, where that is announced."""
    provider = provider_of(config.backend.kind, config.backend.base_url)
    for entry in _table()["closings"]:
        if entry["backend"] == provider:
            ends = any(_is(config.backend.model, model) for model in entry["models"])
            return Closing(
                entry["no_new_jobs_from"],
                entry["models_end"] if ends else None,
                f"{entry['source']}, {entry['as_of']}",
            )
    return None


def _at(kind: str, base_url: str | None, model: str) -> Price:
    if kind in _OWN_MACHINE or (base_url is not None and urlsplit(base_url).hostname in _LOOPBACK):
        return Price(0.0, 0.0, 0.0, "runs on this machine")
    provider = provider_of(kind, base_url)
    for entry in _table()["prices"]:
        if entry["backend"] == provider and _is(model, entry["model"]):
            source = f"{entry['source']}, as of {entry['as_of']}"
            return Price(entry["training"], entry["input"], entry["output"], source)
    return Price()


def _overridden(price: Price, config: RunConfig) -> Price:
    given = config.budget.price
    if given is None:
        return price
    known = {name: value for name, value in given.model_dump().items() if value is not None}
    return replace(price, **known, source="budget.price" if len(known) == 3 else f"budget.price; {price.source}")


def provider_of(kind: str, base_url: str | None) -> str:
    """The provider behind a kind of backend: OpenAI is reached through two kinds."""
    host = urlsplit(base_url).hostname if base_url else None
    return "openai" if host in ("api.openai.com", "eu.api.openai.com") else kind


def _is(model: str, name: str) -> bool:
    """Whether a model is the named one, a dated snapshot of it, or a fine-tune of one of those."""
    base = model.removeprefix("ft:").split(":")[0]
    return re.fullmatch(re.escape(name) + r"(-\d{4}-\d{2}-\d{2})?", base) is not None


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((files(__package__) / "prices.json").read_text(encoding="utf-8"))
    return table
