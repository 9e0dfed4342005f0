"""The attribution core: losses in, scores and their uncertainty out. NumPy and SciPy only; no I/O, no clocks.

Shapes: K members, N training examples, M test examples. Sign, everywhere: positive = helpful, that is, up-weighting
the training example lowers the test example's loss.

METHOD. Members theta_k are fine-tunes on random subsets of the training set (black-box form of Pan et al., "Daunce",
arXiv 2505.23223, 2025). A (K, N) and B (K, M) are the per-example losses of training and test examples, centred over
members; G = A A^T = U diag(w) U^T, m = mean(w).

1. ``covariance`` (the paper's): A^T B / (K - 1).
2. ``correlation``: the same with columns divided by their standard deviations.
3. ``inclusion``: -inclusion_c^T B / (K - 1), empirical influence (Feldman and Zhang 2020).
4. ``whitened``: A^T (G + lambda m I)^-1 B, ridge in member space: each example's K deviations are a random feature of
   its gradient, and this takes the second moment of the features out, as TRAK (Park et al. 2023) does with projections.
5. All but ``inclusion`` and ``correlation`` are A^T U diag(phi(w)) U^T B. With scoring noise sigma (nats, per loss)
   every eigenvalue carries N sigma^2 too much: s = max(w - N sigma^2, 0), and phi(w) becomes (s / w)^2 phi(s).
6. Which phi. Let f be an eigenvalue of the gradients' second moment and R(f) the response of parameters to re-weighting
   examples under a recipe. Members on subsets of ratio r give w = K (1 - r) / r (f R)^2, and phi weighs the direction
   by f R^2 phi, while influence under the target's recipe is R_T. So members with the target's recipe want phi = w^-1/2
   whatever R is (``half_whitened``), and short members from the target (R = c, R_T = 1 / (f + d)) want
   phi = 1 / (sqrt(w) (f R + rho)) with f R = sqrt(w r / (K (1 - r))), where rho = c d = (member's steps x mean learning
   rate) / (target's steps x mean learning rate). The latter is no estimator here: with scoring noise it lost up to .11
   LDS to ``auto``, without it gained up to .015. ``auto`` asks whether f R / rho is large. What this rests on
   (measured in tests/benchmarks/RESULTS-estimators.md):
   * F is the gradients' second moment, R a function of the curvature H. With h for H's eigenvalue (same directions),
     w = K (1 - r) / r (f R(h))^2 still, so ``half_whitened`` does not ask that F = H.
   * Models of a share q of the training set take q times as many steps: judged by halves (LDS), rho counts twice.
   * Momentum mu multiplies learning-rate time by 1 / (1 - mu), in members and target alike. Under Adam with
     preconditioner P the same holds in coordinates P^-1/2 theta, with the moment of P^1/2 g for F: ``half_whitened``
     stays as it is, and rho is a ratio of learning-rate time x P, in which a fresh optimiser counts otherwise.
   * K members against gradients of any rank: a ridge c acts in expectation as tau / (tau + kappa) on the population's
     tau = (1 - r) / r (f R)^2, with 1 / kappa = tr (G + c)^-1. Where K exceeds what rank there is, w / K = tau; where
     it is far below, all w are equal and every filter is the same. In between phi of the sample's w is within .02 of
     the best filter of its eigenvectors (.044 for flat spectra with K at half of the rank), nearer than phi of
     shrunken eigenvalues, so filters take w as it is.
7. Earlier checkpoints of the same fine-tunes are further rows (R in place of K): each stage of training is centred over
   its members, then A and B are stacked. In a direction f a member's rows at all stages carry the same deviation of its
   subset, times R_t(f); so stages tell directions of different f apart that K members alone would mix, and the rank
   grows from K - 1 to at most the sum over stages of (members - 1). Rows of one member are not independent: folds,
   jackknife and bootstrap leave out members, never rows, and degrees of freedom for intervals are K - 1. `covariance`
   divides by the rows' degrees of freedom (the covariance pooled over stages), lambda is relative to tr(G) / R, the
   noise energy of a row stays N sigma^2, and f R of item 6 becomes the root mean square over stages.
8. Influence is heavy-tailed, and of many small scores most is chance: a filter's score S is multiplied by
   z^2 / (z^2 + c), z = S sqrt(d) / (|a| |b|) being its size in units of what unrelated examples make (`pairs`).
   Named estimators do without; ``auto`` takes c by cross-validation.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .choice import Choice, choose
from .estimators import ESTIMATORS, QUESTIONS, Estimator, Question, Setting
from .groups import GroupScores, group_scores_of
from .influence import SelfInfluence, self_influence
from .jackknife import confidence_interval, significance_threshold
from .losses import per_example_losses, resolve_censored, segment_losses
from .pairs import Scores, fit
from .quality import MINIMUM_MEMBERS, SelfLDS, StopRule, estimate
from .rows import MemberLosses, Rho, member_losses
from .stages import Checkpoints
from .topk import Ranking, ranking_of

__all__ = [
    "ESTIMATORS",
    "MINIMUM_MEMBERS",
    "QUESTIONS",
    "Checkpoints",
    "Choice",
    "Estimator",
    "GroupScores",
    "MemberLosses",
    "Question",
    "Ranking",
    "Rho",
    "Scores",
    "SelfInfluence",
    "SelfLDS",
    "Setting",
    "StopRule",
    "choose",
    "confidence_interval",
    "estimate",
    "fit",
    "group_scores",
    "grouped",
    "member_losses",
    "per_example_losses",
    "ranked",
    "resolve_censored",
    "scores",
    "segment_losses",
    "self_influence",
    "self_lds",
    "significance_threshold",
    "top",
]


class Known(TypedDict, total=False):
    """What is known besides the losses and subsets; see `scores`."""

    noise: float | NDArray[np.float64] | None
    rho: Rho
    earlier: Checkpoints | None
    prior_NM: ArrayLike | None


def scores(
    train_loss_KN: ArrayLike,
    test_loss_KM: ArrayLike,
    inclusion_KN: ArrayLike | None = None,
    estimator: str = "auto",
    **known: Unpack[Known],
) -> NDArray[Any]:
    """Attribution scores of every training example to every test example.

    Args:
        train_loss_KN: (K, N) per-example losses of K members, nats; NaN = missing.
        test_loss_KM: (K, M) per-example losses, nats; NaN = missing.
        inclusion_KN: (K, N) whether training example i is in member k's subset.
        estimator: a name in `ESTIMATORS`, or "auto" (see `choose`).
        known: more that is known:
            noise: standard deviation of the scoring noise of one training loss, nats, or (N,) of them; None: not
            measured. rho: "base" for members that are trained like the target; for members started from the target
            their learning-rate time relative to the target's (METHOD item 6), or "unknown". earlier: losses of the
            same members at earlier checkpoints, which are further rows; see `rows`. prior_NM: (N, M) what is known of
            the pairs before, higher = more related, on any scale: "auto" adds it as far as the members bear it out;
            named estimators go without.

    Returns:
        (N, M) scores; positive = helpful: up-weighting the training example lowers the test example's loss. Units are
        nats^2 for covariance, none for correlation and whitened, nats for the others, up to a factor common to all
        pairs. NaN for examples without losses. float32 if both loss matrices are.

    Raises:
        DataError, NotEnoughMembersError, ConfigurationError: see `member_losses` and the estimator.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> inclusion = rng.random((40, 100)) < 0.5                # 40 members, 100 training examples
        >>> train = -inclusion + 0.1 * rng.normal(size=(40, 100))  # an example in the subset has a lower loss
        >>> test = -inclusion[:, :3] + 0.1 * rng.normal(size=(40, 3))
        >>> scores(train, test, inclusion).argmax(axis=0)
        array([0, 1, 2])
    """
    losses = member_losses(train_loss_KN, test_loss_KM, inclusion_KN, **known)
    choice = choose(losses, estimator)
    return fit(losses, choice.estimator.name, choice.setting).dense()


def self_lds(
    train_loss_KN: ArrayLike,
    test_loss_KM: ArrayLike,
    inclusion_KN: ArrayLike,
    estimator: str = "auto",
    **known: Unpack[Known],
) -> SelfLDS:
    """The quality of a run, estimated from its own members; see `quality`. Arguments as for `scores`.

    Raises:
        NotEnoughMembersError: fewer than 8 members. Otherwise as `scores`.
    """
    losses = member_losses(train_loss_KN, test_loss_KM, inclusion_KN, **known)
    return estimate(losses, estimator)


def top(
    train_loss_KN: ArrayLike,
    test_loss_KM: ArrayLike,
    k: int,
    estimator: str = "auto",
    stderr: bool = True,
    opponents: bool = False,
    *,
    inclusion_KN: ArrayLike | None = None,
    question: Question = "attribution",
    per: Literal["test", "train"] = "test",
    fdr: float | None = None,
    **known: Unpack[Known],
) -> Ranking:
    """The k largest (or smallest) scores of every test example, exact, without the N x M matrix.

    Args:
        train_loss_KN, test_loss_KM, inclusion_KN, estimator, known: as for `scores`. Inputs may be memory-mapped.
        k: how many; more than there are means all.
        stderr: also standard errors, z-values and what is significantly not zero.
        opponents: the smallest scores instead of the largest.
        question: with estimator="auto": "attribution" (effect on the loss, judged by LDS) or "retrieval" (which
            examples belong together). A named estimator answers its own, and refuses retrieval if that is not it.
        per: "test" ranks training examples for each test example, "train" the other way round.
        fdr: mark as distinguishable so that at most this share of all marked pairs of the N x M is expected to be false
            (Benjamini-Hochberg; costs a pass over all pairs).

    Raises:
        ConfigurationError: k < 1, an unknown option, or fdr outside (0, 1). Otherwise as `scores`.
    """
    losses = member_losses(train_loss_KN, test_loss_KM, inclusion_KN, **known)
    choice = choose(losses, estimator, question)
    return ranked(losses, choice, k, stderr=stderr, opponents=opponents, per=per, fdr=fdr)


def ranked(
    losses: MemberLosses,
    choice: Choice,
    k: int,
    *,
    stderr: bool = True,
    opponents: bool = False,
    per: Literal["test", "train"] = "test",
    fdr: float | None = None,
) -> Ranking:
    """`top` with an estimator that is chosen already. Of ``losses``, test examples may be left out afterwards: without
    ``fdr`` a pair's entry does not depend on which others there are."""
    scored = fit(losses, choice.estimator.name, choice.setting)
    names = {"estimator": choice.estimator.name, "why": choice.why, "question": choice.question_text}
    return ranking_of(scored, k, **names, stderr=stderr, opponents=opponents, per=per, fdr=fdr)


def group_scores(
    train_loss_KN: ArrayLike,
    test_loss_KM: ArrayLike,
    train_labels_N: Sequence[Hashable] | None = None,
    test_labels_M: Sequence[Hashable] | None = None,
    estimator: str = "auto",
    *,
    inclusion_KN: ArrayLike | None = None,
    **known: Unpack[Known],
) -> GroupScores:
    """Sum scores over groups on either side.

    Args:
        train_labels_N, test_labels_M: any hashable labels, or None for every example by itself.
        train_loss_KN, test_loss_KM, estimator, inclusion_KN, known: as for `scores`.

    Raises:
        DataError: a label sequence of the wrong length. Otherwise as `scores`.
    """
    losses = member_losses(train_loss_KN, test_loss_KM, inclusion_KN, **known)
    return grouped(losses, choose(losses, estimator), train_labels_N, test_labels_M)


def grouped(
    losses: MemberLosses,
    choice: Choice,
    train_labels_N: Sequence[Hashable] | None = None,
    test_labels_M: Sequence[Hashable] | None = None,
) -> GroupScores:
    """`group_scores` of an estimator that is chosen already."""
    scored = fit(losses, choice.estimator.name, choice.setting)
    return group_scores_of(scored, train_labels_N, test_labels_M, choice.estimator.name, choice.why)
