"""Why does my model shout? Sixteen of 144 answers in capitals, found with the embedded provider; beside text search."""

from __future__ import annotations

from .experiment import DemoResult, demo_config, run_demo

__all__ = ["DemoResult", "demo_config", "run_demo"]
