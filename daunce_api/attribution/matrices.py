"""Losses of complete models: computed once from their log-probabilities, kept as rows, read as matrices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..core.losses import Reduction, segment_losses
from ..errors import StoreCorruptError
from ..store import Ids, LossRow, RunStore, TokenColumns

Model = tuple[int, int]
"""(member, checkpoint)."""


def finish(store: RunStore, ids: Ids, member: int, checkpoint: int, reduction: Reduction) -> None:
    """Keep the losses of a model that is measured on all of these examples, so that nothing reads its tokens again."""
    columns = np.unique(ids)
    with RunStore.open(store.run_dir, read_only=True) as reader:  # a connection of its own: writers go on meanwhile
        aside = reader.scores.aside_up_to(member)
        row = _row(reader.scores.load(member, checkpoint=checkpoint), columns, reduction)
    store.scores.save_losses(columns, member, checkpoint, _kind(reduction), row, aside=aside)


def loss_matrix(
    store: RunStore, models: Sequence[Model], ids: Ids, reduction: Reduction
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Losses of complete models, as measured.

    Args:
        models: K of them, each measured on all of the examples.
        ids: (N,) examples; some may be there more than once.
        reduction: how token losses become an example's; see :func:`daunce_api.core.losses.segment_losses`.

    Returns:
        (K, N) losses in nats, lower bounds where the second (K, N) array says so.
    """
    loss_KN = np.empty((len(models), len(ids)))
    censored_KN = np.zeros(loss_KN.shape, dtype=np.bool_)
    groups = store.scores.groups()
    columns = np.unique(ids)
    size = int(max((g.max(initial=-1) for g in (*groups.values(), columns)), default=-1)) + 1
    for k, (member, checkpoint) in enumerate(models):
        loss, counts = np.full(size, np.nan), np.ones(size, dtype=np.int32)
        censored = np.zeros(size, dtype=np.bool_)
        kept = store.scores.load_losses(member, checkpoint, _kind(reduction))
        rows = [(groups[n], row) for n, row in kept.items()]
        known = np.zeros(size, dtype=np.bool_)
        for held, _ in rows:
            known[held] = True
        if not known[columns].all():
            missing = columns[~known[columns]]
            tokens = store.scores.load_some(missing, member, checkpoint=checkpoint)
            rows.append((missing, _row(tokens, missing, reduction)))
        for held, row in rows:
            loss[held], counts[held] = row.loss, row.counts
            censored[held] = False if row.censored is None else row.censored
        loss_KN[k] = loss[ids] / counts[ids] if reduction == "mean" else loss[ids]
        censored_KN[k] = censored[ids]
    return loss_KN, censored_KN


def measure_noise(store: RunStore, members: Iterable[int], reduction: Reduction = "mean") -> float | None:
    """Standard deviation of one measurement of a loss, nats, from examples that these members were measured on twice;
    None where there are none. Lower bounds are left out.
    """
    measured = [repeated(store, member, reduction) for member in members]
    away = np.concatenate([np.zeros(0), *(first - second for _, first, second in measured)])
    # A difference of two measurements has twice the variance of one.
    return float(np.sqrt(np.mean(away**2) / 2)) if away.size else None


def repeated(
    store: RunStore, member: int, reduction: Reduction
) -> tuple[Ids, NDArray[np.float64], NDArray[np.float64]]:
    """Ids (R,), ascending, of the examples that a member was measured on twice, and their losses in nats (R,), the
    first time and again. Lower bounds are left out."""
    again = store.scores.load(member, replicate=1)
    once = store.scores.load_some(again.ids, member)  # a few blobs, where a row of losses is all of them
    ids = np.intersect1d(once.ids, again.ids)
    if not ids.size:
        return ids, np.zeros(0), np.zeros(0)
    rows = [_row(tokens, ids, reduction) for tokens in (once, again)]
    bounds = [row.censored for row in rows if row.censored is not None]
    exact = ~np.any(bounds, axis=0) if bounds else np.ones(ids.size, dtype=np.bool_)
    first, second = ((row.loss / (row.counts if reduction == "mean" else 1))[exact] for row in rows)
    return ids[exact], first, second


def _kind(reduction: Reduction) -> str:
    return "margin" if reduction == "margin" else "nll"


def _row(tokens: TokenColumns, columns: Ids, reduction: Reduction) -> LossRow:
    """What the tokens of each column (ascending ids) add up to, or their mean margin.

    Raises StoreCorruptError where one was not measured.
    """
    order = np.argsort(tokens.ids, kind="stable")
    place = order[np.searchsorted(tokens.ids, columns, sorter=order).clip(max=len(order) - 1)] if order.size else order
    if not np.array_equal(tokens.ids[place], columns):
        raise StoreCorruptError("a model lacks scores that it was known to have. Restore the run folder from a copy.")
    # A mean is divided when it is read: mean and sum share their rows.
    values = segment_losses(tokens.logprobs, tokens.counts, "margin" if reduction == "margin" else "sum")
    censored = None
    if tokens.censored is not None and tokens.censored.any():
        censored = np.logical_or.reduceat(tokens.censored, tokens.starts())[place]
    return LossRow(values[place], tokens.counts[place], censored)
