"""The models that members' jobs left: which there are, and whether one is gone or not visible yet."""

from __future__ import annotations

from ..errors import RejectedError
from .client import JobClient
from .events import Event, EventKind, name_of


class Models:
    """Models of one run's members; ``wanted`` of each are scored (``ensemble.checkpoints``)."""

    def __init__(self, client: JobClient, wanted: int) -> None:
        self._client = client
        self._wanted = wanted

    async def checkpoints(self, member: int) -> dict[int, str]:
        """The member's models from before the end of its job, as many as ``ensemble.checkpoints`` wants, by number:
        1 is the last one before the final model. Fewer, where the provider has fewer."""
        wanted = self._wanted
        row = self._client.store.jobs.trained_by(member)
        if wanted == 1 or row is None:
            return {}
        known = self._client.store.jobs.checkpoints(row.key) is not None
        models_S = await self._client.checkpoints(row)
        models = {n: model for n, model in enumerate(reversed(models_S), start=1) if n < wanted and model is not None}
        if not known and len(models) < wanted - 1:
            text = f"{name_of(member)} has {1 + len(models)} of the {wanted} models that ensemble.checkpoints asks for"
            self._client.emit(Event(EventKind.FEWER_MODELS, text, member, row.attempt))
        return models

    async def checkpoint_is_gone(self, member: int, number: int, model: str, error: RejectedError) -> bool:
        """Whether a refused request means that the provider no longer has this checkpoint; then it is left out.

        A checkpoint that is not visible yet is waited for first. False: the request was refused for another reason.
        """
        row = self._client.store.jobs.trained_by(member)
        if row is None or (error.status != 404 and await self._client.model_exists(model)):
            return False
        self._client.store.jobs.checkpoint_gone(row.key, number, str(error))
        text = f"{name_of(member)} is used without {model}: {error}"
        self._client.emit(Event(EventKind.FEWER_MODELS, text, member, row.attempt))
        return True

    async def is_not_yet(self, model: str, error: RejectedError) -> bool:
        """Whether a refused request about a new model is worth repeating: the provider does not show the model yet.

        Waits before it says so; False once the grace period is over, or where the model is not what is missing.
        """
        if error.status != 404 and (model not in str(error) or await self._client.model_exists(model)):
            return False
        return await self._client.wait_for(f"model {model}", error)
