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

from typing import Any

from numpy.typing import ArrayLike, NDArray

from .choice import Choice, choose
from .estimators import ESTIMATORS, QUESTIONS, Estimator, Question, Setting
from .groups import GroupScores, group_scores
from .jackknife import confidence_interval, significance_threshold
from .losses import SelfInfluence, resolve_censored, segment_losses, self_influence
from .pairs import Scores, fit
from .quality import MINIMUM_MEMBERS, SelfLDS, estimate
from .rows import Checkpoints, MemberLosses, Rho, member_losses
from .topk import Ranking, top

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
    "choose",
    "confidence_interval",
    "estimate",
    "fit",
    "group_scores",
    "member_losses",
    "resolve_censored",
    "scores",
    "segment_losses",
    "self_influence",
    "significance_threshold",
    "top",
]


def scores(
    train_loss_KN: ArrayLike,
    test_loss_KM: ArrayLike,
    inclusion_KN: ArrayLike | None = None,
    estimator: str = "auto",
    **known: Any,
) -> NDArray[Any]:
    """Attribution scores of every training example to every test example.

    The same in parts: `member_losses` checks what is known, `choose` picks an estimator, and `fit` (all scores), `top`,
    `group_scores` and `estimate` (their quality) take the two.

    Args:
        train_loss_KN: (K, N) per-example losses of K members, nats; NaN = missing.
        test_loss_KM: (K, M) per-example losses, nats; NaN = missing.
        inclusion_KN: (K, N) whether training example i is in member k's subset.
        estimator: a name in `ESTIMATORS`, or "auto" (see `choose`).
        known: noise, rho, earlier and prior_NM of `member_losses`.

    Returns:
        (N, M) scores; positive = helpful: up-weighting the training example lowers the test example's loss. Units are
        nats^2 for covariance, none for correlation and whitened, nats for the others, up to a factor common to all
        pairs. NaN for examples without losses. float32 if both loss matrices are.

    Raises:
        DataError, NotEnoughMembersError, ConfigurationError: see `member_losses` and the estimator.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> inclusion = rng.random((40, 100)) < 0.5                # 40 members, 100 training examples
        >>> train = -1.0 * inclusion + 0.1 * rng.normal(size=(40, 100))  # an example in the subset has a lower loss
        >>> test = -1.0 * inclusion[:, :3] + 0.1 * rng.normal(size=(40, 3))
        >>> scores(train, test, inclusion).argmax(axis=0)
        array([0, 1, 2])
    """
    losses = member_losses(train_loss_KN, test_loss_KM, inclusion_KN, **known)
    choice = choose(losses, estimator)
    return fit(losses, choice.estimator.name, choice.setting).dense()
