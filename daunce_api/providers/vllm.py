"""vLLM: exact log-probabilities through ``prompt_logprobs``, and members as LoRA adapters that it loads.

Each position is a table from token id to log-probability, so every value is looked up by the id that was sent: a
server that read other tokens, or one token more, cannot go unnoticed.

For adapters the server is started with ``--enable-lora`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`` and must see
their folders. An adapter is served under a hash of its weights, so that a name never stands for other weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from ..config import RunConfig
from ..data.tokenizers import EncodedExample
from ..errors import ContractError, RejectedError
from .base import ProbeReport, Scorer, ScorerCapabilities, TokenScores
from .contract import check_ids, refuse_long, refuse_shifted, scores_of
from .hosting import Host, HostedScorer
from .openai_wire.client import WireClient, WireScorer, open_client
from .options import BatchOptions
from .polling import Answer
from .probe import GENERATED, Generated, generated, probe_generated, values_of
from .registry import Context

WEIGHTS = "adapter_model.safetensors"
LOCAL_MODELS = Path("local") / "models"
"""Where the local trainer keeps its adapters, inside the run folder."""


LARGE_VOCABULARY = (
    "for vocabularies of 100,000 tokens and more start vLLM with --max-num-batched-tokens 2048: it holds the "
    "probabilities of every token of a step at once (vLLM issue 5907)"
)
IGNORED = (
    "The server ignores prompt_logprobs, which vLLM has. Use scorer kind echo on Together, Fireworks or daunce serve."
)


class VllmOptions(BatchOptions):
    """``backend.scorer.options`` of the vLLM scorer."""

    together = ("local_root", "server_root")
    what = "go together"

    adapters: bool | None = Field(
        None,
        description="true: models are adapter folders to load; false: names that are served already; default: true for "
        "kind vllm, false for kind prompt_logprobs",
    )
    max_adapters: int = Field(1, ge=1, description="adapters that the server holds: its --max-loras")
    local_root: Path | None = Field(None, description="folder here that the server sees as server_root")
    server_root: str | None = None
    ranks: bool = Field(
        True, description="list the most likely token of each position too, which shows shifted values; false: shorter"
    )


def vllm_options(config: RunConfig) -> VllmOptions:
    """The scorer's options; whether adapters are loaded goes by its kind."""
    return VllmOptions.of(config, adapters=config.backend.scorer.kind != "prompt_logprobs")


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """Any completion, exactly; no network."""
    return vllm_options(config).capabilities("vLLM prompt_logprobs", notes=(LARGE_VOCABULARY,))


def open_scorer(context: Context) -> Scorer:
    """A scorer of the config's vLLM server, which loads members' adapters unless ``adapters`` is off."""
    config = context.config
    options = vllm_options(config)
    client = open_client(context, options)
    scorer = VllmScorer(client, scorer_capabilities(config), options)
    if not options.adapters:
        return scorer
    return HostedScorer(scorer, AdapterHost(client, config))


class VllmScorer(WireScorer):
    """``Scorer`` over vLLM's ``prompt_logprobs``. Closing it closes the client."""

    fingerprint = "prompt-logprobs completions"

    def __init__(self, client: WireClient, capabilities: ScorerCapabilities, options: VllmOptions) -> None:
        super().__init__(client, capabilities)
        self._options = options

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        """Log-probabilities (nats) of each example's targets.

        Raises RejectedError for an example over the context length, ContractError for an answer that does not hold
        what was requested.
        """
        for example in batch:
            refuse_long(example, 1, self._options.max_context_tokens)
        fields = {"max_tokens": 1, "prompt_logprobs": int(self._options.ranks)}
        doing = f"scoring {len(batch)} prompts under {model}"
        choices = await self.completions(model, [e.ids for e in batch], fields, doing=doing)
        return [
            table_scores(self.provider, example, choice.get("prompt_logprobs"), choice.get("prompt_token_ids"))
            for example, choice in zip(batch, choices, strict=True)
        ]

    async def probe(self, model: str, example: EncodedExample) -> ProbeReport:
        """Compare prompt log-probabilities with those of greedy generation. Raises as
        :func:`.probe.probe_generated`."""
        return await probe_generated(self, model, example, self._generate)

    async def _generate(self, model: str, prompt: tuple[int, ...]) -> Generated | None:
        fields = {"max_tokens": GENERATED, "logprobs": 1, "return_token_ids": True}
        (choice,) = await self.completions(model, [prompt], fields, doing=f"testing {model}")
        return generated(choice.get("token_ids"), values_of(choice))


def table_scores(provider: str, example: EncodedExample, tables: object, read: object = None) -> TokenScores:
    """The targets' log-probabilities in vLLM's list of ``{id: {logprob, rank, decoded_token}}``, by id.

    ``read`` are the ids that the server says it read, where it does. The first entry is null: nothing comes before
    the first token. Raises ContractError where length, ids or values break the contract, or where a token is more
    likely than the one that is ranked first: then values and positions are shifted against each other.
    """
    if isinstance(read, list):
        check_ids(provider, example, read)
    if not isinstance(tables, list) or not tables:
        return scores_of(provider, example, None, hint=IGNORED)
    values: list[object] = []
    for position, (token, table) in enumerate(zip(example.ids, tables, strict=False)):
        if table is None and position == 0:
            values.append(None)
            continue
        entry = table.get(str(token)) if isinstance(table, dict) else None
        if not isinstance(entry, dict):
            raise ContractError(
                f"{provider} read another token than was sent at position {position} of example "
                f"{example.example.id!r}: its template or tokenizer differs, or it truncates. Nothing was used. Point "
                "backend.tokenizer to the served model's own folder."
            )
        for first in (e for e in table.values() if isinstance(e, dict) and e.get("rank") == 1):
            refuse_shifted(provider, example, position, entry.get("logprob"), first.get("logprob"))
        values.append(entry.get("logprob"))
    values += [None] * (len(tables) - len(values))
    return scores_of(provider, example, values, hint=IGNORED)


class AdapterHost(Host):
    """Loads and unloads adapters over vLLM's ``/v1/load_lora_adapter``. The client is the scorer's, who closes it.

    A model is a folder of the local trainer's, any adapter folder, or the base model.
    """

    def __init__(self, client: WireClient, config: RunConfig) -> None:
        self._options = options = vllm_options(config)
        super().__init__(options.max_adapters)
        self._client = client
        self._models = config.run_dir / LOCAL_MODELS
        self._base = config.backend.model

    def always_served(self, model: str) -> str | None:
        return model if model == self._base else None

    async def create(self, model: str) -> tuple[str, str, Answer]:
        """Raises RejectedError where the folder is missing here or at the server, or where the server does not load
        adapters at run time."""
        folder = self._folder(model)
        name = name_of(folder)
        body = {"lora_name": name, "lora_path": self._seen_by_server(folder)}
        try:
            await self._command("load_lora_adapter", body, f"loading adapter {model}")
        except RejectedError as error:
            if error.status == 404 and "adapter" not in str(error).partition(":")[2].lower():
                raise RejectedError(
                    f"{self._client.provider} does not load adapters at run time. Start vLLM with --enable-lora and "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True."
                ) from error
            if "already" not in str(error):
                raise
        return name, name, {}

    async def delete(self, loaded: str, model: str) -> None:
        await self._command("unload_lora_adapter", {"lora_name": loaded}, f"unloading adapter {model}")

    async def listed(self, model: str) -> list[str]:
        try:
            return [name_of(self._folder(model))]
        except RejectedError:
            return []  # the name came from its weights; the server forgets it when it restarts

    async def _command(self, path: str, body: dict[str, str], doing: str) -> None:
        """A request whose answer, if it is no error, says nothing of interest."""
        await self._client.content(self._client.raw("POST", path, body), doing=doing)

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
