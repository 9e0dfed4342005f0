"""How a backend is opened from a config.

The module of a kind (``kinds``) is imported when it is first used. It defines, for the roles that it has,

    trainer_capabilities(config: RunConfig) -> TrainerCapabilities     no network, no key
    scorer_capabilities(config: RunConfig) -> ScorerCapabilities       no network, no key
    open_trainer(context: Context) -> Trainer
    open_scorer(context: Context) -> Scorer
    open_tokenizer(config: RunConfig) -> Tokenizer                     optional, the scorer's before the trainer's;
                                                                       default: ``providers.tokenizers``
    start_server(config: RunConfig) -> tuple[Endpoint, Callable[[], None]]   optional: a server of the run's own
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeVar

import httpx2

from ..config import RunConfig, close_to
from ..data.tokenizers import Tokenizer
from ..errors import ConfigurationError, MissingExtraError
from .base import Scorer, ScorerCapabilities, Trainer, TrainerCapabilities
from .endpoint import ANONYMOUS, Endpoint, api_key_from, checked_base_url

KeyOf = Callable[[str], str]

REPLAYED = "replayed-key"
"""Stands for every key in a replay."""


@dataclass(frozen=True, slots=True)
class BackendKind:
    """A provider of fine-tuning. ``scorer`` is the kind used where the config names none; a scorer of the same name has
    the same address, key and extra. ``remote``: requests leave the process; without a ``base_url`` of its own
    ``backend.base_url`` is needed."""

    module: str
    scorer: str
    extra: str | None = None
    provider: str = ""
    base_url: str | None = None
    key_variable: str | None = None
    remote: bool = True


Entry = TypeVar("Entry")

_HERE = "daunce_api.providers"
TINKER_BASE_URL = "https://tinker.thinkingmachines.dev/services/tinker-prod"

BACKENDS: Mapping[str, BackendKind] = {
    "embedded": BackendKind(f"{_HERE}.embedded", "echo", extra="server", provider="the embedded server"),
    "openai": BackendKind(
        f"{_HERE}.openai_wire.trainer",
        "chat_token",
        provider="OpenAI",
        base_url="https://api.openai.com/v1",
        key_variable="OPENAI_API_KEY",
    ),
    "openai_wire": BackendKind(f"{_HERE}.openai_wire.trainer", "echo", provider="the server"),
    "local": BackendKind(f"{_HERE}.local.trainer", "local", extra="local", provider="this machine", remote=False),
    "together": BackendKind(
        f"{_HERE}.together.trainer",
        "together",
        extra="together",
        provider="Together",
        base_url="https://api.together.ai/v1",
        key_variable="TOGETHER_API_KEY",
    ),
    "fireworks": BackendKind(
        f"{_HERE}.fireworks.trainer",
        "fireworks",
        extra="fireworks",
        provider="Fireworks",
        base_url="https://api.fireworks.ai/inference/v1",
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
    "nebius": BackendKind(
        f"{_HERE}.nebius",
        "nebius",
        provider="Nebius",
        base_url="https://api.tokenfactory.nebius.com/v1",
        key_variable="NEBIUS_API_KEY",
    ),
    "azure": BackendKind(f"{_HERE}.azure", "azure", provider="Azure OpenAI", key_variable="AZURE_OPENAI_API_KEY"),
}

SCORERS: Mapping[str, str] = {
    "echo": f"{_HERE}.openai_wire.echo",
    "chat_token": f"{_HERE}.openai_wire.batch_api",
    "local": f"{_HERE}.local.backend",
    "vllm": f"{_HERE}.vllm",
    "prompt_logprobs": f"{_HERE}.vllm",
    "sglang": f"{_HERE}.sglang",
    "together": f"{_HERE}.together.scorer",
    "fireworks": f"{_HERE}.fireworks.scorer",
    "tinker": f"{_HERE}.tinker.scorer",
    "nebius": f"{_HERE}.nebius",
    "azure": f"{_HERE}.azure",
    "tgi": f"{_HERE}.retired",
}
"""Modules of the ways to read log-probabilities."""


def known(table: Mapping[str, Entry], name: str, key: str) -> Entry:
    """What a table has under a name. Raises ConfigurationError with ``key``, where it was read, for an unknown one."""
    if name in table:
        return table[name]
    offered = [kind for kind in table if kind != "tgi"]
    raise ConfigurationError(f"{key}: {name!r} is not known; {close_to(name, offered, 'it can be {}.')}")


@dataclass(frozen=True)
class Context:
    """What a kind needs to open its role. ``shared`` lets a trainer and a scorer of one kind share an object."""

    config: RunConfig
    endpoint: Endpoint | None
    http_client: httpx2.AsyncClient | None = None
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def wire_endpoint(self) -> Endpoint:
        """The endpoint of a kind that has one. Raises ConfigurationError where none is known."""
        if self.endpoint is None:
            raise ConfigurationError("this kind of backend needs an address: set backend.base_url.")
        return self.endpoint


@dataclass(frozen=True, slots=True)
class Backend:
    """An opened pair of trainer and scorer."""

    trainer: Trainer
    scorer: Scorer


@asynccontextmanager
async def open_backend(
    config: RunConfig, *, http_client: httpx2.AsyncClient | None = None, replaying: bool = False
) -> AsyncIterator[Backend]:
    """Trainer and scorer of a config, closed at the end of the block. Sends nothing yet, but starts the server of kind
    ``embedded``, which is stopped then.

    ``http_client`` replaces the connections of OpenAI-wire kinds (tests). ``replaying`` says that a recording answers
    every request: no key is needed and no server is started. Raises ConfigurationError for an unknown
    kind, a missing API key or address, and MissingExtraError.
    """
    kind, module, scorer_module = _modules(config)
    key_of = (lambda _: REPLAYED) if replaying else api_key_from
    async with AsyncExitStack() as stack:
        if not hasattr(module, "start_server"):
            endpoint = _trainer_endpoint(config, kind, key_of)
        elif replaying:
            endpoint = Endpoint("http://127.0.0.1/v1", REPLAYED, kind.provider)
        else:
            endpoint, stop = module.start_server(config)
            stack.callback(stop)
        shared: dict[str, Any] = {}
        trainer = module.open_trainer(Context(config, endpoint, http_client, shared))
        await stack.enter_async_context(trainer)
        endpoint = _scorer_endpoint(config, kind, endpoint, key_of)
        scorer = scorer_module.open_scorer(Context(config, endpoint, http_client, shared))
        await stack.enter_async_context(scorer)
        yield Backend(trainer, scorer)


def check_keys(config: RunConfig) -> None:
    """Look for the API keys that the config's trainer and scorer need; nothing is opened or sent.

    Raises ConfigurationError that names the environment variable of a key that is missing.
    """
    kind, module, _ = _modules(config)
    endpoint = None if hasattr(module, "start_server") else _trainer_endpoint(config, kind, api_key_from)
    _scorer_endpoint(config, kind, endpoint, api_key_from)


def capabilities_of(config: RunConfig) -> tuple[TrainerCapabilities, ScorerCapabilities]:
    """What the config's trainer and scorer can do, without network and without a key."""
    _, module, scorer_module = _modules(config)
    return module.trainer_capabilities(config), scorer_module.scorer_capabilities(config)


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of the config's model. Raises ConfigurationError where it is not known."""
    _, module, scorer_module = _modules(config)
    for part in (scorer_module, module):
        if hasattr(part, "open_tokenizer"):
            tokenizer: Tokenizer = part.open_tokenizer(config)
            return tokenizer
    from .tokenizers import tokenizer_of

    return tokenizer_of(config)


def scorer_kind(config: RunConfig) -> str:
    """Name of the scorer that the config uses."""
    return config.backend.scorer.kind or known(BACKENDS, config.backend.kind, "backend.kind").scorer


def scoring_address(config: RunConfig) -> str | None:
    """Kind and address that log-probabilities come from, without a key; None where that is this machine, or where the
    models are trained on it."""
    kind = known(BACKENDS, config.backend.kind, "backend.kind")
    if config.backend.kind == "embedded" or not kind.remote:
        return None

    def no_key(_: str) -> str:
        return ANONYMOUS

    endpoint = _scorer_endpoint(config, kind, _trainer_endpoint(config, kind, no_key), no_key)
    if endpoint is None or not endpoint.base_url or endpoint.loopback:
        return None
    return f"{scorer_kind(config)} {endpoint.base_url}"


def _modules(config: RunConfig) -> tuple[BackendKind, ModuleType, ModuleType]:
    """The config's kind, the module of its trainer and that of its scorer."""
    kind, name = known(BACKENDS, config.backend.kind, "backend.kind"), scorer_kind(config)
    scorer = _load(known(SCORERS, name, "backend.scorer.kind"), _own(name).extra, name)
    return kind, _load(kind.module, kind.extra, config.backend.kind), scorer


def _own(scorer: str) -> BackendKind:
    """Address, key and extra of a scorer's own provider; none of them where it has none."""
    return BACKENDS.get(scorer, BackendKind("", scorer))


def _load(module: str, extra: str | None, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        ours = (error.name or "").startswith("daunce_api") or isinstance(error, MissingExtraError)
        if extra is None or ours:
            raise
        raise MissingExtraError(f"backend {name!r} ({error.name})", extra) from error


def _trainer_endpoint(config: RunConfig, kind: BackendKind, key_of: KeyOf) -> Endpoint | None:
    if not kind.remote:
        return None
    settings = config.backend
    base_url = settings.base_url or kind.base_url
    if base_url is None:
        raise ConfigurationError(
            f"backend.kind {settings.kind!r} needs backend.base_url, such as http://127.0.0.1:8000/v1."
        )
    key = _key(settings.base_url, settings.api_key_env, kind, key_of)
    return Endpoint(checked_base_url(base_url), key, kind.provider)


def _scorer_endpoint(config: RunConfig, kind: BackendKind, trainer: Endpoint | None, key_of: KeyOf) -> Endpoint | None:
    """The scorer's own address and key where it has one; otherwise the trainer's."""
    settings = config.backend.scorer
    scorer = _own(scorer_kind(config))
    base_url = settings.base_url or (scorer.base_url if settings.kind not in (None, kind.scorer) else None)
    if base_url is None:
        if settings.api_key_env is None or trainer is None:
            return trainer
        return Endpoint(trainer.base_url, key_of(settings.api_key_env), trainer.provider)
    key = _key(settings.base_url, settings.api_key_env, scorer, key_of)
    return Endpoint(checked_base_url(base_url), key, "the scoring server")


def _key(address: str | None, variable: str | None, kind: BackendKind, key_of: KeyOf) -> str:
    """The key for an address (None: the provider's own). A provider's own variable is only the default for its own
    address: a key must not go elsewhere."""
    own = address is None or address.rstrip("/") == kind.base_url
    variable = variable or (kind.key_variable if own else None)
    return ANONYMOUS if variable is None else key_of(variable)
