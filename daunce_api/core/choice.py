"""Which estimator: `auto`, and the words for why."""

from __future__ import annotations

from dataclasses import dataclass

from daunce_api.core.estimators import QUESTIONS, Estimator, Question, estimator_named
from daunce_api.core.members import MemberLosses
from daunce_api.core.spectrum import Setting
from daunce_api.errors import ConfigurationError


@dataclass(frozen=True)
class Choice:
    """An estimator together with its parameters and the reason for it.

    Attributes:
        estimator: the registry entry.
        setting: noise, rho and lambda as used.
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
    """Settle on an estimator.

    Args:
        members: checked losses.
        estimator: a registry name, or "auto".
        setting: noise and rho, as far as they are known.
        question: with "auto", what the scores are for.

    Returns:
        Choice. "auto" takes `correlation` for retrieval; for attribution `matched` where rho and inclusion are known
        and `half_whitened` otherwise, both behind the noise weight.

    Raises:
        ConfigurationError: unknown estimator or question, or an argument that the estimator needs is missing.
    """
    setting = setting or Setting()
    if question not in QUESTIONS:
        raise ConfigurationError(f"Unknown question {question!r}; there are: {', '.join(QUESTIONS)}.")
    if estimator != "auto":
        entry = estimator_named(estimator)
        return Choice(entry, setting, f"{entry.name} was asked for", entry.question)
    if question == "retrieval":
        return Choice(
            estimator_named("correlation"),
            setting,
            "correlation finds related examples with the fewest members, since an example with a large loss variance "
            "does "
            "not crowd out the others",
            question,
        )
    if setting.rho is not None and members.inclusion_KN is not None:
        return Choice(
            estimator_named("matched"),
            setting,
            f"members are short runs from the target (rho = {setting.rho:.3g})",
            question,
        )
    return Choice(
        estimator_named("half_whitened"), setting, "members follow the target's own recipe as far as is known", question
    )
