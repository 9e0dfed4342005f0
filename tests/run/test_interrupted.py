"""A run that is killed or interrupted at any moment is taken up by the same command and ends with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openai
import pytest
import yaml

from daunce_api import Run, RunConfig
from daunce_api.errors import RunLockedError
from daunce_api.server import EmbeddedServer
from daunce_api.store import RunStore

MakeConfig = Callable[..., RunConfig]
COMMAND = [sys.executable, "-c", "from daunce_api.cli import main; main()"]


def start(config: RunConfig) -> subprocess.Popen[str]:
    path = config.run_dir.parent / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    return subprocess.Popen(
        [*COMMAND, "run", str(path), "--no-report"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_until(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def jobs_of(config: RunConfig) -> int:
    try:
        with RunStore.open(config.run_dir, read_only=True) as store:
            return len(store.jobs.rows())
    except Exception:
        return 0


def jobs_at(server: EmbeddedServer, config: RunConfig) -> list[str]:
    client = openai.OpenAI(base_url=server.base_url, api_key=server.api_key)
    with RunStore.open(config.run_dir, read_only=True) as store:
        key = store.run_key
    metadata = [job.metadata or {} for job in client.fine_tuning.jobs.list(limit=100)]
    return sorted(m["daunce_key"] for m in metadata if m.get("daunce_key", "").startswith(key))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_an_interrupted_run_is_taken_up(
    make_config: MakeConfig, server: EmbeddedServer, finished: Path, how: signal.Signals
) -> None:
    config = make_config()
    process = start(config)
    wait_until(lambda: jobs_of(config) >= 2)
    process.send_signal(how)
    _, err = process.communicate(timeout=240)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "run the same command again to resume" in err
        assert "Traceback" not in err
    attribution = Run.create(config).execute()
    assert np.array_equal(attribution.train_loss_KN, Run.open(finished).attribution().train_loss_KN)
    assert [key.rpartition("-m")[2] for key in jobs_at(server, config)] == ["0-a1", "1-a1", "2-a1", "3-a1"]


def test_a_second_process_is_refused_with_the_first_ones_pid(make_config: MakeConfig) -> None:
    config = make_config()
    process = start(config)
    try:
        wait_until(lambda: jobs_of(config) >= 1)
        process.send_signal(signal.SIGSTOP)  # so that it is not done before it is met
        with pytest.raises(RunLockedError, match=str(process.pid)):
            Run.create(config).execute()
    finally:
        process.kill()
        process.communicate()
