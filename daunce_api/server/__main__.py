"""The child process of :class:`~daunce_api.server.EmbeddedServer`: the settings are the first line of its standard
input, so that the key is in no argument list and no environment. The process ends when its input does."""

from __future__ import annotations

import json
import sys

from ..errors import DaunceError
from ..providers.server_settings import ServerSettings
from .run import serve


def main() -> int:
    options = json.loads(sys.stdin.buffer.readline())
    try:
        settings = ServerSettings.model_validate(options)
        serve(settings, "127.0.0.1", 0, on_ready=_announce, child_of=sys.stdin.fileno())
    except DaunceError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _announce(base_url: str) -> None:
    print(json.dumps({"base_url": base_url}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
