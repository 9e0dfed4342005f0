"""The command line: parse, call, print. Everything it does is a call of the package's public functions."""

from __future__ import annotations

from . import running, looking, asking, fixing, endpoint  # isort: skip - the order of the commands in `daunce --help`
from .common import app, main

__all__ = ["app", "asking", "endpoint", "fixing", "looking", "main", "running"]
