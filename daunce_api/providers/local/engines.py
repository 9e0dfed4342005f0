"""Where tasks run: in a thread of this process, in worker processes, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

from ...errors import ConfigurationError, MissingExtraError, TransientError

_PROBE_SECONDS = 10.0

ArgumentT = TypeVar("ArgumentT")
ResultT = TypeVar("ResultT")


class Engine(Protocol):
    """Runs picklable tasks, at most ``workers`` at a time."""

    workers: int
    shares_files: bool
    """Whether workers read this machine's folders; otherwise adapters travel inside the tasks."""

    def submit(self, function: Callable[[ArgumentT], ResultT], task: ArgumentT) -> Future[ResultT]:
        """Raises TransientError, now or from the future, where a worker was lost: the task can be submitted again."""
        ...

    def close(self) -> None: ...


class ThreadEngine:
    """One task at a time in a thread of this process: no second copy of the model."""

    shares_files = True
    workers = 1

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="daunce-local")

    def submit(self, function: Callable[[ArgumentT], ResultT], task: ArgumentT) -> Future[ResultT]:
        return self._pool.submit(function, task)

    def close(self) -> None:
        """Waits for the task in hand: a thread cannot be interrupted."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class ProcessEngine:
    """Worker processes, one torch thread each by default: two threads of one process are slower than two processes."""

    shares_files = True

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.workers, mp_context=context, initializer=_end_with, initargs=(os.getpid(),))

    def submit(self, function: Callable[[ArgumentT], ResultT], task: ArgumentT) -> Future[ResultT]:
        try:
            inner = self._pool.submit(function, task)
        except BrokenProcessPool:
            self._pool = self._start()
            inner = self._pool.submit(function, task)
        return _translated(inner, BrokenProcessPool)

    def close(self) -> None:
        """Ends workers in mid-task: what they were at is repeated by the next run."""
        processes = list((getattr(self._pool, "_processes", None) or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _end_with(parent: int) -> None:
    """End this worker when its parent is gone: a killed parent cannot say so."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class RayEngine:
    """Tasks on a Ray cluster; Ray itself runs the tasks of a lost worker again."""

    shares_files = False

    def __init__(self, *, address: str | None, cpus: float, gpus: float, retries: int) -> None:
        """``address``: ``auto`` or a cluster's; None starts one on this machine, ended at :meth:`close`.

        Raises MissingExtraError without Ray, ConfigurationError where the cluster cannot be reached or has no worker
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
        self.workers = int(min(f for f in fits if f is not None))
        if self.workers < 1:
            self.close()
            raise ConfigurationError(f"the Ray cluster has no room for a task of {cpus:g} CPUs and {gpus:g} GPUs")
        self._options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": retries}

    def submit(self, function: Callable[[ArgumentT], ResultT], task: ArgumentT) -> Future[ResultT]:
        remote = self._ray.remote(**self._options)(function)
        inner: Future[ResultT] = remote.remote(task).future()
        return _translated(inner, self._ray.exceptions.RayError)

    def close(self) -> None:
        if self._own:
            self._ray.shutdown()
            self._own = False


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


def _translated(inner: Future[ResultT], *lost: type[Exception]) -> Future[ResultT]:
    """A future in which the loss of a worker is a TransientError, and a remote error is the error itself."""
    outer: Future[ResultT] = Future()
    outer.set_running_or_notify_cancel()

    def done(finished: Future[ResultT]) -> None:
        error = None if finished.cancelled() else finished.exception()
        cause = getattr(error, "cause", None)  # Ray wraps what a task raised; its other errors are its own
        if isinstance(cause, BaseException):
            outer.set_exception(cause)
        elif finished.cancelled() or isinstance(error, lost):
            outer.set_exception(TransientError("a local worker was lost while it worked; its task can be repeated"))
        elif error is not None:
            outer.set_exception(error)
        else:
            outer.set_result(finished.result())

    inner.add_done_callback(done)
    return outer
