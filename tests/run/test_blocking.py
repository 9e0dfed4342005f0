"""What is awaited inside works from a script and from a notebook's cell."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

import pytest

from daunce_api._util.blocking import run_blocking


async def answer() -> tuple[int, str]:
    await asyncio.sleep(0)
    return 3, threading.current_thread().name


def test_a_script_runs_it_in_its_own_thread() -> None:
    assert run_blocking(answer()) == (3, threading.current_thread().name)


async def test_a_running_loop_does_not_stand_in_the_way() -> None:
    value, thread = run_blocking(answer())
    assert value == 3
    assert thread != threading.current_thread().name


async def test_errors_come_out_as_they_are() -> None:
    async def fail() -> None:
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        run_blocking(fail())


async def test_an_interrupted_cell_cancels_and_waits_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    result = Future.result
    main = threading.current_thread()

    async def long() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            seen.append("ended")

    def interrupted(self: Future[None], timeout: float | None = None) -> object:
        if threading.current_thread() is main and not seen:
            seen.append("interrupted")
            raise KeyboardInterrupt
        return result(self, timeout)

    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_blocking(long())
    assert seen == ["interrupted", "ended"]
