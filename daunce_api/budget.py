"""Tokens, money and time of a run, before anything is spent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
