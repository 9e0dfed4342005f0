"""Exact log-probabilities through Text Generation Inference's ``/generate`` with ``decoder_input_details``.

TGI takes text and tokenizes it itself, special tokens in front included (a BOS token that the example begins with is
left to it). The ids that it read come back with every answer, and must be those of the example.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ..config import RunConfig
from ..data.tokenizers import Tokenizer
from ..errors import ContractError
from .base import ScorerCapabilities
from .openai_wire.client import WireClient
from .openai_wire.wire_scorer import open_client
from .options import Options, parse_options
from .plain_text import Reading, TextScorer
from .registry import Context
from .tokenizers import tokenizer_of

IGNORED = (
    "Start TGI without prefix caching (PREFIX_CACHING=0): with it the prompt's log-probabilities are not computed."
)


class TGIOptions(Options):
    """``backend.scorer.options`` of the TGI scorer."""

    leading_tokens: int = Field(
        0, ge=0, le=4, description="special tokens in front of every text that members were trained without"
    )
    adapters: bool = Field(True, description="send the model's name as adapter_id")
    max_context_tokens: int | None = Field(None, ge=1, description="the server's --max-input-tokens")
    concurrency: int = Field(32, ge=1, description="requests that the endpoint takes at once")
    timeout: float = Field(120.0, gt=0, description="seconds that a request may take")


def tgi_options(config: RunConfig) -> TGIOptions:
    """The scorer's options, checked."""
    return parse_options(TGIOptions, config.backend.scorer.options, "backend.scorer.options")


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """Any completion, exactly; no network. The server batches by itself, so a request holds one prompt."""
    options = tgi_options(config)
    notes = (f"the server puts {options.leading_tokens} special tokens in front",) if options.leading_tokens else ()
    return ScorerCapabilities(
        provider="TGI",
        scope="any",
        max_context_tokens=options.max_context_tokens,
        max_concurrent_requests=options.concurrency,
        notes=notes,
    )


def open_scorer(context: Context) -> TGIScorer:
    """A scorer of the config's TGI server; a trailing ``/v1`` of its address is overlooked."""
    config = context.config
    options = tgi_options(config)
    client = open_client(context, timeout=options.timeout, concurrency=options.concurrency)
    return TGIScorer(client, scorer_capabilities(config), options, tokenizer_of(config), config.backend.model)


class TGIScorer(TextScorer):
    """``Scorer`` over ``POST /generate``. Closing it closes the client. ``base`` is the model without adapter."""

    def __init__(
        self, client: WireClient, capabilities: ScorerCapabilities, options: TGIOptions, tokenizer: Tokenizer, base: str
    ) -> None:
        leading, limit = options.leading_tokens, options.max_context_tokens
        super().__init__(client, capabilities, tokenizer, leading=leading, limit=limit, hint=IGNORED)
        self._options = options
        self._base = base
        self._url = str(client.sdk.base_url).rstrip("/").removesuffix("/v1") + "/generate"

    @property
    def fingerprint(self) -> str:
        adapters = "" if self._options.adapters else " adapters=off"
        return f"tgi-prefill leading={self._options.leading_tokens}{adapters}"

    async def _read(self, model: str, text: str, *, doing: str, count: int = 1) -> Reading:
        parameters: dict[str, Any] = {
            "max_new_tokens": count,
            "do_sample": False,
            "details": True,
            "decoder_input_details": True,
        }
        if self._options.adapters and model != self._base:
            parameters["adapter_id"] = model
        body = {"inputs": text, "parameters": parameters}
        answer = await self.client.post(self._url, body, doing=doing)
        details = answer.get("details")
        prefill = _entries(self.client.provider, details, "prefill", doing)
        said = []
        for token in _entries(self.client.provider, details, "tokens", doing):
            if token.get("special"):
                break
            said.append((token.get("id"), token.get("logprob"), str(token.get("text") or "")))
        return Reading([entry.get("id") for entry in prefill], [entry.get("logprob") for entry in prefill], said)


def _entries(provider: str, details: object, name: str, doing: str) -> list[dict[str, Any]]:
    """``details.NAME``: an object a token; none where it is missing."""
    found = details.get(name) if isinstance(details, dict) else None
    if not isinstance(found, list):
        return []
    if not all(isinstance(entry, dict) for entry in found):
        raise ContractError(f"{provider} answered {doing} with a malformed {name}. {IGNORED}")
    return found
