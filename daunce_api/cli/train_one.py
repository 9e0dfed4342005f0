"""``daunce doctor --train-one``: one tiny job, to see whether the provider trains on what is measured.

A provider renders chats with a template of its own, which nobody outside sees: a date, a default system prompt or
reasoning that is left out makes members of other tokens than their losses are measured on. The number of tokens that
the provider bills for a job of known examples tells.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._util.clock import Clock, SystemClock
from .._util.retry import Retrier, RetryPolicy
from ..data.tokenizers import EncodedExample
from ..errors import AmbiguousSubmitError, ProviderError
from ..plan.prices import MILLION, prices_of
from ..plan.tokens import EPOCHS, count
from ..providers.base import Job, JobRequest, JobStatus, Trainer
from ..providers.probe import probe_model
from ..providers.registry import Backend, capabilities_of
from .findings import Findings

if TYPE_CHECKING:
    from ..run import Run

RETRIES = RetryPolicy(first=2.0, longest=30.0, attempts=6, total=300.0)
POLL_SECONDS, LONGEST = 10.0, 7200.0
"""Between two looks at the job, and until it is cancelled."""
LISTING_SECONDS = 15.0
"""How long a new job may be missing from a list, where the provider does not say."""


@dataclass(frozen=True, slots=True)
class TinyJob:
    """What is trained: examples by their positions, their tokens in one epoch, dollars (None: price not known)."""

    positions: tuple[int, ...]
    tokens: int
    usd: float | None
    hyperparameters: dict[str, bool | int | float | str]


def tiny_job(run: Run) -> TinyJob:
    """The shortest examples that the provider takes as a file, one epoch."""
    trainer, scorer = capabilities_of(run.config)
    tokens_N = count(run.config, run.train, run.test, run.encoded, trainer, scorer).training_N
    shortest = sorted(range(len(tokens_N)), key=lambda i: (tokens_N[i], i))[: max(trainer.min_examples, 4)]
    tokens = sum(tokens_N[i] for i in shortest)
    given = dict(run.config.training.hyperparameters)
    known = next((name for name in EPOCHS if name in given or name in trainer.hyperparameters), "n_epochs")
    price = prices_of(run.config)[0].training
    usd = None if price is None else tokens * price / MILLION
    return TinyJob(tuple(sorted(shortest)), tokens, usd, {**given, known: 1})


async def train_one(
    run: Run, backend: Backend, job: TinyJob, example: EncodedExample, findings: Findings, *, clock: Clock | None = None
) -> None:
    """Train it, compare what is billed with what is counted, test the scorer with the model, and delete both.

    What fails is a finding. The job carries a key of its content, so that an interrupted look finds it again.
    """
    trainer, retry = backend.trainer, Retrier(RETRIES, clock or SystemClock())
    content = run.train.training_file(job.positions, run.config.data.loss_on)
    mark = hashlib.sha256(content + repr(sorted(job.hyperparameters.items())).encode()).hexdigest()[:12]
    name = f"daunce-doctor-{mark}.jsonl"
    file_id = model = None
    try:
        file_id = await retry(lambda: trainer.find_file(name, len(content)), "look for the file")
        if file_id is None:
            file_id = await retry(lambda: trainer.upload(name, content), "upload the file")
        request = JobRequest(
            key=f"doctor{mark}-m0-a1",
            model=run.config.backend.model,
            file_id=file_id,
            seed=0,
            hyperparameters=job.hyperparameters,
            suffix="daunce-doctor",
        )
        ended = await _ended(trainer, request, retry, clock or SystemClock())
        model = ended.model
        if ended.status is not JobStatus.SUCCEEDED or model is None:
            findings.add("tiny job", False, f"job {ended.id} is {ended.status}: {ended.error or 'it has no model'}")
            return
        compare_tokens(ended.trained_tokens, job.tokens, len(job.positions), findings)
        base, tested = run.config.backend.model, model
        report = await retry(lambda: probe_model(backend.scorer, tested, example, base=base), f"test {model}")
        if report is not None:
            findings.add("fine-tune's alignment", True if report.checked else None, report.detail)
    except ProviderError as error:
        findings.add("tiny job", False, str(error))
    finally:
        await _delete(trainer, model, file_id, findings)


async def _ended(trainer: Trainer, request: JobRequest, retry: Retrier, clock: Clock) -> Job:
    """The job once it is final and has its model; it is submitted once, and looked for before that."""

    async def submitted() -> Job:
        known = await trainer.find_job(request.key)
        return known if known is not None else await trainer.submit(request)

    try:
        job = await retry(submitted, "submit the tiny job")
    except AmbiguousSubmitError:
        await clock.sleep(trainer.capabilities.listing_lag_seconds or LISTING_SECONDS)
        found = await retry(lambda: trainer.find_job(request.key), "look for the tiny job")
        if found is None:
            raise
        job = found
    begun, job_id = clock.now(), job.id
    while not job.status.final or (job.status is JobStatus.SUCCEEDED and job.model is None):
        if clock.now() - begun > LONGEST:
            if job.status.final:
                return job
            return await retry(lambda: trainer.cancel(job_id), "cancel the tiny job")
        await clock.sleep(POLL_SECONDS)
        job = await retry(lambda: trainer.get(job_id), "look at the tiny job")
    return job


async def _delete(trainer: Trainer, model: str | None, file_id: str | None, findings: Findings) -> None:
    """Delete what the job left; what stays is named."""
    try:
        if model is not None and not await trainer.delete_model(model):
            findings.add("left at the provider", None, f"model {model}: delete it there when it is no longer needed")
        if file_id is not None and not await trainer.delete_file(file_id):
            findings.add("left at the provider", None, f"file {file_id}: delete it there when it is no longer needed")
    except ProviderError as error:
        findings.add("left at the provider", None, f"model {model}, file {file_id}: {error}")


def compare_tokens(billed: int | None, counted: int, examples: int, findings: Findings) -> None:
    """Add what the number of billed tokens says of the provider's template."""
    if billed is None:
        findings.add("billed tokens", None, "the provider reports none, so its template could not be compared")
        return
    difference = billed - counted
    if difference == 0:
        findings.add("billed tokens", True, f"{billed:,} are billed and {counted:,} are counted here: the same text")
        return
    findings.add(
        "billed tokens",
        None,
        f"{billed:,} are billed, {counted:,} are counted here: {abs(difference) / examples:+.1f} an example".replace(
            "+", "+" if difference > 0 else "-"
        ),
    )
    findings.advice.append(
        "members may be trained on other tokens than are measured: the provider's chat template adds or leaves out "
        "something (a date, a default system prompt, reasoning), or it bills padding. Write the system prompt into the "
        "data, or give the provider the template of backend.tokenizer where it takes one."
    )
