"""The attribution core: losses in, scores and their uncertainty out. NumPy and SciPy only; no I/O, no clocks.

Shapes: K members, N training examples, M test examples. Sign, everywhere: positive = helpful.
"""

from daunce_api.core.api import scores, self_lds
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
from daunce_api.core.topk import Ranking, top

__all__ = [
    "ESTIMATORS",
    "QUESTIONS",
    "AtLeast",
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
    "group_scores",
    "member_losses",
    "per_example_losses",
    "resolve_censored",
    "scores",
    "segment_losses",
    "self_influence",
    "self_lds",
    "token_scores",
    "top",
]
