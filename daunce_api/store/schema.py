"""The store's tables."""

from __future__ import annotations

import sqlite3

VERSION = 3

SEALED: dict[str, tuple[str, ...]] = {
    "meta": ("key", "value"),
    "files": ("sha256", "name", "size", "state", "file_id"),
    "jobs": (
        *("key", "member", "attempt", "request_json", "status", "job_id", "model", "error", "trained_tokens"),
        *("model_deleted", "submitted_at", "ended_at"),
    ),
    "checkpoints": ("key", "models"),
    "left_out": ("member", "reason", "at", "taken_back_at"),
    "stops": ("id", "kind", "reason", "at", "cleared_at"),
    "spend": ("subject", "purpose", "reserved", "settled"),
    "hosted": ("model", "at"),
    "cached": ("member", "checkpoint", "examples", "tokens"),
    "aside": ("number", "members", "up_to", "suspect", "reason", "at", "restored_at"),
    "groups": ("number", "ids"),
    "blobs": ("id", "member", "replicate", "checkpoint", "n", "tokens", "ids", "counts", "logprobs", "censored"),
    "losses": ("grp", "member", "checkpoint", "kind", "loss", "counts", "censored"),
}
"""Columns of the tables whose rows carry a checksum (column ``seal``, the last one)."""

_KEYS = {
    "meta": "key", "files": "sha256", "jobs": "key", "checkpoints": "key", "left_out": "member", "stops": "id",
    "spend": "subject", "hosted": "model", "cached": "member, checkpoint", "aside": "number", "groups": "number",
    "blobs": "id", "losses": "grp, member, checkpoint",
}  # fmt: skip
_INTEGERS = frozenset(
    "size member attempt trained_tokens model_deleted id reserved settled checkpoint examples tokens number up_to "  # noqa: SIM905
    "suspect replicate n grp".split()
)
_BLOBS = frozenset(["ids", "counts", "logprobs", "censored", "loss"])


def create(connection: sqlite3.Connection) -> None:
    """Make the tables of this version in an empty database."""
    for table, columns in SEALED.items():
        typed = [f"{c} {'INTEGER' if c in _INTEGERS else 'BLOB' if c in _BLOBS else 'TEXT'}" for c in columns]
        connection.execute(
            f"CREATE TABLE {table} ({', '.join(typed)}, seal BLOB NOT NULL, PRIMARY KEY ({_KEYS[table]}))"
        )
    connection.execute("CREATE UNIQUE INDEX attempts ON jobs (member, attempt)")
    # Covering, so that what was measured is counted without reading the log-probabilities.
    connection.execute("CREATE INDEX models ON blobs (member, replicate, checkpoint, n, tokens)")
    connection.execute("CREATE TABLE examples (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, tokens INTEGER)")
    connection.execute("CREATE TABLE spans (id INTEGER PRIMARY KEY, started TEXT NOT NULL, seen TEXT NOT NULL)")
    connection.execute(
        "CREATE TABLE transitions (id INTEGER PRIMARY KEY, time TEXT NOT NULL, subject TEXT NOT NULL, "
        "before TEXT NOT NULL, after TEXT NOT NULL, detail TEXT NOT NULL)"
    )
    connection.execute("CREATE TABLE counter (n INTEGER NOT NULL)")
    connection.execute("INSERT INTO counter VALUES (0)")
    connection.execute(f"PRAGMA user_version = {VERSION}")
