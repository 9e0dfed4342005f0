"""Record the API traffic of a run, and replay it without network, key or waiting.

    with record("fixtures/demo") as session: ...      # every request and answer, without secrets
    with replay("fixtures/demo") as session: ...      # the same run again, answered from the folder

A run asks a session for three things: ``run_key`` (names at the provider contain it, so a replay must use the
recorded one: ``RunStore.create_or_open(..., run_key=session.run_key)``), ``clock`` (a replay waits for nothing), and
``replaying`` (``open_backend(config, replaying=session.replaying)`` needs no key and starts no server).
"""

from __future__ import annotations

from .session import LIVE, LOCAL, Session, record, replay

__all__ = ["LIVE", "LOCAL", "Session", "record", "replay"]
