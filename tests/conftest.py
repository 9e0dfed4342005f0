"""For every test: Ctrl-C interrupts, also where the suite was started in the background of a shell; slow files come
first, so that no worker is left alone with one of them at the end."""

from __future__ import annotations

import signal
from collections import Counter

import pytest

# A shell starts `pytest &` with SIGINT ignored, and every process below it inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
