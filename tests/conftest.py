"""For every test: Ctrl-C interrupts, also where the suite was started in the background of a shell."""

from __future__ import annotations

import signal

# A shell starts `pytest &` with SIGINT ignored, and every process below it inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
