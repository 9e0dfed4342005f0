"""What a worker does: train a batch of members, or score token ids. Plain functions of picklable values, so that a
thread, a process or a Ray worker on another machine can run them."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch

from ...data.tokenizers import EncodedExample, encode_example
from ...errors import CapabilityError, DataError, DaunceError, RejectedError
from ..objective import Objective
from .adapters import save_adapter
from .full import check_trainable
from .jobs import beside
from .language import LanguageModel
from .member_work import Files, MemberResult, MemberTask, train_in_halves, training_records, wanted
from .memory import MemoryPlan, default_limit, plan_full_memory, plan_memory
from .recipes import FullSettings, LoraSettings
from .trainees import FullWeights, Member, Weights
from .training import batches_of, train_full, train_members, trained_tokens


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model and how a worker holds it; equal specs share one copy in a process.

    ``quantisation``: None, ``8bit`` or ``4bit`` (bitsandbytes). ``threads``: torch threads of the worker.
    ``tokenizer``: folder of another tokenizer than the model's own.
    """

    path: str
    device: str = "cpu"
    dtype: str = "float32"
    device_map: str | None = None
    quantisation: str | None = None
    gradient_checkpointing: bool = False
    threads: int = 1
    tokenizer: str | None = None


@dataclass(frozen=True, slots=True)
class TrainTask:
    """Members that are trained side by side. ``memory_limit`` in bytes beside the model; None: half of what is free,
    shared by ``workers`` processes. ``checkpoints``: of how many epochs before the last one the result is kept too."""

    model: ModelSpec
    settings: LoraSettings | FullSettings
    objective: Objective
    members: tuple[MemberTask, ...]
    memory_limit: int | None = None
    workers: int = 1
    checkpoints: int = 0


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """Log-probabilities of the ``targets`` of token-id sequences under one fine-tune (a folder here, or its files)."""

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
        tokenizer=spec.tokenizer,
    )


def run_score(task: ScoreTask) -> list[tuple[float, ...]]:
    """Log-probabilities (nats) of each sequence's targets; on a CPU they do not depend on how sequences are grouped
    (see ``LanguageModel.target_logprobs``)."""
    answers = loaded(task.model).target_logprobs(task.sequences, adapter=_folder(task.adapter))
    return [tuple(answer.tolist()) for answer in answers]


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
        train = _train_lora if isinstance(task.settings, LoraSettings) else _train_whole
        results.update({r.key: r for r in train(model, task, group)})
    return [results[m.key] for m in task.members]


def read_examples(content: bytes, model: LanguageModel) -> list[EncodedExample]:
    """A training file as token ids; assistant turns with ``weight: 0`` carry no loss, all others do.

    Raises DataError that lists every problem with its line.
    """
    data = training_records(content)
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


Group = Sequence[tuple[MemberTask, list[EncodedExample]]]


def _train_whole(model: LanguageModel, task: TrainTask, group: Group) -> list[MemberResult]:
    """Full fine-tunes, one at a time."""
    alone = [[member] for member in group]
    return train_in_halves(alone, lambda batch: [_train_one(model, task, *batch[0])], halve_on=())


def _train_one(
    model: LanguageModel, task: TrainTask, member: MemberTask, examples: list[EncodedExample]
) -> MemberResult:
    settings = task.settings
    if not isinstance(settings, FullSettings):
        raise CapabilityError("adapters are trained together")
    check_trainable(model.adapted)
    start = _folder(member.start)
    plan = plan_full_memory(
        model.adapted,
        longest=max(len(e.ids) for e in examples),
        limit=task.memory_limit or default_limit(model.adapted.device, task.workers),
        objective=task.objective.kind,
    )
    earlier: dict[int, Files] = {}

    def keep(weights: FullWeights, epoch: int | None = None) -> Files:
        if member.out is None:
            return _packed(lambda out: model.save_full(out, weights))
        model.save_full(beside(member.out, epoch), weights)
        return {}

    def after_epoch(epoch: int, weights: FullWeights) -> None:
        if wanted(epoch, settings.n_epochs, task.checkpoints):
            earlier[epoch] = keep(weights, epoch)

    weights, losses, _ = train_full(
        model.adapted,
        Member(examples, member.seed),
        None if start is None else model.full_weights(start),
        settings,
        objective=task.objective,
        max_tokens=plan.max_tokens,
        keep_bytes=plan.keep_bytes,
        after_epoch=after_epoch if task.checkpoints else None,
    )
    return MemberResult(member.key, keep(weights), tuple(losses), trained_tokens(examples, settings), earlier=earlier)


def _train_lora(model: LanguageModel, task: TrainTask, group: Group) -> list[MemberResult]:
    settings = task.settings
    if not isinstance(settings, LoraSettings):
        raise CapabilityError("full fine-tunes are trained one at a time")
    device = model.adapted.device
    shapes = model.adapter_shapes(settings.targets)
    plan = plan_memory(
        model.adapted,
        shapes,
        settings.rank,
        wanted=len(group),
        longest=max(len(e.ids) for _, examples in group for e in examples),
        limit=task.memory_limit or default_limit(device, task.workers),
        dropout=settings.dropout > 0,
        objective=task.objective.kind,
    )
    return train_in_halves(
        (group[i : i + plan.members] for i in range(0, len(group), plan.members)),
        lambda chunk: _train_chunk(model, settings, task, chunk, shapes, plan),
        halve_on=(CapabilityError, RejectedError),
    )


def _train_chunk(
    model: LanguageModel,
    settings: LoraSettings,
    task: TrainTask,
    chunk: Group,
    shapes: Mapping[str, tuple[int, int]],
    plan: MemoryPlan,
) -> list[MemberResult]:
    starts: dict[Path, Weights] = {}
    members = []
    for member, examples in chunk:
        start = None
        folder = _folder(member.start)
        if folder is not None:
            if folder not in starts:
                starts[folder] = model.start_weights(folder, settings, shapes)
            start = starts[folder]
        members.append(Member(examples, member.seed, start))
    earlier: list[dict[int, Files]] = [{} for _ in chunk]

    def pack(own: Weights) -> Files:
        return _packed(partial(save_adapter, weights=own, settings=settings, base_model=model.name))

    def after_epoch(epoch: int, weights: list[Weights]) -> None:
        if wanted(epoch, settings.n_epochs, task.checkpoints):
            for kept, own in zip(earlier, weights, strict=True):
                kept[epoch] = pack(own)

    weights, losses, _ = train_members(
        model.adapted,
        members,
        shapes,
        settings,
        objective=task.objective,
        max_tokens=plan.max_tokens,
        keep_bytes=plan.keep_bytes,
        after_epoch=after_epoch if task.checkpoints else None,
    )
    results = []
    for (member, examples), own, history, kept in zip(chunk, weights, losses, earlier, strict=True):
        tokens = trained_tokens(examples, settings)
        results.append(MemberResult(member.key, pack(own), tuple(history), tokens, earlier=kept))
    return results


def _packed(save: Callable[[Path], None]) -> Files:
    with tempfile.TemporaryDirectory(prefix="daunce-finetune-") as folder:
        out = Path(folder) / "model"
        save(out)
        return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def _folder(given: Path | Files | None) -> Path | None:
    return given if given is None or isinstance(given, Path) else _unpacked(given)


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
