"""vLLM: exact log-probabilities through ``prompt_logprobs``, and members as LoRA adapters that it loads.

Each position is a table from token id to log-probability, so every value is looked up by the id that was sent: a
server that read other tokens, or one token more, cannot go unnoticed. On the chat route the server renders the
messages; its tokens must be those of the client's own rendering.

For adapters the server is started with ``--enable-lora`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`` and must see
their folders. An adapter is served under a hash of its weights, so that a name never stands for other weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..config import RunConfig
from ..data.tokenizers import EncodedExample
from ..errors import CapabilityError, ContractError, RejectedError
from .base import ProbeReport, Scorer, ScorerCapabilities, TokenScores
from .contract import TOP_TOLERANCE, by_index, check_ids, check_model, refuse_long, scores_of
from .failures import gone_already
from .hosting import HostedScorer
from .openai_wire.client import WireClient
from .openai_wire.wire_scorer import WireScorer, open_client
from .options import ScorerOptions, all_or_none
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


class VllmOptions(ScorerOptions):
    """``backend.scorer.options`` of the vLLM scorer."""

    route: Literal["completions", "chat"] = Field("completions", description="chat lets the server render the chat")
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
    prompts_per_request: int = Field(32, ge=1, le=2048, description="completions only; chat takes one")
    tokens_per_request: int = Field(16_384, ge=1)


def vllm_options(config: RunConfig) -> VllmOptions:
    """The scorer's options, checked. Raises ConfigurationError where only one of the roots is given."""
    options = VllmOptions.of(config, adapters=config.backend.scorer.kind != "prompt_logprobs")
    all_or_none(options, ("local_root", "server_root"), "go together")
    return options


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """Any completion, exactly; no network."""
    options = vllm_options(config)
    return ScorerCapabilities(
        provider=f"vLLM prompt_logprobs ({options.route})",
        scope="any",
        max_context_tokens=options.max_context_tokens,
        max_prompts_per_request=options.prompts_per_request if options.route == "completions" else 1,
        max_tokens_per_request=options.tokens_per_request,
        max_concurrent_requests=options.concurrency,
        notes=(LARGE_VOCABULARY,),
        look=_refuse_plain if options.route == "chat" else None,
    )


def _refuse_plain(example: EncodedExample) -> None:
    if not example.example.is_chat:
        raise CapabilityError(
            f"example {example.example.id!r} is no chat; set backend.scorer.options.route: completions for it."
        )


def open_scorer(context: Context) -> Scorer:
    """A scorer of the config's vLLM server, which loads members' adapters unless ``adapters`` is off."""
    config = context.config
    options = vllm_options(config)
    client = open_client(context, timeout=options.timeout, concurrency=options.concurrency)
    scorer = VllmScorer(client, scorer_capabilities(config), options)
    if not options.adapters:
        return scorer
    return HostedScorer(scorer, AdapterHost(client, config.run_dir / LOCAL_MODELS, config.backend.model, options))


class VllmScorer(WireScorer):
    """``Scorer`` over vLLM's ``prompt_logprobs``. Closing it closes the client."""

    def __init__(self, client: WireClient, capabilities: ScorerCapabilities, options: VllmOptions) -> None:
        super().__init__(client, capabilities)
        self.fingerprint = f"prompt-logprobs {options.route}"
        self._options = options

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        """Log-probabilities (nats) of each example's targets.

        Raises RejectedError for an example over the context length, CapabilityError where the chat route is asked
        for an example that is no chat, ContractError for an answer that does not hold what was requested.
        """
        for example in batch:
            refuse_long(example, 1, self._options.max_context_tokens)
        if self._options.route == "chat":
            return [await self._score_chat(model, example) for example in batch]
        return await self._score_ids(model, batch)

    async def probe(self, model: str, example: EncodedExample) -> ProbeReport:
        """Compare prompt log-probabilities with those of greedy generation, on the completions route: the chat route
        reads the same ones. Raises as :func:`.probe.probe_generated`."""
        return await probe_generated(self, model, example, self._generate, score=self._score_ids)

    async def _generate(self, model: str, prompt: tuple[int, ...]) -> Generated | None:
        call = self.client.sdk.completions.with_raw_response.create(
            model=model,
            prompt=[list(prompt)],
            max_tokens=GENERATED,
            temperature=0,
            logprobs=1,
            extra_body={"return_token_ids": True},
        )
        answer = await self.client.json(call, doing=f"testing {model}")
        check_model(self.client.provider, model, answer.get("model"))
        (choice,) = by_index(self.client.provider, answer.get("choices"), 1)
        return generated(choice.get("token_ids"), values_of(choice))

    async def _score_ids(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        call = self.client.sdk.completions.with_raw_response.create(
            model=model,
            prompt=[list(example.ids) for example in batch],
            max_tokens=1,
            temperature=0,
            extra_body={"prompt_logprobs": int(self._options.ranks)},
        )
        answer = await self.client.json(call, doing=f"scoring {len(batch)} prompts under {model}")
        check_model(self.client.provider, model, answer.get("model"))
        choices = by_index(self.client.provider, answer.get("choices"), len(batch))
        return [
            table_scores(self.client.provider, example, choice.get("prompt_logprobs"), choice.get("prompt_token_ids"))
            for example, choice in zip(batch, choices, strict=True)
        ]

    async def _score_chat(self, model: str, example: EncodedExample) -> TokenScores:
        _refuse_plain(example)
        chat = example.example
        messages: Any = [{k: v for k, v in m.to_record().items() if k != "weight"} for m in chat.messages]
        more: dict[str, Any] = {"tools": chat.tools} if chat.tools else {}
        more |= {k: chat.fields[k] for k in ("chat_template_kwargs", "documents") if k in chat.fields}
        call = self.client.sdk.chat.completions.with_raw_response.create(
            model=model,
            messages=messages,
            max_tokens=1,
            temperature=0,
            extra_body={"prompt_logprobs": int(self._options.ranks), "add_generation_prompt": False, **more},
        )
        answer = await self.client.json(call, doing=f"scoring example {example.example.id!r} under {model}")
        check_model(self.client.provider, model, answer.get("model"))
        return table_scores(
            self.client.provider, example, answer.get("prompt_logprobs"), answer.get("prompt_token_ids")
        )


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
        _check_rank(provider, example, position, entry, table)
        values.append(entry.get("logprob"))
    values += [None] * (len(tables) - len(values))
    return scores_of(provider, example, values, hint=IGNORED)


def _check_rank(
    provider: str, example: EncodedExample, position: int, entry: dict[str, Any], table: dict[str, Any]
) -> None:
    """The token's value may not exceed that of rank 1. Costs nothing: every table lists that one too."""
    value = entry.get("logprob")
    first = [e.get("logprob") for e in table.values() if isinstance(e, dict) and e.get("rank") == 1]
    for top in first:
        if isinstance(value, float) and isinstance(top, int | float) and value > top + TOP_TOLERANCE:
            raise ContractError(
                f"{provider} ranks a token of log-probability {top:.4f} first at position {position} of example "
                f"{example.example.id!r}, and gives {value:.4f} to the token itself: values and positions are shifted "
                "against each other. Nothing of the answer was used."
            )


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

    def always_served(self, model: str) -> str | None:
        return model if model == self._base else None

    async def load(self, model: str) -> str:
        """The name that the adapter is served under. Raises RejectedError where the folder is missing here or at the
        server, or where the server does not load adapters at run time."""
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
