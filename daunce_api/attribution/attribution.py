"""``Attribution``: the losses of an ensemble and everything that can be asked of them.

It holds two loss matrices and the examples, not the N x M scores: those are computed where they are needed. It can be
saved, loaded and looked at without the run, the provider or a network.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import core
from ..core.losses import Reduction
from ..data.dataset import Dataset
from ..errors import NotEnoughMembersError
from . import saved, tables
from .labels import NONE, Labels, Side, labels_of
from .score_files import ScoreFormat, write_scores
from .similarity import PriorKind, prior_of
from .tokens import Split, TokenTable, pair_tokens

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

_BLOCK_PAIRS = 1_000_000


@dataclass(frozen=True, eq=False)
class Attribution:
    """Scores of N training examples to M test examples, from K members.

    Sign: a positive score means that the training example helps: up-weighting it lowers the test example's loss. Unit
    of the default loss: nats per completion token; see :func:`daunce_api.core.scores` for the unit of each estimator.

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
    focus: tuple[str, ...] = ()
    """Ids of the questions that were just asked, to be shown first."""

    @property
    def design_KN(self) -> NDArray[Any]:
        """(K, N) what moved the members: their subsets, or the weights of a perturbed objective."""
        return self.inclusion_KN if self.weight_KN is None else self.weight_KN

    def with_estimator(self, estimator: str) -> Attribution:
        """The same losses under another estimator."""
        return replace(self, estimator=estimator)

    def first(self, members: int) -> Attribution:
        """The attribution of the first so many members alone."""
        return self.of_members(range(min(members, len(self.members))))

    def of_members(self, rows: Sequence[int]) -> Attribution:
        """The attribution of some members alone, by their rows."""
        keep = list(rows)
        tokens = {side: table.rows(keep) for side, table in self.tokens.items()}
        return replace(
            self,
            members=tuple(self.members[k] for k in keep),
            train_loss_KN=self.train_loss_KN[keep],
            test_loss_KM=self.test_loss_KM[keep],
            inclusion_KN=self.inclusion_KN[keep],
            weight_KN=None if self.weight_KN is None else self.weight_KN[keep],
            tokens=tokens,
            earlier=None if self.earlier is None else self.earlier.members(keep),
        )

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
    def prior_NM(self) -> Floats | None:
        """(N, M) the prior, on a scale of its own; None where there is none."""
        return prior_of(self.train, self.test, self.prior, self.prior_model)

    @cached_property
    def choice(self) -> core.Choice:
        """The estimator in use and why it was chosen."""
        return core.choose(self.losses, self.estimator)

    def _chosen_for(self, question: core.Question) -> core.Choice:
        if question == "attribution":
            return self.choice
        return core.choose(self.losses, self.estimator, question)

    @cached_property
    def self_lds(self) -> core.SelfLDS | None:
        """Estimated quality of the ranking (see :func:`daunce_api.core.self_lds`); None with too few members."""
        try:
            return core.estimate(self.losses, self.estimator)
        except NotEnoughMembersError:
            return None

    def scores_NM(self) -> NDArray[Any]:
        """(N, M) scores by :attr:`choice`; positive = helpful. Units, and what is raised, as of
        :func:`daunce_api.core.scores`."""
        return np.concatenate(list(self._score_rows()))

    @cached_property
    def scored(self) -> core.Scores:
        """Scores and standard errors of all pairs, computed block by block where they are needed."""
        return core.fit(self.losses, self.choice.estimator.name, self.choice.setting)

    def scores(self, by: Labels | None = None, *, test_by: Labels | None = None) -> pd.DataFrame:
        """Scores as a table: rows are training examples, columns test examples, or groups of them; positive = helpful.

        Args:
            by: sum over training examples with one label: ``"source"``, a mapping from id to label (it may know more
                ids), or one label for every example in the data's order. A label is a text or a whole number; examples
                without one are summed as "(none)".
            test_by: the same for test examples.

        A group's score is the sum of its pairs' scores, where missing ones count as zero; :meth:`groups` has the
        standard errors. Raises DataError where labels are missing, and what :meth:`scores_NM` raises.
        """
        return tables.score_table(self, by, test_by)

    def export(self, path: str | Path, format: ScoreFormat) -> Path:
        """Write all N x M scores for other tools, block by block, and return where.

        Args:
            path: the file, or the folder of ``bergson``; what is there is replaced at the end.
            format: ``"npy"`` ((N, M), in the data's order), ``"csv"`` or ``"parquet"`` (one row a pair:
                ``train_id``, ``test_id``, ``score``; empty or null where there is none) or ``"bergson"`` (its
                score folder, ``higher_is_better``).

        Positive = helpful in all of them. Raises ConfigurationError for another format, DataError for pairs without a
        score that bergson's folder cannot hold, MissingExtraError for parquet without pyarrow, and StoreError where
        nothing can be written.
        """
        return write_scores(Path(path), format, self._score_rows(), self.train.ids, self.test.ids)

    def _score_rows(self) -> Iterator[NDArray[Any]]:
        step = max(1, _BLOCK_PAIRS // len(self.test))
        for start in range(0, len(self.train), step):
            yield self.scored.block(slice(start, start + step))

    def __repr__(self) -> str:
        checkpoints = "" if self.earlier is None else f" with {len(self.earlier)} earlier checkpoints"
        return (
            f"Attribution({len(self.members)} members{checkpoints}, "
            f"{len(self.train)} training x {len(self.test)} test examples, estimator={self.estimator!r})"
        )

    def _repr_html_(self) -> str:
        from .notebook import notebook_html

        return notebook_html(self)

    def labels(self, side: Side) -> list[str]:
        """The source of each example; "(none)" where it has none."""
        return [source if source is not None else NONE for source in getattr(self, side).sources]

    def top(
        self,
        test: str,
        k: int = 10,
        *,
        opponents: bool = False,
        question: core.Question = "attribution",
        fdr: float | None = None,
    ) -> pd.DataFrame:
        """The k strongest proponents (or opponents) of a test example.

        Columns: ``rank``, ``id``, ``source``, ``score`` (positive = helpful), with a prior its parts ``evidence`` and
        ``prior`` (all that follows is about the evidence), ``stderr``, ``low``, ``high`` (95 %),
        ``z``, ``distinguishable`` (from zero: by itself at 5 %, or with a false-discovery rate ``fdr`` over all
        pairs), ``prompt``, ``completion``. ``DataFrame.attrs`` holds ``estimator``, ``why``, ``question``
        and ``measured``.

        Raises DataError for an unknown test id, and what :func:`daunce_api.core.top` raises.
        """
        columns = [self.test.position(test)]
        ranking = self.ranking(k, opponents=opponents, question=question, fdr=fdr, columns=columns)
        return tables.ranking_table(self, ranking)

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
            return core.ranked(losses, choice, k, stderr=stderr, opponents=opponents, per=per, fdr=fdr)
        ranking = core.ranked(self.losses, choice, k, stderr=stderr, opponents=opponents, per=per, fdr=fdr)
        picked: dict[str, Any] = {
            name: None if (value := getattr(ranking, name)) is None else value[columns]
            for name in ("index_Mk", "score_Mk", "stderr_Mk", "z_Mk", "distinguishable_Mk", "prior_Mk")
        }
        return replace(ranking, **picked)

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
        return core.grouped(self.losses, self._chosen_for(question), train_labels_N, test_labels_M)

    def top_groups(
        self,
        test: str,
        k: int = 10,
        *,
        by: Labels = "source",
        opponents: bool = False,
        question: core.Question = "attribution",
        fdr: float | None = None,
    ) -> pd.DataFrame:
        """The groups of training examples that, summed, helped a test example most (or hurt it most).

        ``by`` gives their labels as in :meth:`scores`. Columns: ``rank``, ``source`` (``group`` for labels of your
        own), ``examples`` (how many it has), ``score``, ``stderr``, ``low``, ``high``, ``z``, ``distinguishable``, as
        in :meth:`top`; the false-discovery rate ``fdr`` is over all groups and test examples.

        Raises ConfigurationError for an fdr outside (0, 1). Otherwise as :meth:`groups`.
        """
        return tables.group_ranking_table(self, test, k, by=by, opponents=opponents, question=question, fdr=fdr)

    @cached_property
    def token_split(self) -> Split:
        """Scores split over tokens, and why they cannot be where that is so."""
        return Split(self)

    def token_scores(self, train: str, test: str) -> pd.DataFrame:
        """Which tokens carry the score of a pair: those of the answer, then those of the training example.

        Columns: ``side`` ("test", "train"), ``position`` (in the completion), ``token`` and ``score``, the token's part
        (positive = helpful). The parts of either side add up to the pair's score, exactly, for every estimator.

        ``DataFrame.attrs`` holds ``train``, ``test``, ``score`` (the sum), ``estimator``, ``why``; ``left_out``, why
        there are no rows of the training side ("" where there are); and ``final_only``, whether the pair's score also
        uses earlier checkpoints, of which tokens are not kept: then the parts are those of the final models' score.

        Raises DataError for unknown ids, where token log-probabilities were not kept, and where losses are missing.
        """
        return pair_tokens(self, train, test)

    def self_influence(self) -> core.SelfInfluence:
        """What members say about each training example by itself: mislabelled ones stand out."""
        return core.self_influence(self.train_loss_KN, self.inclusion_KN, self.noise or 0.0)

    def save(self, folder: str | Path) -> Path:
        """Write the attribution to a folder (``attribution.json``, ``losses.npz``), over what is there.

        Both files are written beside the old ones and then renamed, so that a crash leaves whole files. Raises
        StoreError where the folder cannot be written.
        """
        return saved.write(Path(folder), *saved.contents_of(self))

    @classmethod
    def load(cls, folder: str | Path) -> Attribution:
        """Read what :meth:`save` wrote.

        Raises ConfigurationError where nothing is there, StoreCorruptError where it is damaged. No pickle is read.
        """
        return saved.read(Path(folder), lambda content, arrays: cls(**saved.fields_of(content, arrays)))
