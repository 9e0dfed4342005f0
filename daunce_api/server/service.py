"""The running parts behind the routes: state, the model's processes, the queue of jobs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.tokenizers import LocalTokenizer
from ..errors import DaunceError
from ..providers.local.engines import WorkerLostError
from ..providers.local.models import resolve_model
from ..providers.local.options import ModelSpec
from ..providers.server_settings import ServerSettings
from .api_errors import ApiError, model_not_found, unavailable
from .inject import Injector
from .scheduler import Scheduler
from .state import Row, State
from .tokentext import TokenText
from .worker import BaseModelFacts, Worker, facts

MAX_QUEUE = 1024
"""Requests that wait for the model before 503 is answered."""


@dataclass(frozen=True)
class ServedModel:
    """A model as requests name it: the base, a fine-tune or a checkpoint of one."""

    id: str
    adapter: Path | None
    fingerprint: str


@dataclass
class Service:
    """Shared by all routes; made when the server starts."""

    settings: ServerSettings
    injector: Injector
    state: State
    scorer: Worker
    base: BaseModelFacts
    tokenizer: LocalTokenizer
    text: TokenText
    scheduler: Scheduler = field(init=False)
    batches: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """Batches in progress, by id."""
    waiting: int = 0

    @classmethod
    async def start(cls, settings: ServerSettings, injector: Injector) -> Service:
        """Open the state and load the model. Raises DaunceError where the model cannot be loaded."""
        await asyncio.to_thread(resolve_model, settings.model)  # a process would report a missing model seconds later
        state = State(settings.state_dir)
        spec = ModelSpec.of(settings.model, device=settings.device, dtype=settings.dtype, threads=settings.threads)
        scorer = Worker(spec)
        try:
            base = await scorer.call(facts)
        except Exception as error:
            await scorer.close()
            state.close()
            if isinstance(error, DaunceError) and not isinstance(error, WorkerLostError):
                raise
            raise DaunceError(f"the model cannot be loaded: {error}") from None
        service = cls(settings, injector, state, scorer, base, LocalTokenizer(base.folder), TokenText(base.folder))
        workers = [Worker(spec) for _ in range(settings.workers)]
        service.scheduler = Scheduler(state, base, service.tokenizer, workers, injector.born)
        return service

    async def close(self) -> None:
        for task in self.batches.values():
            task.cancel()
        await asyncio.gather(*self.batches.values(), return_exceptions=True)
        await self.scheduler.close()
        await self.scorer.close()
        self.state.close()

    def file(self, identity: str) -> Row | None:
        """The row of a file that requests may name."""
        return None if self.injector.hidden("file", identity) else self.state.file(identity)

    def served(self, model: str) -> ServedModel:
        """Raises ApiError 404 where there is no such model."""
        if model == self.base.id:
            return ServedModel(model, None, fingerprint(self.base.fingerprint))
        row = self.fine_tune(model)
        return ServedModel(model, self.state.adapter_path(row), fingerprint(self.base.fingerprint, row["fingerprint"]))

    def fine_tune(self, model: str) -> Row:
        """The row of a fine-tune or checkpoint that requests may name. Raises ApiError 404."""
        row = self.state.one("models", model)
        if row is None or self.injector.hidden("model", model) or not self.answers(row):
            raise model_not_found(model)
        return row

    def answers(self, row: Row) -> bool:
        """Whether requests may use a model; at Nebius only one that was made from a checkpoint."""
        return self.settings.dialect != "nebius" or ":" in row["job"]

    def for_inference(self, model: str) -> ServedModel:
        """As :meth:`served`; a model with the fault ``model_deleted`` disappears here."""
        found = self.served(model)
        if found.adapter is not None:
            job = self.state.one("jobs", self.fine_tune(model)["job"])
            if job is not None and job["fault"] == "model_deleted" and self.injector.vanishes_now(model):
                self.delete_fine_tune(model)
                raise model_not_found(model)
        return found

    def delete_fine_tune(self, model: str) -> None:
        """Delete a fine-tune with the checkpoints of its job, or one checkpoint alone. Raises ApiError 404."""
        row = self.fine_tune(model)
        whole = row["step"] is None and ":" not in row["job"]
        self.state.delete_models(self.state.models_of_job(row["job"]) if whole else [row])

    async def infer(self, model: ServedModel, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(spec, adapter, *arguments)`` in the model's process; requests are answered in the order of their
        arrival.

        Raises ApiError 503 where too many wait or the process died twice, 404 where the model was deleted meanwhile,
        500 where it fails.
        """
        if self.waiting >= MAX_QUEUE:
            raise unavailable("Too many requests are waiting for the model.", code="overloaded")
        self.waiting += 1
        try:
            for _ in range(2):
                with contextlib.suppress(WorkerLostError):
                    return await self.scorer.call(function, model.adapter, *arguments)
        except Exception as error:
            if model.adapter is not None and not model.adapter.exists():
                raise model_not_found(model.id) from None
            raise ApiError(500, f"The model failed: {str(error)[:300]}", type="server_error") from None
        finally:
            self.waiting -= 1
        raise unavailable("The model's process ended. It is started again at the next request.", code="engine_lost")


def fingerprint(*digests: str) -> str:
    """``system_fingerprint``: changes with the base model and with the weights on top of it."""
    return "fp_" + hashlib.sha256("".join(digests).encode()).hexdigest()[:12]
