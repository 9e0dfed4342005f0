"""What ``daunce doctor`` may cost: its price before it sends anything, and a ledger beside the config with a cap."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from .._util.files import writing
from ..config import RunConfig
from ..data.tokenizers import EncodedExample
from ..errors import BudgetError, StoreError
from ..plan.prices import MILLION, prices_of
from ..providers.registry import capabilities_of

PROBE_REQUESTS, PROBE_OUTPUT = 12, 128
"""Most requests of an endpoint's own test of two models, and tokens that they generate."""


def price_of_look(config: RunConfig, examples: Sequence[EncodedExample], repeats: int) -> float | None:
    """Dollars that ``repeats`` requests for the first example cost at most, with one for all together and the
    endpoint's own test; None where the price of tokens is not known."""
    if not examples:
        return 0.0
    _, price = prices_of(config)
    scorer = capabilities_of(config)[1]
    first, together = len(examples[0].ids), sum(len(e.ids) for e in examples)
    sent = (repeats + PROBE_REQUESTS) * first + together
    answered = PROBE_OUTPUT + (repeats + len(examples) if scorer.scope != "any" else 0)
    if price.input is None or price.output is None:
        return None
    # Single requests are sent at full price, whatever a run's batches cost.
    return (sent * price.input + answered * price.output) / MILLION


class Allowance:
    """``CONFIG.doctor.jsonl``: a line a look, with the time and the dollars that it may have cost."""

    def __init__(self, config: Path) -> None:
        self.path = config.with_name(config.name + ".doctor.jsonl")

    def spent(self) -> float:
        """Dollars of all looks so far. Raises StoreError where the ledger is damaged."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return 0.0
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"{self.path} cannot be read. Nothing was sent. Repair or delete it.") from error
        try:
            return sum(float(json.loads(line)["usd"]) for line in lines)
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.path} is damaged. Nothing was sent. Repair or delete it.") from error

    def check(self, usd: float, max_usd: float) -> None:
        """Raises BudgetError where a look of this price would exceed the cap together with the earlier ones."""
        spent = self.spent()
        if spent + usd > max_usd:
            raise BudgetError(
                f"a look at the endpoint costs up to ${usd:,.4f}, and ${spent:,.4f} of the ${max_usd:,.2f} that "
                f"`daunce doctor` may spend on this config are used ({self.path}). Nothing was sent. Raise --max-usd."
            )

    def book(self, usd: float) -> None:
        """Write a look down before anything is sent. Raises StoreError where that cannot be done."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), "usd": usd})
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
