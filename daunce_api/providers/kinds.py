"""Which kinds of backend there are.

A kind is one line in ``BACKENDS`` or ``SCORERS``: a module, which ``registry`` imports when it is asked for, and the
extra that holds its dependencies.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from ..errors import ConfigurationError
from .openai_wire.client import OPENAI_BASE_URL


@dataclass(frozen=True, slots=True)
class ScorerKind:
    """A way to read log-probabilities. ``base_url`` and ``key_variable`` are defaults of an endpoint of its own."""

    module: str
    extra: str | None = None
    base_url: str | None = None
    key_variable: str | None = None


@dataclass(frozen=True, slots=True)
class BackendKind:
    """A provider of fine-tuning. ``scorer`` is the kind used where the config names none; ``needs_url`` says that
    ``backend.base_url`` has no default; ``remote`` that requests leave the process."""

    module: str
    scorer: str
    extra: str | None = None
    provider: str = ""
    base_url: str | None = None
    key_variable: str | None = None
    remote: bool = True
    needs_url: bool = False


KindT = TypeVar("KindT")

_HERE = "daunce_api.providers"
TOGETHER_BASE_URL = "https://api.together.ai/v1"
FIREWORKS_BASE_URL = "https://api.fireworks.ai/inference/v1"
TINKER_BASE_URL = "https://tinker.thinkingmachines.dev/services/tinker-prod"

BACKENDS: Mapping[str, BackendKind] = {
    "embedded": BackendKind(f"{_HERE}.embedded", "echo", extra="server", provider="the embedded server"),
    "openai": BackendKind(
        f"{_HERE}.openai_wire.trainer",
        "chat_token",
        provider="OpenAI",
        base_url=OPENAI_BASE_URL,
        key_variable="OPENAI_API_KEY",
    ),
    "openai_wire": BackendKind(f"{_HERE}.openai_wire.trainer", "echo", provider="the server", needs_url=True),
    "local": BackendKind(f"{_HERE}.local.trainer", "local", extra="local", provider="this machine", remote=False),
    "together": BackendKind(
        f"{_HERE}.together.trainer",
        "together",
        extra="together",
        provider="Together",
        base_url=TOGETHER_BASE_URL,
        key_variable="TOGETHER_API_KEY",
    ),
    "fireworks": BackendKind(
        f"{_HERE}.fireworks.trainer",
        "fireworks",
        extra="fireworks",
        provider="Fireworks",
        base_url=FIREWORKS_BASE_URL,
        key_variable="FIREWORKS_API_KEY",
    ),
    "tinker": BackendKind(
        f"{_HERE}.tinker.trainer",
        "tinker",
        extra="tinker",
        provider="Tinker",
        base_url=TINKER_BASE_URL,
        key_variable="TINKER_API_KEY",
    ),
    "azure": BackendKind(
        f"{_HERE}.azure", "azure", provider="Azure OpenAI", key_variable="AZURE_OPENAI_API_KEY", needs_url=True
    ),
}

SCORERS: Mapping[str, ScorerKind] = {
    "echo": ScorerKind(f"{_HERE}.openai_wire.echo"),
    "chat_token": ScorerKind(f"{_HERE}.openai_wire.chat_token"),
    "local": ScorerKind(f"{_HERE}.local.backend", extra="local"),
    "vllm": ScorerKind(f"{_HERE}.openai_wire.adapters"),
    "prompt_logprobs": ScorerKind(f"{_HERE}.openai_wire.prompt_logprobs"),
    "sglang": ScorerKind(f"{_HERE}.sglang"),
    "tgi": ScorerKind(f"{_HERE}.tgi"),
    "together": ScorerKind(f"{_HERE}.together.scorer", base_url=TOGETHER_BASE_URL, key_variable="TOGETHER_API_KEY"),
    "fireworks": ScorerKind(f"{_HERE}.fireworks.scorer", base_url=FIREWORKS_BASE_URL, key_variable="FIREWORKS_API_KEY"),
    "tinker": ScorerKind(
        f"{_HERE}.tinker.scorer", extra="tinker", base_url=TINKER_BASE_URL, key_variable="TINKER_API_KEY"
    ),
    "azure": ScorerKind(f"{_HERE}.azure"),
}


def known(table: Mapping[str, KindT], name: str, key: str) -> KindT:
    """The kind of that name. Raises ConfigurationError where there is none, with ``key``, where it was read."""
    if name in table:
        return table[name]
    close = difflib.get_close_matches(name, table, n=1)
    hint = f"did you mean {close[0]}?" if close else f"it can be {', '.join(table)}."
    raise ConfigurationError(f"{key}: {name!r} is not known; {hint}")
