"""What a worker does: train a batch of members, or score token ids. Plain functions of picklable values, so that a
thread, a process or a Ray worker on another machine can run them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

from ...dataset import Dataset
from ...errors import CapabilityError, DataError, DaunceError, RejectedError
from ...tokens import EncodedExample, encode_example
from .adapters import LoraSettings, save_adapter
from .language import LanguageModel
from .memory import default_limit, plan_memory
from .objectives import Objective
from .training import Member, Weights, batches_of, train_members

Files = Mapping[str, bytes]
"""An adapter folder: file name to content."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model and how a worker holds it; equal specs share one copy in a process.

    ``quantisation``: None, ``8bit`` or ``4bit`` (bitsandbytes, on CUDA). ``threads``: torch threads of the worker.
    """

    path: str
    device: str = "cpu"
    dtype: str = "float32"
    device_map: str | None = None
    quantisation: str | None = None
    gradient_checkpointing: bool = False
    threads: int = 1


@dataclass(frozen=True, slots=True)
class MemberTask:
    """One fine-tune: its training file, seed, and the adapter that it starts from (None: the base model)."""

    key: str
    content: bytes
    seed: int
    start: Files | None = None


@dataclass(frozen=True, slots=True)
class TrainTask:
    """Members that are trained side by side. ``memory_limit`` in bytes beside the model; None: half of what is free,
    shared by ``workers`` processes. ``at_once`` bounds the members in one batch further."""

    model: ModelSpec
    settings: LoraSettings
    objective: Objective
    members: tuple[MemberTask, ...]
    memory_limit: int | None = None
    at_once: int | None = None
    workers: int = 1


@dataclass(frozen=True, slots=True)
class MemberResult:
    """The adapter of one member, or why there is none."""

    key: str
    files: Files = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    trained_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """Log-probabilities of the ``targets`` of token-id sequences under one adapter (a folder here, or its files)."""

    model: ModelSpec
    adapter: Path | Files | None
    sequences: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@lru_cache(maxsize=1)
def loaded(spec: ModelSpec) -> LanguageModel:
    """The model of a spec, in this process."""
    if spec.device == "cpu":
        torch.set_num_threads(spec.threads)
    return LanguageModel.load(
        spec.path,
        device=spec.device,
        dtype=spec.dtype,
        device_map=spec.device_map,
        quantisation=spec.quantisation,
        gradient_checkpointing=spec.gradient_checkpointing,
    )


def run_score(task: ScoreTask) -> list[tuple[float, ...]]:
    """Log-probabilities (nats) of each sequence's targets. Sequences are evaluated one at a time (see
    ``LanguageModel.token_logprobs``), so the answers do not depend on how they are grouped."""
    model = loaded(task.model)
    adapter = task.adapter if task.adapter is None or isinstance(task.adapter, Path) else _unpacked(task.adapter)
    answers = model.token_logprobs([ids for ids, _ in task.sequences], adapter=adapter)
    return [
        tuple(answer.logprobs[[t - 1 for t in targets]].tolist())
        for answer, (_, targets) in zip(answers, task.sequences, strict=True)
    ]


def run_train(task: TrainTask) -> list[MemberResult]:
    """One result a member, in order. Members that take the same number of steps are trained together, as many as the
    memory plan allows; where a batch fails it is halved, down to single members, whose failure is their own."""
    model = loaded(task.model)
    results: dict[str, MemberResult] = {}
    ready: dict[int, list[tuple[MemberTask, list[EncodedExample]]]] = {}
    for member in task.members:
        try:
            examples = read_examples(member.content, model)
        except DaunceError as error:
            results[member.key] = MemberResult(member.key, error=str(error))
            continue
        steps = len(batches_of(len(examples), task.settings, member.seed))
        ready.setdefault(steps, []).append((member, examples))
    for group in ready.values():
        results.update({r.key: r for r in _train_group(model, task, group)})
    return [results[m.key] for m in task.members]


def read_examples(content: bytes, model: LanguageModel) -> list[EncodedExample]:
    """A training file as token ids; assistant turns with ``weight: 0`` carry no loss, all others do.

    Raises DataError that lists every problem with its line.
    """
    records = [json.loads(line) for line in content.split(b"\n") if line.strip()]
    data = Dataset.from_records(records, name="training file")
    encoded, problems = [], []
    for position, example in enumerate(data):
        try:
            encoded.append(encode_example(example, model.tokenizer, loss_on="all"))
        except DataError as error:
            problems.append(f"{data.where(position)}: {error}")
            continue
        if len(encoded[-1].ids) > model.max_context:
            problems.append(
                f"{data.where(position)}: {len(encoded[-1].ids):,} tokens; {model.name} takes {model.max_context:,}"
            )
    if problems:
        raise DataError("the training file cannot be used; nothing was trained.", problems)
    return encoded


def _train_group(
    model: LanguageModel, task: TrainTask, group: Sequence[tuple[MemberTask, list[EncodedExample]]]
) -> list[MemberResult]:
    device = model.adapted.device
    shapes = model.adapter_shapes(task.settings.targets)
    plan = plan_memory(
        model.adapted,
        shapes,
        task.settings.rank,
        wanted=min(len(group), task.at_once or len(group)),
        longest=max(len(e.ids) for _, examples in group for e in examples),
        limit=task.memory_limit or default_limit(device, task.workers),
    )
    chunks = [group[i : i + plan.members] for i in range(0, len(group), plan.members)]
    results = []
    while chunks:
        chunk = chunks.pop(0)
        try:
            results += _train_chunk(model, task, chunk, shapes, plan.max_tokens, plan.keep_bytes)
        except (CapabilityError, RejectedError, MemoryError, torch.OutOfMemoryError) as error:
            if len(chunk) == 1:
                results.append(MemberResult(chunk[0][0].key, error=str(error)))
            else:
                half = (len(chunk) + 1) // 2
                chunks[:0] = [chunk[:half], chunk[half:]]
        except DaunceError as error:
            results += [MemberResult(m.key, error=str(error)) for m, _ in chunk]
    return results


def _train_chunk(
    model: LanguageModel,
    task: TrainTask,
    chunk: Sequence[tuple[MemberTask, list[EncodedExample]]],
    shapes: Mapping[str, tuple[int, int]],
    max_tokens: int,
    keep_bytes: int,
) -> list[MemberResult]:
    starts: dict[str, Weights] = {}
    members = []
    for member, examples in chunk:
        start = None
        if member.start is not None:
            digest = _digest(member.start)
            if digest not in starts:
                starts[digest] = model.start_weights(_unpacked(member.start), task.settings, shapes)
            start = starts[digest]
        members.append(Member(examples, member.seed, start))
    weights, losses, _ = train_members(
        model.adapted,
        members,
        shapes,
        task.settings,
        objective=task.objective,
        max_tokens=max_tokens,
        keep_bytes=keep_bytes,
    )
    results = []
    for (member, examples), own, history in zip(chunk, weights, losses, strict=True):
        tokens = task.settings.n_epochs * sum(len(e.ids) for e in examples)
        results.append(MemberResult(member.key, _packed(model, own, task.settings), tuple(history), tokens))
    return results


def _packed(model: LanguageModel, weights: Weights, settings: LoraSettings) -> Files:
    with tempfile.TemporaryDirectory(prefix="daunce-adapter-") as folder:
        out = Path(folder) / "adapter"
        save_adapter(out, weights, settings, model.name)
        return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def _digest(files: Files) -> str:
    return hashlib.sha256(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()


@lru_cache(maxsize=1)
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="daunce-adapters-")


def _unpacked(files: Files) -> Path:
    """The folder of these files in this process's scratch folder; written once for the same content."""
    folder = Path(_scratch().name) / _digest(files)
    if not folder.exists():
        part = Path(tempfile.mkdtemp(dir=_scratch().name))
        for name in sorted(files):
            (part / os.path.basename(name)).write_bytes(files[name])
        part.rename(folder)
    return folder
