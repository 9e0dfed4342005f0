"""The embedded provider: a server of the run's own on a loopback port, asked through real HTTP.

Its files, jobs and adapters live in the run folder, so that an interrupted run finds them again. From there on it is
an OpenAI-wire server like any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from ..config import RunConfig
from ..errors import ConfigurationError
from .base import TrainerCapabilities
from .endpoint import Endpoint
from .openai_wire.client import WireClient
from .openai_wire.trainer import WireTrainer, WireTrainerOptions
from .options import parse_options
from .registry import Context
from .server_process import EmbeddedServer
from .server_settings import ServerSettings
from .tokenizers import EMBEDDED_MODEL, embedded_folder

STATE_FOLDER = "server"
"""Inside the run folder."""

_OWN = {"state_dir": "it is RUN/server", "api_key": "a new one is made for every start", "model": "use backend.model"}


def trainer_capabilities(config: RunConfig) -> TrainerCapabilities:
    """As of any OpenAI-wire server; twice as many jobs as workers keep every worker busy."""
    trainer, server = _options(config)
    return trainer.capabilities(
        config,
        "embedded server",
        2 * server.workers,
        epochs=3,
        max_context_tokens=context_tokens(config),
        notes=("trains and scores on this machine",),
    )


def open_trainer(context: Context) -> WireTrainer:
    """The OpenAI-wire trainer, on the run's own server."""
    options, _ = _options(context.config)
    client = WireClient.open(context.wire_endpoint, http_client=context.http_client, timeout=options.timeout)
    return WireTrainer(client, trainer_capabilities(context.config), options)


def context_tokens(config: RunConfig) -> int | None:
    """Longest prompt of the served model, from its config.json."""
    if config.backend.model != EMBEDDED_MODEL:
        from .local.models import context_of

        return context_of(config.backend.model)
    return int(json.loads((embedded_folder() / "config.json").read_text())["max_position_embeddings"])


def start_server(config: RunConfig) -> tuple[Endpoint, Callable[[], None]]:
    """Start the server in a child process: its endpoint, and what stops it."""
    server = EmbeddedServer(_options(config)[1]).start()
    return Endpoint(server.base_url, server.api_key, "the embedded server"), server.stop


def _options(config: RunConfig) -> tuple[WireTrainerOptions, ServerSettings]:
    """``backend.options`` holds the trainer's and the server's options side by side. The server is never behind."""
    given = config.backend.options
    for name, why in _OWN.items():
        if name in given:
            raise ConfigurationError(f"backend.options.{name} cannot be set for kind embedded: {why}.")
    trainer = {k: v for k, v in given.items() if k in WireTrainerOptions.model_fields}
    server = {k: v for k, v in given.items() if k not in trainer}
    server |= {"model": config.backend.model, "state_dir": config.run_dir / STATE_FOLDER}
    own = {"grace_seconds": 0.0, "listing_lag_seconds": 0.0}
    return (
        parse_options(WireTrainerOptions, {**own, **trainer}, "backend.options"),
        parse_options(ServerSettings, server, "backend.options"),
    )
