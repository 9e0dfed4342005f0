"""Differences between servers that echo prompts with their log-probabilities, as presets of the echo scorer."""

from __future__ import annotations

from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from ...errors import ConfigurationError

Dialect = Literal["auto", "plain", "vllm", "fireworks"]

_PRESETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "vllm": {"return_token_ids": True},
    "fireworks": {
        "return_token_ids": True,
        "max_tokens": 1,
        # By default Fireworks truncates what does not fit, which would shift every position.
        "extra_body": {"context_length_exceeded_behavior": "error"},
        # A deployed adapter answers under its own name, without the deployment that it was asked on.
        "check_model_name": False,
    },
}


def presets(dialect: object, address: str | None) -> dict[str, Any]:
    """Options of the echo scorer that a dialect needs; ``auto`` goes by the host of ``address``.

    Raises ConfigurationError for Together's address, whose answers have another shape and another scorer.
    """
    if dialect == "auto":
        dialect = _by_host(urlsplit(address or "").hostname or "")
    known = _PRESETS.get(dialect) if isinstance(dialect, str) else None
    if known is None:
        raise ConfigurationError(
            f"backend.scorer.options.dialect: {dialect!r} is not known; it can be {', '.join(get_args(Dialect))}."
        )
    return dict(known)


def _by_host(host: str) -> str:
    if host == "fireworks.ai" or host.endswith(".fireworks.ai"):
        return "fireworks"
    if host.endswith(("together.ai", "together.xyz")):
        raise ConfigurationError(
            "Together echoes prompts in a shape of its own: set backend.scorer.kind: together instead of echo."
        )
    return "plain"


def dialect_of_models(listed: object) -> str | None:
    """The dialect that an answer of ``GET /models`` tells of: vLLM names itself as the owner of what it serves."""
    if isinstance(listed, list) and any(isinstance(m, dict) and m.get("owned_by") == "vllm" for m in listed):
        return "vllm"
    return None
