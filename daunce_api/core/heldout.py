"""Predictions for held-out members, at the cost of K x K matrices.

A filter estimator fitted on some members predicts the test losses of another member k from its inclusion row:
``-(m_k - mean m) @ score = -[(m_k - mean m) A^T] U phi(w) U^T B``. Everything about the N training examples enters
through two matrices, A A^T (R x R) and (inclusion) A^T (K x R), which are computed once; a fold, a half or a bootstrap
is then a sub-block of them. Judging twenty filters on ten folds costs about as much as one. Where pairs are weighted
(`shrinkage`) all N x M of them are gone through instead, so that fewer test examples are judged by
(`some_tests`).

With earlier checkpoints a member's rows go together: all of them are fitted on, or none, and what is predicted are the
test losses of its final model.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigurationError
from .blocks import score_blocks
from .checkpoints import Floats, centred, stacked
from .estimators import Estimator
from .members import MemberLosses
from .shrinkage import directions, shrinkage_of
from .spectrum import Matrix, Setting, Spectrum, Vector, centred_gram, decompose, inclusion_dispersion, stabilised

Candidate = tuple[Estimator, Setting]
Members = NDArray[np.int64]
_BLOCK = 16_384
_ALL = slice(None)
_KEPT_BYTES = 2**27


class HeldOut:
    """Fits estimators on some members and predicts others.

    A missing loss counts as its example's mean here, whatever the estimator does with it in scores: to judge by, that
    is enough, and it costs nothing.

    Attributes:
        members: the losses.
        target_KM: what predictions are compared with: the test losses of the final models as measured.
    """

    def __init__(self, members: MemberLosses) -> None:
        if members.inclusion_KN is None:
            raise ConfigurationError("Held-out members are predicted from their subsets: pass inclusion_KN.")
        self.members = members
        self.target_KM: Floats = members.test_KM
        self._inclusion = members.inclusion_KN
        self._stages = members.stages
        whole = members.complete and self._stages.present_TK.all()
        self._train, self._test = (
            side if whole else tuple(_at_mean(x) for x in side) for side in (members.train_stages, members.test_stages)
        )
        gram, cross, self._overlap = self._multiply()
        self._products = gram, cross
        self._dispersion = inclusion_dispersion(self._inclusion)
        self._kept: dict[tuple[bool, bytes, bytes], tuple[Spectrum, Matrix]] = {}

    def _multiply(self) -> tuple[Matrix, Matrix, Matrix]:
        count, examples = self.members.train_KN.shape
        rows = self._stages.count * count
        gram, cross, overlap = np.zeros((rows, rows)), np.zeros((count, rows)), np.zeros((count, count))
        for start in range(0, examples, _BLOCK):
            piece = slice(start, start + _BLOCK)
            a = self._stages.centre(np.concatenate([x[:, piece].astype(np.float64) for x in self._train]))
            gram += a @ a.T
            included = centred(self._inclusion[:, piece].astype(np.float64))
            cross += included @ a.T
            overlap += included @ included.T
        return gram, cross, overlap

    def explained(self) -> tuple[float, float]:
        """Share of the test losses' variance that subsets explain linearly, and its standard error.

        Haseman and Elston's regression (1972): over pairs of members, the product of their standardised test losses,
        mean over test examples, against the overlap of their subsets, scaled so that a member's with itself is 1.
        Luck of training and scoring noise are no part of it. The error takes pairs to be independent.
        """
        count = self.members.count
        overlap = self._overlap - self._overlap.mean(axis=1, keepdims=True)
        overlap = overlap - overlap.mean(axis=0)
        b = centred(self._test[-1].astype(np.float64))
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

    def predict(self, candidates: Sequence[Candidate], fit: Members, held: Members) -> list[NDArray[np.float64]]:
        """Test losses of members ``held`` (H, M), predicted with scores from members ``fit``, for each candidate.

        The scale and offset of a prediction are the estimator's own; only its order over members carries meaning.
        """
        fits: dict[bool, tuple[Spectrum, Matrix]] = {}
        out: list[NDArray[np.float64] | None] = []
        weighted: list[tuple[int, Estimator, Setting]] = []
        for estimator, setting in candidates:
            if estimator.filter is None:
                out.append(self._predict_by_blocks(estimator, setting, fit, held))
                continue
            if setting.checkpoints not in fits:
                fits[setting.checkpoints] = self._fit(setting.checkpoints, fit, held)
            if setting.shrinkage is not None:
                weighted.append((len(out), estimator, setting))
                out.append(None)
                continue
            spectrum, projected = fits[setting.checkpoints]
            phi, b_DM = self._filtered(spectrum, estimator, setting, fit)
            out.append(-(projected * phi) @ b_DM)
        for checkpoints, (spectrum, _) in fits.items():
            some = [w for w in weighted if w[2].checkpoints == checkpoints]
            for (place, *_), predicted in zip(some, self._predict_weighted(spectrum, some, fit, held), strict=True):
                out[place] = predicted
        return [x for x in out if x is not None]

    def _filtered(
        self, spectrum: Spectrum, estimator: Estimator, setting: Setting, fit: Members
    ) -> tuple[Vector, NDArray[np.float64]]:
        """A filter's phi (D,), and the test losses in the directions of the spectrum, (D, M)."""
        assert estimator.filter is not None
        phi = estimator.filter(spectrum.with_noise(setting.noise_energy(self.members.train_KN.shape[1])), setting)
        tests = self._test if setting.checkpoints else self._test[-1:]
        b = spectrum.stages.centre(stacked([stabilised(x, setting.log_offset)[fit] for x in tests]))
        return phi, spectrum.u_RD.T @ b

    def _predict_weighted(
        self, spectrum: Spectrum, some: Sequence[tuple[int, Estimator, Setting]], fit: Members, held: Members
    ) -> list[NDArray[np.float64]]:
        """As `predict`, with pairs weighted: through all N x M of them, in float32, which is enough to judge by."""
        alike: dict[tuple[object, ...], list[int]] = {}
        for i, (_, estimator, setting) in enumerate(some):
            alike.setdefault((estimator.name, setting.ridge, setting.log_offset), []).append(i)
        filtered = [self._filtered(spectrum, *some[own[0]][1:], fit) for own in alike.values()]
        u_DR = spectrum.u_RD.T.astype(np.float32)
        weight = (self._inclusion[held] - self._inclusion[fit].mean(axis=0, dtype=np.float64)).astype(np.float32)
        stages = self._train if spectrum.stages.count > 1 else self._train[-1:]
        total = [np.zeros((held.size, self.target_KM.shape[1])) for _ in some]
        for start in range(0, weight.shape[1], _BLOCK):
            piece = slice(start, start + _BLOCK)
            a_DN = u_DR @ spectrum.stages.centre(stacked([x[fit, piece] for x in stages])).astype(np.float32)
            squares_DN = a_DN * a_DN
            for own, (phi, b_DM) in zip(alike.values(), filtered, strict=True):
                right = (phi[:, None] * b_DM).astype(np.float32)
                score = a_DN.T @ right
                lengths = phi.astype(np.float32) @ squares_DN, (right * b_DM).sum(axis=0).astype(np.float32)
                spread = directions(spectrum.w * phi)
                for i in own:
                    shrinkage = shrinkage_of(some[i][2].shrinkage or 1.0, spread, *lengths)
                    total[i] -= weight[:, piece] @ shrinkage.shrunk(score, _ALL, _ALL)
        return total

    def some_tests(self, pairs: int, least: int) -> HeldOut:
        """The same with as many test examples, evenly spread, as make so many pairs, and no fewer than ``least``."""
        count = self.target_KM.shape[1]
        wanted = max(least, pairs // self.members.train_KN.shape[1])
        if wanted >= count:
            return self
        step = slice(None, None, -(-count // wanted))
        part = copy(self)
        part.members, part.target_KM = self.members.columns(test=step), self.target_KM[:, step]
        part._test = tuple(x[:, step] for x in self._test)
        return part

    def spectrum(self, setting: Setting) -> Spectrum:
        """The spectrum of the final models' training losses, of all members."""
        energy = setting.noise_energy(self.members.train_KN.shape[1])
        count = self.members.count
        stages = self.members.final().stages
        final = self._products[0][-count:, -count:]
        return decompose(final, stages=stages, dispersion=self._dispersion, noise_energy=energy)

    def _fit(self, checkpoints: bool, fit: Members, held: Members) -> tuple[Spectrum, Matrix]:
        """The spectrum of members ``fit``, and the subsets of ``held`` in its directions; kept where they take little
        room, since candidates come in several turns."""
        key = checkpoints, fit.tobytes(), held.tobytes()
        if key not in self._kept:
            found = self._decomposed(checkpoints, fit, held)
            if len(self._kept) * found[0].u_RD.nbytes > _KEPT_BYTES:
                return found
            self._kept[key] = found
        return self._kept[key]

    def _decomposed(self, checkpoints: bool, fit: Members, held: Members) -> tuple[Spectrum, Matrix]:
        gram, cross = self._products
        stages = self._stages if checkpoints else self.members.final().stages
        first = gram.shape[0] - stages.count * stages.members
        rows = first + stages.members_rows(fit)
        part = stages.some(fit)
        spectrum = decompose(
            centred_gram(gram[np.ix_(rows, rows)], part), stages=part, dispersion=self._dispersion, noise_energy=0.0
        )
        block = cross[np.ix_(held, rows)] - cross[np.ix_(fit, rows)].mean(axis=0)
        return spectrum, part.centre(block.T).T @ spectrum.u_RD

    def _predict_by_blocks(
        self, estimator: Estimator, setting: Setting, fit: Members, held: Members
    ) -> NDArray[np.float64]:
        blocks = score_blocks(estimator, self.members.rows(fit), setting)
        weight = self._inclusion[held] - self._inclusion[fit].mean(axis=0, dtype=np.float64)
        total = np.zeros((held.size, blocks.shape[1]))
        for start in range(0, blocks.shape[0], _BLOCK):
            rows = slice(start, start + _BLOCK)
            total -= weight[:, rows] @ np.nan_to_num(blocks.block(rows, slice(None)))
        return total

    def folded(
        self, candidates: Sequence[Candidate], folds: int, part: int = 1, turn: int = 0
    ) -> list[NDArray[np.float64]]:
        """(K, M) predictions of every member by members of the other folds, or by one ``part``-th of those.

        The split is round-robin and depends on nothing but K; ``turn`` says which of the parts.
        """
        count = self.members.count
        fold = np.arange(count) % min(folds, count)
        out = [np.full(self.target_KM.shape, np.nan) for _ in candidates]
        for f in range(int(fold.max()) + 1):
            held, rest = np.flatnonzero(fold == f), np.flatnonzero(fold != f)
            rest = rest[(f + turn) % part :: part]
            for filled, predicted in zip(out, self.predict(candidates, rest, held), strict=True):
                filled[held] = predicted
        return out


def _at_mean(loss_KX: Floats) -> Floats:
    """The same losses with missing ones at their column's mean (zero where a column has none)."""
    seen = np.isfinite(loss_KX)
    mean = np.where(seen, loss_KX, 0).sum(axis=0) / np.maximum(seen.sum(axis=0), 1)
    return np.asarray(np.where(seen, loss_KX, mean), loss_KX.dtype)
