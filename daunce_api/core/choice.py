"""Which estimator: the one place that chooses, and the words for why.

Members that share the target's recipe (rho "base"): the candidate with the highest cross-validated correlation.

Short members from the target (rho a number, or "unknown", which is taken as .05): held-out members answer to
re-weighting with their own response c, the target with 1 / (f + d) (METHOD item 6). Where f / d = f R / rho is small
the two agree, up to a factor, and the same choice is right: so on the language model's LoRA fine-tune (f R / rho up to
4). Where it is large (23 to 130 on the other fine-tunes, SGD and Adam alike) held-out members want a larger ridge than
the target does, and following them cost up to .2 LDS. There the smallest ridge is taken whose cross-validated
correlation is within 8 % of the best: as much as the noise in the small directions, which held-out members do see,
allows; less so where scoring noise has a share in the losses (the fourth power of the signal's share was the best of 0,
1, 2 and 4).

Then scores are shrunk (`pairs.Shrinkage`) by the amount with the highest cross-validated correlation, and where the
members answer like the target the filter is chosen once more with it. Held-out members of short runs want less of
that, too, than retrained models do: there the largest amount within 5 % of the best is taken. With too few members to
cross-validate, c = 4, which cost at most .002 LDS with 10 members and gained up to .13.

A prior is added with the weight 30 / K times its own correlation with the members' test losses, less one standard
error of that (`prior_weight`): no member has taken part in it, so all of them are held out. The more members, the less
it is needed; where it knows nothing it gets nothing. And scores of pairs that it relates are shrunk towards zero less
(`pairs.Shrinkage`), with g = 1.5 times the same correlation less its error, whatever the number of members. 30 and 1.5
come from the chat task of tests/benchmarks.

Losses at earlier checkpoints are used unless held-out members are predicted better, by 1 %, without them, and always
while there are too few members to cross-validate. Of the scales of test losses (`stabilized`) the one nearest to the
margin is taken that is within 1 % of the best. What all this gained and cost is in RESULTS-estimators.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import ConfigurationError
from .crossval import Candidate, CrossValidator, weighted_correlation
from .estimators import ESTIMATORS, QUESTIONS, Estimator, Question, Setting, Spectrum, estimator_named, spectrum_of
from .rows import MemberLosses, centered

RIDGES = tuple(float(x) for x in np.round(10.0 ** np.arange(-1, 1.01, 0.25), 3))
SHORTFALL = 0.08
SAME_ANSWER = 10.0  # f R / rho of the leading direction up to which members answer like the target
ASSUMED_RHO = 0.05  # of short members whose recipes do not say
MEMBERS_TO_CHOOSE = 20  # correlations of fewer are too noisy to choose by; fixed values did as well or better
JUDGED_TESTS = 1_000
JUDGED_PAIRS, JUDGED_LEAST = 600_000, 16  # of weighted scores: so many pairs, or those of so many test examples
AMOUNTS = (None, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
FIXED_AMOUNT = 4.0  # with too few members to cross-validate
SHORT_OF_BEST = 0.05
PRIOR = 30.0
TILT = 1.5
MOST_PRIOR = 1.0
TOO_CLOSE = 0.01


@dataclass(frozen=True)
class Choice:
    """An estimator together with its parameters and the reason for it.

    Attributes:
        estimator: the registry entry.
        setting: its parameters.
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
    losses: MemberLosses,
    estimator: str = "auto",
    question: Question = "attribution",
    cv: CrossValidator | None = None,
) -> Choice:
    """Settle on an estimator and its parameters.

    Args:
        losses: see `member_losses`.
        estimator: a registry name, or "auto".
        question: with "auto", what the scores are for. A named estimator answers its own question.
        cv: the cross-validator of these members, where there is one already.

    Returns:
        Choice. A named estimator is taken as it is, except that `whitened` gets its lambda by cross-validation when
        the inclusion matrix is known and there are at least 20 members (lambda = 1 otherwise).
        "auto" takes `correlation` for retrieval; for attribution see the module's text.

    Raises:
        ConfigurationError: unknown estimator or question, an argument that the estimator needs is missing, or retrieval
            with a named estimator that is not for it.
    """
    if question not in QUESTIONS:
        raise ConfigurationError(f"Unknown question {question!r}; there are: {', '.join(QUESTIONS)}.")
    if estimator == "auto":
        if question == "retrieval":
            why = (
                "correlation finds related examples with the fewest members: an example whose loss varies much does "
                "not crowd out the others"
            )
            return Choice(ESTIMATORS["correlation"], Setting(), why, question)
        return _with_prior(losses, _auto(losses, _validator(losses, cv)) if _can_judge(losses) else _fixed(losses))
    entry, setting = estimator_named(estimator), Setting()
    if question == "retrieval" and entry.question != question:
        raise ConfigurationError(
            f"The configured estimator is {entry.name}, and it answers {QUESTIONS[entry.question]}; which examples "
            "belong together is answered by correlation. Leave the estimator to 'auto', or name 'correlation'."
        )
    why = f"{entry.name} is the configured estimator"
    if entry.name == "whitened" and _can_judge(losses):
        cv = _validator(losses, cv)
        values = cv.correlations([(entry.name, Setting(ridge=ridge)) for ridge in RIDGES])
        setting = Setting(ridge=RIDGES[_take(values, shortfall(cv))])
        why += f", lambda = {setting.ridge:.2g} by cross-validation over members"
    return Choice(entry, setting, why, entry.question)


def answers_like_target(losses: MemberLosses, spectrum: Spectrum) -> bool:
    """Whether members and target answer to re-weighting alike: not short, or at most 10 rho for f R of the leading
    direction, the unitless response of the training recipe: sqrt(s / (K dispersion)), METHOD item 6."""
    if losses.rho == "base":
        return True
    rho = ASSUMED_RHO if isinstance(losses.rho, str) else losses.rho
    leading = np.sqrt(spectrum.signal[0] / (spectrum.stages.rows * losses.dispersion))
    return bool(leading <= SAME_ANSWER * rho)


def shortfall(cv: CrossValidator) -> float:
    """Share of the best cross-validated correlation that a smaller ridge may cost; 0 where members answer like the
    target, else ``SHORTFALL * (signal's share of the losses' variance)^4``."""
    spectrum = cv.spectrum()
    if answers_like_target(cv.losses, spectrum):
        return 0.0
    return float(SHORTFALL * (spectrum.signal.sum() / spectrum.w.sum()) ** 4)


def _can_judge(losses: MemberLosses) -> bool:
    return losses.inclusion_KN is not None and losses.count >= MEMBERS_TO_CHOOSE


def _validator(losses: MemberLosses, cv: CrossValidator | None) -> CrossValidator:
    """On at most 1,000 test examples."""
    return (cv or CrossValidator(losses)).some_tests(0, JUDGED_TESTS)


def _auto(losses: MemberLosses, cv: CrossValidator) -> Choice:
    many = len(losses.train) > 1
    used = [Setting(checkpoints=use) for use in ((True, False) if many else (True,))]
    noises = [0.0, 0.01, 0.1] if losses.noise is None else [losses.noise]
    scales = [
        replace(known, log_offset=offset)
        for known in used
        for offset in _offsets(losses if known.checkpoints else losses.final(), noises)
    ]
    groups: list[list[Candidate]] = [
        [("whitened", replace(scale, ridge=ridge)) for ridge in RIDGES] for scale in scales
    ]
    others: list[Candidate] = [("covariance", known) for known in used]
    allowed = shortfall(cv)
    if not allowed:
        others += [("half_whitened", scale) for scale in scales]
    values = cv.correlations([c for group in groups for c in group] + others)
    split = values[: len(groups) * len(RIDGES)].reshape(len(groups), len(RIDGES))
    tops, rest = split.max(axis=1), values[split.size :]
    # In this order: with checkpoints first, and the scale that is nearest to the margin.
    best = int(np.flatnonzero(tops >= min((1 - TOO_CLOSE) * tops.max(), tops.max()))[0])
    chosen, value = groups[best][_take(split[best], allowed)], float(tops[best])
    if rest.max() > value:
        chosen, value = others[int(rest.argmax())], float(rest.max())
    name, setting = _shrunk(cv, chosen, refine=not allowed)
    plain = float(rest[: len(used)].max())
    what = name + (f" (lambda = {setting.ridge:.2g})" if name == "whitened" else "")
    if name == "covariance":
        why = f"covariance predicts held-out members best ({plain:.3f})"
    elif not allowed:
        why = f"{what} predicts held-out members best ({value:.3f}; covariance {plain:.3f})"
    else:
        why = (
            f"{what}: the smallest ridge within reach of the best cross-validated correlation (best {value:.3f}; "
            f"covariance {plain:.3f}), since members are short runs from the target"
        )
    return Choice(ESTIMATORS[name], setting, why + _besides(losses, setting), "attribution")


def prior_weight(losses: MemberLosses) -> tuple[float, float, float]:
    """The weight of the prior, its mean correlation with the members' test losses, and the jackknife's error of that.

    The prior predicts a member's test losses as scores do, ``-(m_k - mean m) @ prior``.
    """
    if losses.prior_NM is None or losses.inclusion_KN is None or losses.count < 4:
        return 0.0, 0.0, 0.0
    step = -(-losses.kept_M.size // JUDGED_TESTS)
    prior_NM, target_KM = losses.prior_NM[:, ::step], losses.test_KM[:, ::step]
    predicted = -centered(losses.inclusion_KN.astype(np.float64)) @ prior_NM
    weights = np.vstack([np.ones(losses.count), 1 - np.eye(losses.count)])
    from scipy.stats import rankdata  # slow to import

    ranks = rankdata(predicted, axis=0), rankdata(target_KM, axis=0)
    found, *without = weighted_correlation(*ranks, weights).mean(axis=1)
    error = float(np.sqrt((losses.count - 1) * np.var(without)))
    return float(np.clip(PRIOR / losses.count * (found - error), 0, MOST_PRIOR)), float(found), error


def _with_prior(losses: MemberLosses, choice: Choice) -> Choice:
    if losses.prior_NM is None:
        return choice
    weight, found, error = prior_weight(losses)
    tilt = TILT * (found - error)
    known = f"{found:.2f} +- {error:.2f}, its own correlation with the members' losses"
    if not weight:
        return replace(choice, why=f"{choice.why}; without the prior ({known})")
    why = f"{choice.why}; plus {weight:.2f} standard deviations of prior ({known})"
    return replace(choice, setting=replace(choice.setting, prior=weight, tilt=tilt), why=why)


def _fixed(losses: MemberLosses) -> Choice:
    """Too little to cross-validate."""
    noise, many = losses.noise or 0.0, len(losses.train) > 1
    if noise and not spectrum_of(losses).signal.any():
        why = "the scoring noise is larger than what filters could use"
        return Choice(ESTIMATORS["covariance"], Setting(), why, "attribution")
    ridge = 1.0 if losses.rho == "base" else 0.3 if noise or not many else 0.1
    why = f"whitened with lambda = {ridge}: the fixed choice without cross-validation (" + (
        "no inclusion matrix)" if losses.inclusion_KN is None else f"{losses.count} members)"
    )
    setting = Setting(ridge=ridge, log_offset=_offsets(losses, [noise])[0], shrinkage=FIXED_AMOUNT)
    return Choice(ESTIMATORS["whitened"], setting, why + _besides(losses, setting), "attribution")


def _shrunk(cv: CrossValidator, chosen: Candidate, refine: bool) -> Candidate:
    """The same with the shrinkage that is best by cross-validation; with ``refine`` also with the filter that goes with
    it.

    Members from the target get the strongest within 5 % of the best, since they tell too little of it.
    """
    cv = cv.some_tests(JUDGED_PAIRS, JUDGED_LEAST)

    def at(name: str, setting: Setting) -> Candidate:
        amounts = [replace(setting, shrinkage=amount) for amount in AMOUNTS]
        values = cv.correlations([(name, known) for known in amounts])
        best = int(values.argmax())
        if cv.losses.rho != "base" and values[best] > 0:
            best = int(np.flatnonzero(values >= (1 - SHORT_OF_BEST) * values[best])[-1])
        return name, amounts[best]

    name, setting = at(*chosen)
    if not refine or setting.shrinkage is None:
        return name, setting
    filters: list[Candidate] = [("whitened", replace(setting, ridge=ridge)) for ridge in RIDGES]
    filters.append(("half_whitened", replace(setting, ridge=None)))
    return at(*filters[int(cv.correlations(filters).argmax())])


def _besides(losses: MemberLosses, setting: Setting) -> str:
    why = ""
    if setting.shrinkage is not None:
        why = f"; scores are shrunk towards zero where chance explains them (c = {setting.shrinkage:g})"
    earlier = len(losses.train) - 1
    if not earlier:
        return why
    if setting.checkpoints:
        return f"{why}; with the losses at {earlier} earlier checkpoint{'s' * (earlier > 1)} as further rows"
    return f"{why}; without the losses at earlier checkpoints, which predict held-out members worse"


def _offsets(losses: MemberLosses, noises: Sequence[float]) -> list[float | None]:
    """c of the log scale for each possible scoring noise: ten times as much keeps the logarithm from blowing it up.

    Only those that have a logarithm: margins, which are of either sign, are linear in the parameters as they are.
    """
    present = losses.stages.present_TK
    lowest = min(float(x[here].min()) for x, here in zip(losses.test, present, strict=True) if here.any())
    return [c for c in (0.01 + 10 * noise for noise in noises) if lowest > -c] or [None]


def _take(values: np.ndarray, allowed: float) -> int:
    """Index among rising lambdas."""
    if not allowed or values.max() <= 0:
        return int(values.argmax())
    return int(np.flatnonzero(values >= (1 - allowed) * values.max())[0])
