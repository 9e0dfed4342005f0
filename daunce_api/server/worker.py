"""The processes that hold the model, and what they run for the server: plain functions of picklable values.

Nothing here imports PyTorch before a process calls it.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RejectedError
from ..providers.local.engines import WorkerProcess, report
from ..providers.local.options import LoraSettings, ModelSpec
from .training_data import read_training_file

if TYPE_CHECKING:
    from ..providers.local.language import TokenLogprobs

Read = dict[str, list[Any]]
"""``logprobs`` of n tokens in nats, and n lists each of the most likely tokens there: ``top_ids``, ``top_logprobs``."""


class Worker:
    """One process with the model, for use from the event loop: one call at a time, in the order of arrival."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._process = WorkerProcess()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="daunce-serve")

    async def call(
        self, function: Callable[..., Any], *arguments: Any, on_report: Callable[[Any], object] = lambda _: None
    ) -> Any:
        """``function(spec, *arguments)`` in the process, which is started where it does not run.

        Raises WorkerLostError where it ends meanwhile, and whatever the function raises.
        """
        loop = asyncio.get_running_loop()
        call = partial(self._process.call, on_report=lambda message: loop.call_soon_threadsafe(on_report, message))
        return await loop.run_in_executor(self._thread, call, function, self._spec, *arguments)

    def stop(self) -> None:
        """End the training that is in progress at its next step."""
        self._process.stop()

    async def close(self) -> None:
        """End the process for good; the next server starts its job again."""
        self._process.end()
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)


@dataclass(frozen=True)
class BaseModelFacts:
    """Facts about the base model, known once it is loaded; ``end`` is the id of the token that ends an answer."""

    id: str
    folder: Path
    max_context: int
    vocabulary: int
    end: int | None
    fingerprint: str


def facts(spec: ModelSpec) -> BaseModelFacts:
    """Load the model."""
    from ..providers.local.worker import loaded

    model = loaded(spec)
    end = model.tokenizer.encode(model.tokenizer.end) if model.tokenizer.end else []
    digest = hashlib.sha256()
    for path in sorted(model.tokenizer.folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja"):
            digest.update(path.name.encode())
            with path.open("rb") as stream:
                hashlib.file_digest(stream, lambda: digest)
    return BaseModelFacts(
        id="".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in model.name),
        folder=model.tokenizer.folder,
        max_context=model.max_context,
        vocabulary=model.vocabulary,
        end=end[-1] if len(end) == 1 else None,
        fingerprint=digest.hexdigest(),
    )


def score(spec: ModelSpec, adapter: Path | None, prompts: Sequence[Sequence[int]], top: int) -> list[Read]:
    """Every id of every prompt.

    The first id of a prompt has nothing before it: its value is that of a text that starts there, that is given
    the model's beginning-of-text token alone or, where it has none, its end-of-text token (OpenAI's rule for an
    empty prompt). Raises RejectedError where a value is not finite.
    """
    from ..providers.local.worker import loaded

    model = loaded(spec)
    begin = model.tokenizer.encode(model.tokenizer.begin or model.tokenizer.end or "")
    firsts = list(dict.fromkeys(prompt[0] for prompt in prompts))
    pairs = [[begin[-1] if begin else 0, first] for first in firsts]
    found = [_plain(read) for read in model.token_logprobs([*pairs, *prompts], adapter=adapter, top=top)]
    first_of = dict(zip(firsts, found, strict=False))
    answers = [
        {key: [*first_of[prompt[0]][key], *values] for key, values in read.items()}
        for prompt, read in zip(prompts, found[len(firsts) :], strict=True)
    ]
    if not all(math.isfinite(value) for answer in answers for value in answer["logprobs"]):
        raise RejectedError("the model gives log-probabilities that are not finite")
    return answers


def generate(
    spec: ModelSpec, adapter: Path | None, prompt: Sequence[int], options: Mapping[str, Any]
) -> tuple[list[int], Read, bool]:
    """Generated ids, what the model gives for them, and whether a stop id ended them; ``options`` are those of
    ``LanguageModel.generate``."""
    from ..providers.local.worker import loaded

    made = loaded(spec).generate(prompt, adapter=adapter, **options)
    return list(made.ids), _plain(made.read), made.finished


@dataclass(frozen=True)
class Step:
    """A job made an optimizer step."""

    step: int
    total_steps: int
    train_loss: float


@dataclass(frozen=True)
class Checkpoint:
    """A job finished an epoch with ``step``."""

    step: Step
    folder: Path
    digest: str


@dataclass(frozen=True)
class Trained:
    """The result of a job: one loss per step, and the digest of the weights."""

    losses: tuple[float, ...]
    trained_tokens: int
    folder: Path
    digest: str


def train(
    spec: ModelSpec, file: Path, settings: LoraSettings, seed: int, out: Path, start_from: Path | None
) -> Trained:
    """Train one job; it reports each Step and Checkpoint. Raises TrainingFileError, RejectedError where it diverges,
    OSError where the disk is full, TrainingCancelledError where it was stopped."""
    from ..providers.local.train import fine_tune, trained_tokens
    from ..providers.local.worker import loaded

    model = loaded(spec)
    examples = read_training_file(file, model.tokenizer, model.max_context)
    trainee = model.trainee([(examples, seed)], settings, start_from)
    steps: list[Step] = []

    def after_step(step: int, total: int, losses: list[float]) -> None:
        steps.append(Step(step, total, losses[0]))
        report(steps[-1])

    def after_epoch(epoch: int) -> None:
        folder = out.with_name(f"{out.name}.epoch-{epoch}")
        model.save(folder, trainee)
        report(Checkpoint(steps[-1], folder, _digest(folder)))

    try:
        [losses] = fine_tune(model.adapted, trainee, settings, after_step=after_step, after_epoch=after_epoch)
        model.save(out, trainee)
    except Exception as error:
        # safetensors has no class of its own for a full disk: it prints what the operating system said.
        if any(word in str(error) for word in ("StorageFull", "No space left", "QuotaExceeded")):
            raise OSError(errno.ENOSPC, str(error)) from None
        raise
    return Trained(tuple(losses), trained_tokens(examples, settings), out, _digest(out))


def _plain(read: TokenLogprobs) -> Read:
    return {name: values.tolist() for name, values in read._asdict().items()}


def _digest(adapter: Path) -> str:
    return hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
