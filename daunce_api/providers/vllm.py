"""Members as LoRA adapters on a vLLM server: loaded when they are scored, unloaded to make room.

The server is started with ``--enable-lora`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`` and must see the adapter
folders. An adapter is served under a hash of its weights, so that a name never stands for other weights than it did.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field

from ..config import RunConfig
from ..errors import ConfigurationError, RejectedError
from .base import Scorer, ScorerCapabilities
from .failures import gone_already
from .hosting import hosted
from .openai_wire.client import WireClient
from .openai_wire.echo import EchoOptions, EchoScorer, echo_capabilities
from .openai_wire.wire_scorer import open_client
from .options import ScorerOptions, parse_options
from .prompt_logprobs import PromptLogprobsOptions, PromptLogprobsScorer, prompt_capabilities
from .registry import Context

WEIGHTS = "adapter_model.safetensors"
LOCAL_MODELS = Path("local") / "models"
"""Where the local trainer keeps its adapters, inside the run folder."""


class VllmOptions(ScorerOptions):
    """``backend.scorer.options`` of the vLLM scorer."""

    route: Literal["completions", "chat", "echo"] = Field(
        "completions", description="completions and chat read prompt_logprobs; echo is OpenAI's own field"
    )
    adapters: bool = Field(True, description="models are adapter folders to load; false: names that are served already")
    max_adapters: int = Field(1, ge=1, description="adapters that the server holds: its --max-loras")
    local_root: Path | None = Field(None, description="folder here that the server sees as server_root")
    server_root: str | None = None
    ranks: bool = Field(True, description="as of prompt_logprobs; completions and chat only")
    prompts_per_request: int = Field(32, ge=1, le=2048)
    tokens_per_request: int = Field(16_384, ge=1)


def vllm_options(config: RunConfig) -> VllmOptions:
    """The scorer's options, checked. Raises ConfigurationError where only one of the roots is given."""
    options = parse_options(VllmOptions, config.backend.scorer.options, "backend.scorer.options")
    if (options.local_root is None) != (options.server_root is None):
        raise ConfigurationError("backend.scorer.options: local_root and server_root go together.")
    return options


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """Any completion, exactly; no network."""
    options = vllm_options(config)
    if options.route == "echo":
        return echo_capabilities(_echo(options), provider="vLLM (echo)")
    return prompt_capabilities(_prompt(options))


def open_scorer(context: Context) -> Scorer:
    """A scorer of the config's vLLM server, which loads members' adapters unless ``adapters`` is off."""
    config = context.config
    options = vllm_options(config)
    client = open_client(context, timeout=options.timeout, concurrency=options.concurrency)
    scorer: Scorer
    if options.route == "echo":
        scorer = EchoScorer(client, scorer_capabilities(config), _echo(options))
    else:
        scorer = PromptLogprobsScorer(client, scorer_capabilities(config), _prompt(options))
    if not options.adapters:
        return scorer
    host = AdapterHost(client, config.run_dir / LOCAL_MODELS, config.backend.model, options)
    return hosted(scorer, host)


def _shared(options: VllmOptions) -> dict[str, object]:
    names = ("prompts_per_request", "tokens_per_request", "max_context_tokens", "concurrency", "timeout")
    return {name: getattr(options, name) for name in names}


def _prompt(options: VllmOptions) -> PromptLogprobsOptions:
    return PromptLogprobsOptions.model_validate({"route": options.route, "ranks": options.ranks, **_shared(options)})


def _echo(options: VllmOptions) -> EchoOptions:
    return EchoOptions.model_validate({"return_token_ids": True, "max_tokens": 1, **_shared(options)})


class AdapterHost:
    """Loads and unloads adapters over vLLM's ``/v1/load_lora_adapter``. The client is the scorer's, who closes it.

    A model is a folder of ``models`` (the local trainer's), any adapter folder, or the base model ``base``.
    """

    def __init__(self, client: WireClient, models: Path, base: str, options: VllmOptions) -> None:
        self.limit = options.max_adapters
        self._client = client
        self._models = models
        self._base = base
        self._options = options

    async def load(self, model: str) -> str:
        """The name that the adapter is served under. Raises RejectedError where the folder is missing here or at the
        server, or where the server does not load adapters at run time."""
        if model == self._base:
            return model
        folder = self._folder(model)
        name = name_of(folder)
        body = {"lora_name": name, "lora_path": self._seen_by_server(folder)}
        try:
            await self._client.command("load_lora_adapter", body, doing=f"loading adapter {model}")
        except RejectedError as error:
            if "already" in str(error):
                return name
            if error.status == 404 and "adapter" not in str(error).partition(":")[2].lower():
                raise RejectedError(
                    f"{self._client.provider} does not load adapters at run time. Start vLLM with --enable-lora and "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True."
                ) from error
            raise
        return name

    async def unload(self, model: str) -> None:
        """Take it off; one that is gone already is no error, and neither is a folder that is no longer here."""
        if model == self._base:
            return
        try:
            name = name_of(self._folder(model))
        except RejectedError:
            return  # the name came from its weights; the server forgets it when it restarts
        with gone_already():
            await self._client.command("unload_lora_adapter", {"lora_name": name}, doing=f"unloading adapter {model}")

    async def close(self) -> None:
        """Nothing of its own to close."""

    def _folder(self, model: str) -> Path:
        candidates = [self._models / model, Path(model)]
        for folder in candidates:
            if (folder / WEIGHTS).is_file():
                return folder.resolve()
        raise RejectedError(f"model {model!r} is no adapter folder: {candidates[0]} holds no {WEIGHTS}.")

    def _seen_by_server(self, folder: Path) -> str:
        options = self._options
        if options.local_root is None or options.server_root is None:
            return str(folder)
        try:
            inside = folder.relative_to(options.local_root.resolve())
        except ValueError:
            raise RejectedError(
                f"the adapter folder {folder} is not inside local_root {options.local_root}, so the server cannot "
                "see it."
            ) from None
        return f"{options.server_root.rstrip('/')}/{inside.as_posix()}"


def name_of(folder: Path) -> str:
    """The name that an adapter is served under."""
    return f"daunce-{hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:24]}"
