"""Stop a run, and take away what it left: jobs, files and models at its provider, and what stands on its scoring server
(deployments and adapters, some of them paid for by the hour). A store and a backend are all that this needs."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from .._util.blocking import run_blocking
from ..config import RunConfig
from ..providers.base import Deferred, Hosting, Scorer
from ..providers.registry import Backend, open_backend
from ..store import RunStore
from ..train import CancelReport, CleanReport, JobClient, cancel_jobs, clean_up

Answer = TypeVar("Answer")


def cancel_run(run_dir: str | Path) -> CancelReport:
    """Stop the jobs of a run that are not final: of any run folder, also one whose data or tokenizer is gone."""
    return _at_provider(run_dir, lambda client, _: cancel_jobs(client))


def clean_run(run_dir: str | Path) -> CleanReport:
    """Delete what a run created at the provider: models and files of its jobs, batches of its scoring. What it left on
    the scoring server is taken off first. Needs the run's store and its provider, nothing else."""
    return _at_provider(run_dir, clean_everything)


async def clean_everything(client: JobClient, backend: Backend) -> CleanReport:
    """:func:`clean_run` with a client and a backend that are open."""
    store, scorer = client.store, backend.scorer
    hosted = store.hosted.models()
    kept = await take_off(scorer, store)
    report = await clean_up(client)
    report.unloaded = [model for model in hosted if model not in kept]
    report.kept.update({f"{model} on the scoring server": why for model, why in kept.items()})
    if isinstance(scorer, Deferred):
        swept = await scorer.sweep(store.jobs.models())
        report.files += swept.files
        report.kept |= swept.kept
    return report


def _at_provider(run_dir: str | Path, action: Callable[[JobClient, Backend], Coroutine[Any, Any, Answer]]) -> Answer:
    async def act() -> Answer:
        with RunStore.open(run_dir) as store:
            async with open_backend(RunConfig.from_manifest(store.manifest)[0]) as backend:
                return await action(JobClient(backend.trainer, store), backend)

    return run_blocking(act())


async def take_off(scorer: Scorer, store: RunStore) -> dict[str, str]:
    """Take off the scoring server what the store knows of; why not, by model, where that failed.

    Raises StopError where credentials do not allow it.
    """
    models = store.hosted.models()
    if not models or not isinstance(scorer, Hosting):
        return {}
    scorer.record(store.hosted)
    return await scorer.take_off(models)


async def take_off_before(config: RunConfig, store: RunStore) -> None:
    """The same before a run goes on, a finished one too; a backend is opened only where something was left. What
    could not be taken off is noted, and tried again the next time."""
    if not store.hosted.models():
        return
    async with open_backend(config) as backend:
        for model, why in (await take_off(backend.scorer, store)).items():
            store.note("left on the scoring server", f"{model}: {why}")
