"""``daunce doctor --train-one``: one tiny job, to see whether the provider trains on what is measured.

A provider renders chats with a template of its own, which nobody outside sees: a date, a default system prompt or
reasoning that is left out makes members of other tokens than their losses are measured on. The number of tokens that
the provider bills for a job of known examples tells.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from .._util.clock import Clock
from .._util.retry import RetryPolicy
from ..data.tokenizers import EncodedExample
from ..errors import ProviderError
from ..plan.prices import MILLION, prices_of
from ..plan.tokens import EPOCHS, count
from ..providers.base import Job, JobRequest, JobStatus
from ..providers.probe import probe_model
from ..providers.registry import Backend, capabilities_of
from ..store import FINAL, INTENT, RunStore
from ..train import JobClient, clean_up
from ..train.patient import PollPolicy
from .findings import Findings

if TYPE_CHECKING:
    from ..run import Run

RETRIES = RetryPolicy(first=2.0, longest=30.0, attempts=6, total=300.0)
POLLS = PollPolicy(first=10.0, longest=10.0, job_timeout=7200.0)


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

    What fails is a finding. The job has a small run folder of its own beside the config's, so that a look that was
    interrupted goes on with it; the folder is deleted at the end.
    """
    content = run.train.training_file(job.positions, run.config.data.loss_on)
    mark = hashlib.sha256(content + repr(sorted(job.hyperparameters.items())).encode()).hexdigest()[:12]
    folder, base = run.run_dir.with_name(f"{run.run_dir.name}.doctor-{mark}"), run.config.backend.model
    with RunStore.create_or_open(folder, run.manifest(), run_key=f"doctor{mark}") as store:
        client = JobClient(backend.trainer, store, clock=clock, retries=RETRIES, polls=POLLS)
        try:
            ended = await _ended(client, base, content, job)
            if ended.status is JobStatus.SUCCEEDED and ended.model is not None:
                compare_tokens(ended.trained_tokens, job.tokens, len(job.positions), findings)
                test = partial(probe_model, backend.scorer, ended.model, example, base=base)
                report = await client.repeat(test, f"test {ended.model}")
                if report is not None:
                    findings.add("fine-tune's alignment", True if report.checked else None, report.detail)
            else:
                findings.add("tiny job", False, f"job {ended.id} is {ended.status}: {ended.error}")
        except ProviderError as error:
            findings.add("tiny job", False, str(error))
        finally:
            for what, why in (await clean_up(client)).kept.items():
                advice = "delete it there when it is no longer needed"
                findings.add("left at the provider", None, f"{what}: {why}; {advice}")
    shutil.rmtree(folder, ignore_errors=True)


async def _ended(client: JobClient, base: str, content: bytes, job: TinyJob) -> Job:
    """The job at its end: that of an earlier look where one was interrupted."""
    rows = client.store.jobs.rows(0)
    if rows and rows[-1].status == INTENT:
        await client.resubmit(rows[-1])
    elif not rows or rows[-1].status in FINAL:
        attempt = len(rows) + 1
        request = JobRequest(
            key=f"{client.store.run_key}-m0-a{attempt}",
            model=base,
            file_id=await client.files.id_of(content, verify=True),
            seed=0,
            hyperparameters=job.hyperparameters,
            suffix="daunce-doctor",
        )
        await client.submit(request, 0, attempt)
    return await client.watch(client.store.jobs.rows(0)[-1])


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
        f"{billed:,} are billed, {counted:,} are counted here: {difference / examples:+.1f} an example",
    )
    findings.advice.append(
        "members may be trained on other tokens than are measured: the provider's chat template adds or leaves out "
        "something (a date, a default system prompt, reasoning), or it bills padding. Write the system prompt into the "
        "data, or give the provider the template of backend.tokenizer where it takes one."
    )
