"""Which models are scored at the same time, where a server holds only a few of them.

Without it the requests of many members would take turns on such a server, and every turn loads a model, which takes
minutes where a model is a deployment.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ModelLeases:
    """At most ``limit`` models at once (None: any number), first come, first served.

    A model that is given back and asked for again at once keeps its place.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._users: dict[str, int] = {}
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def lease(self, model: str) -> AsyncIterator[None]:
        """The model counts as one of those at work inside the block."""
        if self._limit is None:
            yield
            return
        await self._acquire(model)
        try:
            yield
        finally:
            self._give_back(model)

    async def _acquire(self, model: str) -> None:
        if model in self._users:
            self._users[model] += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((model, turn))
        self._hand_over()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give_back(model)
            raise

    def _give_back(self, model: str) -> None:
        self._users[model] -= 1
        # Later, so that whoever asks for the same model in the same breath finds it still there.
        asyncio.get_running_loop().call_soon(self._hand_over)

    def _hand_over(self) -> None:
        self._users = {model: users for model, users in self._users.items() if users}
        while self._waiting:
            model, turn = self._waiting[0]
            if not turn.done():
                if model not in self._users and self._limit is not None and len(self._users) >= self._limit:
                    return
                self._users[model] = self._users.get(model, 0) + 1
                turn.set_result(None)
            self._waiting.popleft()
