"""The attribution core: losses in, scores and their uncertainty out. NumPy and SciPy only; no I/O, no clocks.

Shapes: K members, N training examples, M test examples. Sign, everywhere: positive = helpful.
"""

from daunce_api.core.api import scores, self_lds
from daunce_api.core.choice import Choice, choose
from daunce_api.core.estimators import ESTIMATORS, QUESTIONS, Estimator, Factors, Question
from daunce_api.core.losses import per_example_losses, resolve_censored, segment_losses
from daunce_api.core.members import MemberLosses, member_losses
from daunce_api.core.quality import SelfLDS
from daunce_api.core.spectrum import Setting
from daunce_api.core.topk import Ranking, top

__all__ = [
    "ESTIMATORS",
    "QUESTIONS",
    "Choice",
    "Estimator",
    "Factors",
    "MemberLosses",
    "Question",
    "Ranking",
    "SelfLDS",
    "Setting",
    "choose",
    "member_losses",
    "per_example_losses",
    "resolve_censored",
    "scores",
    "segment_losses",
    "self_lds",
    "top",
]
