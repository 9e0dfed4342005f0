"""`daunce serve` in a child process, for as long as a ``with`` block; the server is not imported here."""

from __future__ import annotations

import contextlib
import secrets
import selectors
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

from .._util.environment import worker_environment
from ..errors import MissingExtraError, StopError
from .server_settings import ServerSettings

LOG_NAME = "server.log"
START_SECONDS, STOP_SECONDS = 180.0, 10
_LOG_TAIL = 2000


def require_server_extra() -> None:
    """Raises MissingExtraError where a package that the server needs is not installed."""
    if not all(find_spec(name) for name in ("starlette", "uvicorn", "python_multipart", "torch", "transformers")):
        raise MissingExtraError("the embedded server", "server")


class EmbeddedServer:
    """Starts ``daunce serve`` on a free loopback port with a random key, and stops it at the end of the block.

    The child ends with its parent, however that ends: it holds the other end of a pipe. Its output goes to
    ``server.log`` in the state folder. ``base_url`` ends in ``/v1``; ``api_key`` is drawn anew unless the settings
    hold one.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self.api_key = settings.api_key or secrets.token_urlsafe(32)
        self.base_url = ""

    @property
    def pid(self) -> int | None:
        """Process id of the child while it runs."""
        return None if self._process is None else self._process.pid

    @property
    def log_path(self) -> Path:
        return self._settings.state_dir / LOG_NAME

    def start(self) -> Self:
        """Start and wait until requests are answered.

        Raises StopError with the last lines of the child's output where it does not come up, MissingExtraError.
        """
        require_server_extra()
        self._settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        settings = self._settings.model_copy(update={"api_key": self.api_key})
        offset = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "daunce_api.server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=worker_environment(),
                # Ctrl-C goes to the parent alone, which ends the child when it has finished with it.
                start_new_session=True,
            )
        try:
            base_url = self._handshake(self._process, settings)
        except BaseException:
            self.stop()
            raise
        if base_url is None:
            code = self._process.poll()
            self.stop()
            ending = "did not answer in time" if code is None else f"ended with status {code}"
            tail = self._tail(offset)
            raise StopError(
                f"the embedded server {ending}. Its last output ({self.log_path}):\n{tail or '(none)'}\n"
                "Nothing was changed. Fix the cause, then run the same command again."
            )
        self.base_url = base_url
        return self

    def stop(self) -> None:
        """End the child; nothing happens where none runs."""
        process, self._process = self._process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _handshake(self, process: subprocess.Popen[bytes], settings: ServerSettings) -> str | None:
        """Send the settings and read the base URL; None where the child ended or took too long."""
        if process.stdin is None or process.stdout is None:
            return None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(settings.model_dump_json().encode() + b"\n")
            process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(START_SECONDS):
                return None
        line = process.stdout.readline()
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            return None
        return line.decode().strip()

    def _tail(self, offset: int) -> str:
        text = self.log_path.read_bytes()[offset:][-_LOG_TAIL:].decode(errors="replace")
        return text.replace(self.api_key, "[key]").strip()
