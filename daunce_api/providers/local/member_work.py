"""What is asked of a worker about one member, and what all kinds of training make of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from ...data.dataset import Dataset
from ...errors import DaunceError

Own = TypeVar("Own")
"""What a member is trained on, as its kind of training reads it."""

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)

Files = Mapping[str, bytes]
"""The folder of a fine-tune: file name to content."""


@dataclass(frozen=True, slots=True)
class MemberTask:
    """One fine-tune: its training file, seed, and the fine-tune that it starts from (None: the base model).

    A full fine-tune is written to ``out`` where the worker shares this machine's folders: it is as large as the model.
    Otherwise, and for adapters, the result carries the files.
    """

    key: str
    content: bytes
    seed: int
    start: Path | Files | None = None
    out: Path | None = None


@dataclass(frozen=True, slots=True)
class MemberResult:
    """The fine-tune of one member (its files, or none where they are in its task's ``out``), or why there is none."""

    key: str
    files: Files = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    trained_tokens: int = 0
    error: str | None = None
    earlier: Mapping[int, Files] = field(default_factory=dict)
    """By epoch (from 1); empty files where they are in folders beside the task's ``out``."""


def training_records(content: bytes) -> Dataset:
    """The records of a training file. Raises DataError that lists every problem with its line."""
    return Dataset.from_records(
        [json.loads(line) for line in content.split(b"\n") if line.strip()], name="training file"
    )


def wanted(epoch: int, n_epochs: int, checkpoints: int) -> bool:
    """Whether an epoch (from 1) is one of the last ``checkpoints`` before the final one."""
    return n_epochs - checkpoints <= epoch < n_epochs


def train_in_halves(
    batches: Iterable[Sequence[tuple[MemberTask, Own]]],
    train: Callable[[Sequence[tuple[MemberTask, Own]]], list[MemberResult]],
    *,
    halve_on: tuple[type[Exception], ...],
) -> list[MemberResult]:
    """Results of all members. A batch in which ``train`` raises one of ``halve_on``, or runs out of memory, is halved,
    down to single members, whose failure is their own; another DaunceError is the failure of the whole batch."""
    waiting = list(batches)
    results: list[MemberResult] = []
    while waiting:
        batch = waiting.pop(0)
        try:
            results += train(batch)
        except (DaunceError, *OUT_OF_MEMORY) as error:
            if len(batch) > 1 and isinstance(error, (*halve_on, *OUT_OF_MEMORY)):
                half = (len(batch) + 1) // 2
                waiting[:0] = [batch[:half], batch[half:]]
            else:
                results += [MemberResult(member.key, error=str(error)) for member, _ in batch]
    return results
