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
   x mean learning rate) / (target's steps x mean learning rate).
7. Earlier checkpoints of the same fine-tunes are further rows (R in place of K): each stage of training is centred over
   its members, then A and B are stacked. In a direction f a member's rows at all stages carry the same deviation of its
   subset, times R_t(f); so stages tell directions of different f apart that K members alone would mix, and the rank
   grows from K - 1 to at most the sum over stages of (members - 1). Rows of one member are not independent: folds,
   jackknife and bootstrap leave out members, never rows, and degrees of freedom for intervals are K - 1. `covariance`
   divides by the rows' degrees of freedom (the covariance pooled over stages), lambda is relative to tr(G) / R, the
   noise energy of a row stays N sigma^2, and f R of item 6 becomes the root mean square over stages.
"""

from daunce_api.core.api import scores, self_lds
from daunce_api.core.checkpoints import Checkpoints
from daunce_api.core.choice import Choice, choose
from daunce_api.core.estimators import ESTIMATORS, QUESTIONS, Estimator, Factors, Question
from daunce_api.core.groups import GroupScores, group_scores
from daunce_api.core.influence import SelfInfluence, self_influence
from daunce_api.core.losses import per_example_losses, resolve_censored, segment_losses
from daunce_api.core.members import MemberLosses, member_losses
from daunce_api.core.quality import SelfLDS
from daunce_api.core.spectrum import Setting
from daunce_api.core.stopping import AtLeast, Condition, Plateau, Reached
from daunce_api.core.tokens import TokenScores, token_scores
from daunce_api.core.topk import Ranking, ranked, top
from daunce_api.core.uncertainty import confidence_interval

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
