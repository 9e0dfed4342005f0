"""What follows from a run's data and losses and is slow to compute: kept in its folder, under a digest of its source.

Everything in ``RUN/derived`` may be deleted: it is computed again. A folder that cannot be written is no error.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import core
from .._util.files import replacing, write
from .._util.version import __version__
from ..core.quality import Curve, Draws
from ..errors import StoreError

FOLDER = "derived"
_MOST = 50
"""Choices and estimates that are kept at most; the oldest goes."""
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)


def digest_of(*parts: ArrayLike | None) -> str:
    """SHA-256 of arrays and plain values, and of the version of this package."""
    digest = hashlib.sha256(__version__.encode())
    for part in parts:
        array = np.ascontiguousarray("" if part is None else part)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.data if array.dtype.kind in "biuf" else repr(array.tolist()).encode())
    return digest.hexdigest()


def choice_of(folder: Path | None, digest: str, compute: Callable[[], core.Choice]) -> core.Choice:
    """The estimator that was chosen for the losses of this digest."""

    def read(value: Mapping[str, Any]) -> core.Choice:
        estimator, setting = core.ESTIMATORS[value["estimator"]], core.Setting(**value["setting"])
        return core.Choice(estimator, setting, value["why"], value["question"])

    def plain(choice: core.Choice) -> dict[str, Any]:
        setting = asdict(choice.setting)
        return {"estimator": choice.estimator.name, "setting": setting, "why": choice.why, "question": choice.question}

    choice: core.Choice = _kept(folder, "choices.json", digest, compute, plain, read)
    return choice


QUALITIES = "quality.json"


def quality_is_kept(folder: Path | None, digest: str) -> bool:
    """Whether :func:`quality_of` has nothing to compute."""
    with suppress(*_UNREADABLE):
        return folder is not None and digest in json.loads((folder / QUALITIES).read_text(encoding="utf-8"))
    return False


def quality_of(folder: Path | None, digest: str, compute: Callable[[], core.SelfLDS | None]) -> core.SelfLDS | None:
    """The quality that was estimated from the losses of this digest; None with too few members."""

    def read(value: Mapping[str, Any]) -> core.SelfLDS:
        curve, draws = value["curve"], value["draws"]
        if draws is not None:
            arrays: dict[str, Any] = {name: np.array(numbers) for name, numbers in draws.items()}
            draws = Draws(**{**arrays, "growth": tuple(draws["growth"])})
        curve = None if curve is None else Curve(**curve)
        return core.SelfLDS(**{**value, "curve": curve, "draws": draws})

    quality: core.SelfLDS | None = _kept(folder, QUALITIES, digest, compute, asdict, read)
    return quality


def _kept(
    folder: Path | None,
    name: str,
    digest: str,
    compute: Callable[[], Any],
    plain: Callable[[Any], Any],
    read: Callable[[Any], Any],
) -> Any:
    if folder is None:
        return compute()
    path = folder / name
    known: dict[str, Any] = {}
    with suppress(*_UNREADABLE):
        known = dict(json.loads(path.read_text(encoding="utf-8")))
        return read(known[digest])
    made = compute()
    if made is not None:
        known = dict([*known.items(), (digest, plain(made))][-_MOST:])
        with suppress(StoreError):
            write(path, json.dumps(known, default=np.ndarray.tolist))
    return made


def prior_columns(
    folder: Path,
    digest: str,
    questions: Sequence[str],
    compute: Callable[[list[int]], NDArray[np.float64]],
) -> NDArray[np.float32]:
    """(N, M) prior of these questions, each column computed once.

    Args:
        digest: of the training examples and of how similarity is measured.
        questions: what tells questions apart, M of them.
        compute: (N, n) prior of n questions, by their positions.
    """
    path = folder / "prior.npz"
    known: list[str] = []
    column_Nm = None
    with suppress(*_UNREADABLE), np.load(path, allow_pickle=False) as stored:
        if str(stored["digest"]) == digest:
            known, column_Nm = stored["questions"].tolist(), stored["prior_Nm"]
    held = frozenset(known)
    missing = [j for j, question in enumerate(questions) if question not in held]
    if missing:
        fresh = compute(missing).astype(np.float32)
        column_Nm = fresh if column_Nm is None else np.concatenate([column_Nm, fresh], axis=1)
        known = known + [questions[j] for j in missing]
        with suppress(StoreError), replacing(path) as part, part.open("wb") as file:
            np.savez(file, allow_pickle=False, digest=digest, questions=np.array(known), prior_Nm=column_Nm)
    assert column_Nm is not None
    place = {question: j for j, question in enumerate(known)}
    # In one layout whatever was kept: sums over another one differ in their last bits.
    return np.ascontiguousarray(column_Nm[:, [place[question] for question in questions]])
