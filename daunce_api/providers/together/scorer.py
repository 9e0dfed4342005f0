"""Exact log-probabilities at Together: completions with ``echo``, answered in a top-level ``prompt`` list.

Together takes text only, so the ids that it read come back and must be those of the example. A fine-tune answers on
a dedicated endpoint; with ``endpoint_id`` and ``deployment_id`` the members' adapters are attached to one and taken
off again within its limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import Field

from ...config import RunConfig
from ...data.dataset import Example
from ...data.encoded import text_of as whole_text
from ...data.literal import MARK
from ...data.tokenizers import EncodedExample, Tokenizer
from ...errors import ContractError, RejectedError
from ..base import ProbeReport, Scorer, ScorerCapabilities, TokenScores
from ..calls import Calls
from ..contract import check_ids, part_of, refuse_long, scores_of
from ..hosting import Host, HostedScorer
from ..openai_wire.client import WireClient, WireScorer, open_client
from ..options import ScorerOptions
from ..polling import Answer
from ..probe import GENERATED, compare, not_generating
from ..registry import Context
from ..tokenizers import tokenizer_of
from .trainer import maker_of, open_together

IGNORED = (
    "It did not echo the prompt. Check that the model runs on a dedicated endpoint that returns log-probabilities."
)


class TogetherScorerOptions(ScorerOptions):
    """``backend.scorer.options`` of the Together scorer."""

    together = ("project_id", "endpoint_id", "deployment_id")
    what = "name a dedicated endpoint together; give all three, or none where every fine-tune has one of its own"

    project_id: str | None = Field(None, description="project of the dedicated endpoint")
    endpoint_id: str | None = Field(None, description="dedicated endpoint that adapters are attached to")
    deployment_id: str | None = Field(None, description="its deployment of the base model")
    max_adapters: int = Field(16, ge=1, description="adapters that the deployment holds at once")


def scorer_capabilities(config: RunConfig) -> ScorerCapabilities:
    """Any completion, exactly; no network."""
    return TogetherScorerOptions.of(config).capabilities(
        "Together",
        hourly=True,
        tried_on="fine_tune",
        notes=("a fine-tune answers only on a dedicated endpoint, which is paid by the minute",),
    )


def open_scorer(context: Context) -> Scorer:
    """A scorer of Together's completions; with a dedicated endpoint, members are attached to it in turn."""
    config = context.config
    options = TogetherScorerOptions.of(config)
    scorer = TogetherScorer(open_client(context, options), config)
    if options.endpoint_id is None:
        return scorer
    sdk, calls = open_together(context, timeout=options.timeout, project_id=options.project_id)
    return HostedScorer(scorer, AdapterHost(sdk, calls, options))


def text_of(example: Example, tokenizer: Tokenizer) -> str:
    """The whole text that :func:`daunce_api.data.tokenizers.encode_example` turns into ids."""
    # The marks keep a content from spelling a special token for our tokenizer. A server would read one in such a
    # content all the same; then its ids differ and the answer is refused.
    return whole_text(example, tokenizer).replace(MARK, "")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a server says of one text: the ids that it read, a log-probability each, and what it generated then:
    (id, log-probability, text), up to the first token that is no text."""

    ids: Sequence[object]
    values: Sequence[object]
    made: Sequence[tuple[object, object, str]] = ()


class TogetherScorer(WireScorer):
    """``Scorer`` over ``POST /completions`` with text, of the config's fine-tunes. Closing it closes the client.

    The server's ids must come back and be those of the example; otherwise nothing is used. Many models' servers put the
    token that begins a text (BOS) in front by themselves. Then the text is sent without it, and what they read is the
    example again.
    """

    fingerprint = "together-echo leading=0"

    def __init__(self, client: WireClient, config: RunConfig) -> None:
        super().__init__(client, scorer_capabilities(config))
        self._limit = self.capabilities.max_context_tokens
        self._config = config
        self._front: object = None
        """Id that the server puts in front of every text, once an answer has shown that it doubles the example's."""

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return tokenizer_of(self._config)

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        """Log-probabilities (nats) of each example's targets, a request each.

        Raises RejectedError for an example over the context length, ContractError for an answer that does not hold
        what was requested.
        """
        return [await self._score(model, example) for example in batch]

    async def _score(self, model: str, example: EncodedExample) -> TokenScores:
        refuse_long(example, 1, self._limit)
        doing = f"scoring example {example.example.id!r} under {model}"
        text = text_of(example.example, self._tokenizer)
        sent = self._without_front(example, text)
        reading = await self._read(model, sent, doing=doing)
        if sent == text and list(reading.ids) == [example.ids[0], *example.ids]:
            self._front = example.ids[0]
            sent = self._without_front(example, text)
            reading = await self._read(model, sent, doing=doing)
        return self._scores(example, reading, shortened=sent != text)

    async def probe(self, model: str, example: EncodedExample) -> ProbeReport:
        """Compare log-probabilities with those of greedy generation.

        The generated text is sent back and must be read as the generated tokens; where it is not, nothing is known.
        Raises as :meth:`score`, ContractError where the values differ, and RejectedError for the base model: what
        answers for it, if anything does, is not the endpoint that fine-tunes answer on.
        """
        if model == self._config.backend.model:
            raise RejectedError(
                f"Together serves fine-tunes on endpoints of their own, of which {model} tells nothing."
            )
        await self._score(model, example)  # whether the model is there, and what the server puts in front
        room = GENERATED if self._limit is None else self._limit - len(example.ids) - 1
        text = text_of(example.example, self._tokenizer)
        offsets = self._tokenizer.encode_with_offsets(text)[1]
        whole = self._without_front(example, text)
        prompt = whole[: len(whole) - len(text) + offsets[example.targets[0]][0]] or whole
        doing = f"testing {model}"
        try:
            first = await self._read(model, prompt, doing=doing, count=max(1, min(GENERATED, room)))
        except RejectedError as error:
            return not_generating(error)
        again = await self._read(model, prompt + "".join(said for _, _, said in first.made), doing=doing)
        pairs = []
        read = list(zip(again.ids, again.values, strict=False))
        for position, (token, value, _) in enumerate(first.made, start=len(first.ids)):
            if position >= len(read) or read[position][0] != token:
                break  # its own text is read as other tokens from here on
            pairs.append((position, value, read[position][1]))
        if not pairs or list(again.ids[: len(first.ids)]) != list(first.ids):
            return ProbeReport(False, "the endpoint reads the text that it generates as other tokens than it made")
        return compare(self.provider, pairs)

    def _without_front(self, example: EncodedExample, text: str) -> str:
        """The text as it is to be sent: without the token that the server puts in front itself."""
        begins = self._front is not None and example.ids[0] == self._front
        return text[self._tokenizer.encode_with_offsets(text)[1][0][1] :] if begins else text

    def _scores(self, example: EncodedExample, reading: Reading, *, shortened: bool) -> TokenScores:
        provider, name = self.provider, f"example {example.example.id!r}"
        ids, values = list(reading.ids), list(reading.values)
        if not values:
            return scores_of(provider, example, None, hint=IGNORED)
        if shortened and ids != list(example.ids):
            raise ContractError(
                f"{provider} read other tokens than those of {name}: it puts the special token {self._front} in front "
                "of every text, and reads the text behind it in another way than where the token is part of the text. "
                "Nothing was used. Use a server that takes token ids (vLLM, SGLang, `daunce serve`)."
            )
        if ids[1:] == list(example.ids):
            raise ContractError(
                f"{provider} read other tokens than those of {name}: it puts a special token (id {ids[0]}) in front, "
                "and the example has none there. Nothing was used. Point backend.tokenizer to the served model's own "
                "folder: where its tokenizer begins every text with this token, examples do too. Where the members "
                "were trained without it, serve a tokenizer that adds none."
            )
        check_ids(provider, example, ids)
        return scores_of(provider, example, values, hint=IGNORED)

    async def _read(self, model: str, text: str, *, doing: str, count: int = 1) -> Reading:
        fields = {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": count}
        answer = await self.ask("/completions", model, fields, doing=doing)
        values, ids = (part_of(answer, "prompt", 0, "logprobs", name) for name in ("token_logprobs", "token_ids"))
        if not isinstance(values, list) or not values:
            return Reading([], [])
        if not isinstance(ids, list):
            raise ContractError(
                f"{self.provider} did not say which tokens it read ({doing}). It tokenizes the text by itself, "
                "so without ids no value can be trusted; nothing was used."
            )
        made = part_of(answer, "choices", 0, "logprobs")
        lists = [part_of(made, name) or [] for name in ("token_ids", "token_logprobs", "tokens")]
        said = zip(*lists, strict=False) if all(isinstance(part, list) for part in lists) else ()
        return Reading(
            [_whole(i) for i in ids], values, [(_whole(token), value, str(piece)) for token, value, piece in said]
        )


def _whole(number: object) -> object:
    """Together writes ids as floating-point numbers."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


class AdapterHost(Host):
    """Attaches fine-tunes' adapters to a deployment of their base model, and detaches them."""

    def __init__(self, sdk: Any, calls: Calls, options: TogetherScorerOptions) -> None:
        super().__init__(options.max_adapters)
        self._sdk = sdk
        self._adapters = sdk.endpoints.adapters
        self._calls = calls
        self._where = {"endpoint_id": options.endpoint_id, "deployment_id": options.deployment_id}

    async def create(self, model: str) -> tuple[str, str, Answer]:
        job = await maker_of(self._sdk, self._calls, model)
        if not job.get("adapter_object_id"):
            raise RejectedError(f"Together knows no adapter of {model!r}: it was deleted, or is another project's.")
        call = self._adapters.create(adapter_model_id=job["adapter_object_id"], **self._where)
        answer = await self._calls.fields(call, doing=f"attaching {model}", needs={"id": str})
        return str(job.get("adapter_object_name") or model), answer["id"], answer

    async def read(self, loaded: str, model: str) -> Answer:
        call = self._adapters.retrieve(id=loaded, **self._where)
        return await self._calls.fields(call, doing=f"waiting for {model}")

    def ready(self, answer: Answer, model: str) -> bool:
        states = [str(c.get("state", "")) for c in answer.get("perCluster") or () if isinstance(c, dict)]
        if any(state.endswith("FAILED") for state in states):
            raise RejectedError(f"Together could not load adapter {model!r} on the endpoint.")
        return bool(states) and all(state.endswith("READY") for state in states)

    async def delete(self, loaded: str, model: str) -> None:
        answer = await self.read(loaded, model)
        call = self._adapters.delete(id=loaded, etag=str(answer.get("etag", "")), **self._where)
        await self._calls.call(call, doing=f"detaching {model}")

    async def listed(self, model: str) -> list[str]:
        adapter = (await maker_of(self._sdk, self._calls, model)).get("adapter_object_id")
        if not adapter:
            return []
        attached = await self._calls.listed(self._adapters.list(**self._where), doing="listing what is attached")
        return [str(a.id) for a in attached if a.adapter_model_id == adapter]

    async def close(self) -> None:
        await self._sdk.close()
