"""Does the removal help? Models without the proposed examples beside models without random ones and models of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .._util.blocking import run_blocking
from ..data.subsets import Ensemble, plan_ensemble
from ..errors import BudgetError, CapabilityError, ConfigurationError, NotEnoughMembersError, ProviderError
from ..evaluation.retraining import question_losses, retraining
from ..run import Run
from ..score.work import Options, Work
from .proposal import Proposal, finite

SEEDS = 3
ALL, CLEANED, RANDOM = "all", "cleaned", "random"
ARMS = (ALL, CLEANED, RANDOM)
"""What each arm's models are trained on: everything, the cleaned data, the data without as many random examples."""

_LEVEL = 0.95

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """A marked answer under the arms' models: mean losses in nats per token, and how much the removal changed it.

    ``change``: mean loss of the cleaned arm less that of all data, paired by seed, with a 95 % interval from ``low`` to
    ``high`` (Student's t over seeds); positive = the answer became less likely. All are NaN where a model gives only a
    lower bound of the loss, since its provider does not list the answer's token.
    ``said``: what the first model of an arm answers to the question by itself, where the endpoint generates.
    """

    id: str
    verdict: str
    loss: dict[str, float]
    change: float
    low: float
    high: float
    said: Mapping[str, str] = field(default_factory=dict)

    def probability(self, arm: str) -> float:
        """Geometric mean of the answer's token probabilities under an arm's models."""
        return float(np.exp(-self.loss[arm]))


@dataclass(frozen=True)
class Outcome:
    """What the retrained models say.

    ``seeds``: models of each arm that are scored. ``unwanted``, ``wanted``: the mean change over the answers of a
    verdict whose losses are known, as (mean, low, high), or None where there are none. ``verdict``: the result in a
    sentence.
    """

    seeds: int
    answers: tuple[Answer, ...]
    unwanted: tuple[float, float, float] | None
    wanted: tuple[float, float, float] | None
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """As plain data, null for NaN."""
        plain = asdict(self)
        for answer, row in zip(self.answers, plain["answers"], strict=True):
            row["probability"] = {arm: answer.probability(arm) for arm in answer.loss}
        return dict(finite(plain))


def retraining_of(run: Run, proposal: Proposal, *, seeds: int = SEEDS) -> Run:
    """The run that fine-tunes ``seeds`` models for each arm with the target's recipe and asks them the questions.

    It is part of ``run``: the cap covers both, and it is resumed, cancelled and cleaned like one. Nothing is sent
    before :func:`outcome`. Raises ConfigurationError for an empty removal list or fewer than two seeds.
    """
    removed = proposal.positions
    if not removed:
        raise ConfigurationError(f"There is nothing to retrain without: {proposal.reason}")
    if seeds < 2:
        raise ConfigurationError("retraining needs at least 2 seeds, or the change has no interval.")
    count = len(run.train)
    words = [run.config.ensemble.seed, *removed]
    rng = np.random.default_rng(np.random.SeedSequence(words))
    rest = np.setdiff1d(np.arange(count), removed)
    rows = []
    drawn = plan_ensemble(count, seeds, 0.5, int(rng.integers(2**31))).seeds_K
    for _ in range(seeds):
        row = np.ones((len(ARMS), count), dtype=np.bool_)
        row[ARMS.index(CLEANED), removed] = False
        # Another random draw for each seed: what one draw happens to hold must not decide.
        row[ARMS.index(RANDOM), rng.permutation(rest)[: len(removed)]] = False
        rows.append(row)
    design = Ensemble(np.concatenate(rows), drawn.repeat(len(ARMS)), int(rng.integers(2**31)))
    return retraining(run, f"fix-{design.digest[:8]}", design)


def outcome(
    retrained: Run, proposal: Proposal, *, known: Mapping[str, Any] | None = None, **options: Unpack[Options]
) -> Outcome:
    """Train and score what is missing, then compare the arms; the same call again resumes.

    ``known``: an earlier outcome of the same models (:meth:`Outcome.to_json`), whose generated answers are kept.
    ``options``: of :meth:`daunce_api.Run.execute`.

    Raises NotEnoughMembersError where fewer than two seeds have a model in every arm, and any other DaunceError.
    """
    retrained.measure(**options)
    losses = question_losses(retrained)
    row_of = {model: row for row, model in enumerate(losses.models)}
    groups = range(retrained.material.ensemble.members // len(ARMS))
    whole = [g for g in groups if all(g * len(ARMS) + a in row_of for a in range(len(ARMS)))]
    if len(whole) < 2:
        raise NotEnoughMembersError(
            f"only {len(whole)} of {len(groups)} seeds have a model in every arm. What was trained is kept; run the "
            "same command again."
        )
    rows = np.array([[row_of[g * len(ARMS) + a] for a in range(len(ARMS))] for g in whole])
    marked = [(i, "unwanted") for i in proposal.unwanted] + [(i, "wanted") for i in proposal.wanted]
    columns = [retrained.test.position(i) for i, _ in marked]
    loss_SAM = losses.loss_SM[rows][:, :, columns]
    change_SM = loss_SAM[:, ARMS.index(CLEANED)] - loss_SAM[:, ARMS.index(ALL)]
    said = {a["id"]: a.get("said") or {} for a in (known or {}).get("answers", ())}
    if not any(said.values()):
        models = [whole[0] * len(ARMS) + ARMS.index(arm) for arm in (ALL, CLEANED)]
        said = _generated(retrained, [identity for identity, _ in marked], models)
    answers = []
    for j, (identity, verdict) in enumerate(marked):
        means = {arm: float(loss_SAM[:, a, j].mean()) for a, arm in enumerate(ARMS)}
        answers.append(Answer(identity, verdict, means, *_interval(change_SM[:, j]), said.get(identity, {})))
    known_M = np.isfinite(loss_SAM).all(axis=(0, 1))
    spans = {}
    for verdict in ("unwanted", "wanted"):
        of_verdict = [j for j, (_, v) in enumerate(marked) if v == verdict and known_M[j]]
        spans[verdict] = _interval(change_SM[:, of_verdict].mean(axis=1)) if of_verdict else None
    sentence = _sentence(len(proposal.positions), answers, spans)
    return Outcome(len(whole), tuple(answers), spans["unwanted"], spans["wanted"], sentence)


def _generated(run: Run, questions: Sequence[str], models: Sequence[int]) -> dict[str, dict[str, str]]:
    """What a model of all data and one of the cleaned data answer by themselves; empty where nothing generates."""
    prompts: dict[str, Any] = {}
    for identity in questions:
        example = run.test[run.test.position(identity)]
        context = example.messages[: example.trained_turns("last")[-1]] if example.is_chat else ()
        if not any(m.images or m.calls or m.role in ("tool", "function") for m in context) and not example.tools:
            prompts[identity] = [m.to_record() for m in context] or example.prompt
    prompts = {identity: prompt for identity, prompt in prompts.items() if prompt}
    try:
        answers = run_blocking(Work(run).generate(list(prompts.values()), models)) if prompts else []
    except (BudgetError, CapabilityError, ProviderError):
        return {}
    return {i: dict(zip((ALL, CLEANED), a, strict=True)) for i, a in zip(prompts, answers, strict=True)}


def _interval(values_S: Floats) -> tuple[float, float, float]:
    mean = float(np.mean(values_S))
    width = float(stats.t.ppf((1 + _LEVEL) / 2, len(values_S) - 1) * np.std(values_S, ddof=1) / len(values_S) ** 0.5)
    return mean, mean - width, mean + width


def _sentence(removed: int, answers: list[Answer], spans: Mapping[str, tuple[float, float, float] | None]) -> str:
    parts = []
    for verdict, span in spans.items():
        of_verdict = [a for a in answers if a.verdict == verdict]
        known = [a for a in of_verdict if np.isfinite(a.change)]
        if unknown := len(of_verdict) - len(known):
            parts.append(
                f"the change of {unknown} of {len(of_verdict)} {verdict} answers is not known, since some models give "
                "only a lower bound of the loss"
            )
        if span is None:
            continue
        mean, low, high = span
        became = "less likely" if low > 0 else "more likely" if high < 0 else "not significantly more or less likely"
        p = {arm: float(np.mean([a.probability(arm) for a in known])) for arm in ARMS}
        parts.append(
            f"{verdict} answers became {became}: {p[ALL]:.3f} before, {p[CLEANED]:.3f} after, {p[RANDOM]:.3f} without "
            f"as many random examples (probability a token; loss {mean:+.2f} nats [{low:+.2f}, {high:+.2f}])"
        )
    examples = "example" if removed == 1 else "examples"
    return f"Without {removed} {examples}, " + "; ".join(parts) + "."
