"""The running parts behind the routes: state, the model's processes, the queue of jobs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..data.tokenizers import LocalTokenizer
from ..providers.server_settings import ServerSettings
from .api_errors import ApiError, model_not_found, unavailable
from .channel import Worker, WorkerDiedError, WorkerFaultError
from .inject import Injector
from .state import Row, State
from .tokentext import TokenText


@dataclass(frozen=True)
class BaseModelFacts:
    """What the base model says of itself when it is loaded."""

    id: str
    folder: Path
    max_context: int
    vocabulary: int
    end: int | None
    fingerprint: str
    created: int

    @classmethod
    def of(cls, facts: dict[str, Any], settings: ServerSettings) -> BaseModelFacts:
        folder = Path(facts["tokenizer"])
        name = settings.model_name or "".join(
            c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in facts["name"]
        )
        return cls(
            id=name,
            folder=folder,
            max_context=facts["max_context"],
            vocabulary=facts["vocabulary"],
            end=facts["end"],
            fingerprint=facts["fingerprint"],
            created=int((folder / "tokenizer.json").stat().st_mtime),
        )


@dataclass(frozen=True)
class ServedModel:
    """A model that a request named: the base, a fine-tune or a checkpoint of one."""

    id: str
    adapter: Path | None
    fingerprint: str


@dataclass
class Service:
    """Shared by all routes; made when the server starts."""

    settings: ServerSettings
    state: State
    base: BaseModelFacts
    tokenizer: LocalTokenizer
    text: TokenText
    scorer: Worker
    injector: Injector | None
    waiting: int = field(default=0)

    def born(self, identity: str) -> None:
        """A job, file or model is new; an injected lag hides it for a while."""
        if self.injector is not None:
            self.injector.born(identity)

    def hidden(self, kind: Literal["job", "file", "model"], identity: str, *, listed: bool = False) -> bool:
        """Whether an injected lag hides it still, by id or from lists."""
        return self.injector is not None and self.injector.hidden(kind, identity, listed=listed)

    def served(self, model: str) -> ServedModel:
        """Raises ApiError 404 where there is no such model."""
        if model == self.base.id:
            return ServedModel(model, None, fingerprint(self.base.fingerprint))
        row = self.fine_tune(model)
        return ServedModel(model, self.state.adapter_path(row), fingerprint(self.base.fingerprint, row["fingerprint"]))

    def fine_tune(self, model: str) -> Row:
        """The row of a fine-tune or checkpoint that requests may name. Raises ApiError 404."""
        row = self.state.one("models", model)
        if row is None or self.hidden("model", model) or not self.answers(row):
            raise model_not_found(model)
        return row

    def answers(self, row: Row) -> bool:
        """Whether a model can be asked: at Nebius only those that were made of a checkpoint can."""
        return self.settings.dialect != "nebius" or ":" in row["job"]

    async def for_inference(self, model: str) -> ServedModel:
        """As :meth:`served`; here a model that is to vanish under its users does so."""
        found = self.served(model)
        if self.injector is not None and found.adapter is not None:
            row = self.state.one("models", model)
            job = self.state.one("jobs", row["job"]) if row is not None else None
            if job is not None and job["fault"] == "model_deleted" and self.injector.vanishes_now(model):
                await self.delete_fine_tune(model)
                raise model_not_found(model)
        return found

    async def delete_fine_tune(self, model: str) -> None:
        """Delete a fine-tune with the checkpoints of its job, or one checkpoint alone."""
        row = self.state.one("models", model)
        if row is None:
            raise model_not_found(model)
        rows = [row] if row["step"] is not None else self.state.models_of_job(row["job"])
        self.state.delete_models(rows)
        for deleted in rows:
            await self.scorer.tell({"op": "unload", "id": 0, "adapter": str(self.state.adapter_path(deleted))})

    async def infer(self, model: ServedModel, message: dict[str, Any]) -> dict[str, Any]:
        """Ask the model's process; requests are answered in the order of their arrival.

        Raises ApiError 503 where too many wait or the process died twice, 404 where the model was deleted meanwhile,
        500 where it fails.
        """
        message = {**message, "adapter": None if model.adapter is None else str(model.adapter)}
        if self.waiting >= self.settings.max_queue:
            raise unavailable("Too many requests are waiting for the model.", code="overloaded")
        self.waiting += 1
        try:
            for _ in range(2):
                try:
                    return await self.scorer.call(message)
                except WorkerDiedError:
                    continue
            raise unavailable("The model's process ended. It is started again at the next request.", code="engine_lost")
        except WorkerFaultError as fault:
            if model.adapter is not None and not model.adapter.exists():
                raise model_not_found(model.id) from None
            raise ApiError(500, f"The model failed: {fault.message[:300]}", type="server_error") from None
        finally:
            self.waiting -= 1


def fingerprint(*digests: str) -> str:
    """``system_fingerprint``: changes with the base model and with the weights on top of it."""
    return "fp_" + hashlib.sha256("".join(digests).encode()).hexdigest()[:12]
