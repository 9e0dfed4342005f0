"""``Attribution``: the losses of an ensemble and everything that can be asked of them.

It holds two loss matrices and the examples, not the N x M scores: those are computed where they are needed. It can be
saved, loaded and looked at without the run, the provider or a network.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from .. import core
from ..errors import DataError
from . import saved, tables
from .labels import Label, Labels, in_order, labels_of
from .measurements import Measurements
from .score_files import ScoreFormat, write_scores
from .tokens import Split

if TYPE_CHECKING:
    import pandas as pd

_GROUP_QUESTIONS: dict[core.Question, str] = {
    "attribution": "how much each {what} moves the answer's loss",
    "retrieval": "whose examples belong to the answer, by {what}",
}


@dataclass(frozen=True, eq=False)
class Attribution(Measurements):
    """Scores of N training examples to M test examples, from K members.

    Sign: a positive score means that the training example helps: up-weighting it lowers the test example's loss. Unit
    of the default loss: nats per completion token; see :func:`daunce_api.core.scores` for the unit of each estimator.

    Its attributes are those of :class:`~daunce_api.attribution.measurements.Measurements`: ``train`` and ``test`` (the
    examples), ``members``, ``train_loss_KN``, ``test_loss_KM`` and ``inclusion_KN`` (the measurements, nats and bool),
    ``choice`` (the estimator and why) and ``self_lds`` (the quality), among others.

        >>> attribution.top("q-17", k=3)[["id", "score", "stderr"]]
    """

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
        import pandas as pd

        if by is None and test_by is None:
            return pd.DataFrame(self.scores_NM(), index=pd.Index(self.train.ids, name="train"), columns=self.test.ids)
        groups = self.groups(train=by, test=test_by)
        rows, columns = list(groups.train_groups), list(groups.test_groups)
        if by is None:
            rows = [*self.train.ids]
        if test_by is None:
            columns = [*self.test.ids]
        table = pd.DataFrame(groups.score_GH, index=pd.Index(rows, name=tables.row_name(by)), columns=columns)
        if by is not None:
            table = table.loc[in_order(cast("list[Label]", rows))]
        return table if test_by is None else table[in_order(cast("list[Label]", columns))]

    def export(self, path: str | Path, format: ScoreFormat) -> Path:
        """Write all N x M scores for other tools, block by block, and return where.

        Args:
            path: the file, or the folder of ``bergson``; an existing one is replaced atomically.
            format: ``"npy"`` ((N, M), in the data's order), ``"csv"`` or ``"parquet"`` (one row a pair:
                ``train_id``, ``test_id``, ``score``; empty or null where there is none) or ``"bergson"`` (its
                score folder, ``higher_is_better``).

        Positive = helpful in all of them. Raises ConfigurationError for another format, DataError for pairs without a
        score that bergson's folder cannot hold, MissingExtraError for parquet without pyarrow, and StoreError where
        nothing can be written.
        """
        return write_scores(Path(path), format, self._score_rows(), self.train.ids, self.test.ids)

    def __repr__(self) -> str:
        checkpoints = "" if self.earlier is None else f" with {len(self.earlier)} earlier checkpoints"
        return (
            f"Attribution({len(self.members)} members{checkpoints}, "
            f"{len(self.train)} training x {len(self.test)} test examples, estimator={self.estimator!r})"
        )

    def _repr_html_(self) -> str:
        from .notebook import notebook_html

        return notebook_html(self)

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
        import pandas as pd

        j, members = self.test.position(test), len(self.members)
        groups = self.groups(train=by, question=question)
        sizes = Counter(labels_of(self.train, by))
        score_GM, error_GM, prior_GM = groups.score_GH, groups.stderr_GH, groups.prior_GH
        evidence_GM = score_GM if prior_GM is None else score_GM - prior_GM
        z_GM = np.divide(evidence_GM, error_GM, out=np.full(score_GM.shape, np.nan), where=error_GM > 0)
        mark_GM = tables.significant(z_GM, members, fdr)
        name, prior = tables.row_name(by), None if prior_GM is None else prior_GM[:, j]
        table = pd.DataFrame(
            {
                name: groups.train_groups,
                "examples": [sizes[cast("Label", label)] for label in groups.train_groups],
                **tables.intervals(score_GM[:, j], error_GM[:, j], z_GM[:, j], mark_GM[:, j], members, prior=prior),
            }
        )
        table = table.sort_values("score", ascending=opponents, kind="stable").head(k)
        table.insert(0, "rank", range(1, len(table) + 1))
        table.attrs.update(
            estimator=groups.estimator,
            why=groups.why,
            question=_GROUP_QUESTIONS[question].format(what=name),
            measured=self.measured,
            members=members,
        )
        return table.reset_index(drop=True)

    @cached_property
    def token_split(self) -> Split:
        """Scores split over tokens, and why they cannot be where that is so."""
        return Split(self)

    def token_scores(self, train: str, test: str) -> pd.DataFrame:
        """Which tokens carry the score of a pair: those of the answer, then those of the training example.

        Columns: ``side`` ("test", "train"), ``position`` (in the completion), ``token`` and ``score``, the token's part
        (positive = helpful). The parts of either side add up to the pair's score (with a prior, to its evidence),
        exactly, for every estimator.

        ``DataFrame.attrs`` holds ``train``, ``test``, ``score`` (the sum), ``estimator``, ``why``; ``left_out``, why
        there are no rows of the training side ("" where there are); and ``final_only``, whether the pair's score also
        uses earlier checkpoints, of which tokens are not kept: then the parts are those of the final models' score.

        Raises DataError for unknown ids, where token log-probabilities were not kept, and where losses are missing.
        """
        import pandas as pd

        i, j, split = self.train.position(train), self.test.position(test), self.token_split
        if split.why:
            raise DataError(f"Scores of this attribution cannot be split over tokens: {split.why}.")
        for side, example, loss_K in (
            ("train", train, self.train_loss_KN[:, i]),
            ("test", test, self.test_loss_KM[:, j]),
        ):
            if not np.isfinite(loss_K).any():
                raise DataError(f"No member has scored {side} example {example!r}.")
        parts = [("test", self.tokens["test"].pieces[j], split.test_parts(i, j))]
        if not split.why_not_train:
            parts.append(("train", self.tokens["train"].pieces[i], split.train_parts(i, j)))
        columns = [(side, t, piece) for side, pieces, _ in parts for t, piece in enumerate(pieces)]
        table = pd.DataFrame(columns, columns=["side", "position", "token"])
        table = table.assign(score=np.concatenate([part for *_, part in parts]))
        table.attrs.update(
            train=train,
            test=test,
            score=float(parts[0][2].sum()),
            estimator=self.choice.estimator.name,
            why=self.choice.why,
            left_out=split.why_not_train,
            final_only=split.final_only,
        )
        return table

    def save(self, folder: str | Path) -> Path:
        """Write the attribution to a folder (``attribution.json``, ``losses.npz``), replacing an earlier one.

        Each file is replaced atomically. Raises StoreError where the folder cannot be written.
        """
        return saved.write(Path(folder), self)

    @classmethod
    def load(cls, folder: str | Path) -> Attribution:
        """Read what :meth:`save` wrote.

        Raises ConfigurationError where nothing is there, StoreCorruptError where it is damaged. No pickle is read.
        """
        return cls(**saved.read(Path(folder)))
