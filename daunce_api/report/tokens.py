"""Which tokens carry a pair's score: those of the answer and those of the training example.

Every estimator is ``a_i^T W b_j`` with W (K, K), a the centred training losses and b the test losses (`correlation`
divides by both norms). An example's loss is the mean or sum over its tokens (of losses or margins), so a pair's score
is a sum over the tokens of either side, exactly. Where test losses are taken on the log scale, ``f(l_k) - f(mean l)``
is split over the answer's tokens in proportion to each token's share of ``l_k - mean l``, member by member, which keeps
the sum exact.
`inclusion` does not look at training losses: there only the answer's side can be split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from daunce_api import core
from daunce_api.attribution import Attribution, Side, TokenTable
from daunce_api.core.checkpoints import centred
from daunce_api.core.losses import token_losses
from daunce_api.core.spectrum import stabilised
from daunce_api.report.spelling import Spelling, spell

DEPTH = 10
MAX_PARTS = 2_000_000
"""Token parts that the page carries at most, one byte each: with long texts, fewer pairs have them."""

_SIDES: tuple[Side, Side] = ("test", "train")

Floats = NDArray[np.float64]
Index = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SideParts:
    """Parts of the pairs of one sign: for each of M answers its first ``depth`` training examples.

    Attributes:
        test, train: int8, pair after pair, each over the units of its answer (training example); 127 = the largest of
            the pair. No entries for pairs that do not exist, none in ``train`` for an estimator without that side.
        test_edges, train_edges: (M * depth + 1,) where each pair's begin.
        scale: (M * depth, 3) in units of the score: the largest part of the answer and of the training example, and the
            sum of a pair's parts.
    """

    test: NDArray[np.int8]
    train: NDArray[np.int8]
    test_edges: Index
    train_edges: Index
    scale: Floats


@dataclass(frozen=True, eq=False)
class TokenView:
    """Everything about tokens that the page shows.

    Attributes:
        depth: pairs with parts, per answer and sign; 0 = none, and ``why`` says so.
        spelled: by side and position, how tokens spell a text: of all listed answers, and of every training example in
            a pair with parts.
        loss: by position of the answer, mean loss of each unit over members, nats.
        proponents, opponents: the parts; None at depth 0.
        why: why there are no parts on one or both sides; "" where there are.
        final_only: see `Split`.
    """

    depth: int
    spelled: dict[Side, dict[int, Spelling]]
    loss: dict[int, Floats]
    proponents: SideParts | None
    opponents: SideParts | None
    why: str
    final_only: bool = False


def token_view(
    attribution: Attribution, columns: list[int], proponents_Mk: Index, opponents_Mk: Index
) -> TokenView | None:
    """Token parts of the first pairs of each listed answer; None without token log-probabilities of the answers."""
    test, train = (attribution.tokens.get(side) for side in ("test", "train"))
    if test is None:
        return None
    answers = {j: spell(test.pieces[j], attribution.test[j].completion_text()) for j in columns}
    loss = {j: _unit_losses(test, j, answers[j]) for j in columns}
    split = Split(attribution)
    if split.why:
        return TokenView(0, {"test": answers, "train": {}}, loss, None, None, split.why)
    both = train if split.has_train else None
    depth = _depth(columns, (proponents_Mk, opponents_Mk), test, both)
    why = "" if depth else "the texts are too long for a page of this size"
    if depth and both is None:
        why = (
            "token log-probabilities of the training examples were not kept"
            if split.has_train
            else f"{attribution.choice.estimator.name} does not look at the losses of training examples"
        )
    shown = np.unique(np.concatenate([x[:, :depth].ravel() for x in (proponents_Mk, opponents_Mk)]))
    examples = {
        int(i): spell(both.pieces[i], attribution.train[int(i)].completion_text())
        for i in shown[shown >= 0]
        if both is not None
    }
    spelled: dict[Side, dict[int, Spelling]] = {"test": answers, "train": examples}
    if not depth:
        return TokenView(0, spelled, loss, None, None, why)
    proponents, opponents = (
        _side_parts(split, columns, x[:, :depth], depth, spelled) for x in (proponents_Mk, opponents_Mk)
    )
    return TokenView(depth, spelled, loss, proponents, opponents, why, split.final_only)


class Split:
    """The scores of an attribution, split over tokens.

    Attributes:
        why: why they cannot be; "" where they can.
        has_train: whether the training side can be split too.
        final_only: the scores also use earlier checkpoints, of which tokens are not kept: what is split is the score of
            the same estimator on the final models.
    """

    def __init__(self, attribution: Attribution) -> None:
        self._attribution = attribution
        choice = attribution.choice
        self.final_only = attribution.earlier is not None and choice.setting.checkpoints
        self._correlation = choice.estimator.name == "correlation"
        # A correlation is a covariance over two norms, which all tokens share.
        self._estimator = core.ESTIMATORS["covariance"] if self._correlation else choice.estimator
        self._setting = replace(choice.setting, log_offset=None)
        self._offset = choice.setting.log_offset
        self._members = core.member_losses(
            attribution.train_loss_KN, attribution.test_loss_KM, attribution.inclusion_KN
        )
        self._whole_N = np.asarray(np.isfinite(self._members.train_KN).all(axis=0))
        whole_M = np.asarray(np.isfinite(self._members.test_KM).all(axis=0))
        # An example that nobody has scored has no pairs; one that some have scored makes every pair a case of its own.
        gaps = any(
            (np.isfinite(loss).any(axis=0) & ~whole).any()
            for loss, whole in ((self._members.train_KN, self._whole_N), (self._members.test_KM, whole_M))
        )
        self.why = "some members have not scored every example" if gaps or not self._whole_N.any() else ""
        self.has_train = choice.estimator.name != "inclusion"

    def train_parts(self, i: int, j: int) -> Floats:
        """(T,) part of each token of training example i in its score to test example j; they sum to the score."""
        tokens_KT = centred(self._losses("train", i))
        return np.asarray(tokens_KT.T @ (self._map_KK @ self._test_loss(j)) * self._factor(i, j))

    def test_parts(self, i: int, j: int) -> Floats:
        """(U,) part of each token of test example j in the score of training example i to it; they sum to the score."""
        losses_KU = self._losses("test", j)
        tokens_KU = centred(losses_KU)
        if self._offset is not None:
            loss_K = losses_KU.sum(axis=1)
            away_K = loss_K - loss_K.mean()
            moved_K = stabilised(np.append(loss_K, loss_K.mean())[:, None], self._offset)[:, 0]
            slope_K = np.divide(
                moved_K[:-1] - moved_K[-1], away_K, out=np.ones_like(away_K), where=np.abs(away_K) > 1e-12
            )
            tokens_KU = tokens_KU * slope_K[:, None]
        return np.asarray(self._left(i) @ self._map_KK @ tokens_KU * self._factor(i, j))

    @cached_property
    def _map_KK(self) -> Floats:
        """W: what the estimator makes of a test column, one column for each member; centring included."""
        return np.asarray(self._factors.right_RM)

    @cached_property
    def _factors(self) -> core.Factors:
        members = self._members
        columns = replace(
            members,
            train_KN=members.train_KN[:, self._whole_N].astype(np.float64),
            test_KM=np.eye(members.count),
            inclusion_KN=None if members.inclusion_KN is None else members.inclusion_KN[:, self._whole_N],
            complete=True,
        )
        return self._estimator.factorise(columns, self._setting)

    def _losses(self, side: Side, position: int) -> Floats:
        """(K, T) losses of an example's tokens, which sum to the example's loss."""
        reduction = self._attribution.loss
        loss_KT = token_losses(self._attribution.tokens[side].logprobs[position][self._members.kept], reduction)
        return np.asarray(loss_KT / (1 if reduction == "sum" else loss_KT.shape[1]))

    def _left(self, i: int) -> Floats:
        """(K,) what the estimator takes from the training example."""
        return np.asarray(self._factors.left_RN[:, int(self._whole_N[:i].sum())])

    def _test_loss(self, j: int) -> Floats:
        return stabilised(self._members.test_KM[:, [j]].astype(np.float64), self._offset)[:, 0]

    def _factor(self, i: int, j: int) -> float:
        """1, and for correlations what makes one of a covariance."""
        if not self._correlation:
            return 1.0
        norms = np.linalg.norm(self._left(i)) * np.linalg.norm(centred(self._test_loss(j)))
        return float((self._members.count - 1) / norms) if norms else 0.0


def _depth(columns: list[int], indices: tuple[Index, ...], test: TokenTable, train: TokenTable | None) -> int:
    """How many pairs of each answer and sign have parts, so that all of them fit the page."""
    count_M = np.array([len(test.pieces[j]) for j in columns])
    per_place = np.zeros(DEPTH)
    for index_Mk in indices:
        near = index_Mk[:, :DEPTH]
        size = np.where(near >= 0, count_M[:, None], 0)
        if train is not None:
            count_N = np.array([len(pieces) for pieces in train.pieces])
            size = size + np.where(near >= 0, count_N[near], 0)
        per_place[: near.shape[1]] += size.sum(axis=0)
    return int((np.cumsum(per_place) <= MAX_PARTS).sum())


def _side_parts(
    split: Split, columns: list[int], index_Mk: Index, depth: int, spelled: dict[Side, dict[int, Spelling]]
) -> SideParts:
    flat: dict[Side, list[NDArray[np.int8]]] = {"test": [], "train": []}
    scale = np.zeros((len(columns) * depth, 3))
    for m, j in enumerate(columns):
        for place in range(depth):
            i = int(index_Mk[m, place]) if place < index_Mk.shape[1] else -1
            for s, side in enumerate(_SIDES):
                position = j if side == "test" else i
                if i < 0 or position not in spelled[side]:
                    flat[side].append(np.zeros(0, np.int8))
                    continue
                part = split.test_parts(i, j) if side == "test" else split.train_parts(i, j)
                scale[m * depth + place, 2] = part.sum()
                part = np.add.reduceat(part, spelled[side][position].starts)
                largest = float(np.abs(part).max())
                scale[m * depth + place, s] = largest
                flat[side].append(np.round(127 * part / (largest or 1.0)).astype(np.int8))
    edges = {side: np.cumsum([0, *(len(x) for x in parts)]).astype(np.int64) for side, parts in flat.items()}
    test, train = (np.concatenate(flat[side]) for side in ("test", "train"))
    return SideParts(test, train, edges["test"], edges["train"], scale)


def _unit_losses(table: TokenTable, j: int, spelling: Spelling) -> Floats:
    """Mean loss over members, summed over the tokens of each unit."""
    loss_KT = -table.logprobs[j]
    seen = np.isfinite(loss_KT)
    mean = np.where(seen, loss_KT, 0).sum(axis=0) / np.maximum(seen.sum(axis=0), 1)
    return np.asarray(np.add.reduceat(mean, spelling.starts))
