"""Starting, ending, dying and coming back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import psutil
import pytest
import uvicorn

from daunce_api._util.environment import worker_environment
from daunce_api.errors import ConfigurationError, RunLockedError, StopError, StoreCorruptError
from daunce_api.server import EmbeddedServer, ServerSettings
from daunce_api.server.run import serve
from daunce_api.server.state import State

from .conftest import connect, echo, jsonl, records, submit, upload, wait


def _gone(pids: list[int], seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_state_survives_sigkill_and_jobs_end_as_undisturbed(
    state_dir: Path, client: openai.OpenAI, server: EmbeddedServer, training_file: str
) -> None:
    """Killed with one job running and one waiting; the next server ends both, with the weights of a quiet run. That one
    is ended by Ctrl-C, in silence."""
    first = EmbeddedServer(ServerSettings(state_dir=state_dir)).start()
    killed = connect(first)
    file = upload(killed, jsonl(records()))
    done = wait(killed, submit(killed, file, seed=1).id)
    running = submit(killed, file, seed=2, n_epochs=10)
    waiting = submit(killed, file, seed=3, metadata={"daunce_key": "k"})
    wait(killed, running.id, until=lambda j: j.estimated_finish is not None)
    before = echo(killed, done.fine_tuned_model, [[3, 30, 40]])
    family = [first.pid or 0, *(p.pid for p in psutil.Process(first.pid).children(recursive=True))]
    assert len(family) >= 3
    os.kill(first.pid or 0, signal.SIGKILL)
    assert _gone(family[1:])  # the model's processes end with the server
    first.stop()

    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from daunce_api.server import ServerSettings, run_server\n"
        "ready = lambda url: print(url, flush=True)\n"
        "run_server(ServerSettings(state_dir=Path(sys.argv[1])), port=0, on_ready=ready)\n"
    )
    second = subprocess.Popen(
        [sys.executable, "-c", script, str(state_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=worker_environment(),
        text=True,
        start_new_session=True,
    )
    assert second.stdout is not None
    client_2 = connect(SimpleNamespace(base_url=second.stdout.readline().strip(), api_key="any"))
    assert client_2.fine_tuning.jobs.retrieve(done.id).status == "succeeded"
    assert echo(client_2, done.fine_tuned_model, [[3, 30, 40]]) == before
    assert client_2.files.content(file).content == jsonl(records())
    again, last = wait(client_2, running.id), wait(client_2, waiting.id)
    assert (again.status, last.status) == ("succeeded", "succeeded")
    assert [j.id for j in client_2.fine_tuning.jobs.list(metadata={"daunce_key": "k"})] == [waiting.id]
    steps = [p.step_number for p in client_2.fine_tuning.jobs.checkpoints.list(running.id)]
    assert steps == [30, 27, 24]
    quiet = wait(client, submit(client, training_file, seed=2, n_epochs=10).id)
    part = Path("final") / "adapter_model.safetensors"
    mine, theirs = state_dir / "adapters" / running.id, server.log_path.parent / "adapters" / quiet.id
    assert (mine / part).read_bytes() == (theirs / part).read_bytes()

    family = [p.pid for p in psutil.Process(second.pid).children(recursive=True)]
    assert len(family) >= 2
    os.killpg(second.pid, signal.SIGINT)  # Ctrl-C, as a terminal sends it
    out, err = second.communicate(timeout=120)
    assert (second.returncode, out, err) == (0, "", "")
    assert _gone(family)


@pytest.mark.slow
def test_a_process_that_dies_is_replaced(
    server: EmbeddedServer, client: openai.OpenAI, training_file: str, fine_tune: Any
) -> None:
    """Scoring goes on; the job that was in a dead process is done again, to the same bytes."""
    before = echo(client, fine_tune.fine_tuned_model, [[3, 30, 40]])
    quiet = wait(client, submit(client, training_file, seed=2, n_epochs=12).id)
    job = submit(client, training_file, seed=2, n_epochs=12)
    wait(client, job.id, until=lambda j: j.estimated_finish is not None)
    for child in psutil.Process(server.pid).children():
        child.kill()
    assert echo(client, fine_tune.fine_tuned_model, [[3, 30, 40]]) == before
    assert wait(client, job.id).status == "succeeded"
    parts = [
        server.log_path.parent / "adapters" / j / "final" / "adapter_model.safetensors" for j in (quiet.id, job.id)
    ]
    assert parts[0].read_bytes() == parts[1].read_bytes()
    steps = [p.step_number for p in client.fine_tuning.jobs.checkpoints.list(job.id)]
    assert steps == [36, 33, 30]


@pytest.mark.slow
def test_the_server_dies_with_its_parent(state_dir: Path) -> None:
    script = (
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from daunce_api.server import EmbeddedServer, ServerSettings\n"
        "server = EmbeddedServer(ServerSettings(state_dir=Path(sys.argv[1]))).start()\n"
        "print(json.dumps([server.pid, server.base_url]), flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(state_dir)], stdout=subprocess.PIPE, env=worker_environment()
    )
    assert parent.stdout is not None
    pid, base_url = json.loads(parent.stdout.readline())
    family = [pid, *(p.pid for p in psutil.Process(pid).children(recursive=True))]
    assert httpx2.get(base_url.removesuffix("/v1") + "/health").status_code == 200
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert _gone(family)


def test_a_server_that_cannot_start_says_why(state_dir: Path) -> None:
    state_dir.mkdir()
    (state_dir / "state.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StopError, match=r"state\.sqlite cannot be read") as caught:
        EmbeddedServer(ServerSettings(state_dir=state_dir, api_key="marked")).start()
    assert "Fatal Python error" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "marked" not in str(caught.value) + (state_dir / "server.log").read_text()


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_named(state_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(StopError, match="no Hugging Face model folder") as caught:
        EmbeddedServer(ServerSettings(state_dir=state_dir, model=str(tmp_path / "nothing"))).start()
    assert "Traceback" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="no Hugging Face model folder"):
        serve(ServerSettings(state_dir=tmp_path / "other", model=str(tmp_path / "nothing")), "127.0.0.1", 0)


@pytest.mark.parametrize("exits", [True, False])
def test_no_version_of_uvicorn_hides_that_the_server_did_not_start(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch, exits: bool
) -> None:
    async def startup(self: uvicorn.Server, sockets: Any = None) -> None:
        await self.lifespan.startup()
        assert self.lifespan.should_exit
        if exits:
            sys.exit(3)
        self.should_exit = True

    monkeypatch.setattr(uvicorn.Server, "startup", startup)
    state_dir.mkdir()
    (state_dir / "state.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreCorruptError):
        serve(ServerSettings(state_dir=state_dir), "127.0.0.1", 0, on_ready=pytest.fail)


def test_a_port_that_is_taken_is_named(server: EmbeddedServer, state_dir: Path) -> None:
    port = int(server.base_url.rpartition(":")[2].removesuffix("/v1"))
    with pytest.raises(ConfigurationError, match=f"port {port}"):
        serve(ServerSettings(state_dir=state_dir), "127.0.0.1", port)


@pytest.mark.slow
def test_a_full_disk_delays_and_loses_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=False, capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a small file system")
    (disk / "state").mkdir()
    (disk / "state" / "server.log").symlink_to(tmp_path / "server.log")
    try:
        with EmbeddedServer(ServerSettings(state_dir=disk / "state")) as server:
            client = connect(server)
            file = upload(client, jsonl(records()))
            job = submit(client, file, n_epochs=10)
            filler = disk / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as full:
                while True:
                    full.write(b"x" * 4096)
            for _ in range(5):
                with pytest.raises(openai.InternalServerError) as caught:
                    upload(client, jsonl(records(100)))
                assert (caught.value.status_code, caught.value.code) == (503, "storage_unavailable")
            while "cannot be" not in server.log_path.read_text():  # the job comes to write something
                time.sleep(0.1)
            assert client.fine_tuning.jobs.retrieve(job.id).status in ("queued", "running", "validating_files")
            filler.unlink()
            assert wait(client, job.id).status == "succeeded"
            assert client.files.content(file).content == jsonl(records())
            assert wait(client, submit(client, file).id).status == "succeeded"
    finally:
        subprocess.run(["umount", disk], check=True)


def test_one_server_a_folder(server: EmbeddedServer) -> None:
    with pytest.raises(RunLockedError) as caught:
        State(server.log_path.parent, lock_timeout=0.1)
    assert caught.value.pid == server.pid


def test_damaged_state_is_refused(state_dir: Path) -> None:
    State(state_dir).close()
    (state_dir / "state.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreCorruptError):
        State(state_dir)
    other = state_dir / "other"
    State(other).close()
    import sqlite3

    with sqlite3.connect(other / "state.sqlite") as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(StoreCorruptError, match="schema 99"):
        State(other)


def test_leftovers_of_a_crash_are_swept(state_dir: Path) -> None:
    state = State(state_dir)
    state.insert("files", id="file-kept", filename="a", bytes=1, purpose="fine-tune", created_at=1)
    state.file_path("file-kept").write_bytes(b"x")
    for name in ("file-torn.part", "file-without-row"):
        (state.files_dir / name).write_bytes(b"x")
    (state.adapters_dir / "ftjob-1" / "final.epoch-1").mkdir(parents=True)
    state.close()
    State(state_dir).close()
    assert [p.name for p in state.files_dir.iterdir()] == ["file-kept"]
    assert list(state.adapters_dir.iterdir()) == []


def test_the_state_folder_is_private(server: EmbeddedServer) -> None:
    assert server.log_path.parent.joinpath("files").stat().st_mode & 0o077 == 0


def test_the_key_is_nowhere_in_the_state(server: EmbeddedServer, client: openai.OpenAI, training_file: str) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key=server.api_key + "x").models.list()
    for path in server.log_path.parent.rglob("*"):
        assert not path.is_file() or server.api_key.encode() not in path.read_bytes()
    process = psutil.Process(server.pid)
    for p in [process, *process.children(recursive=True)]:
        assert server.api_key not in " ".join(p.cmdline())
        assert server.api_key not in p.environ().values()
