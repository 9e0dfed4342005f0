"""``Attribution``: the losses of an ensemble and everything that can be asked of them.

It holds two loss matrices and the examples, not the N x M scores: those are computed where they are needed. It can be
saved, loaded and looked at without the run, the provider or a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .. import core
from . import saved, tables
from .labels import Labels
from .measurements import Measurements
from .score_files import ScoreFormat, write_scores
from .tokens import Split, pair_tokens

if TYPE_CHECKING:
    import pandas as pd


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
        return tables.score_table(self, by, test_by)

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
        return tables.group_ranking_table(self, test, k, by=by, opponents=opponents, question=question, fdr=fdr)

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
        return pair_tokens(self, self.token_split, train, test)

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
