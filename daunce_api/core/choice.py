"""Which estimator: `auto`, how lambda is chosen, and the words for why.

Without rho (members share the target's recipe) the candidate with the highest held-out correlation is taken.

With rho (members are short runs from the target) held-out members answer to re-weighting with their own response c,
the target with 1 / (f + d) (METHOD item 6). Where f / d = f R / rho is small the two agree, up to a factor, and the
same choice is right: so on the language model's LoRA fine-tune (f R / rho up to 4). Where it is large (23 to 130 on the
other fine-tunes, SGD and Adam alike) held-out members want less whitening than the target does, and following them
cost up to .2 LDS. There the strongest whitening is taken whose held-out correlation is within 8 % of the best: as
much as the noise in the small directions, which held-out members do see, allows; less so where scoring noise has a
share in the losses (the fourth power of the signal's share was the best of 0, 1, 2 and 4).

Then scores are drawn towards zero (`shrinkage`) by the amount that held-out members are predicted best with, and where
the members answer like the target the filter is chosen once more with it. Held-out members of short runs want less of
that, too, than retrained models do: there the largest amount within 5 % of the best is taken. With too few members to
ask, c = 4, which cost at most .002 LDS with 10 members and gained up to .13.

Losses at earlier checkpoints (`checkpoints`) are used unless held-out members are predicted better, by 1 %, without
them, and always while there are too few members to ask. Of the scales of test losses (`stabilised`) the one nearest to
the margin is taken that is within 1 % of the best. What all this gained and cost is in RESULTS-estimators.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import ConfigurationError
from .estimators import QUESTIONS, Estimator, Question, estimator_named
from .heldout import Candidate, HeldOut
from .incomplete import few_patterns
from .members import MemberLosses
from .quality import FOLDS, column_spearman
from .spectrum import Setting, spectrum_of

RIDGES = tuple(float(x) for x in np.round(10.0 ** np.arange(-1, 1.01, 0.25), 3))
SHORTFALL = 0.08
MEMBERS_TO_CHOOSE = 20  # held-out correlations of fewer are too noisy to choose by; fixed values did as well or better
JUDGED_TESTS = 1_000
JUDGED_PAIRS, JUDGED_LEAST = 600_000, 40  # of weighted scores: so many pairs, or those of so many test examples
AMOUNTS = (None, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
AMOUNT_UNTOLD = 4.0  # while there is too little to judge by
SHORT_OF_BEST = 0.05
TOO_CLOSE = 0.01


@dataclass(frozen=True)
class Choice:
    """An estimator together with its parameters and the reason for it.

    Attributes:
        estimator: the registry entry.
        setting: noise, rho, lambda and log offset as used.
        why: one sentence for users.
        question: which question it answers.
    """

    estimator: Estimator
    setting: Setting
    why: str
    question: Question

    @property
    def question_text(self) -> str:
        """What a ranking by this estimator answers, in words."""
        return QUESTIONS[self.question]


def choose(
    members: MemberLosses,
    estimator: str = "auto",
    setting: Setting | None = None,
    question: Question = "attribution",
) -> Choice:
    """Settle on an estimator and its parameters.

    Args:
        members: checked losses.
        estimator: a registry name, or "auto".
        setting: noise and rho, as far as they are known.
        question: with "auto", what the scores are for. A named estimator answers its own question.

    Returns:
        Choice. A named estimator is taken as it is, except that `whitened` gets its lambda from held-out members when
        the inclusion matrix is known and there are at least 20 members (lambda = 1 otherwise).
        "auto" takes `correlation` for retrieval; for attribution see the module's text.

    Raises:
        ConfigurationError: unknown estimator or question, an argument that the estimator needs is missing, or retrieval
            is asked of a named estimator that is not for it.
    """
    setting = setting or Setting()
    if question not in QUESTIONS:
        raise ConfigurationError(f"Unknown question {question!r}; there are: {', '.join(QUESTIONS)}.")
    part, rows, _ = members.observed()
    if part is not members:
        found = choose(part, estimator, setting.of_examples(rows, members.train_KN.shape[1]), question)
        return replace(found, setting=replace(found.setting, noise=setting.noise))
    if estimator == "auto":
        if question == "retrieval":
            why = (
                "correlation finds related examples with the fewest members: an example whose loss varies much does "
                "not crowd out the others"
            )
            return Choice(estimator_named("correlation"), setting, why, question)
        return _auto(members, setting)
    entry = estimator_named(estimator)
    if question == "retrieval" and entry.question != question:
        raise ConfigurationError(
            f"{entry.name} was asked for by name, and it answers {QUESTIONS[entry.question]}; which examples belong "
            "together is answered by correlation. Leave the estimator to 'auto', or name 'correlation'."
        )
    why = f"{entry.name} was asked for"
    if entry.name == "whitened" and setting.ridge is None and _can_judge(members):
        candidates = [(entry, replace(setting, ridge=ridge)) for ridge in RIDGES]
        held = _judged(members)
        best = candidates[_take(_values(held, candidates), shortfall(held, setting))]
        why += f", lambda = {best[1].ridge:.2g} chosen by held-out members"
        return Choice(*best, why, entry.question)
    return Choice(entry, setting, why, entry.question)


def _can_judge(members: MemberLosses) -> bool:
    return members.inclusion_KN is not None and members.count >= MEMBERS_TO_CHOOSE


def _auto(members: MemberLosses, setting: Setting) -> Choice:
    whitened, covariance = estimator_named("whitened"), estimator_named("covariance")
    if not few_patterns(members):
        why = "covariance: losses are missing all over, and filters need them in few patterns"
        return Choice(covariance, setting, why, "attribution")
    noise = 0.0 if setting.noise is None else float(np.sqrt(np.mean(np.square(setting.noise))))
    if not _can_judge(members):
        if noise and members.complete and not spectrum_of(members, setting).signal.any():
            return Choice(covariance, setting, "the scoring noise is larger than what filters could use", "attribution")
        ridge = 1.0 if setting.rho is None else 0.3 if noise or members.earlier is None else 0.1
        why = f"whitened with lambda = {ridge}: the fixed choice while there is too little to judge by (" + (
            "no inclusion matrix)" if members.inclusion_KN is None else f"{members.count} members)"
        )
        offset = _offsets(members, [noise])[0]
        known = replace(setting, ridge=ridge, log_offset=offset, shrinkage=AMOUNT_UNTOLD)
        return Choice(whitened, known, why + _besides(members, known), "attribution")
    noises = [noise] if setting.noise is not None else [0.0, 0.01, 0.1]
    used = [replace(setting, checkpoints=use) for use in ([True] if members.earlier is None else [True, False])]
    scales = [
        replace(known, log_offset=offset)
        for known in used
        for offset in _offsets(members if known.checkpoints else members.final(), noises)
    ]
    groups: list[list[Candidate]] = [[(whitened, replace(scale, ridge=ridge)) for ridge in RIDGES] for scale in scales]
    others: list[Candidate] = [(covariance, known) for known in used]
    held = _judged(members)
    allowed = shortfall(held, setting)
    if not allowed:
        others += [(estimator_named("half_whitened"), scale) for scale in scales]
    values = _values(held, [c for group in groups for c in group] + others)
    split = [values[i * len(RIDGES) : (i + 1) * len(RIDGES)] for i in range(len(groups))]
    tops = np.array([part.max() for part in split])
    # In this order: with checkpoints first, and the scale that is nearest to the margin.
    best = int(np.flatnonzero(tops >= min((1 - TOO_CLOSE) * tops.max(), tops.max()))[0])
    chosen, value = groups[best][_take(split[best], allowed)], float(split[best].max())
    rest = values[len(groups) * len(RIDGES) :]
    if rest.max() > value:
        chosen, value = others[int(rest.argmax())], float(rest.max())
    chosen = _shrunk(held, chosen, refine=not allowed)
    plain = float(rest[: len(used)].max())
    what = chosen[0].name + (f" (lambda = {chosen[1].ridge:.2g})" if chosen[0].name == "whitened" else "")
    if chosen[0].name == "covariance":
        why = f"covariance predicts held-out members best ({plain:.3f})"
    elif not allowed:
        why = f"{what} predicts held-out members best ({value:.3f}; covariance {plain:.3f})"
    else:
        why = (
            f"{what}: the strongest whitening that held-out members bear (best {value:.3f}; covariance {plain:.3f}), "
            "since members are short runs from the target"
        )
    return Choice(*chosen, why + _besides(members, chosen[1]), "attribution")


def _shrunk(held: HeldOut, chosen: Candidate, refine: bool) -> Candidate:
    """The same with the shrinkage that held-out members bear; with ``refine`` also with the filter that goes with it.

    Members from the target get the strongest within 5 % of the best, since they tell too little of it.
    """
    held = held.some_tests(JUDGED_PAIRS, JUDGED_LEAST)

    def at(estimator: Estimator, setting: Setting) -> Candidate:
        amounts = [replace(setting, shrinkage=amount) for amount in AMOUNTS]
        values = _values(held, [(estimator, known) for known in amounts])
        best = int(values.argmax())
        if setting.rho is not None and values[best] > 0:
            best = int(np.flatnonzero(values >= (1 - SHORT_OF_BEST) * values[best])[-1])
        return estimator, amounts[best]

    estimator, setting = at(*chosen)
    if not refine or setting.shrinkage is None:
        return estimator, setting
    filters = [(estimator_named("whitened"), replace(setting, ridge=ridge)) for ridge in RIDGES]
    filters.append((estimator_named("half_whitened"), replace(setting, ridge=None)))
    return at(*filters[int(_values(held, filters).argmax())])


def _besides(members: MemberLosses, setting: Setting) -> str:
    why = ""
    if setting.shrinkage is not None:
        why = f"; scores are drawn towards zero as far as chance would make them (c = {setting.shrinkage:g})"
    if members.earlier is None:
        return why
    if setting.checkpoints:
        return f"{why}; with the losses at {len(members.earlier)} earlier checkpoints as further rows"
    return f"{why}; without the losses at earlier checkpoints, which predict held-out members worse"


def _offsets(members: MemberLosses, noises: Sequence[float]) -> list[float | None]:
    """c of the log scale for each possible scoring noise: ten times as much keeps the logarithm from blowing it up.

    Only those that have a logarithm: margins, which are of either sign, are linear in the parameters as they are.
    """
    lowest = min(float(np.nanmin(loss_KM)) for loss_KM in members.test_stages if np.isfinite(loss_KM).any())
    return [c for c in (0.01 + 10 * noise for noise in noises) if lowest > -c] or [None]


def _judged(members: MemberLosses) -> HeldOut:
    """Held-out members, on at most 1,000 test examples."""
    step = -(-members.test_KM.shape[1] // JUDGED_TESTS)
    return HeldOut(members.columns(test=slice(None, None, step)))


def _values(held: HeldOut, candidates: Sequence[Candidate]) -> np.ndarray:
    """Held-out correlation of each candidate."""
    return np.array([np.nanmean(column_spearman(p, held.target_KM)) for p in held.folded(candidates, FOLDS)])


def shortfall(held: HeldOut, setting: Setting) -> float:
    """Share of the best held-out correlation that stronger whitening may cost; 0 where members answer as the target.

    ``SHORTFALL * (signal's share of the losses' variance)^4`` if rho is known and the leading f R exceeds 10 rho.
    """
    spectrum = held.spectrum(setting)
    if spectrum.answers_like_target(setting.rho):
        return 0.0
    return float(SHORTFALL * (spectrum.signal.sum() / spectrum.w.sum()) ** 4)


def _take(values: np.ndarray, allowed: float) -> int:
    """Index among rising lambdas."""
    if not allowed or values.max() <= 0:
        return int(values.argmax())
    return int(np.flatnonzero(values >= (1 - allowed) * values.max())[0])
