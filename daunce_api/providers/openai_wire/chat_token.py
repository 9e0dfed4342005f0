"""The log-probability of one generated token, from the most likely ones that a chat endpoint lists.

OpenAI and Azure show nothing else of their chat models: no prompt log-probabilities, no assistant prefill. So a
completion of one token is measured exactly where it is among the 20 most likely ones, and is censored otherwise: its
log-probability is at most that of the last one listed. What is listed as -9999 is not known, and never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from pydantic import Field

from ...config import RunConfig
from ...data.tokenizers import EncodedExample
from ...errors import CapabilityError, ContractError
from ..base import ScorerCapabilities, TokenScores
from ..contract import IMPOSSIBLE, ROUNDING, by_index, check_model, part_of
from ..hidden_template import HiddenTemplateTokenizer
from ..options import ScorerOptions
from ..tokenizers import tokenizer_of
from .client import WireClient, WireScorer

_SENT = ("tools", "functions", "parallel_tool_calls", "tool_choice", "reasoning_effort")
"""Fields of a chat record that the endpoint takes."""
BATCH_REQUESTS = 50_000
"""Requests that OpenAI takes in one batch."""
NO_LIST = (
    "Reasoning models and some servers offer none. Use a model that lists them, or an endpoint with echo (vLLM, "
    "Together, Fireworks, `daunce serve`)."
)


class ChatTokenOptions(ScorerOptions):
    """``backend.scorer.options`` of the one-token chat scorer."""

    first_token: bool = Field(False, description="measure only the first token of longer completions")
    top_logprobs: int = Field(20, ge=1, le=20, description="most likely tokens listed; OpenAI's limit is 20")
    limit_field: Literal["max_completion_tokens", "max_tokens"] = Field(
        "max_completion_tokens", description="max_tokens for servers that know only that"
    )
    check_model_name: bool = Field(True, description="the answer must name the model that was asked")
    batch_api: bool = Field(False, description="send requests through the Batch API: half the price, up to 24 hours")
    batch_poll_seconds: float = Field(60.0, gt=0)
    batch_concurrency: int = Field(64, ge=1, description="batches under way at once; each may take 24 hours")

    def capabilities(self, provider: str, notes: tuple[str, ...] = (), **differences: Any) -> ScorerCapabilities:
        """What a one-token chat scorer with these options can do."""
        said = [f"a token outside the {self.top_logprobs} most likely ones is censored: its loss is a lower bound"]
        if self.first_token:
            said.append("measures the first completion token only (first_token: true)")
        if self.batch_api:
            said.append("Batch API: half the list price, answers within 24 hours")
            differences |= {
                "max_prompts_per_request": BATCH_REQUESTS,
                "max_concurrent_requests": self.batch_concurrency,
                "price_factor": 0.5,
            }
        return super().capabilities(
            provider,
            scope="first_token" if self.first_token else "one_token",
            one_turn=True,
            accepts=frozenset({"tools", "images"}),
            look=measured_turn,
            notes=(*said, *notes),
            **differences,
        )


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """One token of the most likely ones, or the first token by choice; no network."""
    return ChatTokenOptions.of(config).capabilities("one-token chat")


def open_tokenizer(config: RunConfig) -> HiddenTemplateTokenizer:
    """Ids of the contents alone: the endpoint renders the chat itself."""
    return HiddenTemplateTokenizer(tokenizer_of(config))


class ChatTokenScorer(WireScorer):
    """``Scorer`` over ``POST /chat/completions`` with ``top_logprobs``. Closing it closes the client."""

    def __init__(
        self, client: WireClient, config: RunConfig, capabilities: ScorerCapabilities, options: ChatTokenOptions
    ) -> None:
        super().__init__(client, capabilities)
        self.checks_model = options.check_model_name
        self.fingerprint = f"chat-{capabilities.scope} top={options.top_logprobs}"
        self._config = config
        self._options = options

    @cached_property
    def tokenizer(self) -> HiddenTemplateTokenizer:
        """Opened when the first answer is read: `daunce cancel` works where it is gone."""
        return open_tokenizer(self._config)

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        """Log-probabilities (nats) of each example's target, a request each. Raises as :meth:`request` and
        :meth:`read` do."""
        scores = []
        for example in batch:
            doing = f"scoring example {example.example.id!r} under {model}"
            answer = await self.client.post("/chat/completions", self.request(model, example), doing=doing)
            scores.append(self.read(model, example, answer))
        return scores

    def request(self, model: str, example: EncodedExample) -> dict[str, Any]:
        """The body of the request: all messages before the measured turn, one token, greedy. Raises CapabilityError for
        an example that cannot be asked about."""
        turn = measured_turn(example)
        chat = example.example
        messages = [{k: v for k, v in m.to_record().items() if k != "weight"} for m in chat.messages[:turn]]
        return {
            "model": model,
            "messages": messages,
            **{k: chat.fields[k] for k in _SENT if k in chat.fields},
            self._options.limit_field: 1,
            "logprobs": True,
            "top_logprobs": self._options.top_logprobs,
            "temperature": 0,
        }

    def read(self, model: str, example: EncodedExample, answer: dict[str, Any]) -> TokenScores:
        """The scores in an answer's body. Raises ContractError where it does not hold what was requested."""
        if self.checks_model:
            check_model(self.provider, model, answer.get("model"))
        (choice,) = by_index(self.provider, answer.get("choices"), 1)
        wanted = self.tokenizer.bytes_of(example.ids[example.targets[0]])
        if wanted is None:
            raise CapabilityError(
                f"the first token of the completion of example {example.example.id!r} is a part of a character whose "
                "bytes the tokenizer does not tell. Use the model's own encoding, or an endpoint with echo."
            )
        return token_scores(self.provider, example, choice, wanted)


def measured_turn(example: EncodedExample) -> int:
    """The message whose first token a chat endpoint is asked about. Raises CapabilityError for an example that it
    cannot be asked about: the plan looks at every example so, before anything is paid for."""
    name = f"example {example.example.id!r}"
    if len(example.targets) != 1:
        raise CapabilityError(f"{name} has {len(example.targets)} target tokens; a chat endpoint measures one.")
    if not example.example.is_chat:
        raise CapabilityError(
            f"{name} is no chat, and a chat endpoint can be asked about nothing else. Read the file as chats "
            "(data.columns: {user: prompt, assistant: completion}), or use an endpoint with echo."
        )
    if len(example.turns) != 1:
        raise CapabilityError(
            f"{name} has {len(example.turns)} measured turns, and a chat endpoint is asked about one. Set "
            "data.measure: last and take weight: 1 off all but one turn, or use an endpoint with echo."
        )
    turn = example.example.messages[example.turns[0]]
    if turn.calls or turn.reasoning:
        what = "calls a tool" if turn.calls else "begins with reasoning"
        raise CapabilityError(
            f"the answer of {name} {what}, and a chat endpoint lists the tokens of texts only. Use an endpoint with "
            "echo (vLLM, Together, Fireworks, `daunce serve`), or leave the example out."
        )
    return example.turns[0]


def token_scores(provider: str, example: EncodedExample, choice: dict[str, Any], wanted: bytes) -> TokenScores:
    """The log-probability of the token with the bytes ``wanted`` in a chat choice's first list, or a bound of it.

    Tokens are compared by their bytes where the answer has them; one that is a part of a character needs them. Raises
    ContractError where there is no list, a value in it is impossible, the bytes are missing, or the probabilities were
    taken after a mask or a temperature.
    """
    name = f"example {example.example.id!r}"
    content = part_of(choice, "logprobs", "content")
    if not isinstance(content, list) or not content or not isinstance(content[0], dict):
        refused = part_of(choice, "message", "refusal")
        raise ContractError(
            f"{provider} sent no log-probabilities for {name}"
            + (" and refused to answer it. Leave the example out." if refused else f". {NO_LIST}")
        )
    if len(content) != 1:
        raise ContractError(
            f"{provider} generated {len(content)} tokens for {name} where one was requested; nothing was used. Set "
            "scorer option limit_field: max_tokens."
        )
    listed = content[0].get("top_logprobs")
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise ContractError(f"{provider} sent no list of likely tokens for {name}. {NO_LIST}")
    entries = [(_bytes(entry), _value(provider, name, entry)) for entry in listed]
    known = [(spelled, value) for spelled, value in entries if value > IMPOSSIBLE]
    if not known:
        raise ContractError(f"{provider} lists only stand-ins (-9999) for {name}: nothing was measured or used.")
    if len(entries) > 1 and len(known) == 1 and known[0][1] > -ROUNDING:
        raise ContractError(
            f"{provider} gives one token for {name} the whole probability and none to the others: the values were "
            "taken after a mask or a temperature, and measure nothing. Switch structured output off, or let the "
            "server report log-probabilities before sampling."
        )
    matching = {value for spelled, value in known if spelled == wanted}
    if not matching and _bytes(content[0]) == wanted:
        own = _value(provider, name, content[0])
        matching = {own} if own > IMPOSSIBLE else set()
    if len(matching) > 1:
        raise ContractError(
            f"{provider} lists the token of {name} with {len(matching)} different values; nothing was used."
        )
    if matching:
        return TokenScores((min(matching.pop(), 0.0),), (False,))
    if _is_part(wanted) and any(_hides_bytes(entry) for entry in (*listed, content[0])):
        raise ContractError(
            f"{provider} lists parts of characters without their bytes, and the first token of the completion of "
            f"{name} is one: whether it is among them is unknown, and nothing was used. Use an endpoint with echo, or "
            "leave the example out."
        )
    return TokenScores((min(*(value for _, value in known), 0.0),), (True,))


def _is_part(spelled: bytes) -> bool:
    """Whether a token is no text by itself."""
    try:
        spelled.decode()
    except UnicodeDecodeError:
        return True
    return False


def _hides_bytes(entry: dict[str, Any]) -> bool:
    """Whether a listed token is a part of a character that is not shown as it is."""
    return "\ufffd".encode() in _bytes(entry) or (entry.get("bytes") is None and "\\x" in str(entry.get("token")))


def _bytes(entry: dict[str, Any]) -> bytes:
    raw = entry.get("bytes")
    if isinstance(raw, list) and all(type(b) is int and 0 <= b < 256 for b in raw):
        return bytes(raw)
    return str(entry.get("token", "")).encode(errors="surrogatepass")


def _value(provider: str, name: str, entry: dict[str, Any]) -> float:
    value = entry.get("logprob")
    if isinstance(value, int | float) and not isinstance(value, bool) and value <= ROUNDING:  # NaN is not
        return float(value)
    raise ContractError(
        f"{provider} sent {str(value)[:40]!r} as the log-probability of a token for {name}; nothing was used."
    )
