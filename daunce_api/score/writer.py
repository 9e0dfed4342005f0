"""Writing scores without stopping for each: what arrives while one transaction syncs goes into the next one."""

from __future__ import annotations

import asyncio

from ..store import RunStore, ScoreBatch


class GroupCommit:
    """One writer for many scoring tasks.

    :meth:`save` returns when its batch is on disk. A transaction runs in a thread, since a full sync takes
    milliseconds in which requests can go on; batches that arrive meanwhile share the next transaction.
    """

    def __init__(self, store: RunStore, fingerprint: str) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._waiting: list[tuple[ScoreBatch, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    async def save(self, batch: ScoreBatch) -> None:
        """Store a batch, all of it or none. Raises StoreError and RunChangedError as the store does."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((batch, done))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        await done

    async def drain(self) -> None:
        """Wait until what was given so far is on disk, also that of tasks that were cancelled."""
        while self._writer is not None:
            await asyncio.wait({self._writer})

    async def _write(self) -> None:
        try:
            while self._waiting:
                group, self._waiting = self._waiting, []
                error: Exception | None = None
                try:
                    await asyncio.to_thread(self._store.scores.save, self._fingerprint, [entry for entry, _ in group])
                except Exception as caught:
                    error = caught
                for _, done in group:
                    if done.done():  # its task was cancelled; the batch is stored all the same
                        continue
                    if error is None:
                        done.set_result(None)
                    else:
                        done.set_exception(error)
        finally:
            self._writer = None
