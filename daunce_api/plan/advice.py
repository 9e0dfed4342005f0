"""`daunce plan --advise`: recipes for a budget, what they cost here, and what such recipes were measured to be worth.

Costs are those of the run's own plan: its data, tokenizer, provider and prices. Quality is looked up in measured.json,
a table from the package's own study (tests/benchmarks): the LDS on two fine-tunes, a language model's and a small
classifier's. Between the numbers of members that were measured, LDS is taken to be linear in their logarithm; beyond
them nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from .._util.text import dollars
from ..errors import ConfigurationError, DaunceError
from ..providers.registry import capabilities_of
from ..store import TARGET
from .inputs import RunInputs
from .plan import Plan
from .prices import table_of
from .tokens import EPOCHS

FAST = "learning rate of members: the target's times its epochs; self_lds underrates them by about .1"
SHAPES = (
    ("base", "base", 0.5, None, 1, ""),
    ("base", "base", 0.5, None, 3, ""),
    ("short", "base", 0.3, 1, 1, FAST),
    ("target", "target", 0.3, 1, 1, ""),
)
"""What was measured: its kind in measured.json, start_from, subset_ratio, epochs of members (None: the config's),
checkpoints, and what else its members need."""
BARGAIN = 0.9
"""Share of the best expected LDS that the cheaper recipe has to keep."""


@dataclass(frozen=True)
class Recipe:
    """Members, what they cost, and the LDS that was measured with such members.

    Attributes:
        name: why it is in the list.
        start, ratio, members, checkpoints: of the config's ``ensemble``. epochs: of each member; None: the config's.
        usd: dollars of the whole run.
        lds: what was measured, by task; empty for a recipe that is judged by retrieval.
        note: what else was measured.
    """

    name: str
    start: str
    ratio: float
    epochs: int | None
    members: int
    checkpoints: int
    usd: float
    lds: dict[str, float]
    note: str = ""

    @property
    def expected(self) -> float | None:
        """Mean over the tasks; the run's lies, as far as they tell, between theirs."""
        return float(np.mean(list(self.lds.values()))) if self.lds else None


@dataclass(frozen=True)
class Advice:
    """Recipes within a budget; the last is the paper's (arXiv 2505.23223) for the same money."""

    budget_usd: float
    noise: float | None
    recipes: tuple[Recipe, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        recipes = [asdict(r) | {"expected_lds": r.expected} for r in self.recipes]
        return {**asdict(self), "recipes": recipes, "source": table_of("measured.json")["source"]}

    def text(self) -> str:
        """For a reader."""
        noise = "no scoring noise" if self.noise is None else f"scoring noise of {self.noise:g} nats"
        lines = [f"Recipes within {dollars(self.budget_usd)}, {noise}:"]
        for r in self.recipes:
            lines += [
                f"  {r.name}: {dollars(r.usd)}",
                f"    start_from: {r.start}, subset_ratio: {r.ratio}, members: {r.members}, checkpoints: "
                f"{r.checkpoints}, {'epochs as configured' if r.epochs is None else 'epochs of members: 1'}",
            ]
            if r.expected is not None:
                each = ", ".join(f"{value:.2f} on {task}" for task, value in r.lds.items())
                lines.append(f"    expected LDS about {r.expected:.2f} (measured: {each})")
            lines += [f"    {r.note}"] if r.note else []
        return "\n".join(
            [*lines, *(f"Note: {note}." for note in self.notes), f"Measured: {table_of('measured.json')['source']}."]
        )


def advise(inputs: RunInputs, max_usd: float | None = None, noise: float | None = None) -> Advice:
    """Recipes for a run's data and provider within a budget; nothing is sent.

    Args:
        max_usd: the budget in dollars; None: ``budget.max_usd``.
        noise: standard deviation of the scoring noise of one loss, nats, as `daunce doctor` reports it; None: none.

    Raises:
        ConfigurationError: no budget, or one that no recipe fits; noise that cannot be; prices that are not known.
        DataError: examples that cannot be encoded.
        DaunceError: why no member at all can be trained or scored, as in :attr:`Plan.refusals`.
    """
    budget = inputs.config.budget.max_usd if max_usd is None else max_usd
    if budget is None or not (math.isfinite(budget) and budget >= 0):
        raise ConfigurationError("Advice needs a budget in dollars: set budget.max_usd, or pass --max-usd.")
    if noise is not None and not (math.isfinite(noise) and noise >= 0):
        raise ConfigurationError("Scoring noise is a standard deviation in nats: finite, 0 or more.")
    level, notes = _level(noise)
    found: list[Recipe] = []
    last: list[Recipe] = []
    refused: list[DaunceError] = []
    smallest = math.inf
    for kind, start, ratio, epochs, checkpoints, needs in SHAPES:
        plan = _plan(inputs, start, ratio, epochs, checkpoints)
        if refusals := (*plan.about_jobs, *plan.about_scoring):
            refused.append(refusals[0])
            notes.append(f"start_from: {start} with checkpoints: {checkpoints} is left out. {refusals[0]}".rstrip("."))
            continue
        fixed, each = _costs(plan)
        planted = table_of("measured.json")["planted"]
        if (kind, checkpoints) == (planted["kind"], 1) and fixed + planted["members"] * each <= budget:
            usd = fixed + planted["members"] * each
            precision = planted["average_precision"]
            note = f"finds a planted group by --question retrieval (average precision {precision}); {needs}"
            last.append(Recipe("Cheapest for one cause", start, ratio, epochs, planted["members"], 1, usd, {}, note))
        counts = _rows().query("kind == @kind and noise == @level")["members"]
        least, most = int(counts.min()), int(counts.max())
        smallest = min(smallest, fixed + least * each)
        members = most if each == 0 else min(most, int((budget - fixed) // each))
        numbers = range(least, members + 1)
        expected = _lds(kind, level, numbers, "auto" if checkpoints == 1 else "auto_3_models")
        for count, lds in zip(numbers, expected, strict=True):
            found.append(Recipe("", start, ratio, epochs, count, checkpoints, fixed + count * each, lds, needs))
        if kind == "target" and members >= least:
            paper = replace(found[-1], name="The paper's", lds=_lds(kind, level, [members], "covariance")[0])
            last.append(replace(paper, note="estimator: covariance"))
    if len(refused) == len(SHAPES):
        raise refused[0]
    if not found:
        raise ConfigurationError(
            f"{dollars(budget)} is too little: the smallest recipe that was measured costs {dollars(smallest)} here. "
            "Nothing was sent."
        )
    best = max(found, key=lambda r: (round(r.expected or 0.0, 2), -r.usd))
    bargain = min((r for r in found if (r.expected or 0.0) >= BARGAIN * (best.expected or 0.0)), key=lambda r: r.usd)
    first = [replace(best, name="Best"), replace(bargain, name="Cheaper")]
    return Advice(budget, noise, (*first, *last), tuple(notes))


def _plan(inputs: RunInputs, start: str, ratio: float, epochs: int | None, checkpoints: int) -> Plan:
    """Of two such members."""
    config = inputs.config
    shape = {"start_from": start, "subset_ratio": ratio, "checkpoints": checkpoints, "members": 2, "stop": None}
    target = config.ensemble.target_model if start == "target" else None
    training = config.training
    if epochs is not None:
        known = capabilities_of(config)[0].hyperparameters
        name = next((n for n in EPOCHS if n in training.hyperparameters or n in known), EPOCHS[0])
        training = training.model_copy(
            update={
                "hyperparameters": {**training.hyperparameters, name: epochs},
                "target_hyperparameters": training.of_target,
            }
        )
    varied = config.model_copy(
        update={
            "ensemble": config.ensemble.model_copy(update={**shape, "target_model": target}),
            "training": training,
        }
    )
    variant = RunInputs(varied, inputs.train, inputs.questions)
    variant.share_encoding(inputs)
    plan = variant.whole_plan()
    inputs.share_encoding(variant)
    return plan


def _costs(plan: Plan) -> tuple[float, float]:
    """Dollars that do not depend on the number of members, and of one member: trained, and its models scored."""
    costs, scoring = plan.costs, plan.scoring_usd_per_model
    if plan.hosting is not None and plan.hosting.usd is None:
        raise ConfigurationError(
            f"Nothing can be advised, since the cost of the endpoint that scores is not known: {plan.hosting.text}."
        )
    if costs is None or scoring is None:
        raise ConfigurationError("Prices of this provider are not known, so nothing can be advised: set budget.price.")
    hosting = 0.0 if plan.hosting is None else plan.hosting.usd or 0.0
    scoring -= hosting / plan.scored_models
    members = [costs.estimate(k) for k in plan.training_tokens if k != TARGET]
    fixed = hosting + (costs.estimate(TARGET) if TARGET in plan.training_tokens else 0.0)
    fixed += (plan.scored_models - len(members) * plan.checkpoints) * scoring
    fixed += plan.test_usd or 0.0
    return fixed, float(np.mean(members)) + plan.checkpoints * scoring + (plan.again_usd or 0.0)


def _level(noise: float | None) -> tuple[float, list[str]]:
    """The next larger noise that was measured, and what has to be said of that."""
    levels = sorted(set(_rows()["noise"]))
    if noise is None:
        return levels[0], ["no scoring noise is assumed; `daunce doctor` measures it, and --noise takes it"]
    above = [x for x in levels if x >= noise]
    if not above:
        return levels[-1], [f"noise above {levels[-1]} nats was not measured: expect less"]
    return above[0], [] if above[0] == noise else [f"taken from measurements with noise of {above[0]} nats"]


def _lds(kind: str, noise: float, members: Sequence[int], column: str) -> list[dict[str, float]]:
    """By task, for each of these numbers of members."""
    by_task = {}
    for task, rows in _rows().query("kind == @kind and noise == @noise").groupby("task"):
        by_task[str(task)] = np.interp(np.log(members), np.log(rows["members"]), rows[column])
    return [{task: round(float(lds[n]), 3) for task, lds in by_task.items()} for n in range(len(members))]


def _rows() -> pd.DataFrame:
    table = table_of("measured.json")
    return pd.DataFrame(table["lds"], columns=table["columns"])
