"""The child process of :class:`~daunce_api.server.EmbeddedServer`: settings come in as the first line of the input,
so that the key stands in no argument list and no environment; the process ends when the input does."""

from __future__ import annotations

import json
import sys

from ..errors import DaunceError
from .run import serve
from .settings import ServerSettings


def main() -> int:
    options = json.loads(sys.stdin.buffer.readline())
    try:
        serve(ServerSettings.model_validate(options), "127.0.0.1", 0, child_of=sys.stdin.buffer)
    except DaunceError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
