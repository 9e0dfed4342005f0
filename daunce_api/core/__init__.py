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
   phi = 1 / (sqrt(w) (f R + rho)) with f R = sqrt(w r / (K (1 - r))) (``matched``), where rho = c d = (member's steps
   x mean learning rate) / (target's steps x mean learning rate). What this rests on
   (measured in tests/benchmarks/RESULTS-estimators.md):
   * F is the gradients' second moment, R a function of the curvature H. With h for H's eigenvalue (same directions),
     w = K (1 - r) / r (f R(h))^2 still, so ``half_whitened`` does not ask that F = H. ``matched`` does: rho counts
     f / h times. Wrong labels that the model expects leave f = h; over-confidence and memorising do not.
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
   z^2 / (z^2 + c), z = S sqrt(d) / (|a| |b|) being its size in units of what unrelated examples make (`shrinkage`).
   Named estimators do without; ``auto`` takes c from held-out members.
"""

from .api import scores, self_lds
from .checkpoints import Checkpoints
from .choice import Choice, choose
from .estimators import ESTIMATORS, QUESTIONS, Estimator, Factors, Question
from .groups import GroupScores, group_scores, grouped
from .influence import SelfInfluence, self_influence
from .losses import per_example_losses, resolve_censored, segment_losses
from .members import MemberLosses, member_losses
from .quality import SelfLDS
from .spectrum import Setting
from .stopping import AtLeast, Condition, Plateau, Reached
from .tokens import TokenScores, token_scores
from .topk import Ranking, ranked, top
from .uncertainty import confidence_interval

__all__ = [
    "ESTIMATORS",
    "QUESTIONS",
    "AtLeast",
    "Checkpoints",
    "Choice",
    "Condition",
    "Estimator",
    "Factors",
    "GroupScores",
    "MemberLosses",
    "Plateau",
    "Question",
    "Ranking",
    "Reached",
    "SelfInfluence",
    "SelfLDS",
    "Setting",
    "TokenScores",
    "choose",
    "confidence_interval",
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
    "token_scores",
    "top",
]
