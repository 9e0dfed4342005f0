"""Which jobs are trained together, and what happens to the others where a group is lost."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from daunce_api.config import RunConfig
from daunce_api.errors import ConfigurationError, MissingExtraError, StopError, TransientError
from daunce_api.providers.base import Job, JobRequest, JobStatus
from daunce_api.providers.local import trainer as trainer_module
from daunce_api.providers.local.backend import LocalRun
from daunce_api.providers.local.store import MemberResult
from daunce_api.providers.local.trainer import LocalTrainer, group_size, trainer_capabilities
from daunce_api.providers.local.worker import TrainTask


def jobs_of(group: list[str]) -> list[int]:
    return [int(name.removeprefix("m")) for name in group]


@dataclass
class StubEngine:
    """Answers each group after some turns of the event loop, as its script says: None trains nothing and succeeds, an
    error is raised, and from ``dies_at`` on no group is answered."""

    workers: int = 2
    script: list[Exception | None] = field(default_factory=list)
    dies_at: int = 10**9
    writes: bool = True
    groups: list[list[str]] = field(default_factory=list)

    def submit(self, function: Callable[[Any], Any], task: TrainTask) -> Future[Any]:
        self.groups.append([m.key for m in task.members])
        future: Future[Any] = Future()
        if len(self.groups) > self.dies_at:
            return future
        planned = self.script.pop(0) if self.script else None
        if planned is not None:
            future.set_exception(planned)
        else:
            for m in task.members if self.writes else ():
                m.out.mkdir(parents=True)
                (m.out / "weights").write_text(m.key)
            future.set_result([MemberResult(m.key) for m in task.members])
        return future

    def close(self) -> None: ...


@pytest.fixture
def config(tmp_path: Path, model_folder: Path) -> Callable[..., RunConfig]:
    def make(run: str = "run", members: int = 100, cap: int | None = None, **sections: Any) -> RunConfig:
        return RunConfig.from_mapping(
            {
                "run_dir": str(tmp_path / run),
                "data": {"train": "t.jsonl", "test": "q.jsonl"},
                "backend": {
                    "kind": "local",
                    "model": str(model_folder),
                    "max_concurrent_jobs": cap,
                    "options": sections.pop("options", {}),
                },
                "ensemble": {"members": members, **sections},
            }
        )

    return make


async def submit(trainer: LocalTrainer, name: str, model: str) -> Job:
    content = b'{"prompt": "a", "completion": "b"}\n'
    file_id = await trainer.upload("subset.jsonl", content)
    return await trainer.submit(JobRequest(name, model, file_id, 1, {}, name))


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():  # noqa: ASYNC110 - what is waited for is the trainer's state, which has no event
        await asyncio.sleep(0.005)


async def ended(trainer: LocalTrainer, jobs: list[Job]) -> list[Job]:
    async def all_final() -> bool:
        return all([(await trainer.get(j.id)).status.final for j in jobs])

    await until(all_final)
    return [await trainer.get(j.id) for j in jobs]


async def test_a_hundred_jobs_are_cut_into_the_same_groups_however_they_come(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trainer_module, "_GATHER_SECONDS", 1e6)  # all groups are full
    seen = []
    for run, turns in (("at once", 0), ("in drops", 3)):
        chosen = config(run)
        engine = StubEngine()
        async with LocalTrainer(LocalRun(chosen, engine)) as trainer:
            jobs = []
            for k in range(104):
                jobs.append(await submit(trainer, f"m{k}", chosen.backend.model))
                for _ in range(turns):
                    await asyncio.sleep(0.001)
            await ended(trainer, jobs)
        seen.append(sorted(engine.groups, key=lambda group: jobs_of(group)[0]))  # two workers may take turns
    in_order = [f"m{k}" for k in range(104)]
    assert seen[0] == [in_order[first : first + 8] for first in range(0, 104, 8)]
    assert seen[1] == seen[0]


async def test_a_lost_workers_jobs_are_trained_again_as_those_that_waited_longest(config: Callable[..., RunConfig]):
    chosen = config(options={"members_at_a_time": 2})
    engine = StubEngine(workers=1, script=[TransientError("worker lost")])
    async with LocalTrainer(LocalRun(chosen, engine)) as trainer:
        jobs = [await submit(trainer, f"m{k}", chosen.backend.model) for k in range(4)]
        done = await ended(trainer, jobs)
    assert [j.status for j in done] == [JobStatus.SUCCEEDED] * 4
    assert engine.groups == [["m0", "m1"], ["m0", "m1"], ["m2", "m3"]]


async def test_the_first_groups_results_outlive_a_death_in_the_second(config: Callable[..., RunConfig]):
    chosen = config(options={"members_at_a_time": 2})
    names = [f"m{k}" for k in range(6)]
    async with LocalTrainer(LocalRun(chosen, StubEngine(workers=1, dies_at=1))) as trainer:
        jobs = [await submit(trainer, name, chosen.backend.model) for name in names]
        await ended(trainer, jobs[:2])

        async def second_is_running() -> bool:
            return (await trainer.get(jobs[2].id)).status is JobStatus.RUNNING

        await until(second_is_running)
    engine = StubEngine(workers=1)
    async with LocalTrainer(LocalRun(chosen, engine)) as trainer:
        done = await ended(trainer, jobs)
    assert engine.groups == [names[2:4], names[4:6]]
    for job, name in zip(done, names, strict=True):
        assert (chosen.run_dir / "local" / "models" / str(job.model) / "weights").read_text() == name


async def test_the_target_waits_for_nobody(config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trainer_module, "_GATHER_SECONDS", 1e6)
    chosen = config(start_from="target", cap=4)
    engine = StubEngine()
    async with LocalTrainer(LocalRun(chosen, engine)) as trainer:
        target = (await ended(trainer, [await submit(trainer, "target", chosen.backend.model)]))[0]
        # Two workers and four jobs at once: groups of two, of which an incomplete one waits for further jobs.
        jobs = [await submit(trainer, f"m{k}", str(target.model)) for k in range(3)]
        await ended(trainer, jobs[:2])
        assert (await trainer.get(jobs[2].id)).status is JobStatus.QUEUED
        jobs.append(await submit(trainer, "m3", str(target.model)))
        await ended(trainer, jobs)
    assert engine.groups == [["target"], ["m0", "m1"], ["m2", "m3"]]


def test_groups_follow_from_the_config_and_the_workers(config: Callable[..., RunConfig]):
    def size(workers: int, **given: Any) -> int:
        chosen = config(**given)
        at_once = trainer_capabilities(chosen).max_concurrent_jobs
        return group_size(LocalRun(chosen), workers=workers, jobs_at_once=at_once)

    assert size(2) == 8
    assert size(2, members=6) == 3
    assert size(64) == 2
    assert size(2, members=6, options={"members_at_a_time": 5}) == 5
    assert size(2, cap=4) == 2
    assert size(2, cap=4, options={"members_at_a_time": 16}) == 4


def test_all_members_can_wait_together_unless_a_rule_may_end_the_run(config: Callable[..., RunConfig]):
    assert trainer_capabilities(config(members=300)).max_concurrent_jobs == 300
    assert trainer_capabilities(config(members=300, options={"workers": 3})).workers == 3  # a plan's hours go by these
    assert trainer_capabilities(config(members=300, stop={"self_lds": 0.5})).max_concurrent_jobs == 64
    assert trainer_capabilities(config(members=300, cap=7)).max_concurrent_jobs == 7


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigurationError("no cluster"), ConfigurationError),
        (MissingExtraError("Ray", "ray"), MissingExtraError),
        (OSError("no room"), StopError),
    ],
)
async def test_a_run_whose_engine_cannot_start_ends_and_can_be_taken_up(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
):
    def fails(_: object) -> None:
        raise error

    chosen = config()
    with monkeypatch.context() as patch:
        patch.setattr("daunce_api.providers.local.backend._start_engine", fails)
        async with LocalTrainer(LocalRun(chosen)) as trainer:
            job = await submit(trainer, "m0", chosen.backend.model)
            with pytest.raises(kind, match=re.escape(str(error))):
                await ended(trainer, [job])
    async with LocalTrainer(LocalRun(chosen, StubEngine())) as trainer:
        assert [j.status for j in await ended(trainer, [job])] == [JobStatus.SUCCEEDED]


async def test_results_that_cannot_be_kept_end_the_run(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
):
    chosen = config()
    run = LocalRun(chosen, StubEngine())

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    async with LocalTrainer(run) as trainer:
        job = await submit(trainer, "m0", chosen.backend.model)
        monkeypatch.setattr(type(run.folder), "write", full)
        with pytest.raises(StopError, match="no space left"):
            await ended(trainer, [job])


async def test_a_cluster_that_does_not_share_the_run_folder_is_named(config: Callable[..., RunConfig]):
    chosen = config()
    async with LocalTrainer(LocalRun(chosen, StubEngine(writes=False))) as trainer:
        job = await submit(trainer, "m0", chosen.backend.model)
        with pytest.raises(ConfigurationError, match="on storage that all machines of the cluster share"):
            await ended(trainer, [job])
