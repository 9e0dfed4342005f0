"""Exact log-probabilities through Text Generation Inference's ``/generate`` with ``decoder_input_details``.

TGI takes text and tokenizes it itself, special tokens in front included. The ids that it read come back with every
answer, and must be those of the example.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ..config import RunConfig
from ..errors import ContractError
from ..tokens import EncodedExample, Tokenizer
from .base import ScorerCapabilities, TokenScores
from .openai_wire.client import WireClient
from .openai_wire.contract import check_ids, scores_of
from .openai_wire.prompt_logprobs import refuse_long
from .openai_wire.wire_scorer import OneByOneScorer, open_client
from .options import Options, parse_options
from .plain_text import text_of
from .registry import Context
from .tokenizers import tokenizer_of

IGNORED = (
    "Start TGI without prefix caching (PREFIX_CACHING=0): with it the prompt's log-probabilities are not computed."
)


class TGIOptions(Options):
    """``backend.scorer.options`` of the TGI scorer."""

    leading_tokens: int = Field(
        0, ge=0, le=4, description="special tokens that the server puts in front of every text (a BOS token: 1)"
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


class TGIScorer(OneByOneScorer):
    """``Scorer`` over ``POST /generate``. Closing it closes the client. ``base`` is the model without adapter."""

    def __init__(
        self, client: WireClient, capabilities: ScorerCapabilities, options: TGIOptions, tokenizer: Tokenizer, base: str
    ) -> None:
        super().__init__(client, capabilities)
        self._options = options
        self._tokenizer = tokenizer
        self._base = base
        self._url = str(client.sdk.base_url).rstrip("/").removesuffix("/v1") + "/generate"

    @property
    def fingerprint(self) -> str:
        adapters = "" if self._options.adapters else " adapters=off"
        return f"tgi-prefill leading={self._options.leading_tokens}{adapters}"

    async def _score(self, model: str, example: EncodedExample) -> TokenScores:
        refuse_long(example, 1 + self._options.leading_tokens, self._options.max_context_tokens)
        parameters: dict[str, Any] = {
            "max_new_tokens": 1,
            "do_sample": False,
            "details": True,
            "decoder_input_details": True,
        }
        if self._options.adapters and model != self._base:
            parameters["adapter_id"] = model
        body = {"inputs": text_of(example.example, self._tokenizer), "parameters": parameters}
        answer = await self.client.post(self._url, body, doing=f"scoring example {example.example.id!r} under {model}")
        return prefill_scores(self.client.provider, example, answer.get("details"), self._options.leading_tokens)


def prefill_scores(provider: str, example: EncodedExample, details: object, leading: int) -> TokenScores:
    """The targets' log-probabilities in ``details.prefill``, behind ``leading`` special tokens of the server's own.

    Raises ContractError where the ids or the values break the contract.
    """
    prefill = details.get("prefill") if isinstance(details, dict) else None
    if not isinstance(prefill, list) or not prefill:
        return scores_of(provider, example, None, hint=IGNORED)
    if not all(isinstance(entry, dict) for entry in prefill):
        raise ContractError(f"{provider} sent a malformed prefill for example {example.example.id!r}. {IGNORED}")
    ids = [entry.get("id") for entry in prefill]
    if leading == 0 and ids[1:] == list(example.ids):
        raise ContractError(
            f"{provider} puts a special token (id {ids[0]}) in front of example {example.example.id!r}, and it was "
            "trained without one. Nothing was used. Serve a tokenizer that adds none, or accept it with "
            "backend.scorer.options.leading_tokens: 1."
        )
    check_ids(provider, example, ids[leading:])
    return scores_of(provider, example, [entry.get("logprob") for entry in prefill[leading:]], hint=IGNORED)
