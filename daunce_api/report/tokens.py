"""The tokens that the page shows: parts of the first pairs of each answer, and how tokens spell their texts.

The page carries every text once; its tokens are lengths over that text. What a template writes around a completion (an
end mark, say) is a token too and is put before or after. A character that is split over several tokens has no piece of
its own in any of them: those tokens become one unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..attribution import Attribution, Side, TokenTable
from ..attribution.tokens import Split
from .pack import Arrays

DEPTH = 10
MAX_PARTS = 2_000_000
"""Token parts that the page carries at most, one byte each: with long texts, fewer pairs have them."""

_SIDES: tuple[Side, Side] = ("test", "train")

Floats = NDArray[np.float64]
Index = NDArray[np.int64]

_BROKEN = "\ufffd"


@dataclass(frozen=True, slots=True)
class Spelling:
    """How the tokens of one example spell its text.

    Attributes:
        starts: index of the first token of each unit; a unit is what has a colour of its own.
        lengths: of each unit in UTF-16 code units, which is how JavaScript counts.
        before, after: what the tokens hold around the text.
        instead: the text that the tokens spell, where they do not spell the example's own; else None.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    before: str = ""
    after: str = ""
    instead: str | None = None


def spell(pieces: Sequence[str], text: str) -> Spelling:
    """Fit tokens to the text of an example.

    Args:
        pieces: the tokens as printable strings.
        text: the completion.

    Returns:
        Spelling; its units, one after the other, are ``before + text + after``, or ``instead``.
    """
    if any(_BROKEN in piece for piece in pieces):
        whole = _mended(pieces, text)
        if whole is not None:
            starts, units = whole
            return _placed(starts, units, text)
    return _placed(range(len(pieces)), pieces, text)


def _placed(starts: Sequence[int], units: Sequence[str], text: str) -> Spelling:
    joined = "".join(units)
    lengths = tuple(len(unit.encode("utf-16-le", "surrogatepass")) // 2 for unit in units)
    at = joined.find(text)
    if at < 0 or not text:
        return Spelling(tuple(starts), lengths, instead=joined)
    return Spelling(tuple(starts), lengths, joined[:at], joined[at + len(text) :])


def _mended(pieces: Sequence[str], text: str) -> tuple[list[int], list[str]] | None:
    """Units in which no character is split, by walking along the text; None where the tokens do not follow it."""
    starts: list[int] = []
    units: list[str] = []
    place = t = 0
    while t < len(pieces):
        starts.append(t)
        if _BROKEN not in pieces[t]:
            if place < len(text) and not text.startswith(pieces[t], place):
                return None
            units.append(pieces[t])
            place += len(pieces[t])
            t += 1
            continue
        end = t
        while end < len(pieces) and _BROKEN in pieces[end]:
            end += 1
        # Every character that is split shows as at least one mark, so a run covers at most as many characters.
        most = place + sum(map(len, pieces[t:end]))
        after = -1 if end == len(pieces) else text.find(pieces[end], place + 1, most + len(pieces[end]))
        stop = len(text) if after < 0 else after
        if not place < stop <= most:
            return None
        units.append(text[place:stop])
        place, t = stop, end
    return starts, units


@dataclass(frozen=True, eq=False)
class SideParts:
    """Parts of the pairs of one sign: for each of M answers its first ``depth`` training examples.

    Attributes:
        parts: by side, int8 of each pair over the units of its answer (training example); 127 = the largest of the
            pair. Empty for pairs that do not exist, and on the training side for an estimator without one.
        scale: (M * depth, 3) in units of the score: the largest part of the answer and of the training example, and the
            sum of a pair's parts.
    """

    parts: dict[Side, list[NDArray[np.int8]]]
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
        final_only: see `daunce_api.attribution.tokens.Split`.
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
    test.prefetch(columns)
    answers = {j: spell(test.pieces[j], attribution.test[j].completion_text()) for j in columns}
    loss = {j: _unit_losses(test, j, answers[j]) for j in columns}
    split = attribution.token_split
    both = None if split.why_not_train else train
    depth = _depth(columns, (proponents_Mk, opponents_Mk), test, both)
    why = split.why_not_train if depth else "the texts are too long for a page of this size"
    shown = np.unique(np.concatenate([x[:, :depth].ravel() for x in (proponents_Mk, opponents_Mk)]))
    if both is not None:
        both.prefetch(shown[shown >= 0].tolist())
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


def _depth(columns: list[int], indices: tuple[Index, ...], test: TokenTable, train: TokenTable | None) -> int:
    """How many pairs of each answer and sign have parts, so that all of them fit the page."""
    count_M = np.array([len(test.pieces[j]) for j in columns])
    per_place = np.zeros(DEPTH)
    for index_Mk in indices:
        near = index_Mk[:, :DEPTH]
        size = np.where(near >= 0, count_M[:, None], 0)
        if train is not None:
            count = {i: len(train.pieces[i]) for i in np.unique(near[near >= 0]).tolist()} | {-1: 0}
            size = size + np.vectorize(count.__getitem__, otypes=[int])(near)
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
    return SideParts(flat, scale)


def _unit_losses(table: TokenTable, j: int, spelling: Spelling) -> Floats:
    """Mean loss over members, summed over the tokens of each unit."""
    loss_KT = -table.logprobs[j]
    seen = np.isfinite(loss_KT)
    mean = np.where(seen, loss_KT, 0).sum(axis=0) / np.maximum(seen.sum(axis=0), 1)
    return np.asarray(np.add.reduceat(mean, spelling.starts))


def add_tokens(arrays: Arrays, view: TokenView, columns: Sequence[int], shown: Sequence[int]) -> dict[str, Any]:
    """Put the numbers of a view into the arrays.

    Args:
        columns, shown: positions of the answers and training examples that the page has, in its order.

    Returns:
        the rest, as plain data: ``depth``, ``why``, ``final_only``; by side, the [before, after] of each text that has
        any, or the index of what stands in its place; ``instead``, those texts.
    """
    nothing, instead = Spelling((), ()), list[str]()
    content: dict[str, Any] = {"depth": view.depth, "why": view.why, "final_only": view.final_only, "instead": instead}
    for side, positions in zip(_SIDES, (columns, shown), strict=True):
        spellings = [view.spelled[side].get(int(position), nothing) for position in positions]
        around: dict[int, Any] = {}
        for place, spelling in enumerate(spellings):
            if spelling.instead is not None:
                around[place] = len(instead)
                instead.append(spelling.instead)
            elif spelling.before or spelling.after:
                around[place] = [spelling.before, spelling.after]
        content[side] = around
        lengths = [length for spelling in spellings for length in spelling.lengths]
        arrays.add(f"{side}_token_edges", np.cumsum([0, *(len(spelling.lengths) for spelling in spellings)]), "i")
        arrays.add(f"{side}_token_lengths", np.minimum(lengths, 2**16 - 1), "h")
    arrays.add("token_loss", np.concatenate([view.loss[j] for j in columns]), "f")
    for name, parts in (("pro", view.proponents), ("opp", view.opponents)):
        if parts is not None:
            for side, found in parts.parts.items():
                arrays.add(f"{name}_{side}_parts", np.concatenate(found), "b")
                arrays.add(f"{name}_{side}_edges", np.cumsum([0, *map(len, found)]), "i")
            arrays.add(f"{name}_token_scale", parts.scale, "f")
    return content
