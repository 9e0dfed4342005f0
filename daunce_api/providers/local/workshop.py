"""What the trainer and the scorer of one run share: its folder and its workers."""

from __future__ import annotations

import threading
from pathlib import Path

from ...config import RunConfig
from ...errors import RejectedError
from .engines import Engine, ProcessEngine, RayEngine, ThreadEngine
from .jobs import JobFolder
from .kits import kit_of
from .member_work import Files
from .options import LocalOptions, options_of

FOLDER = "local"
"""Inside the run folder."""


class Workshop:
    """What the trainer and the scorer of one run share: the folder and the workers."""

    def __init__(self, config: RunConfig, engine: Engine | None = None) -> None:
        """``engine`` replaces the one that the options name; the caller closes it."""
        self.config = config
        self.options = options_of(config)
        self.model = config.backend.model
        self.kit = kit_of(config)
        self.folder = JobFolder(config.run_dir / FOLDER)
        self._engine = engine
        self._own = engine is None
        self._users = 0
        self._starting = threading.Lock()

    @property
    def engine(self) -> Engine:
        """The workers, started at first use. Raises ConfigurationError or MissingExtraError where they cannot be."""
        with self._starting:  # the trainer and the scorer ask from threads of their own
            if self._engine is None:
                self._engine = _start_engine(self.options)
            return self._engine

    def enter(self) -> None:
        self._users += 1

    def leave(self) -> None:
        """The last one to leave stops the workers."""
        self._users -= 1
        if self._users == 0 and self._own and self._engine is not None:
            engine, self._engine = self._engine, None
            engine.close()

    def adapter(self, model: str) -> Path | None:
        """Folder of a fine-tune's model id, an adapter or a whole model; None for the base model. Raises RejectedError
        for an unknown id."""
        if model == self.model:
            return None
        folder = self.folder.adapter(model)
        if folder is not None:
            return folder
        if self.kit.is_model(Path(model)):
            return Path(model)
        raise RejectedError(
            f"model {model!r} is neither {self.model}, a model of this run, nor the folder of an adapter or a model"
        )


def _start_engine(options: LocalOptions) -> Engine:
    if options.engine == "ray":
        ray = options.ray
        return RayEngine(address=ray.address, cpus=ray.cpus, gpus=options.gpus_per_task, retries=ray.retries)
    return ThreadEngine() if options.engine == "thread" else ProcessEngine(options.worker_count)


def adapter_files(folder: Path | None) -> Files | None:
    """Content of a fine-tune's folder."""
    return None if folder is None else {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}
