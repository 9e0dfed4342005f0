"""The main job on real data: find a planted backdoor with the embedded provider, and compare with text search."""

from __future__ import annotations

from .experiment import DemoResult, demo_config, run_demo

__all__ = ["DemoResult", "demo_config", "run_demo"]
