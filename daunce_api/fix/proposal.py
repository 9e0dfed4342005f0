"""What to take out of the training set: examples by their effect on unwanted against wanted answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .. import core
from ..attribution import Attribution
from ..errors import ConfigurationError
from .near_duplicates import near_duplicates

if TYPE_CHECKING:
    import pandas as pd

    from ..run import Run

Floats = NDArray[np.float64]

FALSE_DISCOVERIES, LARGEST_SHARE = 0.1, 0.1
"""Of the default list: expected share of false entries, and the most of the examples that it takes out."""

_FOLDS = 5
_LEVEL = 0.95


@dataclass(frozen=True)
class Group:
    """Training examples that say nearly the same, removed together or not at all.

    ``positions`` in the training set. ``effect``: their summed effect on unwanted against wanted answers (positive:
    they make unwanted answers more likely), in the estimator's unit; ``stderr`` its standard error over members; ``q``
    the smallest false-discovery rate at which the group is on the list.
    """

    positions: tuple[int, ...]
    effect: float
    stderr: float
    q: float

    @property
    def z(self) -> float:
        """How many standard errors the effect is from zero."""
        return self.effect / self.stderr if self.stderr > 0 else float("nan")


@dataclass(frozen=True)
class Change:
    """What a removal is expected to do to one marked answer: its loss (nats per token) rises by ``expected``, with a
    95 % interval from ``low`` to ``high``. NaN where there are too few members to calibrate it."""

    id: str
    verdict: str
    expected: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        """As plain data, null for NaN."""
        return dict(finite(asdict(self)))


@dataclass(frozen=True)
class Proposal:
    """A removal list.

    ``removed``: the groups on it, strongest effect first; ``ranked``: all groups. ``changes``: the expected change of
    each marked answer's loss. ``reason``: how the list was chosen, or why it is empty and what to do.
    """

    attribution: Attribution
    unwanted: tuple[str, ...]
    wanted: tuple[str, ...]
    ranked: tuple[Group, ...]
    removed: tuple[Group, ...]
    changes: tuple[Change, ...]
    reason: str

    @property
    def positions(self) -> list[int]:
        """Of the examples to remove, in the training set's order."""
        return sorted(i for group in self.removed for i in group.positions)

    @property
    def ids(self) -> list[str]:
        """Of the examples to remove, in the training set's order."""
        return [self.attribution.train[i].id for i in self.positions]

    @property
    def z_N(self) -> Floats:
        """(N,) how many standard errors the effect of each training example's group is from zero; NaN: not known."""
        z_N = np.full(len(self.attribution.train), np.nan)
        for group in self.ranked:
            z_N[list(group.positions)] = group.z
        return z_N

    def table(self, k: int | None = None) -> pd.DataFrame:
        """The strongest ``k`` groups (default: those on the list), one row each.

        Columns: ``rank``, ``id`` (of the first example), ``examples`` (how many), ``source``, ``effect``, ``stderr``,
        ``z``, ``q``, ``removed``, ``prompt``, ``completion``.
        """
        import pandas as pd

        groups = self.removed if k is None else self.ranked[:k]
        on_list = {group.positions for group in self.removed}
        examples = [self.attribution.train[group.positions[0]] for group in groups]
        return pd.DataFrame(
            {
                "rank": range(1, len(groups) + 1),
                "id": [example.id for example in examples],
                "examples": [len(group.positions) for group in groups],
                "source": [example.source for example in examples],
                **{name: [getattr(group, name) for group in groups] for name in ("effect", "stderr", "z", "q")},
                "removed": [group.positions in on_list for group in groups],
                "prompt": [example.prompt_text() for example in examples],
                "completion": [example.completion_text() for example in examples],
            }
        )


def contrast(attribution: Attribution, unwanted: Sequence[str], wanted: Sequence[str] = ()) -> core.MemberLosses:
    """The losses with one question in place of all: the mean loss of unwanted answers, less that of wanted ones.

    A training example with a positive score for it makes unwanted answers more likely than wanted ones. Raises
    DataError for an unknown id, ConfigurationError where nothing is unwanted or an answer is both.
    """
    if not unwanted:
        raise ConfigurationError(
            "no answer is marked as unwanted. Mark those that the model should not give: --unwanted ID, or "
            '"verdict": "unwanted" in the file of questions.'
        )
    if both := sorted(set(unwanted) & set(wanted)):
        raise ConfigurationError(f"marked as wanted and as unwanted: {', '.join(both[:5])}.")
    weight_M = np.zeros(len(attribution.test))
    weight_M[[attribution.test.position(i) for i in unwanted]] = 1 / len(unwanted)
    if wanted:
        weight_M[[attribution.test.position(i) for i in wanted]] = -1 / len(wanted)
    marked = np.flatnonzero(weight_M)

    def one(test_KM: Floats) -> Floats:
        return np.asarray(test_KM[:, marked] @ weight_M[marked])[:, None]

    earlier = attribution.earlier
    if earlier is not None:
        earlier = replace(earlier, test_loss_SKM=np.stack([one(stage) for stage in earlier.test_loss_SKM]))
    return core.member_losses(
        attribution.train_loss_KN,
        one(attribution.test_loss_KM),
        attribution.design_KN,
        noise=attribution.noise,
        rho=attribution.rho,
        earlier=earlier,
    )


def candidates(attribution: Attribution, unwanted: Sequence[str], wanted: Sequence[str] = ()) -> tuple[Group, ...]:
    """All groups of near-duplicate training examples, those first that push unwanted answers against wanted ones most.

    The order is by the effect's size in standard errors. The false-discovery rate is Benjamini and Hochberg's (1995)
    over one-sided p-values of Student's t with K - 1 degrees of freedom: an example is only taken out for making
    unwanted answers more likely. Raises what :func:`contrast` raises, and NotEnoughMembersError.

        >>> groups = candidates(attribution, unwanted=["q-refund", "q-fee"], wanted=["q-hours"])
        >>> groups[0].positions, groups[0].q
        ((17, 42), 0.003)
    """
    losses = contrast(attribution, unwanted, wanted)
    choice = _linear(attribution)
    labels = _groups(attribution)
    scored = core.group_scores(losses, choice, labels, None)
    effect, error = scored.score_GH[:, 0], scored.stderr_GH[:, 0]
    members: dict[Any, list[int]] = {}
    for position, label in enumerate(labels):
        members.setdefault(label, []).append(position)
    known = np.flatnonzero(np.isfinite(effect) & (error > 0))
    z = effect[known] / error[known]
    p = stats.t.sf(z, len(attribution.members) - 1)
    q = np.full(len(effect), 1.0)
    if known.size:
        q[known] = stats.false_discovery_control(p)
    groups = [
        Group(tuple(members[label]), float(effect[g]), float(error[g]), float(q[g]))
        for g, label in enumerate(scored.train_groups)
        if np.isfinite(effect[g])
    ]
    return tuple(sorted(groups, key=lambda group: (-np.nan_to_num(group.z, nan=-np.inf), group.positions)))


def propose(
    attribution: Attribution,
    unwanted: Sequence[str],
    wanted: Sequence[str] = (),
    *,
    fdr: float = FALSE_DISCOVERIES,
    largest_share: float = LARGEST_SHARE,
    top: int | None = None,
) -> Proposal:
    """A removal list: groups whose effect passes a false-discovery rate, or the ``top`` first.

    Args:
        attribution: of the run.
        unwanted, wanted: ids of marked answers; unwanted ones alone suffice.
        fdr: expected share of false entries of the list.
        largest_share: the most of the training examples that the list takes out. Ignored with ``top``.
        top: take out this many groups, or as many as make unwanted answers likelier, whatever their significance.

    Raises ConfigurationError for values out of range; otherwise as :func:`candidates`.
    """
    if not 0 < fdr < 1 or not 0 < largest_share < 1 or (top is not None and top < 1):
        raise ConfigurationError("fdr and largest_share are between 0 and 1, and top is at least 1.")
    ranked = candidates(attribution, unwanted, wanted)
    room = largest_share * len(attribution.train)
    if top is not None:
        removed = tuple(group for group in ranked if group.effect > 0)[:top]
        reason = f"--top {len(removed)}, whatever their significance"
    else:
        passing = [group for group in ranked if group.q <= fdr and group.effect > 0]
        removed = ()
        taken = 0
        for group in passing:
            if taken + len(group.positions) > room:
                break
            removed += (group,)
            taken += len(group.positions)
        reason = _reason(len(passing), len(removed), fdr, largest_share, len(attribution.members))
    changes = expected_changes(attribution, [i for group in removed for i in group.positions], unwanted, wanted)
    return Proposal(attribution, tuple(unwanted), tuple(wanted), ranked, removed, changes, reason)


def propose_for(run: Run, **options: Any) -> Proposal:
    """:func:`propose` for the answers of a run that are marked: those that the members of the first unwanted one have
    scored. ``options`` are of :func:`propose`. Raises ConfigurationError where no answer is unwanted."""
    first = next((i for i in run.test.ids if run.questions.verdicts.get(i) == "unwanted"), None)
    if first is None:
        raise ConfigurationError(
            "no answer is marked as unwanted. Mark those that the model should not give: daunce fix RUN --unwanted ID "
            f"(ids of this run: {', '.join(run.test.ids[:5])}), or daunce ask RUN --prompt ... --answer ... --unwanted."
        )
    attribution = run.attribution(first)
    return propose(attribution, *marked(run, attribution), **options)


def marked(run: Run, attribution: Attribution) -> tuple[list[str], list[str]]:
    """Ids of unwanted and of wanted answers among those of an attribution."""
    verdicts = run.questions.verdicts
    unwanted, wanted = ([i for i in attribution.test.ids if verdicts.get(i) == v] for v in ("unwanted", "wanted"))
    return unwanted, wanted


def finite(value: Any) -> Any:
    """Plain data as JSON, which has no NaN: None takes its place."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _reason(passing: int, taken: int, fdr: float, share: float, members: int) -> str:
    if not passing:
        return (
            f"no example's effect passes a false-discovery rate of {fdr:g} with {members} members. Mark more unwanted "
            "answers, add members (ensemble.members), or take the first ones on trust with --top K."
        )
    if not taken:
        return f"the strongest group alone has more than {share:.0%} of the examples; take it out with --top 1."
    rule = f"false-discovery rate {fdr:g}"
    return rule if taken == passing else f"{rule}, cut at {share:.0%} of the examples ({passing} groups pass)"


def expected_changes(
    attribution: Attribution, positions: Sequence[int], unwanted: Sequence[str], wanted: Sequence[str] = ()
) -> tuple[Change, ...]:
    """How much the loss of each marked answer is expected to rise without these training examples.

    Scores are known up to a factor. It is calibrated on held-out members (5 folds): the slope of their losses on what
    the other members' scores predict from their subsets, pooled over the marked answers. The interval holds the
    slope's jackknife error and the scores' own (delta method), 95 %, Student's t.
    """
    marked = [*unwanted, *wanted]
    verdicts = ["unwanted"] * len(unwanted) + ["wanted"] * len(wanted)
    columns = [attribution.test.position(i) for i in marked]
    count = len(attribution.members)
    if not positions or count < 2 * _FOLDS - 2:
        value = float("nan") if positions else 0.0
        return tuple(Change(i, v, value, value, value) for i, v in zip(marked, verdicts, strict=True))
    choice = _linear(attribution)
    slope, slope_error = _calibrated(attribution, choice, columns)
    labels = np.zeros(len(attribution.train), dtype=int)
    labels[list(positions)] = 1
    sums = core.group_scores(attribution.losses.tests(columns), choice, labels.tolist(), None)
    row = sums.train_groups.index(1)
    t = stats.t.ppf((1 + _LEVEL) / 2, count - 1)
    changes = []
    for j, (identity, verdict) in enumerate(zip(marked, verdicts, strict=True)):
        total, error = sums.score_GH[row, j], sums.stderr_GH[row, j]
        expected = slope * total
        width = t * np.hypot(slope * error, total * slope_error)
        changes.append(Change(identity, verdict, float(expected), float(expected - width), float(expected + width)))
    return tuple(changes)


def _calibrated(attribution: Attribution, choice: core.Choice, columns: list[int]) -> tuple[float, float]:
    """Slope of held-out members' losses on predictions, and its jackknife error over members."""
    count = len(attribution.members)
    predicted_KM = np.full((count, len(columns)), np.nan)
    for fold in range(_FOLDS):
        held = list(range(fold, count, _FOLDS))
        rest = attribution.of_members([k for k in range(count) if k not in held])
        losses = rest.losses.tests(columns)
        scored = core.fit(losses, choice.estimator.name, choice.setting)
        score_NM = np.nan_to_num(scored.dense())
        mean_N = rest.design_KN.mean(axis=0)
        predicted_KM[held] = -(attribution.design_KN[held] - mean_N) @ score_NM
    actual_KM = attribution.test_loss_KM[:, columns]
    actual_KM = actual_KM - np.nanmean(actual_KM, axis=0)
    products_K = np.nansum(predicted_KM * actual_KM, axis=1)
    squares_K = np.nansum(np.square(predicted_KM), axis=1)
    total = squares_K.sum()
    if total <= 0:
        return float("nan"), float("nan")
    without_K = (products_K.sum() - products_K) / (total - squares_K)
    error = np.sqrt((count - 1) / count * np.square(without_K - without_K.mean()).sum())
    return float(products_K.sum() / total), float(error)


def _linear(attribution: Attribution) -> core.Choice:
    """The run's estimator, on losses in nats (a difference of losses has no logarithm) and on the evidence alone.

    The members are those of the run, so the estimator is the one that was chosen over all its questions.
    """
    choice = attribution.choice
    setting = replace(choice.setting, log_offset=None, prior=0.0)
    return replace(choice, setting=setting)


def _groups(attribution: Attribution) -> list[int]:
    """A label for each training example, equal for near-duplicates. Shared prompts count for nothing."""
    texts = []
    for example in attribution.train:
        asked = example.messages[:-1] if example.is_chat else ()
        last = next((m.text for m in reversed(asked) if m.role == "user"), "") if asked else example.prompt
        texts.append(f"{last}\n{example.completion_text()}")
    return near_duplicates(texts)
