"""Cross-validation over members: scores fitted on some members predict others, at the cost of K x K matrices.

A filter fitted on some members predicts the test losses of another member k from its inclusion row:
``-(m_k - mean m) @ score = -[(m_k - mean m) A^T] U phi(w) U^T B``. Everything about the N training examples enters
through two matrices, A A^T (R x R) and (inclusion) A^T (K x R), which are computed once; a fold, a half or a bootstrap
is then a sub-block of them. Judging twenty filters on ten folds costs about as much as one. Where pairs are weighted
(`pairs.Shrinkage`) all N x M of them are gone through instead, so that fewer test examples are judged by
(`some_tests`).

With earlier checkpoints a member's rows go together: all of them are fitted on, or none, and what is predicted are the
test losses of its final model.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigurationError
from .estimators import Matrix, Setting, Spectrum, decompose, estimator_named, stabilized
from .pairs import Shrinkage, fit, tilted
from .rows import Floats, Index, MemberLosses, Stages, centered, stacked

Candidate: TypeAlias = tuple[str, Setting]
FOLDS = 10
_BLOCK = 16_384
_PAIRS = 65_536  # of a tile of weighted scores that stays in cache
_ALL = slice(None)
_KEPT = 20  # spectra of folds, since candidates come in several turns


class CrossValidator:
    """Fits candidates on some members and predicts others.

    Attributes:
        losses: the losses of all members.
        target_KM: what predictions are compared with: the test losses of the final models.
    """

    def __init__(self, losses: MemberLosses) -> None:
        if losses.inclusion_KN is None:
            raise ConfigurationError("Members are cross-validated through their subsets: pass inclusion_KN.")
        _ = losses.dispersion  # raises for subsets that tell nothing apart
        self.losses = losses
        self.target_KM = losses.test_KM
        self._inclusion = losses.inclusion_KN
        self._kept: dict[tuple[bool, bytes, bytes], tuple[Spectrum, Matrix, Floats, Index]] = {}
        count, examples = losses.train_KN.shape
        rows = losses.stages.count * count
        self._train = np.empty((rows, examples), dtype=np.float32)  # enough to judge weights by
        self._gram, self._cross, self._overlap = (np.zeros(s) for s in ((rows, rows), (count, rows), (count, count)))
        for start in range(0, examples, _BLOCK):
            piece = slice(start, start + _BLOCK)
            a = losses.stages.centre(np.concatenate([x[:, piece].astype(np.float64) for x in losses.train]))
            included = centered(self._inclusion[:, piece].astype(np.float64))
            self._train[:, piece] = a
            self._gram += a @ a.T
            self._cross += included @ a.T
            self._overlap += included @ included.T

    def members(self, pick: Index) -> CrossValidator:
        """The same of some members, whose matrices are parts of the whole ones: what was centred over all members is
        centred again wherever it is used."""
        rows, part = self.losses.stages.rows_of(pick), copy(self)
        part.losses = self.losses.members(pick)
        part.target_KM, part._inclusion, part._train = self.target_KM[pick], self._inclusion[pick], self._train[rows]
        part._gram, part._cross = self._gram[np.ix_(rows, rows)], self._cross[np.ix_(pick, rows)]
        part._overlap = self._overlap[np.ix_(pick, pick)]
        part._kept = {}
        return part

    def some_tests(self, pairs: int, least: int) -> CrossValidator:
        """The same with as many test examples, evenly spread, as make so many pairs, and no fewer than ``least``."""
        count = self.target_KM.shape[1]
        wanted = max(least, pairs // self.losses.train_KN.shape[1])
        if wanted >= count:
            return self
        part = copy(self)
        part.losses = self.losses.tests(self.losses.kept_M[:: -(-count // wanted)])
        part.target_KM = part.losses.test_KM
        return part

    def explained(self) -> tuple[float, float]:
        """Share of the test losses' variance that subsets explain linearly, and its standard error.

        Haseman and Elston's regression (1972): over pairs of members, the product of their standardised test losses,
        mean over test examples, against the overlap of their subsets, scaled so that a member's with itself is 1.
        Luck of training and scoring noise are no part of it. The error takes pairs to be independent.
        """
        count = self.losses.count
        overlap = centered(centered(self._overlap).T)
        b = centered(self.target_KM.astype(np.float64))
        spread = b.std(axis=0)
        b = b[:, spread > 0] / spread[spread > 0]
        if b.shape[1] == 0 or not np.trace(overlap) > 0:
            return 0.0, float("inf")
        pairs = np.triu_indices(count, 1)
        x, y = (overlap / np.trace(overlap) * count)[pairs], (b @ b.T / b.shape[1])[pairs]
        x, y = x - x.mean(), y - y.mean()
        squares = float((x**2).sum())
        if squares <= 1e-12 * x.size:
            return 0.0, float("inf")
        return float(x @ y) / squares, float(np.sqrt((y**2).mean() / squares))

    def spectrum(self) -> Spectrum:
        """The spectrum of the final models' training losses, of all members."""
        final, count = self.losses.final(), self.losses.count
        return decompose(self._gram[-count:, -count:], final.stages, self.losses.noise_energy)

    def correlations(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        """Held-out correlation of each candidate, mean over test examples."""
        return np.array([np.nanmean(column_spearman(p, self.target_KM)) for p in self.folded(candidates)])

    def folded(self, candidates: Sequence[Candidate]) -> list[NDArray[np.float64]]:
        """(K, M) predictions of every member by the members of the other folds, for each candidate."""
        out = [np.full(self.target_KM.shape, np.nan) for _ in candidates]
        for held, rest in folds(self.losses.count):
            for filled, predicted in zip(out, self.predict(candidates, rest, held), strict=True):
                filled[held] = predicted
        return out

    def predict(self, candidates: Sequence[Candidate], members: Index, held: Index) -> list[NDArray[np.float64]]:
        """Test losses of members ``held`` (H, M), predicted with scores from ``members``, for each candidate.

        The scale and offset of a prediction are the estimator's own; only its order over members carries meaning.
        """
        out: dict[int, NDArray[np.float64]] = {}
        weighted: dict[bool, list[int]] = {}
        for i, (name, setting) in enumerate(candidates):
            if estimator_named(name).filter is None:
                out[i] = self._predict_by_scores(name, setting, members, held)
            elif setting.shrinkage is not None:
                weighted.setdefault(setting.checkpoints, []).append(i)
            else:
                phi, b_DM, projected = self._filtered(candidates[i], members, held)
                w_D = self._decomposed(setting.checkpoints, members, held)[0].w
                out[i] = -(projected * phi) @ b_DM
                out[i] += self._prior_part(setting, members, held, (phi**2 * w_D) @ b_DM**2)
        for some in weighted.values():
            found = self._predict_weighted([candidates[i] for i in some], members, held)
            out |= dict(zip(some, found, strict=True))
        return [out[i] for i in range(len(candidates))]

    def _filtered(self, candidate: Candidate, members: Index, held: Index) -> tuple[Floats, Floats, Matrix]:
        """A filter's phi (D,), the test losses in the directions of the spectrum, (D, M), and the subsets of ``held``
        in these directions (H, D)."""
        name, setting = candidate
        spectrum, projected, *_ = self._decomposed(setting.checkpoints, members, held)
        entry = estimator_named(name)
        assert entry.filter is not None
        tests = self.losses.test if setting.checkpoints else self.losses.test[-1:]
        b = spectrum.stages.centre(stacked([stabilized(x, setting.log_offset)[members] for x in tests]))
        return entry.filter(spectrum, setting), spectrum.u_RD.T @ b, projected

    def _decomposed(self, checkpoints: bool, members: Index, held: Index) -> tuple[Spectrum, Matrix, Floats, Index]:
        """The spectrum of ``members``, the subsets of ``held`` in its directions, (H, D), the mean subset, (N,), and
        the rows of these members."""
        key = checkpoints, members.tobytes(), held.tobytes()
        if key not in self._kept:
            stages = self.losses.stages if checkpoints else self.losses.final().stages
            rows = self._gram.shape[0] - stages.count * stages.members + stages.rows_of(members)
            part = Stages.of(stages.present_TK[:, members])
            spectrum = decompose(self._gram[np.ix_(rows, rows)], part, self.losses.noise_energy)
            block = self._cross[np.ix_(held, rows)] - self._cross[np.ix_(members, rows)].mean(axis=0)
            mean_N = self._inclusion[members].mean(axis=0, dtype=np.float64)
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            self._kept[key] = spectrum, part.centre(block.T).T @ spectrum.u_RD, mean_N, rows
        return self._kept[key]

    def _predict_weighted(
        self, candidates: Sequence[Candidate], members: Index, held: Index
    ) -> list[NDArray[np.float64]]:
        """As `predict`, with pairs weighted: through all N x M of them, in float32, which is enough to judge by."""
        spectrum, _, mean_N, rows = self._decomposed(candidates[0][1].checkpoints, members, held)
        alike: dict[tuple[object, ...], list[int]] = {}
        for i, (name, setting) in enumerate(candidates):
            alike.setdefault((name, replace(setting, shrinkage=None, prior=0.0)), []).append(i)
        filtered = [self._filtered(candidates[own[0]], members, held)[:2] for own in alike.values()]
        count, tests = self._train.shape[1], self.target_KM.shape[1]
        weight_HN = (self._inclusion[held] - mean_N).astype(np.float32)
        total, squares = np.zeros((len(candidates), held.size, tests)), np.zeros((len(candidates), tests))
        u_DR = spectrum.u_RD.T.astype(np.float32)
        for start in range(0, count, step := max(256, _PAIRS // tests)):
            piece = slice(start, start + step)
            a_DN = u_DR @ self._train[rows, piece]
            squares_DN = a_DN * a_DN
            for own, (phi, b_DM) in zip(alike.values(), filtered, strict=True):
                right = (phi[:, None] * b_DM).astype(np.float32)
                score = a_DN.T @ right
                lengths = phi.astype(np.float32) @ squares_DN, (right * b_DM).sum(axis=0).astype(np.float32)
                setting = candidates[own[0]][1]
                shrinkage = Shrinkage.of(1.0, spectrum.w * phi, *lengths)
                if setting.tilt and self.losses.prior_NM is not None:
                    tilt_NM = tilted(self.losses.prior_NM[piece], setting.tilt).astype(np.float32)
                    shrinkage = replace(shrinkage, tilt_NM=tilt_NM)
                square = shrinkage.square(score, _ALL, _ALL)
                most = score * square
                for i in own:
                    weighted = square + np.float32(candidates[i][1].shrinkage)
                    np.divide(most, weighted, out=weighted)
                    total[i] -= weight_HN[:, piece] @ weighted
                    if candidates[i][1].prior:
                        squares[i] += np.square(weighted).sum(axis=0)
        return [
            x + self._prior_part(setting, members, held, square)
            for x, (_, setting), square in zip(total, candidates, squares, strict=True)
        ]

    def _prior_part(self, setting: Setting, members: Index, held: Index, square_M: Floats) -> Floats | float:
        """What the prior adds to predictions, from the sum of squares of each test example's scores."""
        prior_NM = self.losses.prior_NM
        if prior_NM is None or not setting.prior:
            return 0.0
        rms_M = np.sqrt(square_M / prior_NM.shape[0])
        weight = self._inclusion[held] - self._inclusion[members].mean(axis=0, dtype=np.float64)
        return np.asarray(-(weight @ prior_NM) * (setting.prior * rms_M))

    def _predict_by_scores(self, name: str, setting: Setting, members: Index, held: Index) -> NDArray[np.float64]:
        scores = fit(self.losses.members(members), name, setting)
        weight = self._inclusion[held] - self._inclusion[members].mean(axis=0, dtype=np.float64)
        total = np.zeros((held.size, self.target_KM.shape[1]))
        for start in range(0, weight.shape[1], _BLOCK):
            rows = slice(start, start + _BLOCK)
            total -= weight[:, rows] @ scores.inner(rows, _ALL)
        return total


def folds(members: int, count: int = FOLDS) -> list[tuple[Index, Index]]:
    """Members of each fold and all others. The split is round-robin and depends on nothing but K."""
    fold = np.arange(members) % min(count, members)
    return [(np.flatnonzero(fold == f), np.flatnonzero(fold != f)) for f in range(int(fold.max()) + 1)]


def column_spearman(x_SM: ArrayLike, y_SM: ArrayLike) -> NDArray[np.float64]:
    """(M,) Spearman correlation of matching columns; 0 for a constant column, NaN with fewer than 3 rows."""
    from scipy.stats import rankdata  # slow to import

    x, y = (rankdata(np.asarray(v, dtype=np.float64), axis=0) for v in (x_SM, y_SM))
    return np.asarray(weighted_correlation(x, y, np.ones((1, x.shape[0])))[0])


def weighted_correlation(x_SM: Floats, y_SM: Floats, weight_DS: Floats) -> NDArray[np.float64]:
    """(D, M) Pearson correlation of columns under each row of weights; NaN with fewer than 3 rows, 0 if constant."""
    if x_SM.shape[0] < 3:
        return np.full((weight_DS.shape[0], x_SM.shape[1]), np.nan)
    middle = (x_SM.shape[0] + 1) / 2  # of ranks; keeps the sums of squares small
    x, y = x_SM - middle, y_SM - middle
    total = np.maximum(weight_DS.sum(axis=1, keepdims=True), 1e-300)
    mean_x, mean_y = weight_DS @ x / total, weight_DS @ y / total
    cross = weight_DS @ (x * y) / total - mean_x * mean_y
    scale = (weight_DS @ (x * x) / total - mean_x**2) * (weight_DS @ (y * y) / total - mean_y**2)
    good = scale > 1e-9 * np.maximum(total, 1)
    return np.asarray(np.where(good, cross / np.sqrt(np.where(good, scale, 1.0)), 0.0))
