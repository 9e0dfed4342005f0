"""The losses of an ensemble and the scores that follow from them: what tables, tokens, files and pages read."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from .. import core
from ..core.losses import Reduction
from ..data.dataset import Dataset
from ..errors import NotEnoughMembersError
from .derived import choice_of, digest_of, quality_is_kept, quality_of
from .labels import NONE, Labels, Side, labels_of
from .similarity import PriorKind, prior_of
from .token_table import TokenTable

Floats = NDArray[np.float64]

_BLOCK_PAIRS = 1_000_000
_SMALL = 200_000
"""Losses (K x N) of which the choice and the quality take about a second."""


@dataclass(frozen=True, eq=False)
class Measurements:
    """Losses of K members, and scores of N training examples to M test examples by the estimator chosen for them.

    Attributes:
        train, test: the examples, N and M of them.
        members: (K,) member numbers, in the order of the rows below.
        train_loss_KN, test_loss_KM: per-example losses in nats, NaN where not scored.
        inclusion_KN: (K, N) bool, whether an example was in a member's subset.
        estimator: a registry name or "auto".
        noise: measured scoring noise of one loss, nats (standard deviation), or None.
        rho: "base" for members trained like the target; for members started from the target their learning-rate time
            relative to the target's (METHOD item 6 in :mod:`daunce_api.core`), or "unknown".
        loss: how token losses became example losses, "mean" (nats per token) or "sum".
        measured: what a loss is the loss of: "completion", or "first completion token only".
        censored: share of scored losses that are lower bounds.
        tokens: token tables by side ("train", "test"), where they were kept.
        facts: provider, model and other plain facts of the run, for display.
        earlier: losses of the same members at earlier checkpoints of their training, in nats, or None.
        prior, prior_model: what is added to scores of few members (:func:`daunce_api.attribution.similarity.prior_of`).
        weight_KN: (K, N) how much a member's objective weighs an example, where members are perturbed by more than
            their subsets (:meth:`daunce_api.providers.objective.Objective.weights_KN`), or None.
        derived: folder in which the choice, the quality and the prior are kept, so that they are computed once; None:
            nowhere.
    """

    train: Dataset
    test: Dataset
    members: tuple[int, ...]
    train_loss_KN: Floats
    test_loss_KM: Floats
    inclusion_KN: NDArray[np.bool_]
    estimator: str = "auto"
    noise: float | None = None
    rho: core.Rho = "base"
    loss: Reduction = "mean"
    measured: str = "completion"
    censored: float = 0.0
    tokens: Mapping[Side, TokenTable] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    earlier: core.Checkpoints | None = None
    weight_KN: Floats | None = None
    prior: PriorKind = "none"
    prior_model: str | None = None
    derived: Path | None = None
    focus: tuple[str, ...] = ()
    """Ids of the questions that were just asked, to be shown first."""

    @property
    def design_KN(self) -> NDArray[Any]:
        """(K, N) what moved the members: their subsets, or the weights of a perturbed objective."""
        return self.inclusion_KN if self.weight_KN is None else self.weight_KN

    def with_estimator(self, estimator: str) -> Self:
        """The same losses under another estimator."""
        return replace(self, estimator=estimator)

    def first(self, members: int) -> Self:
        """The attribution of the first members alone."""
        return self.of_members(range(min(members, len(self.members))))

    def of_members(self, rows: Sequence[int]) -> Self:
        """The attribution of some members alone, by their rows."""
        keep = list(rows)
        tokens = {side: table.rows(keep) for side, table in self.tokens.items()}
        some = replace(
            self,
            members=tuple(self.members[k] for k in keep),
            train_loss_KN=self.train_loss_KN[keep],
            test_loss_KM=self.test_loss_KM[keep],
            inclusion_KN=self.inclusion_KN[keep],
            weight_KN=None if self.weight_KN is None else self.weight_KN[keep],
            tokens=tokens,
            earlier=None if self.earlier is None else self.earlier.members(keep),
        )
        if "prior_NM" in self.__dict__:  # is of the examples, whoever the members are
            some.__dict__["prior_NM"] = self.prior_NM
        return some

    @cached_property
    def losses(self) -> core.MemberLosses:
        """The losses as the core takes them: checked, without examples that nobody has a loss of."""
        return core.member_losses(
            self.train_loss_KN,
            self.test_loss_KM,
            self.design_KN,
            noise=self.noise,
            rho=self.rho,
            earlier=self.earlier,
            prior_NM=self.prior_NM if self.estimator == "auto" else None,
        )

    @cached_property
    def prior_NM(self) -> NDArray[np.float32] | None:
        """(N, M) the prior, on a scale of its own; None where there is none."""
        return prior_of(self.train, self.test, self.prior, self.prior_model, folder=self.derived)

    @cached_property
    def _digest(self) -> str:
        """Of everything that the choice and the quality follow from; "" where nothing is kept."""
        if self.derived is None:
            return ""
        stages = () if self.earlier is None else (self.earlier.train_loss_SKN, self.earlier.test_loss_SKM)
        losses = (self.train_loss_KN, self.test_loss_KM, self.design_KN, *stages)
        prior: list[str] = []
        if self.estimator == "auto" and self.prior != "none":
            prior = [self.prior, str(self.prior_model), self.train.digest, self.test.digest]
        return digest_of(*losses, self.noise, self.rho, self.estimator, prior)

    @cached_property
    def choice(self) -> core.Choice:
        """The estimator in use and why it was chosen."""
        return choice_of(self.derived, self._digest, lambda: core.choose(self.losses, self.estimator))

    def _chosen_for(self, question: core.Question) -> core.Choice:
        if question == "attribution":
            return self.choice
        return core.choose(self.losses, self.estimator, question)

    @cached_property
    def self_lds(self) -> core.SelfLDS | None:
        """Estimated quality of the ranking (see :func:`daunce_api.core.estimate`); None with too few members."""

        def compute() -> core.SelfLDS | None:
            try:
                return core.estimate(self.losses, self.estimator, chosen=self.choice)
            except NotEnoughMembersError:
                return None

        return quality_of(self.derived, self._digest, compute)

    @property
    def judged(self) -> bool:
        """Whether :attr:`choice` and :attr:`self_lds` are at hand, or computed in a moment."""
        small = self.train_loss_KN.size <= _SMALL
        return small or "self_lds" in self.__dict__ or quality_is_kept(self.derived, self._digest)

    def scores_NM(self) -> NDArray[Any]:
        """(N, M) scores by :attr:`choice`; positive = helpful. Units, and what is raised, as of
        :func:`daunce_api.core.scores`."""
        return np.concatenate(list(self._score_rows()))

    @cached_property
    def scored(self) -> core.Scores:
        """Scores and standard errors of all pairs, computed block by block where they are needed."""
        return core.fit(self.losses, self.choice.estimator.name, self.choice.setting)

    def _score_rows(self) -> Iterator[NDArray[Any]]:
        step = max(1, _BLOCK_PAIRS // len(self.test))
        for start in range(0, len(self.train), step):
            yield self.scored.block(slice(start, start + step))

    def labels(self, side: Side) -> list[str]:
        """The source of each example; "(none)" where it has none."""
        return [source if source is not None else NONE for source in getattr(self, side).sources]

    def ranking(
        self,
        k: int,
        *,
        opponents: bool = False,
        question: core.Question = "attribution",
        fdr: float | None = None,
        columns: list[int] | None = None,
        stderr: bool = True,
        per: Literal["test", "train"] = "test",
    ) -> core.Ranking:
        """:func:`daunce_api.core.top` over all test examples, or some of them by index.

        The estimator and its parameters are always chosen over all of them, and a false-discovery rate is over all
        pairs: neither may depend on which are asked about.
        """
        choice = self._chosen_for(question)
        if columns is None or fdr is None:
            losses = self.losses if columns is None else self.losses.tests(columns)
            return core.top(losses, choice, k, stderr=stderr, opponents=opponents, per=per, fdr=fdr)
        ranking = core.top(self.losses, choice, k, stderr=stderr, opponents=opponents, per=per, fdr=fdr)
        return ranking.at(columns)

    def groups(
        self,
        *,
        train: Labels | None = "source",
        test: Labels | None = None,
        question: core.Question = "attribution",
    ) -> core.GroupScores:
        """Scores summed over labels, on the training side, the test side or both, with their own standard errors.

        Args:
            train, test: labels of each side as in :meth:`scores`; None for every example by itself.
            question: with estimator "auto", what the scores are for, as in :meth:`top`.

        Raises DataError where labels are missing, and what :func:`daunce_api.core.group_scores` raises.
        """
        train_labels_N = None if train is None else labels_of(self.train, train)
        test_labels_M = None if test is None else labels_of(self.test, test)
        return self.grouped(train_labels_N, test_labels_M, question)

    def grouped(
        self,
        train_labels_N: Sequence[Hashable] | None,
        test_labels_M: Sequence[Hashable] | None,
        question: core.Question = "attribution",
    ) -> core.GroupScores:
        """:meth:`groups` of any hashable labels, one for every example in the data's order, taken as they are."""
        return core.group_scores(self.losses, self._chosen_for(question), train_labels_N, test_labels_M)

    def self_influence(self) -> core.SelfInfluence:
        """What members say about each training example by itself: mislabelled ones stand out."""
        return core.self_influence(self.train_loss_KN, self.inclusion_KN, self.noise or 0.0)
