"""Which tokens carry a pair's score: those of the answer and those of the training example.

Every estimator is ``a_i^T W b_j`` with W (K, K), a the centred training losses and b the test losses (`correlation`
divides by both norms, and a score that is shrunk towards zero has a weight). An example's loss is the mean or sum over
its tokens (of losses or margins), so a pair's score is a sum over the tokens of either side, exactly. Where test losses
are taken on the log scale, ``f(l_k) - f(mean l)`` is split over the answer's tokens in proportion to each token's share
of ``l_k - mean l``, member by member, which keeps the sum exact.
`inclusion` does not look at training losses: there only the answer's side can be split.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .. import core
from ..core.estimators import stabilized
from ..core.losses import token_losses
from ..core.rows import centered
from .labels import Side
from .measurements import Measurements

Floats = NDArray[np.float64]


class Split:
    """The scores of an attribution, split over tokens.

    Attributes:
        why: why they cannot be; "" where they can.
        why_not_train: why the training side cannot; "" where it can.
        final_only: the scores also use earlier checkpoints, of which tokens are not kept: what is split is the score of
            the same estimator on the final models.
    """

    def __init__(self, attribution: Measurements) -> None:
        self._attribution = attribution
        choice = attribution.choice
        self.final_only = attribution.earlier is not None and choice.setting.checkpoints
        # A correlation is a covariance over two norms, which all tokens share.
        self._correlation = choice.estimator.name == "correlation"
        self._setting = choice.setting
        losses = attribution.losses.final()
        self._train_KN, self._test_KM = (x.astype(np.float64) for x in (losses.train_KN, losses.test_KM))
        self._losses = losses
        self._places = [{int(i): n for n, i in enumerate(kept)} for kept in (losses.kept_N, losses.kept_M)]
        self.why = "" if "test" in attribution.tokens else "token log-probabilities of the answers were not kept"
        if choice.estimator.name == "inclusion":
            self.why_not_train = "inclusion does not look at the losses of training examples"
        elif "train" not in attribution.tokens:
            self.why_not_train = "token log-probabilities of the training examples were not kept"
        else:
            self.why_not_train = ""

    def train_parts(self, i: int, j: int) -> Floats:
        """(T,) part of each token of training example i in its score to test example j; they sum to the score."""
        tokens_KT = centered(self._token_losses("train", i))
        return np.asarray(tokens_KT.T @ (self._units.right_RM @ self._test_loss(j)) * self._factor(i, j))

    def test_parts(self, i: int, j: int) -> Floats:
        """(U,) part of each token of test example j in the score of training example i to it; they sum to the score."""
        losses_KU = self._token_losses("test", j)
        tokens_KU, offset = centered(losses_KU), self._setting.log_offset
        if offset is not None:
            loss_K = losses_KU.sum(axis=1)
            away_K = loss_K - loss_K.mean()
            moved_K = stabilized(np.append(loss_K, loss_K.mean())[:, None], offset)[:, 0]
            slope_K = np.divide(
                moved_K[:-1] - moved_K[-1], away_K, out=np.ones_like(away_K), where=np.abs(away_K) > 1e-12
            )
            tokens_KU = tokens_KU * slope_K[:, None]
        return np.asarray(self._left(i) @ self._units.right_RM @ tokens_KU * self._factor(i, j))

    @cached_property
    def _units(self) -> core.Scores:
        """The scores of every training example to K imagined answers, each of which one member alone finds hard: their
        test side is W, centring included."""
        losses, count = self._losses, self._losses.count
        units = replace(
            losses,
            train=(self._train_KN,),
            test=(np.eye(count),),
            kept_M=np.arange(count),
            shape=(losses.shape[0], count),
            prior_NM=None,
        )
        name = "covariance" if self._correlation else self._attribution.choice.estimator.name
        return core.fit(units, name, core.Setting(ridge=self._setting.ridge))

    @cached_property
    def _scores(self) -> core.Scores:
        """The evidence of the final models."""
        if not self.final_only:
            return self._attribution.scored
        return core.fit(self._losses, self._attribution.choice.estimator.name, replace(self._setting, prior=0.0))

    def _token_losses(self, side: Side, position: int) -> Floats:
        """(K, T) losses of an example's tokens, which sum to the example's loss."""
        reduction = self._attribution.loss
        loss_KT = token_losses(self._attribution.tokens[side].logprobs[position][self._losses.kept_K], reduction)
        return np.asarray(loss_KT / (1 if reduction == "sum" else loss_KT.shape[1]))

    def _left(self, i: int) -> Floats:
        """(K,) what the estimator takes from the training example."""
        return np.asarray(self._units.left_RN[:, self._places[0][i]])

    def _test_loss(self, j: int) -> Floats:
        return stabilized(self._test_KM[:, [self._places[1][j]]], self._setting.log_offset)[:, 0]

    def _factor(self, i: int, j: int) -> float:
        """What the product of both sides is multiplied by: the pair's weight where scores are shrunk towards zero, what
        makes a correlation of a covariance, or 1."""
        if self._setting.shrinkage is not None:
            row, column = (slice(place, place + 1) for place in (self._places[0][i], self._places[1][j]))
            weights = self._scores.shrinkage
            assert weights is not None
            return float(weights.weight(self._scores.product(row, column), row, column)[0, 0])
        if not self._correlation:
            return 1.0
        norms = np.linalg.norm(self._left(i)) * np.linalg.norm(centered(self._test_loss(j)))
        return float((self._losses.count - 1) / norms) if norms else 0.0
