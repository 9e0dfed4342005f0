"""Exact log-probabilities of any completion through ``echo`` of a completions endpoint.

Token ids are sent, so the server has nothing to tokenize; every answer passes ``contract`` before it is used.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from ...config import RunConfig
from ...data.tokenizers import EncodedExample
from ...errors import ConfigurationError, ContractError, ProviderError, RejectedError
from ..base import ProbeReport, ScorerCapabilities, TokenScores
from ..contract import check_ids, check_top, part_of, refuse_long, scores_of
from ..options import BatchOptions
from ..probe import GENERATED, Generated, compare, generated, is_number, probe_generated, values_of
from ..registry import Context
from .client import WireClient, WireScorer, open_client

IGNORED_ECHO = (
    "Use an endpoint that echoes prompts with their log-probabilities: vLLM, Together, Fireworks or `daunce serve`."
)
FIRST_LEFT_OUT = (
    "If the server has no entry for the first token of a prompt (Modular MAX), set backend.scorer.options.dialect: max."
)


Dialect = Literal["auto", "plain", "vllm", "daunce", "fireworks", "max"]

_PRESETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "vllm": {"return_token_ids": True},
    "daunce": {"return_token_ids": True},
    # Modular MAX generates a token whatever max_tokens says, and has no entry for the first token of the prompt.
    "max": {"max_tokens": 1, "first_position": "left_out"},
    "fireworks": {
        "return_token_ids": True,
        "max_tokens": 1,
        # By default Fireworks truncates what does not fit, which would shift every position.
        "extra_body": {"context_length_exceeded_behavior": "error"},
        # A deployed adapter answers under its own name, without the deployment that it was asked on.
        "check_model_name": False,
    },
}


class EchoOptions(BatchOptions):
    """``backend.scorer.options`` of the echo scorer."""

    max_tokens: Literal[0, 1] = Field(0, description="1 for servers that refuse 0; the generated token is dropped")
    logprobs: int = Field(1, ge=0, le=20, description="most likely tokens listed; some servers read 0 as off")
    return_token_ids: bool = Field(False, description="ask for the ids that the server read, and compare them")
    first_position: Literal["null", "left_out"] = Field(
        "null", description="left_out for servers that send no entry for the first token (MAX)"
    )
    check_model_name: bool = Field(True, description="the answer must name the model that was asked")
    extra_body: dict[str, Any] = Field(default_factory=dict, description="fields of the server's own, sent besides")
    dialect: Dialect = Field("auto", description="presets for a kind of server: auto goes by its address")


def echo_options(config: RunConfig) -> EchoOptions:
    """The scorer's options; those not given follow from the server's dialect, or from the embedded server."""
    address = config.backend.scorer.base_url or config.backend.base_url
    known = presets(config.backend.scorer.options.get("dialect", "auto"), address)
    if config.backend.kind == "embedded":
        from ..embedded import context_tokens

        # With the ids compared, lists of likely tokens would only make answers and recordings longer.
        known = {"return_token_ids": True, "logprobs": 0, "max_context_tokens": context_tokens(config), **known}
    return EchoOptions.of(config, **known)


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """Any completion, exactly; no network."""
    return echo_options(config).capabilities("completions with echo")


def open_scorer(context: Context) -> EchoScorer:
    """An echo scorer of the config's endpoint."""
    options = echo_options(context.config)
    capabilities = scorer_capabilities(context.config)
    # A server is asked which kind it is where the config says neither that nor whether ids are compared.
    detect = options.dialect == "auto" and "return_token_ids" not in options.model_fields_set
    return EchoScorer(open_client(context, options), capabilities, options, detect=detect)


class EchoScorer(WireScorer):
    """``Scorer`` over ``POST /completions`` with ``echo``. Closing it closes the client.

    With ``detect`` it looks once at what the server says of its models, and compares token ids where that is a kind
    that returns them.
    """

    def __init__(
        self, client: WireClient, capabilities: ScorerCapabilities, options: EchoOptions, *, detect: bool = False
    ) -> None:
        super().__init__(client, capabilities)
        self.options = options
        self.checks_model = options.check_model_name
        self.fingerprint = f"completions-echo max_tokens={options.max_tokens}"
        if options.extra_body:
            digest = hashlib.sha256(json.dumps(options.extra_body, sort_keys=True).encode()).hexdigest()
            self.fingerprint += f" extra_body={digest[:16]}"
        self._extra: dict[str, Any] = dict(options.extra_body)
        if options.return_token_ids:
            self._extra["return_token_ids"] = True
        self._known = not detect
        self._looking = asyncio.Lock()

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        """Log-probabilities (nats) of each example's targets, in one request.

        Raises RejectedError for an example over the context length, which a server would truncate in silence, and
        ContractError for an answer that does not hold what was requested.
        """
        for example in batch:
            refuse_long(example, self.options.max_tokens, self.options.max_context_tokens)
        choices = await self.complete(model, [example.ids for example in batch])
        return [self._scores(example, choice) for example, choice in zip(batch, choices, strict=True)]

    async def complete(
        self, model: str, prompts: Sequence[Sequence[int]], *, max_tokens: int | None = None, echo: bool = True
    ) -> list[dict[str, Any]]:
        """Choices of a completions request, one a prompt and in its order; temperature 0."""
        await self._look()
        fields = {
            "echo": echo,
            "logprobs": self.options.logprobs,
            "max_tokens": self.options.max_tokens if max_tokens is None else max_tokens,
            **self._extra,
        }
        try:
            choices = await self.completions(
                model, prompts, fields, doing=f"scoring {len(prompts)} prompts under {model}"
            )
        except RejectedError as error:
            if fields["max_tokens"] == 0 and "max_tokens" in str(error).partition(":")[2]:
                error.args = (f"{error} Set backend.scorer.options.max_tokens: 1.",)
            raise
        if echo and self.options.first_position == "left_out":
            choices = [_with_first_position(choice) for choice in choices]
        return choices

    async def _look(self) -> None:
        """Ask once which kind of server this is; one that does not say is taken as it is."""
        async with self._looking:
            if self._known:
                return
            try:
                listed = (await self.client.get("models", doing="listing models")).get("data")
            except ProviderError:
                listed = None
            if dialect_of_models(listed) is not None:
                # Not among those that must come: versions before 0.10.2 return none, and were scored without.
                self._extra = {"return_token_ids": True, **self._extra}
            self._known = True

    def read_ids(self, choice: dict[str, Any], sent: int) -> list[object] | None:
        """The prompt's ids as the server read them, in either of two forms; None where it does not tell.

        Raises ContractError where they were requested and are missing.
        """
        returned = choice.get("prompt_token_ids")
        if isinstance(returned, list):
            return returned
        listed = part_of(choice, "logprobs", "token_ids")
        if isinstance(listed, list):
            return listed[:sent]
        if self.options.return_token_ids:
            raise ContractError(
                f"{self.provider} does not return the token ids that it read, though return_token_ids asks for them. "
                "Nothing was used. Leave the option out if the server does not know it."
            )
        return None

    async def probe(self, model: str, example: EncodedExample) -> ProbeReport:
        """Compare echoed log-probabilities with those of greedy generation, with two to four small requests.

        Where the server returns token ids, it generates a continuation greedily and then scores it: both must agree.
        Where it does not, the most likely token at some positions of the example must be what greedy generation gives
        there. Raises as :func:`..probe.probe_generated`.
        """
        return await probe_generated(
            self, model, example, self._generate, otherwise=self._by_most_likely, hint=FIRST_LEFT_OUT
        )

    async def _generate(self, model: str, prompt: tuple[int, ...]) -> Generated | None:
        (choice,) = await self.complete(model, [prompt], max_tokens=GENERATED, echo=False)
        return generated(choice.get("token_ids"), values_of(choice))

    async def _by_most_likely(self, model: str, example: EncodedExample) -> ProbeReport:
        if not self.options.logprobs:
            return ProbeReport(False, "the endpoint returns neither token ids nor lists of likely tokens (logprobs: 0)")
        n = len(example.ids)
        (whole,) = await self.complete(model, [example.ids])
        listed = part_of(whole, "logprobs", "top_logprobs")
        if not isinstance(listed, list) or len(listed) < n:
            return ProbeReport(False, "the endpoint does not list likely tokens of the prompt")

        def top(entry: object) -> float | None:
            return max((v for v in entry.values() if is_number(v)), default=None) if isinstance(entry, dict) else None

        pairs, before = [], []
        for position in sorted({max(1, n // 2), n - 1}):
            (choice,) = await self.complete(model, [example.ids[:position]], max_tokens=1, echo=False)
            value = (values_of(choice) or [None])[0]
            if value is not None and (highest := top(listed[position])) is not None:
                pairs.append((position, value, highest))
                before.append((position, value, top(listed[position - 1])))
        if not pairs:
            return ProbeReport(False, "the endpoint generated nothing that could be compared")
        return compare(self.provider, pairs, before, FIRST_LEFT_OUT)

    def _scores(self, example: EncodedExample, choice: dict[str, Any]) -> TokenScores:
        provider, options = self.provider, self.options
        values = part_of(choice, "logprobs", "token_logprobs")
        short = isinstance(values, list) and 1 < len(values) == len(example.ids) + options.max_tokens - 1
        hint = FIRST_LEFT_OUT if short else IGNORED_ECHO
        scores = scores_of(provider, example, values, generated=options.max_tokens, hint=hint)
        returned = self.read_ids(choice, len(example.ids))
        if returned is not None:
            check_ids(provider, example, returned)
        if options.logprobs:
            check_top(provider, example, scores, part_of(choice, "logprobs", "top_logprobs"))
        return scores


def _with_first_position(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice with null for the first token, of a server that has no entry for it."""
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict):
        return choice
    whole = {name: [None, *values] for name, values in logprobs.items() if isinstance(values, list) and values}
    return {**choice, "logprobs": {**logprobs, **whole}}


def presets(dialect: object, address: str | None) -> dict[str, Any]:
    """Options of the echo scorer that a dialect needs, none for an unknown one; ``auto`` goes by the host of
    ``address``.

    Raises ConfigurationError for Together's address, whose answers have another shape and another scorer.
    """
    if dialect == "auto":
        dialect = _by_host(urlsplit(address or "").hostname or "")
    return _PRESETS.get(str(dialect), {})


def _by_host(host: str) -> str:
    if host == "fireworks.ai" or host.endswith(".fireworks.ai"):
        return "fireworks"
    if host.endswith(("together.ai", "together.xyz")):
        raise ConfigurationError(
            "Together echoes prompts in a shape of its own: set backend.scorer.kind: together instead of echo."
        )
    return "plain"


def dialect_of_models(listed: object) -> str | None:
    """The dialect that an answer of ``GET /models`` shows: vLLM and ``daunce serve`` name themselves as the owner of
    what they serve."""
    owners = {m.get("owned_by") for m in listed if isinstance(m, dict)} if isinstance(listed, list) else set()
    return next((name for name in ("vllm", "daunce") if name in owners), None)
