"""The loss matrices of an ensemble, checked once, and which of their rows belong together.

A member without any loss is left out, and so is an example that no member has a loss of: here, and nowhere else. Every
other gap is refused: members that answer different questions are different calls.

STAGES. Losses at earlier checkpoints of the same fine-tunes are further rows of the same matrices: the subset moved
each of those models too, by another mixture of directions, so K members with S earlier checkpoints give up to
(S + 1) (K - 1) directions instead of K - 1. Two things set these rows apart from further members. Every stage of
training is centred over its own members, since losses fall as training goes on. And the rows of one member are not
independent, so whatever leaves members out (folds, jackknife, bootstrap) leaves out all of a member's rows.

Rows are ordered by stage, the final models last, and within a stage by member: row t K + k. A member whose checkpoint
is missing has a row of zeros there, which adds nothing anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigurationError, DataError, NotEnoughMembersError

Floats: TypeAlias = NDArray[Any]  # float32 or float64; NumPy's own float generics do not survive most operations
Mask: TypeAlias = NDArray[np.bool_]
Index: TypeAlias = NDArray[np.int64]
Rho: TypeAlias = float | Literal["base", "unknown"]
"""For members that start from the target, (member's steps x mean learning rate) / (target's steps x mean learning
rate), or "unknown" where the recipes do not say; "base" for members that are trained like the target."""


@dataclass(frozen=True, eq=False)
class Checkpoints:
    """Losses of the same K members at S earlier checkpoints of their training, the final models not among them.

    A checkpoint of a member counts if it has every loss that the final models have; otherwise this stage is left out
    for this member, whose other rows stay.

    Attributes:
        train_loss_SKN: (S, K, N) loss of training example i under member k at checkpoint s, nats, ascending in training
            time; NaN = missing.
        test_loss_SKM: (S, K, M) loss of test example j, nats; NaN = missing.

    Raises:
        DataError: the shapes do not belong together.
    """

    train_loss_SKN: Floats
    test_loss_SKM: Floats

    def __post_init__(self) -> None:
        train, test = np.asarray(self.train_loss_SKN), np.asarray(self.test_loss_SKM)
        if train.ndim != 3 or test.ndim != 3 or train.shape[:2] != test.shape[:2]:
            raise DataError(
                f"Losses at checkpoints must be (S, K, N) and (S, K, M) with the same S checkpoints and K members; got "
                f"{train.shape} and {test.shape}."
            )
        object.__setattr__(self, "train_loss_SKN", train)
        object.__setattr__(self, "test_loss_SKM", test)

    def __len__(self) -> int:
        """S, the number of earlier checkpoints."""
        return int(self.train_loss_SKN.shape[0])

    def members(self, pick: ArrayLike | slice) -> Checkpoints:
        """The same checkpoints of some members only (a slice, indices or a boolean mask)."""
        chosen = pick if isinstance(pick, slice) else np.asarray(pick)
        return Checkpoints(self.train_loss_SKN[:, chosen], self.test_loss_SKM[:, chosen])


@dataclass(frozen=True, eq=False)
class Stages:
    """Which member has a row at which stage of training.

    Attributes:
        present_TK: (T, K) bool, T = S + 1 stages, the final models last.
    """

    present_TK: Mask

    @staticmethod
    def of(present_TK: Mask) -> Stages:
        """Stages with at least two members each; one that a single member reached tells nothing."""
        return Stages(present_TK & (present_TK.sum(axis=1, keepdims=True) >= 2))

    @property
    def count(self) -> int:
        """T, the number of stages."""
        return int(self.present_TK.shape[0])

    @property
    def members(self) -> int:
        """K."""
        return int(self.present_TK.shape[1])

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return int(self.present_TK.sum())

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the rows, sum over stages of (members at that stage - 1): covariance's divisor."""
        return int(np.maximum(self.present_TK.sum(axis=1) - 1, 0).sum())

    def centre(self, rows_RX: Floats) -> Floats:
        """Rows less the mean of their stage; missing ones are zero. The dtype is kept, the mean taken in float64."""
        return np.concatenate([self.centre_stage(t, x) for t, x in enumerate(np.split(rows_RX, self.count))])

    def centre_stage(self, stage: int, loss_KX: Floats) -> Floats:
        """One stage of `centre`."""
        present = self.present_TK[stage]
        if present.all():
            return centered(loss_KX)
        out = np.zeros_like(loss_KX)
        if present.any():
            out[present] = centered(loss_KX[present])
        return out

    def rows_of(self, members: Index) -> Index:
        """Indices of all rows of some members, by stage."""
        return np.asarray((np.arange(self.count)[:, None] * self.members + members).ravel())

    def left_out(self) -> NDArray[np.float64]:
        """(R,) what a row's product counts for in a covariance when its member is left out.

        With D degrees of freedom: K_t / ((K_t - 1) (D - n_k)) for one of the n_k rows of member k, at a stage with K_t
        members.
        """
        rest = np.maximum(self.freedom - self.present_TK.sum(axis=0), 1)
        return np.asarray((self.inflation().reshape(self.present_TK.shape) / rest).ravel())

    def inflation(self) -> NDArray[np.float64]:
        """(R,) K_t / (K_t - 1): by how much more than its square a deviation shortens its column when left out."""
        size = self.present_TK.sum(axis=1, keepdims=True)
        return np.where(self.present_TK, size / np.maximum(size - 1, 1), 0.0).ravel()

    def by_member(self, rows_RX: Floats) -> Floats:
        """(K, P, X) view of one or more sets of rows below each other, the rows of a member together."""
        return rows_RX.reshape(-1, self.members, rows_RX.shape[1]).swapaxes(0, 1)


def centered(loss_KX: Floats) -> Floats:
    """Columns less their mean over members; the dtype is kept, the mean is taken in float64."""
    mean = loss_KX.mean(axis=0, dtype=np.float64)
    return np.asarray(loss_KX - mean.astype(loss_KX.dtype))


def stacked(stages_KX: Sequence[Floats]) -> Floats:
    """Rows of all stages below each other; no copy of a single stage."""
    return stages_KX[0] if len(stages_KX) == 1 else np.concatenate(stages_KX)


@dataclass(frozen=True, eq=False)
class MemberLosses:
    """Complete losses of the members and examples that can be used, all of one floating type.

    Attributes:
        train, test: T = S + 1 stages of (K, N) and (K, M) losses in nats, the final models last.
        inclusion_KN: (K, N) bool or multiplicities, or None when unknown.
        stages: which member has a row at which stage.
        kept_K, kept_N, kept_M: these members, training and test examples among those that were given.
        shape: how many training and test examples were given.
        noise: standard deviation of the scoring noise of one loss, nats; None: not measured.
        rho: see `Rho`.
        prior_NM: what is known of the pairs before any member is trained, higher = more related, columns of mean 0 and
            variance 1 (0 where constant); or None.
    """

    train: tuple[Floats, ...]
    test: tuple[Floats, ...]
    inclusion_KN: Floats | None
    stages: Stages
    kept_K: Index
    kept_N: Index
    kept_M: Index
    shape: tuple[int, int]
    noise: float | None = None
    rho: Rho = "base"
    prior_NM: Floats | None = None

    @property
    def train_KN(self) -> Floats:
        """(K, N) training losses of the final models."""
        return self.train[-1]

    @property
    def test_KM(self) -> Floats:
        """(K, M) test losses of the final models."""
        return self.test[-1]

    @property
    def count(self) -> int:
        """K."""
        return int(self.train_KN.shape[0])

    @property
    def noise_energy(self) -> float:
        """Sum over training examples of the noise variance, nats^2: what noise adds to every eigenvalue."""
        return float(self.train_KN.shape[1] * (self.noise or 0.0) ** 2)

    @cached_property
    def dispersion(self) -> float:
        """See `inclusion_dispersion`, of a known inclusion matrix."""
        assert self.inclusion_KN is not None
        return inclusion_dispersion(self.inclusion_KN)

    def train_rows(self) -> Floats:
        """(R, N) training losses, each stage centred over its members."""
        return stacked([self.stages.centre_stage(t, x) for t, x in enumerate(self.train)])

    def final(self) -> MemberLosses:
        """The final models alone."""
        return replace(self, train=self.train[-1:], test=self.test[-1:], stages=Stages(self.stages.present_TK[-1:]))

    def members(self, pick: Index) -> MemberLosses:
        """Some of the members."""
        return replace(
            self,
            train=tuple(x[pick] for x in self.train),
            test=tuple(x[pick] for x in self.test),
            inclusion_KN=None if self.inclusion_KN is None else self.inclusion_KN[pick],
            stages=Stages.of(self.stages.present_TK[:, pick]),
            kept_K=self.kept_K[pick],
        )

    def tests(self, columns: Sequence[int] | Index) -> MemberLosses:
        """Some test examples, by their position among all that were given."""
        place = np.full(self.shape[1], -1)
        place[self.kept_M] = np.arange(self.kept_M.size)
        inner = place[np.asarray(columns, dtype=np.int64)]
        kept = np.flatnonzero(inner >= 0)
        return replace(
            self,
            test=tuple(x[:, inner[kept]] for x in self.test),
            kept_M=kept,
            shape=(self.shape[0], inner.size),
            prior_NM=None if self.prior_NM is None else self.prior_NM[:, inner[kept]],
        )


def member_losses(
    train_loss_KN: ArrayLike,
    test_loss_KM: ArrayLike,
    inclusion_KN: ArrayLike | None = None,
    *,
    noise: float | None = None,
    rho: Rho = "base",
    earlier: Checkpoints | None = None,
    prior_NM: ArrayLike | None = None,
) -> MemberLosses:
    """Check the loss matrices; leave out members that have no losses and examples that nobody has a loss of.

    Args:
        train_loss_KN: (K, N) losses in nats, NaN = missing. float32 stays float32 if both matrices are.
        test_loss_KM: (K, M) losses in nats, NaN = missing.
        inclusion_KN: (K, N) whether example i is in member k's subset (bool), or how often (bootstrap subsets).
        noise, rho: see `MemberLosses`.
        prior_NM: (N, M) similarity of any scale, or None.
        earlier: losses of the same K members at earlier checkpoints of their training.

    Raises:
        DataError: wrong shapes, infinite losses, NaN in the inclusion matrix, or an example that some of the members
            have a loss of and others have not.
        NotEnoughMembersError: fewer than two members have losses.
        ConfigurationError: noise or rho that cannot be.
    """
    train, test = np.asarray(train_loss_KN), np.asarray(test_loss_KM)
    dtype = np.float32 if train.dtype == test.dtype == np.float32 else np.float64
    train, test = train.astype(dtype, copy=False), test.astype(dtype, copy=False)
    if train.ndim != 2 or test.ndim != 2 or train.shape[0] != test.shape[0] or 0 in train.shape + test.shape:
        raise DataError(
            f"Losses must be (K, N) and (K, M) with the same K members, none empty; got {train.shape} and {test.shape}."
        )
    shape = (train.shape[1], test.shape[1])
    inclusion = _checked_inclusion(inclusion_KN, train.shape)
    gaps = _gaps(train, "training"), _gaps(test, "test")
    silent = [np.zeros(train.shape[0], dtype=np.bool_), *(g.all(axis=1) for g in gaps if g is not None)]
    members = np.flatnonzero(~np.any(silent, axis=0))
    if members.size < 2:
        raise NotEnoughMembersError(
            f"Scores need at least 2 members with training and test losses; {members.size} of {train.shape[0]} have "
            "them. What is scored is kept; score more members and repeat."
        )
    rows, columns = (
        np.arange(count) if gap is None else _complete_columns(gap[members], name)
        for gap, count, name in zip(gaps, shape, ("training", "test"), strict=True)
    )
    given = (train.shape[0], *shape)
    pick = [slice(None) if x.size == n else x for x, n in zip((members, rows, columns), given, strict=True)]
    train, test = train[pick[0]][:, pick[1]], test[pick[0]][:, pick[2]]
    stages = np.ones((1, members.size), dtype=np.bool_)
    sides: tuple[tuple[Floats, ...], tuple[Floats, ...]] = ((train,), (test,))
    if earlier is not None and len(earlier):
        stages, sides = _with_earlier(earlier, given, pick, (train, test), stages)
    return MemberLosses(
        *sides,
        None if inclusion is None else inclusion[pick[0]][:, pick[1]],
        Stages.of(stages),
        members,
        rows,
        columns,
        shape,
        _checked_noise(noise),
        _checked_rho(rho),
        _checked_prior(prior_NM, shape, rows, columns),
    )


def _checked_inclusion(inclusion_KN: ArrayLike | None, shape: tuple[int, ...]) -> Floats | None:
    if inclusion_KN is None:
        return None
    inclusion = np.asarray(inclusion_KN)
    if inclusion.shape != shape:
        raise DataError(f"Inclusion has shape {inclusion.shape}, training losses {shape}; they must agree.")
    if inclusion.dtype.kind == "f" and not np.isfinite(inclusion).all():
        raise DataError("The inclusion matrix has NaN or infinite entries; which example was in which subset is known.")
    return inclusion


def inclusion_dispersion(inclusion_KN: Floats) -> float:
    """var(inclusion) / r^2 within members, r being the mean: (1 - r) / r for subsets of ratio r, about 1 / r for
    bootstrap subsets. Where examples are weighed by noise, whose mean says nothing, r is the share that has a weight:
    an objective is a mean over its examples.

    Raises:
        DataError: no example was in a subset, or all of them in all.
    """
    counts = inclusion_KN.dtype.kind != "f" or bool((inclusion_KN == np.rint(inclusion_KN)).all())
    mean = float(inclusion_KN.mean(dtype=np.float64) if counts else (inclusion_KN != 0).mean())
    if mean <= 0:
        raise DataError("Every subset is empty: no member was trained on any example.")
    within = float(np.mean([np.var(row, dtype=np.float64) for row in inclusion_KN]))
    if within <= 0:
        raise DataError(
            "Every member was trained on every example: subsets of the training set are what attribution reads."
        )
    return within / mean**2


def _checked_noise(noise: float | None) -> float | None:
    if noise is not None and not (np.isfinite(noise) and noise >= 0):
        raise ConfigurationError("Scoring noise is a standard deviation in nats: finite and not negative.")
    return None if noise is None else float(noise)


def _checked_prior(prior_NM: ArrayLike | None, shape: tuple[int, int], rows: Index, columns: Index) -> Floats | None:
    if prior_NM is None:
        return None
    prior = np.asarray(prior_NM, dtype=np.float64)
    if prior.shape != shape or not np.isfinite(prior).all():
        raise DataError(f"The prior has shape {prior.shape}; it must be {shape}, finite, one number for each pair.")
    whole = (len(rows), len(columns)) == shape
    prior = centered(prior if whole else prior[np.ix_(rows, columns)])
    spread = prior.std(axis=0)
    prior /= np.where(spread > 0, spread, np.inf)
    return prior


def _checked_rho(rho: Rho) -> Rho:
    if rho in ("base", "unknown") or (not isinstance(rho, str) and np.isfinite(rho) and rho > 0):
        return rho
    raise ConfigurationError(
        f'rho is a positive ratio of learning-rate times, "base" for members that are trained like the target, or '
        f'"unknown"; not {rho!r}.'
    )


def _gaps(loss_KX: Floats, name: str) -> Mask | None:
    """(K, X) which losses are missing; None where none is, so that a huge matrix needs no mask of its size."""
    if np.isfinite(loss_KX.sum(dtype=np.float64)):  # one pass; NaN and inf both survive a sum
        return None
    infinite = np.flatnonzero([np.isinf(row).any() for row in loss_KX])
    if infinite.size:
        raise DataError(
            f"Member {infinite[0]} has infinite {name} losses. A probability of zero is usually a cut-off list: mark "
            "the entry as missing (NaN) or give its lower bound and resolve_censored()."
        )
    return np.isnan(loss_KX)


def _complete_columns(gap_KX: Mask, name: str) -> Index:
    """Examples that some member has a loss of, where all have."""
    some = ~gap_KX.all(axis=0)
    partial = np.flatnonzero(some & gap_KX.any(axis=0))
    if partial.size:
        raise DataError(
            f"{partial.size} {name} examples, the first of them number {partial[0]}, have losses of some members only. "
            "Scores compare members on the same examples: leave these examples out, or ask about them in a call of "
            "its own, with the members that have them."
        )
    return np.flatnonzero(some)


def _with_earlier(
    earlier: Checkpoints,
    count: tuple[int, int, int],
    pick: list[Any],
    final: tuple[Floats, Floats],
    stages: Mask,
) -> tuple[Mask, tuple[tuple[Floats, ...], tuple[Floats, ...]]]:
    """All stages in the type of the final losses, and (T, K) which rows count; zeros in the others."""
    given = earlier.train_loss_SKN, earlier.test_loss_SKM
    for name, loss, examples in zip(("training", "test"), given, count[1:], strict=True):
        if loss.shape[1:] != (count[0], examples):
            raise DataError(
                f"Checkpoints have {name} losses {loss.shape[1:]} at each stage, the final models "
                f"{(count[0], examples)}; they are of the same members and examples, and a member without checkpoints "
                "has NaN there."
            )
    present = np.ones((len(earlier), final[0].shape[0]), dtype=np.bool_)
    parts = []
    for loss, columns, like in zip(given, pick[1:], final, strict=True):
        part = loss[:, pick[0]][:, :, columns].astype(like.dtype, copy=False)
        for s, k in np.argwhere(np.isinf(part).any(axis=2))[:1]:
            raise DataError(f"Checkpoint {s} of member {k} has infinite losses. Mark such entries as missing (NaN).")
        present &= ~np.isnan(part).any(axis=2)
        parts.append(part)
    sides = [(*np.where(present[:, :, None], p, 0), x) for p, x in zip(parts, final, strict=True)]
    return np.concatenate([present, stages]), (sides[0], sides[1])
