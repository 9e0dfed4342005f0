"""One run of one job: what a worker is asked for, what its progress writes, and the result file."""

from __future__ import annotations

import csv
import io
import logging
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

from ..providers.server_settings import BASE_LEARNING_RATE
from .channel import Message
from .service import Service
from .state import Row, new_id, now

log = logging.getLogger("daunce_api.server")

KEPT_CHECKPOINTS = 3


class Training:
    """A job in a worker's hands."""

    def __init__(self, service: Service, row: Row) -> None:
        self._service, self._state, self._row = service, service.state, row
        self.job = str(row["id"])
        self.adapter = f"{self.job}/final"
        self._started = time.monotonic()
        self._step = 0
        self._loss = 0.0

    def request(self, start_from: Path | None) -> dict[str, Any]:
        """The message to the worker. What an earlier start left is removed first."""
        self._state.delete_models(self._state.models_of_job(self.job))
        self.discard()
        self._started = time.monotonic()
        row = self._row
        return {
            "op": "train",
            "job": self.job,
            "file": str(self._state.file_path(row["training_file"])),
            "settings": {
                "n_epochs": row["n_epochs"],
                "batch_size": row["batch_size"],
                "learning_rate": BASE_LEARNING_RATE * row["learning_rate_multiplier"],
            },
            "seed": row["seed"],
            "out": str(self._state.adapters_dir / self.adapter),
            "start_from": None if start_from is None else str(start_from),
        }

    def discard(self) -> None:
        shutil.rmtree(self._state.adapters_dir / self.job, ignore_errors=True)

    def model_name(self, step: int | None = None) -> str:
        """``ft:BASE:daunce:SUFFIX:ID``; a checkpoint's ends in ``:ckpt-step-N``."""
        name = f"ft:{self._service.base.id}:daunce:{self._row['suffix'] or ''}:{self.job.removeprefix('ftjob-')[:12]}"
        return name if step is None else f"{name}:ckpt-step-{step}"

    def progress(self, message: Message) -> None:
        """A ``step`` or ``checkpoint`` message of the worker."""
        try:
            with self._state.transaction():
                if message["event"] == "step":
                    self._on_step(message)
                else:
                    self._on_checkpoint(message)
        except sqlite3.OperationalError as error:
            # Progress is worth less than the job: it goes on, and its end is written or the job done again.
            log.error("job %s: progress cannot be written: %s", self.job, error)

    def _on_step(self, message: Message) -> None:
        self._step, self._loss, total = message["step"], message["loss"], message["total"]
        remaining = (time.monotonic() - self._started) / self._step * (total - self._step)
        self._state.update_job(self.job, estimated_finish=now() + round(remaining))
        self._state.event(
            self.job,
            f"Step {self._step}/{total}: training loss={self._loss:.2f}",
            type="metrics",
            data={"step": self._step, "total_steps": total, "train_loss": self._loss},
        )

    def _on_checkpoint(self, message: Message) -> None:
        path = Path(message["path"])
        self._state.insert(
            "models",
            id=self.model_name(self._step),
            checkpoint_id=new_id("ftckpt"),
            job=self.job,
            base=self._service.base.id,
            created_at=now(),
            adapter=f"{self.job}/{path.name}",
            fingerprint=message["digest"],
            step=self._step,
            train_loss=self._loss,
        )
        self._state.event(self.job, f"Checkpoint created at step {self._step}")
        checkpoints = [m for m in self._state.models_of_job(self.job) if m["step"] is not None]
        self._state.delete_models(checkpoints[:-KEPT_CHECKPOINTS])


def result_csv(losses: list[float]) -> bytes:
    """OpenAI's columns; those that this server does not measure are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"])
    writer.writerows([step, loss, "", "", ""] for step, loss in enumerate(losses, start=1))
    return text.getvalue().encode()
