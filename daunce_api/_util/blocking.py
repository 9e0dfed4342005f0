"""Run a coroutine to its end from ordinary code, also in a notebook, whose cells run inside an event loop."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
Running = tuple[asyncio.AbstractEventLoop, "asyncio.Task[Any] | None"]


def run_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run``, in a thread of its own where this thread already runs an event loop.

    The caller waits in either case. KeyboardInterrupt cancels the coroutine and is raised when it has ended, as by
    ``asyncio.run``.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    running: Future[Running] = Future()

    async def work() -> T:
        running.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        return await coroutine

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(contextvars.copy_context().run, asyncio.run, work())
        try:
            return done.result()
        except KeyboardInterrupt:
            loop, task = running.result()
            if task is not None and not done.done():
                loop.call_soon_threadsafe(task.cancel)
            raise  # leaving the pool waits for the thread
