"""Files, jobs and models of the local backend: plain files in the run folder, each written whole or not at all; and
what a worker is given and gives back about one member."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..._util.files import replacing
from ..base import Job, JobStatus

_OWN_FILE = re.compile(r"file-[0-9a-f]{20}")
_OWN_MODEL = re.compile(r"ft-[0-9a-f]{20}(-e[1-9][0-9]{0,5})?")


@dataclass(frozen=True, slots=True)
class MemberTask:
    """One fine-tune: its training file, its seed, and the folder that its result goes to."""

    key: str
    content: bytes
    seed: int
    out: Path


@dataclass(frozen=True, slots=True)
class MemberResult:
    """What a member's training was, or why there is no fine-tune in its task's ``out``."""

    key: str
    trained_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One job. ``number`` counts the jobs of a run in the order of submission."""

    id: str
    key: str
    model: str
    file_id: str
    seed: int
    hyperparameters: Mapping[str, Any]
    status: JobStatus = JobStatus.QUEUED
    error: str | None = None
    trained_tokens: int | None = None
    number: int = 0

    @property
    def public(self) -> Job:
        """As the orchestrator sees it; a finished job's model carries the job's id."""
        model = model_id(self.id) if self.status is JobStatus.SUCCEEDED else None
        return Job(self.id, self.status, model, self.error, self.trained_tokens)


def model_id(job_id: str) -> str:
    """Name of the model that a job makes."""
    return job_id.replace("job-", "ft-", 1)


def job_id(key: str) -> str:
    return f"job-{hashlib.sha256(key.encode()).hexdigest()[:20]}"


class JobFolder:
    """``files/``, ``jobs/`` and ``models/`` of one run, made when something is written."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def file_id(self, name: str, size: int) -> str:
        """Id that a file of this name and size has; names carry a hash of the content."""
        return f"file-{hashlib.sha256(f'{name}|{size}'.encode()).hexdigest()[:20]}"

    def write_file(self, name: str, content: bytes) -> str:
        file_id = self.file_id(name, len(content))
        _write(self.root / "files" / file_id, content)
        return file_id

    def file(self, file_id: str) -> Path | None:
        """Path of an uploaded file, or None. Ids hold no path."""
        path = self.root / "files" / file_id
        return path if _OWN_FILE.fullmatch(file_id) and path.is_file() else None

    def write(self, record: JobRecord) -> None:
        _write(self.root / "jobs" / f"{record.id}.json", json.dumps(asdict(record), indent=1).encode())

    def read(self) -> dict[str, JobRecord]:
        """Every job, by id. A job that was running when the last process ended is queued again."""
        jobs = {}
        for path in sorted((self.root / "jobs").glob("job-*.json")):
            content = json.loads(path.read_text())
            content.pop("group", None)  # of an earlier version
            status = JobStatus(content["status"])
            content["status"] = JobStatus.QUEUED if status is JobStatus.RUNNING else status
            jobs[content["id"]] = JobRecord(**content)
        return jobs

    def adapter(self, model: str) -> Path | None:
        """Folder of a model that a job made, or None."""
        path = self.root / "models" / model
        return path if _OWN_MODEL.fullmatch(model) and path.is_dir() else None

    def checkpoints(self, job_id: str) -> list[str]:
        """Models that a job was after earlier epochs, ascending."""
        own = model_id(job_id)
        found = {int(p.name.removeprefix(f"{own}-e")): p.name for p in (self.root / "models").glob(f"{own}-e*")}
        return [found[epoch] for epoch in sorted(found)]

    def model_path(self, job_id: str) -> Path:
        """Where a worker writes the model that a job makes; those of earlier epochs lie :func:`beside` it."""
        return self.root / "models" / model_id(job_id)

    def discard_models(self, job_id: str) -> None:
        """Forget what a worker wrote for a job that no longer counts."""
        for folder in (self.root / "models").glob(f"{model_id(job_id)}*"):
            shutil.rmtree(folder, ignore_errors=True)


def beside(folder: Path, epoch: int) -> Path:
    """Where what ``folder`` was after an earlier epoch (from 1) is left."""
    return folder.with_name(f"{folder.name}-e{epoch}")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder to write plain files into, which becomes ``out`` when all of it is there and on disk, in place of an
    old one; nothing is left of it where writing fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.part-"))
    try:
        yield part
        for path in part.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if out.exists():
            shutil.rmtree(out)
        part.chmod(0o755)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a model's folder: plain files only, so that a wrong path can do no harm."""
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as part, part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
