"""Kinds of scorers that earlier versions had: their finished runs open, and nothing is scored with them any more."""

from __future__ import annotations

from typing import NoReturn

from ..config import RunConfig
from ..errors import ConfigurationError
from .base import ScorerCapabilities
from .registry import Context

TGI = (
    "backend.scorer.kind: tgi is gone: Text Generation Inference was archived in March 2026. Serve the model with vLLM "
    "and set backend.scorer.kind: vllm (or sglang). Finished runs stay readable."
)


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """What it measured, with the reason why it no longer does."""
    return ScorerCapabilities(provider="TGI", scope="any", refusal=TGI)


def open_scorer(context: Context) -> NoReturn:
    """Raises ConfigurationError that names what to use instead."""
    raise ConfigurationError(TGI)
