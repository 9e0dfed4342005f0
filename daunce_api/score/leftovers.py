"""What an interrupted run left on its scoring server: deployments and adapters, some of them paid for by the hour."""

from __future__ import annotations

from ..config import RunConfig
from ..providers.base import Hosting, Scorer
from ..providers.registry import open_backend
from ..store import RunStore


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
