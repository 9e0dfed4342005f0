"""Members on a Ray cluster of two workers on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_records import records

from daunce_api.config import RunConfig
from daunce_api.data.dataset import Dataset
from daunce_api.data.tokenizers import EncodedExample
from daunce_api.errors import ConfigurationError, DataError
from daunce_api.providers.base import JobRequest, JobStatus
from daunce_api.providers.local.backend import LocalRun, LocalScorer
from daunce_api.providers.local.engines import RayEngine, WorkerLostError
from daunce_api.providers.local.options import LoraSettings
from daunce_api.providers.local.store import MemberResult, MemberTask
from daunce_api.providers.local.trainer import LocalTrainer
from daunce_api.providers.local.worker import ModelSpec, TrainTask, run_score, run_train
from daunce_api.providers.objective import Objective

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

DATA = Dataset.from_records(records(24))
SHORT = LoraSettings(rank=4, alpha=8.0, n_epochs=1, batch_size=5)


@pytest.fixture(scope="module")
def engine() -> Iterator[RayEngine]:
    # Ray's workers are nice by 15 otherwise: beside four busy processes, seconds of work take minutes.
    own = {"include_dashboard": False, "log_to_driver": False, "_system_config": {"worker_niceness": 0}}
    ray.init(num_cpus=2, num_gpus=2, logging_level="ERROR", **own)
    engine = RayEngine(address=None, cpus=1, gpus=1)  # declared GPUs; the work is the CPU's
    yield engine
    engine.close()
    assert ray.is_initialized()  # a cluster that was there before is left alone
    ray.shutdown()


def task(model_folder: Path, member: int, out: Path) -> TrainTask:
    content = DATA.training_file(range(member, 20 + member), "last")
    members = (MemberTask(f"m{member}", content, member, out / str(member)),)
    return TrainTask(ModelSpec(str(model_folder)), SHORT, Objective(), members)


def test_a_killed_actor_is_told_and_the_next_task_has_a_new_one(engine: RayEngine, model_folder: Path, tmp_path: Path):
    def dies(_: TrainTask) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    assert engine.workers == 2
    tasks = [task(model_folder, k, tmp_path / "there") for k in range(2)]
    lost, other = engine.submit(dies, tasks[0]), engine.submit(run_train, tasks[1])
    with pytest.raises(WorkerLostError, match="an actor of the Ray cluster was lost in mid-task") as told:
        lost.result(timeout=500)
    assert told.value.out_of_memory  # as with a process: SIGKILL is how a system takes memory back
    again = engine.submit(run_train, tasks[0])
    for member, result in enumerate(f.result(timeout=500)[0] for f in (again, other)):
        assert run_train(task(model_folder, member, tmp_path / "here"))[0] == result
        name = f"{member}/adapter_model.safetensors"
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_actors_with_a_gpu_each_load_the_model_once_and_score_where_it_is_loaded(
    engine: RayEngine, model_folder: Path, tmp_path: Path
):
    # An actor cannot import this test, so that these are functions of their own.
    def meet(place: Path) -> None:
        """Wait until both actors are here."""
        place.mkdir(exist_ok=True)
        (place / str(os.getpid())).touch()
        while len(list(place.iterdir())) < 2:
            time.sleep(0.01)

    def where(place: Path | None) -> tuple[int, str | None, int]:
        """Process, GPUs that it sees, and how often it has loaded a model."""
        from daunce_api.providers.local.worker import loaded

        if place is not None:
            meet(place)
        return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), loaded.cache_info().misses

    def train_together(given: TrainTask, place: Path) -> list[MemberResult]:
        meet(place)
        return run_train(given)

    for turn in range(2):
        place = tmp_path / f"turn-{turn}"
        futures = [engine.submit(train_together, task(model_folder, k, tmp_path), place) for k in range(2)]
        assert all(f.result(timeout=500)[0].error is None for f in futures)
    sequences = (((1, 2, 3), (1, 2)),)
    scoring = (ModelSpec(str(model_folder)), None, sequences)
    places = set()
    for _ in range(4):
        assert len(engine.submit(run_score, *scoring).result(timeout=500)[0]) == 2
        places.add(engine.submit(where, None).result(timeout=500))
    assert len(places) == 1  # the warm one
    futures = [engine.submit(where, tmp_path / "end") for _ in range(2)]
    both = [f.result(timeout=500) for f in futures]
    assert len({pid for pid, _, _ in both}) == 2
    assert {gpu for _, gpu, _ in both} == {"0", "1"}
    assert [loads for _, _, loads in both] == [1, 1]


def test_errors_of_a_task_arrive_as_themselves(engine: RayEngine):
    def fails(_: int) -> None:
        raise DataError("a problem", ["here"])

    with pytest.raises(DataError, match="a problem"):
        engine.submit(fails, 0).result(timeout=500)


CONNECT = """
import functools, os, sys
import ray
from ray._private import services
from daunce_api.providers.local.engines import RayEngine
from daunce_api.errors import ConfigurationError

services.find_gcs_addresses = functools.cache(set)
services.find_bootstrap_address = lambda _: None
for place in sys.argv[1:]:
    address, _, named = place.partition(" ")
    os.environ.pop("RAY_ADDRESS", None)
    if named:
        os.environ["RAY_ADDRESS"] = named
    try:
        engine = RayEngine(address=address, cpus=1, gpus=0)
    except ConfigurationError as error:
        print("refused:", error)
    else:
        engine.close()
        print("workers:", engine.workers, "left:", not ray.is_initialized())
"""


def connect(*places: str) -> list[str]:
    """What a process without a cluster of its own says of each address, which ``RAY_ADDRESS`` may follow. It finds no
    other cluster of this machine."""
    done = subprocess.run(
        [sys.executable, "-c", CONNECT, *places], check=False, capture_output=True, text=True, timeout=500
    )
    return (done.stdout or done.stderr).splitlines()


def test_a_given_cluster_is_used_and_left_running(engine: RayEngine):
    address = ray.get_runtime_context().gcs_address
    assert connect(address, f"auto {address}") == 2 * ["workers: 2 left: True"]
    assert engine.submit(lambda x: 2 * x, 3).result(timeout=500) == 6


def test_a_cluster_that_is_not_there_is_refused_soon():
    with socket.socket() as taken:  # nothing listens there
        taken.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{taken.getsockname()[1]}"
        *named, unnamed = connect(dead, f"ray://{dead}", f"auto {dead}", "auto")
        assert len(named) == 3
        for answer in named:
            assert answer.startswith("refused: the Ray cluster at '")
            assert dead in answer
            assert "Connection refused" in answer
    assert unnamed.startswith("refused: the Ray cluster at 'auto' cannot be reached")


def test_tasks_that_fit_nowhere_are_refused(engine: RayEngine):
    with pytest.raises(ConfigurationError, match="no room"):
        RayEngine(address=None, cpus=64, gpus=0)


async def test_a_run_on_ray_survives_a_killed_actor_and_keeps_everything_in_its_own_folder(
    engine: RayEngine, model_folder: Path, examples: list[EncodedExample], tmp_path: Path
):
    import asyncio

    config = RunConfig.from_mapping(
        {
            "run_dir": str(tmp_path / "run"),
            "data": {"train": "t.jsonl", "test": "q.jsonl"},
            "backend": {"kind": "local", "model": str(model_folder), "options": {"engine": "ray"}},
        }
    )
    run = LocalRun(config, engine)
    warm = engine.submit(os.getpid).result(timeout=500)  # the next task goes to the same actor
    async with LocalTrainer(run) as trainer, LocalScorer(run) as scorer:
        jobs = []
        for k in range(4):
            file_id = await trainer.upload(f"s{k}.jsonl", DATA.training_file(range(k, 20 + k), "last"))
            jobs.append(await trainer.submit(JobRequest(f"k{k}", str(model_folder), file_id, k, {"n_epochs": 1}, "s")))
        async with asyncio.timeout(500):
            while (await trainer.get(jobs[0].id)).status != JobStatus.RUNNING:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            os.kill(warm, signal.SIGKILL)
            while not all([(await trainer.get(j.id)).status.final for j in jobs]):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        done = [await trainer.get(j.id) for j in jobs]
        assert [j.status for j in done] == [JobStatus.SUCCEEDED] * 4
        scores = [await scorer.score(str(j.model), examples[:3]) for j in done]
    assert len({s[0].logprobs for s in scores}) == 4
    assert len(list((tmp_path / "run" / "local" / "models").iterdir())) == 4
