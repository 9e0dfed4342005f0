"""The child process of :class:`~daunce_api.server.EmbeddedServer`: the settings are the first line of its standard
input, so that the key is in no argument list and no environment. The process ends when its input does."""

from __future__ import annotations

import sys
from functools import partial

from ..errors import DaunceError
from ..providers.server_settings import ServerSettings
from .run import serve


def main() -> int:
    settings = ServerSettings.model_validate_json(sys.stdin.buffer.readline())
    try:
        serve(settings, "127.0.0.1", 0, on_ready=partial(print, flush=True), child_of=sys.stdin.fileno())
    except DaunceError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
