"""Exact log-probabilities through SGLang's native ``/generate``.

SGLang's OpenAI route reads ``logprobs: 0`` as off and has no echo of log-probabilities; the native route takes token
ids and returns ``[log-probability, id, text]`` from a chosen position on, so ids are compared one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from ..config import RunConfig
from ..data.tokenizers import EncodedExample
from ..errors import ContractError
from .base import ProbeReport, ScorerCapabilities, TokenScores
from .contract import BEFORE_TARGETS, check_ids, part_of, refuse_long, scores_of
from .openai_wire.client import WireClient, WireScorer, open_client
from .options import ScorerOptions
from .probe import GENERATED, Generated, generated, probe_generated
from .registry import Context

IGNORED = "It does not answer as SGLang's /generate with return_logprob does. Check base_url."


class SGLangOptions(ScorerOptions):
    """``backend.scorer.options`` of the SGLang scorer."""

    adapters: bool = Field(True, description="send the model's name as lora_path; false where models are served whole")
    concurrency: int = Field(32, ge=1, description="requests that the endpoint takes at once")


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """Any completion, exactly; no network. The server batches by itself, so a request holds one prompt."""
    return SGLangOptions.of(config).capabilities("SGLang")


def open_scorer(context: Context) -> SGLangScorer:
    """A scorer of the config's SGLang server; a trailing ``/v1`` of its address is overlooked."""
    options = SGLangOptions.of(context.config)
    return SGLangScorer(open_client(context, options), context.config)


class SGLangScorer(WireScorer):
    """``Scorer`` over ``POST /generate``. Closing it closes the client."""

    def __init__(self, client: WireClient, config: RunConfig) -> None:
        super().__init__(client, scorer_capabilities(config))
        self._options = options = SGLangOptions.of(config)
        self.fingerprint = "sglang-generate" if options.adapters else "sglang-generate adapters=off"
        self._base = config.backend.model
        self._url = str(client.sdk.base_url).rstrip("/").removesuffix("/v1") + "/generate"

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        """Log-probabilities (nats) of each example's targets, a request each.

        Raises RejectedError for an example over the context length, ContractError for an answer that does not hold
        what was requested.
        """
        return [await self._score(model, example) for example in batch]

    async def _score(self, model: str, example: EncodedExample) -> TokenScores:
        refuse_long(example, 1, self._options.max_context_tokens)
        start = max(0, example.targets[0] - 1 - BEFORE_TARGETS)
        doing = f"scoring example {example.example.id!r} under {model}"
        meta = await self._ask(model, example.ids, doing=doing, logprob_start_len=start)
        return triple_scores(self.provider, example, meta, start)

    async def probe(self, model: str, example: EncodedExample) -> ProbeReport:
        """Compare input log-probabilities with those of greedy generation. Raises as
        :func:`.probe.probe_generated`."""
        return await probe_generated(self, model, example, self._generate)

    async def _generate(self, model: str, prompt: tuple[int, ...]) -> Generated | None:
        meta = await self._ask(model, prompt, doing=f"testing {model}", count=GENERATED)
        made = part_of(meta, "output_token_logprobs")
        if not isinstance(made, list) or not all(isinstance(t, list) and len(t) >= 2 for t in made):
            return None
        return generated([t[1] for t in made], [t[0] for t in made])

    async def _ask(self, model: str, ids: Sequence[int], *, doing: str, count: int = 1, **fields: Any) -> object:
        """``meta_info`` of an answer that continues the ids by ``count`` tokens."""
        body: dict[str, Any] = {
            "input_ids": list(ids),
            "sampling_params": {"max_new_tokens": count, "temperature": 0},
            "return_logprob": True,
            **fields,
        }
        if self._options.adapters and model != self._base:
            body["lora_path"] = model
        return (await self.client.post(self._url, body, doing=doing)).get("meta_info")


def triple_scores(provider: str, example: EncodedExample, meta: object, start: int) -> TokenScores:
    """The targets' log-probabilities in ``meta_info.input_token_logprobs``, which begins at position ``start``.

    Raises ContractError where the number of prompt tokens, the ids or the values break the contract.
    """
    triples, prompt_tokens = part_of(meta, "input_token_logprobs"), part_of(meta, "prompt_tokens")
    if not isinstance(triples, list) or not triples:
        return scores_of(provider, example, None, hint=IGNORED)
    if isinstance(prompt_tokens, int) and prompt_tokens != len(example.ids):
        raise ContractError(
            f"{provider} read {prompt_tokens} tokens of example {example.example.id!r} where {len(example.ids)} were "
            "sent: it adds or truncates. Nothing was used."
        )
    if not all(isinstance(t, list) and len(t) >= 2 for t in triples):
        raise ContractError(
            f"{provider} sent malformed log-probabilities for example {example.example.id!r}. {IGNORED}"
        )
    check_ids(provider, example, [*example.ids[:start], *(t[1] for t in triples)])
    values: list[object] = [*([None] * start), *(t[0] for t in triples)]
    return scores_of(provider, example, values, asked_from=start + 1, hint=IGNORED)
