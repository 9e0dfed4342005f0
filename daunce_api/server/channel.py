"""Worker processes and the pipe to them: length-prefixed JSON, so nothing is ever unpickled.

A worker is ``python -m daunce_api.server.worker``. It ends by itself when its standard input closes, which the
operating system does for a server that was killed.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Callable, Mapping
from typing import IO, Any

from .._util.environment import worker_environment
from ..errors import ConfigurationError, DaunceError

HEADER_BYTES = 8
STORAGE_FULL = "storage_unavailable"
"""Error code of a worker that could not write: the same request may succeed when there is room."""

Message = dict[str, Any]

NO_MODEL = "no_model"
"""Code of the answer of a worker that was given no model that it could load."""


class WorkerDiedError(Exception):
    """The process ended while a request was with it."""


class WorkerFaultError(Exception):
    """The worker answered with an error; ``code``, ``param`` as in the API."""

    def __init__(self, message: str, code: str, param: str | None) -> None:
        super().__init__(message)
        self.message, self.code, self.param = message, code, param


def pack(message: Mapping[str, Any]) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def read_message(stream: IO[bytes]) -> Message | None:
    """The next message, or None at the end of the stream."""
    header = stream.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    size = int.from_bytes(header, "big")
    body = stream.read(size)
    if len(body) < size:
        return None
    message: Message = json.loads(body)
    return message


class Worker:
    """One worker process: started at the first call, started again after it died."""

    def __init__(self, hello: Mapping[str, Any]) -> None:
        """``hello`` is the first message to the process: the model to load and how."""
        self._hello = dict(hello)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._pending: dict[int, asyncio.Future[Message]] = {}
        self._listeners: dict[int, Callable[[Message], None]] = {}
        self._numbers = itertools.count(1)
        self._starting = asyncio.Lock()
        self.facts: Message = {}

    async def start(self) -> Message:
        """Start the process if it does not run, and return what it says of its model.

        Raises ConfigurationError where there is no such model, DaunceError where it cannot be loaded, with the
        worker's words.
        """
        async with self._starting:
            if self._process is not None and self._process.returncode is None and self._reader is not None:
                if not self._reader.done():
                    return self.facts
                await self._end()
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "daunce_api.server.worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=worker_environment(),
                # Ctrl-C goes to the server alone, which ends its processes itself.
                start_new_session=True,
            )
            future = self._expect(0)
            self._reader = asyncio.create_task(self._read(self._process))
            try:
                await self._send({**self._hello, "id": 0})
                self.facts = await future
            except WorkerDiedError:
                raise DaunceError(
                    "the process that holds the model ended while it started; see the lines above"
                ) from None
            except WorkerFaultError as fault:
                await self._end()
                kind = ConfigurationError if fault.code == NO_MODEL else DaunceError
                raise kind(fault.message) from None
            return self.facts

    async def call(self, message: Mapping[str, Any], listener: Callable[[Message], None] | None = None) -> Message:
        """Send a request and wait for its answer; ``listener`` gets the messages before it.

        Raises WorkerDiedError or WorkerFaultError.
        """
        await self.start()
        number = next(self._numbers)
        future = self._expect(number)
        if listener is not None:
            self._listeners[number] = listener
        try:
            await self._send({**message, "id": number})
            return await future
        finally:
            self._pending.pop(number, None)
            self._listeners.pop(number, None)

    async def tell(self, message: Mapping[str, Any]) -> None:
        """Send a notice that has no answer; nothing happens where no process runs."""
        if self._process is not None and self._process.returncode is None:
            await self._send(message)

    async def close(self) -> None:
        """End the process at once; a job in it is done again from its start when the server comes back."""
        async with self._starting:
            await self._end()

    async def _end(self) -> None:
        process, reader = self._process, self._reader
        self._process = self._reader = None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()
        if reader is not None:
            await asyncio.gather(reader, return_exceptions=True)

    def _expect(self, number: int) -> asyncio.Future[Message]:
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        return future

    async def _send(self, message: Mapping[str, Any]) -> None:
        stream = self._process.stdin if self._process is not None else None
        if stream is None:
            raise WorkerDiedError
        try:
            stream.write(pack(message))
            await stream.drain()
        except (BrokenPipeError, ConnectionResetError):
            raise WorkerDiedError from None

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        stream = process.stdout
        try:
            while stream is not None:
                size = int.from_bytes(await stream.readexactly(HEADER_BYTES), "big")
                self._deliver(json.loads(await stream.readexactly(size)))
        except (asyncio.IncompleteReadError, ConnectionResetError):
            pass
        finally:
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(WorkerDiedError())
            self._pending.clear()

    def _deliver(self, message: Message) -> None:
        number = message["id"]
        if "event" in message:
            listener = self._listeners.get(number)
            if listener is not None:
                listener(message)
            return
        future = self._pending.get(number)
        if future is None or future.done():
            return
        if "error" in message:
            error = message["error"]
            future.set_exception(WorkerFaultError(error["message"], error["code"], error.get("param")))
        else:
            future.set_result(message)
