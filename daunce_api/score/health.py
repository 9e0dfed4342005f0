"""Whether an endpoint serves the fine-tunes, as far as the members' losses can say: a test with a stated error rate.

An endpoint that answers with one model for all members gives losses that differ by measurement noise alone. So the
members' scatter is compared between two measurements of the same examples: what models really differ by comes back in
the second one, noise does not. With ``x`` and ``y`` the two measurements, centred over K members, ``mean(x * y)``
estimates the variance of the models' own differences, without bias, whatever the noise is.

Alike is said only where this variance is below ``SMALLEST_SIGNAL`` times the noise's by ``DEVIATIONS`` standard errors.
Members that differ by at least that much are stopped wrongly in fewer than 1 of 1,000 runs, looks at 2, 4, 8, ...
members included (tests/score/test_scoring_noise.py simulates it over noise, K and N); smaller differences carry little
attribution and have no such promise.

An endpoint may also answer for a single member with the base model (a gateway that falls back). Every fine-tune's test
shows how far it is from the base; one that is much nearer than the others is compared with the base on examples, and is
found out where its losses are the base's within the noise and the others' are not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .._util.log import logger
from ..attribution import Attribution
from ..attribution.matrices import loss_matrix, repeated
from ..core.losses import Reduction
from ..data.tokenizers import EncodedExample
from ..errors import MembersAlikeError, RejectedError
from ..plan.inputs import TESTS
from ..store import BASE, RunStore
from .client import ScoringClient

Floats = NDArray[np.float64]

SMALLEST_SIGNAL = 0.2
"""Variance over members, as a share of the noise's, from which on a run is never called alike by chance."""
DEVIATIONS = 4.0
REPEATS = 1200
"""Examples to be measured twice of each of the first members where a look at the usual few leaves it open: enough to
tell no signal from ``SMALLEST_SIGNAL`` with two members."""
_SAMPLE = 64
"""Examples by which pairs of members are sorted out before all are compared."""
_CLEAR = 1e-4
"""Probability by chance of a scatter that settles it without further measurements."""

NEAR = 0.2
"""A member this much nearer to the base than the median, on what it generated, is compared with the base's losses."""
BASE_EXAMPLES = 16
"""Training examples of that comparison."""
_SAME, _APART = 3.0, 10.0
"""Standard deviations of the noise within which losses are the base's, and how much farther the others have to be."""

ACCEPTED = "members_alike_accepted"
"""Key in the store: a person has looked at suspect scores and wants them used."""

ROUNDING = 1e-5
"""Nats up to which losses of one model may differ because it answered in other batches."""

Verdict = Literal["differ", "alike", "open"]


@dataclass(frozen=True, slots=True)
class Likeness:
    """What a look at the members gave.

    ``signal``: variance over models as a share of the noise's, ``error`` its standard error (NaN without repeated
    measurements); ``noise``: standard deviation of one loss, nats.
    """

    verdict: Verdict
    signal: float
    error: float
    noise: float


def likeness(first_KR: Floats, again_KR: Floats, loss_KN: Floats) -> Likeness:
    """Look at K members.

    Args:
        first_KR, again_KR: two measurements of R examples, nats.
        loss_KN: every loss, measured once.
    """
    members, repeats = first_KR.shape
    varied = float(np.mean(np.var(loss_KN, axis=0, ddof=1)))
    if repeats == 0:
        verdict: Verdict = "differ" if varied > ROUNDING**2 else "alike"
        return Likeness(verdict, float("nan"), float("nan"), float("nan"))
    noise = float(np.mean((first_KR - again_KR) ** 2) / 2)
    if noise <= ROUNDING**2 or varied <= ROUNDING**2:
        alike = varied <= ROUNDING**2
        return Likeness("alike" if alike else "differ", 0.0 if alike else float("inf"), 0.0, float(np.sqrt(noise)))
    x_KR, y_KR = first_KR - first_KR.mean(axis=0), again_KR - again_KR.mean(axis=0)
    product_R = (x_KR * y_KR).sum(axis=0) / (members - 1) / noise
    signal, freedom = float(product_R.mean()), repeats * (members - 1)
    # As large as it is where the signal is the smallest that counts, or as the examples scatter, whichever is more.
    expected = np.sqrt(((1 + SMALLEST_SIGNAL) ** 2 + SMALLEST_SIGNAL**2) / freedom)
    seen = float(product_R.std(ddof=1) / np.sqrt(repeats)) if repeats > 1 else 0.0
    error = max(float(expected), seen)
    verdict = "open"
    from scipy.special import fdtri  # slow to import

    by_chance = fdtri(loss_KN.shape[1] * (members - 1), repeats * members, 1 - _CLEAR)
    if varied / noise > by_chance or signal - DEVIATIONS * error > 0:
        verdict = "differ"
    elif signal + DEVIATIONS * error < SMALLEST_SIGNAL:
        verdict = "alike"
    return Likeness(verdict, signal, error, float(np.sqrt(noise)))


def check_members_differ(
    loss_KN: Floats,
    models: Sequence[str],
    first_KR: Floats | None = None,
    again_KR: Floats | None = None,
    *,
    numbers: Sequence[int] | None = None,
) -> Verdict:
    """Fine-tunes on different subsets must answer differently; whether these do, or it is open.

    ``loss_KN`` holds per-example losses in nats (NaN where not measured), ``models`` the K model ids, ``first_KR`` and
    ``again_KR`` what was measured twice of the same members. Raises MembersAlikeError where all members give the same
    losses up to the noise (the server answers with the base model, or training changed nothing), or where two members
    give the same losses but for rounding (one adapter is served under two names; its ``members`` are their rows, or
    their ``numbers``).
    Fewer than two members or no examples: it is open.
    """
    loss_KN = np.asarray(loss_KN, dtype=np.float64)
    members = loss_KN.shape[0]
    complete_N = np.isfinite(loss_KN).all(axis=0)
    verdict: Verdict = "open"
    if members >= 2 and complete_N.any():
        nothing = np.empty((members, 0))
        first, again = (nothing if x is None else np.asarray(x, dtype=np.float64) for x in (first_KR, again_KR))
        look = likeness(first, again, loss_KN[:, complete_N])
        verdict = look.verdict
        if verdict == "alike":
            measured = (
                f"the variance over models is {look.signal:.2g} +- {look.error:.2g} times that of the measurement "
                f"noise ({look.noise:.2g} nats)"
                if np.isfinite(look.signal)
                else "to the last bit"
            )
            raise MembersAlikeError(
                f"all {len(models)} fine-tuned models give the same losses: {measured}. Either the server answers with "
                "the base model for every model, or training changed nothing. Check that each fine-tune is "
                "loaded under its own name, and the learning rate and epochs."
            )
    for k in range(1, members):
        apart = np.abs(loss_KN[:k, :_SAMPLE] - loss_KN[k, :_SAMPLE]) > ROUNDING
        for twin in np.flatnonzero(~apart.any(axis=1)).tolist():
            gap_N = np.abs(loss_KN[twin] - loss_KN[k])
            both_N = np.isfinite(gap_N)
            if both_N.any() and (gap_N[both_N] <= ROUNDING).all():
                raise MembersAlikeError(
                    f"models {models[twin]!r} and {models[k]!r} give the same losses on every example: the server "
                    "answers with one model for both. Check that each fine-tune is loaded under its own name.",
                    (twin, k) if numbers is None else (numbers[twin], numbers[k]),
                )
    return verdict


def like_base(loss_KN: Floats, base_N: Floats, first_KR: Floats, again_KR: Floats) -> list[int]:
    """Rows whose losses are the base model's within the noise, where those of most others are not.

    ``first_KR`` and ``again_KR``: two measurements of R examples by the same members, from which the noise is known.
    """
    away_K = np.sqrt(((loss_KN - base_N) ** 2).mean(axis=1))
    noise = float(np.sqrt(((first_KR - again_KR) ** 2).mean())) if first_KR.size else 0.0  # of a difference, as here
    same = max(ROUNDING, _SAME * noise)
    return np.flatnonzero((away_K <= same) & (np.median(away_K) >= _APART * same)).tolist()


def repeated_losses(store: RunStore, members: Sequence[int], reduction: Reduction = "mean") -> tuple[Floats, Floats]:
    """(K, R) losses of the examples that all of these members were measured on twice: the first time, and again."""
    if not members:
        return np.empty((0, 0)), np.empty((0, 0))
    measured = [repeated(store, k, reduction) for k in members]
    shared = reduce(np.intersect1d, (ids for ids, _, _ in measured))
    first, second = (np.array([row[side][np.searchsorted(row[0], shared)] for row in measured]) for side in (1, 2))
    return first, second


class Comparison:
    """Looks at the members of a run until it is settled that they differ: at 2, 4, 8, ... complete ones."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._next = 2
        self._looking = asyncio.Lock()
        self._cleared: set[int] = set()
        """Members near to the base that are not it."""

    def due(self, members: int) -> bool:
        """Whether a comparison of this many complete members is due."""
        return members >= self._next and not self._store.get_value(ACCEPTED)

    async def look(
        self, attribution: Attribution, client: ScoringClient | None = None, examples: Sequence[EncodedExample] = ()
    ) -> None:
        """Look at the complete members. Raises MembersAlikeError; its ``members`` are their numbers.

        Where the few repeated examples leave it open, ``client`` measures more ``examples`` of the first two members
        again, once. Without a client it is the last look, whatever earlier ones gave.
        """
        async with self._looking:
            if self._store.get_value(ACCEPTED) or (client is not None and not self.due(len(attribution.members))):
                return
            verdict = await asyncio.to_thread(self._verdict, attribution)
            models = self._store.jobs.ready_models()
            pair = [k for k in attribution.members[:2] if k in models]
            if verdict == "open" and client is not None and self._next == 2 and len(pair) == 2:
                for member in pair:
                    await client.measure(member, models[member], examples[:REPEATS])
                verdict = await asyncio.to_thread(self._verdict, attribution)
            if verdict == "open" and client is None:
                logger.warning(
                    "the members' losses differ by little more than measurement noise: the scores of this run may mean "
                    "nothing. A larger scoring.noise_probe tells more."
                )
            self._next = 10**9 if verdict == "differ" else 2 * len(attribution.members)

    async def look_for_base(
        self,
        client: ScoringClient,
        members: Sequence[int],
        base: str,
        examples: Sequence[EncodedExample],
        reduction: Reduction,
    ) -> None:
        """Raises MembersAlikeError where the base model answered for one of the complete ``members``; with its number.
        Only where a test leaves that open, the base is measured on some ``examples``, which is booked."""
        store = self._store
        if store.get_value(ACCEPTED):
            return
        async with self._looking:
            models, tests = store.jobs.ready_models(), store.get_value(TESTS, {})
            far = {k: tests.get(models.get(k), {}).get("from_base") for k in members}
            known = {k: float(x) for k, x in far.items() if x is not None}
            near = [k for k, x in known.items() if x <= NEAR * np.median([*known.values()])]
            suspects = [k for k in near if k not in self._cleared]
            if len(known) < 3 or not suspects:
                return
            chosen = tuple({e.key: e for e in examples}.values())[:BASE_EXAMPLES]
            try:
                await client.measure(BASE, base, chosen, 0)
            except RejectedError:  # it is not served, so it can hardly have answered
                self._cleared.update(suspects)
                return
            like = await asyncio.to_thread(self._like_base, [*known], suspects, chosen, reduction)
            self._cleared.update(k for k in suspects if k not in like)
            if like:
                names = ", ".join(repr(models[k]) for k in like)
                raise MembersAlikeError(
                    f"{names} gives the losses of the base model {base!r} on {len(chosen)} examples, and the other "
                    "members do not: the server answers with the base model in its place (a gateway that falls back?). "
                    "Check that this fine-tune is loaded under its own name.",
                    tuple(like),
                )

    def _like_base(
        self, members: Sequence[int], suspects: Sequence[int], examples: Sequence[EncodedExample], reduction: Reduction
    ) -> list[int]:
        """Those of the suspects whose losses on the examples are the base's."""
        ids = self._store.scores.find_ids(examples)
        loss_KN, _ = loss_matrix(self._store, [(BASE, 0), *((k, 0) for k in members)], ids, reduction)
        noise = repeated_losses(self._store, members, reduction)
        rows = like_base(loss_KN[1:], loss_KN[0], *noise)
        return [k for row, k in enumerate(members) if row in rows and k in suspects]

    def _verdict(self, attribution: Attribution) -> Verdict:
        members, earlier = attribution.members, attribution.earlier
        stages = [] if earlier is None else [*zip(earlier.train_loss_SKN, earlier.test_loss_SKM, strict=True)]
        for train_KN, test_KM in stages:
            loss_KX = np.concatenate([test_KM, train_KN], axis=1)
            rows = np.flatnonzero(np.isfinite(loss_KX).any(axis=1))
            self._check(loss_KX[rows], [members[k] for k in rows], " (checkpoint)")
        loss_KX = np.concatenate([attribution.test_loss_KM, attribution.train_loss_KN], axis=1)
        # With the members that were measured again on the most examples; the others have few.
        verdict = self._check(loss_KX, members, "", *repeated_losses(self._store, members, attribution.loss))
        if verdict == "open" and len(members) > 2:
            pair = members[:2]
            verdict = self._check(loss_KX[:2], pair, "", *repeated_losses(self._store, pair, attribution.loss))
        return verdict

    def _check(self, loss_KX: Floats, members: Sequence[int], which: str, *repeated: Floats) -> Verdict:
        models = self._store.jobs.ready_models()
        names = [f"{models.get(k, f'member {k}')}{which}" for k in members]
        return check_members_differ(loss_KX, names, *repeated, numbers=members)


def accept_suspect(run_dir: str | Path) -> tuple[int, ...]:
    """Use suspect scores of a run again that were set aside ("members alike"), and compare members no more; the
    members. Nothing happens where there are none."""
    with RunStore.open(run_dir) as store:
        members = store.scores.take_back()
        if members:
            store.set_value(ACCEPTED, True)
        return members
