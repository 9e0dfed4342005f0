"""Where tasks run: in a thread of this process, in worker processes pinned to devices, or in actors on a Ray cluster.

A worker runs one task at a time and keeps what it has loaded. Of several idle ones the last one that worked is taken,
since that one is warm. Imports no PyTorch.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from ..._util.environment import worker_environment
from ...errors import ConfigurationError, MissingExtraError, TrainingCancelledError, TransientError
from .options import visible_gpus

_PROBE_SECONDS = 10.0


class WorkerLostError(TransientError):
    """A worker ended in mid-task. ``out_of_memory``: because memory ran out, or by SIGKILL, which is how a system takes
    memory back; the task has to be made smaller."""

    def __init__(self, message: str, *, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


class Engine:
    """Runs functions on picklable values, one at a time on each of ``workers``."""

    def __init__(self, workers: Sequence[Here | WorkerProcess | _Actor]) -> None:
        self._all, self.workers = workers, len(workers)
        self._idle: queue.LifoQueue[Here | WorkerProcess | _Actor] = queue.LifoQueue()
        for worker in reversed(workers):
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="daunce-local")

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """The future raises WorkerLostError where a worker was lost: the task can be submitted again."""
        return self._threads.submit(self._run, function, *arguments)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        worker = self._idle.get()
        try:
            return worker.call(function, *arguments)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends workers in mid-task, which the next run repeats; a thread cannot be interrupted and is waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.end()
        self._threads.shutdown(wait=True)


class Here:
    """Runs functions in this very process, which keeps what they load."""

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def end(self) -> None: ...


class ThreadEngine(Engine):
    """One task at a time in a thread of this process: no second copy of the model."""

    def __init__(self) -> None:
        super().__init__([Here()])


class WorkerProcess:
    """A process that runs one task after another; started at its first, and again where it was lost.

    It gets only the environment that it needs (and ``environment``), and ends when this process does.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = environment or {}
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._ended = False
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def call(
        self, function: Callable[..., Any], *arguments: Any, on_report: Callable[[Any], object] = lambda _: None
    ) -> Any:
        """What ``function`` returns there; ``on_report`` gets what it sends by :func:`report`."""
        pipe, process = self._started()
        try:
            with self._sending:
                pipe.send((function, arguments))
            while (answer := pipe.recv())[0] is None:
                on_report(answer[1])
        except (OSError, EOFError):  # its end of the pipe is closed: it is no longer running
            killed = process.wait() == -signal.SIGKILL
            how = "by SIGKILL, most often because memory ran out" if killed else f"with exit code {process.returncode}"
            raise WorkerLostError(
                f"a local worker ended in mid-task {how}; the task can be repeated", out_of_memory=killed
            ) from None
        if not answer[0]:
            raise answer[1]
        return answer[1]

    def _started(self) -> tuple[Connection, subprocess.Popen[bytes]]:
        with self._lock:
            if self._ended:
                raise WorkerLostError("the local workers were stopped")
            if self._pipe is None or self._process is None or self._process.poll() is not None:
                ours, theirs = socket.socketpair()
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", f"from {__name__} import serve; serve({theirs.fileno()})"],
                    pass_fds=[theirs.fileno()],
                    env={**worker_environment(), **self._environment},
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C goes to this process, which decides what it means
                )
                theirs.close()  # so that the pipe ends with the process
                self._pipe = Connection(ours.detach())
                self._pipe.send(sys.path)
            return self._pipe, self._process

    def stop(self) -> None:
        """Have the task that runs end at its next :func:`report`; one that starts meanwhile does not hear it."""
        with self._sending, contextlib.suppress(OSError):
            if self._pipe is not None:
                self._pipe.send_bytes(_STOP)

    def end(self) -> None:
        """End the process for good, in mid-task too."""
        with self._lock:
            self._ended = True
            process = self._process
        if process is not None:
            process.kill()
            process.wait()


_STOP = b"stop"
_parents: list[Connection] = []
"""In a worker process: the pipe to the process that started it."""
_stopped = threading.Event()


def report(message: Any) -> None:
    """From a task in a worker process: say how far it is. Raises TrainingCancelledError where it is to end."""
    if _stopped.is_set():
        raise TrainingCancelledError("the task was stopped; nothing was written")
    for pipe in _parents:
        pipe.send((None, message))


def serve(descriptor: int) -> None:
    """Run what comes through a socket, until its other end is closed: a killed parent cannot say so."""
    # Importing PyTorch makes a million objects and no garbage: looking for it took a tenth of the start.
    gc.set_threshold(50_000)
    pipe = Connection(descriptor)
    _parents.append(pipe)
    os.dup2(2, 1)  # what libraries print is not the output of the program that started this process
    sys.path[:] = pipe.recv()
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = pipe.recv_bytes()
                if message == _STOP:
                    _stopped.set()
                else:
                    waiting.put(message)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            message = waiting.get()
            _stopped.clear()
            function, arguments = pickle.loads(message)  # noqa: S301 - from the process that started this one
            answer = (True, function(*arguments))
        except Exception as error:
            answer = (False, _portable(error))
        pipe.send(answer)


def _portable(error: Exception) -> Exception:
    """An error as the other process can read it: not all survive pickling."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - its own bytes
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


class ProcessEngine(Engine):
    """Worker processes, one torch thread each by default: two threads of one process are slower than two processes.

    With ``gpus`` each process sees one GPU alone, in turn.
    """

    def __init__(self, workers: int, *, gpus: bool = False) -> None:
        super().__init__([WorkerProcess(_pinned(i) if gpus else None) for i in range(workers)])


def _pinned(worker: int) -> dict[str, str]:
    """The environment in which CUDA shows one of the GPUs that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(visible_gpus()))))
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return {"CUDA_VISIBLE_DEVICES": names[worker % len(names)]} if names else {}


class _Actor:
    """An actor on a Ray cluster; started at its first task, and at the next one where it was lost. Ray repeats nothing
    itself: whoever gave the task knows better whether to give it again, or a smaller one."""

    def __init__(self, ray: Any, options: dict[str, Any]) -> None:
        self._ray, self._options = ray, options
        self._actor: Any = None

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self._actor is None:
            self._actor = self._ray.remote(**self._options)(Here).remote()
        try:
            return self._ray.get(self._actor.call.remote(function, *arguments))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            self.end()
            raise WorkerLostError(
                f"an actor of the Ray cluster was lost in mid-task ({type(error).__name__}); the task can be repeated",
                out_of_memory="memory" in str(error),
            ) from None

    def end(self) -> None:
        actor, self._actor = self._actor, None
        if actor is not None:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)


class RayEngine(Engine):
    """Actors on a Ray cluster, each of which loads the model once. They read and write this machine's folders by their
    names: those have to lie on storage that the cluster shares."""

    def __init__(self, *, address: str | None, cpus: float, gpus: float, workers: int | None = None) -> None:
        """``address``: ``auto`` or a cluster's; None starts one on this machine, ended at :meth:`close`. ``workers``:
        the most actors; None: as many as the cluster has room for.

        Raises MissingExtraError without Ray, ConfigurationError where the cluster cannot be reached or has no node
        with these resources.
        """
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("backend.options.engine: ray", "ray") from error
        self._ray = ray
        self._own = not ray.is_initialized()
        if self._own:
            named = os.environ.get("RAY_ADDRESS")
            _check_address(named if named and address in (None, "auto") else address)
            try:
                ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise _unreachable(address, error) from error
        total = ray.cluster_resources()
        fits = [total.get("CPU", 0) / cpus if cpus else None, total.get("GPU", 0) / gpus if gpus else None]
        room = int(min(f for f in fits if f is not None))
        if room < 1:
            self._end_own()
            raise ConfigurationError(f"the Ray cluster has no room for an actor of {cpus:g} CPUs and {gpus:g} GPUs")
        options = {"num_cpus": cpus, "num_gpus": gpus}
        super().__init__([_Actor(ray, options) for _ in range(min(room, workers or room))])

    def close(self) -> None:
        super().close()
        self._end_own()

    def _end_own(self) -> None:
        if self._own:
            self._ray.shutdown()


def _check_address(address: str | None) -> None:
    """Raises ConfigurationError where nothing listens at ``host:port``, which Ray itself would look for in more than a
    minute and then end this process."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _unreachable(address, error) from error


def _unreachable(address: str | None, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"the Ray cluster at {address!r} cannot be reached: {error}. Check backend.options.ray.address, or leave it "
        "out for a cluster on this machine. What was trained is kept."
    )
