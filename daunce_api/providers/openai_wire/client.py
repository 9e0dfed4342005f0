"""The SDK's client as every OpenAI-wire part opens it, and what the scorers on it share.

Answers are read as raw JSON: the SDK builds its objects without checking them, which is slower on long lists of
log-probabilities and lets a malformed answer through. The SDK's own retries are off; callers decide by error class.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import httpx2

from ...errors import ContractError, StopError
from ..base import Closing, ScorerCapabilities
from ..calls import Calls, connections
from ..contract import by_index, check_model, json_of, part_of
from ..endpoint import ANONYMOUS, Endpoint
from ..options import ScorerOptions
from ..registry import Context

if TYPE_CHECKING:
    import openai  # imported where it is used: commands that only read a run start without it

OBJECT_KINDS = frozenset(
    ("file", "list", "model", "fine_tuning.job", "fine_tuning.job.event", "batch", "text_completion", "chat.completion")
)
"""Values of ``object`` that tell one kind of answer from another; any other value says nothing."""
MOST_PAGES = 1000
"""Pages of a list that are read; no provider holds that many jobs or files of one user."""


class WireClient(Closing):
    """An SDK client with the project's errors. Owns the client: closing this closes its connections.

    ``sdk`` may be any ``AsyncOpenAI`` (``AsyncAzureOpenAI`` too).
    """

    def __init__(self, sdk: openai.AsyncOpenAI, *, provider: str) -> None:
        import openai

        self.sdk = sdk
        self.provider = provider
        self.observer: Callable[[Mapping[str, str]], None] | None = None
        """Gets the headers of every answer."""
        self.calls = Calls(provider, [] if sdk.api_key == ANONYMOUS else [sdk.api_key], openai)

    @classmethod
    def open(
        cls,
        endpoint: Endpoint,
        *,
        http_client: httpx2.AsyncClient | None = None,
        timeout: float = 600.0,
        most: int = 100,
    ) -> WireClient:
        """A client of an endpoint, on an ``AsyncOpenAI`` without retries of its own.

        Organization and project of the environment go to OpenAI alone. ``timeout`` is in seconds, for one request;
        ``most`` connections are open at once.
        """
        import openai

        if http_client is None:
            limits = httpx2.Limits(max_connections=most, max_keepalive_connections=most)
            http_client = connections(openai, endpoint, timeout=httpx2.Timeout(timeout, connect=10.0), limits=limits)
        sdk = openai.AsyncOpenAI(
            api_key=endpoint.api_key,
            base_url=endpoint.base_url,
            max_retries=0,
            timeout=timeout,
            http_client=http_client,
        )
        if (urlsplit(endpoint.base_url).hostname or "") not in ("api.openai.com", "eu.api.openai.com"):
            sdk.organization = None
            sdk.project = None
        return cls(sdk, provider=endpoint.provider)

    async def json(
        self,
        call: Awaitable[Any],
        *,
        doing: str,
        submit: bool = False,
        needs: Mapping[str, type] | None = None,
        kind: str | None = None,
        equal: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """The JSON object that a ``with_raw_response`` call is answered with.

        ``doing`` names the request in messages ("creating a job"). ``submit`` marks a request that must not be
        repeated blindly: whatever leaves open whether it was acted on raises AmbiguousSubmitError. ``needs`` are the
        fields without which the answer is malformed (an empty text counts as missing). ``kind`` and ``equal`` say whose
        answer it must be: its ``object``, and fields that have these values wherever the answer holds them. An answer
        that says otherwise belongs to another request and is malformed.
        """
        content = await self.content(call, doing=doing, submit=submit)
        answer = self.calls.checked(json_of(content), doing, submit, needs)
        said = answer.get("object")
        if kind is not None and said != kind and isinstance(said, str) and said in OBJECT_KINDS:
            raise self.calls.malformed(doing, submit, f"an object of another kind, {said!r} instead of {kind!r}")
        for name, value in (equal or {}).items():
            shown = answer.get(name)
            if shown is not None and shown != value:
                what = self.calls.clean(f"{name} {shown!r} instead of {value!r}")
                raise self.calls.malformed(doing, submit, f"the answer to another request ({what})")
        return answer

    async def content(self, call: Awaitable[Any], *, doing: str, submit: bool = False) -> bytes:
        """The bytes that a ``with_raw_response`` call is answered with; errors as in :meth:`json`."""
        import openai

        async def answer() -> bytes:
            try:
                answered = await call
            except openai.APIStatusError as error:
                self._seen(error.response.headers)
                raise
            response: httpx2.Response = getattr(answered, "http_response", answered)
            self._seen(response.headers)
            return response.content

        return await self.calls.call(answer(), doing=doing, submit=submit)

    def raw(self, method: Literal["GET", "POST", "DELETE"], url: str, body: object = None) -> Awaitable[Any]:
        """A request outside the SDK's surface, to be given to :meth:`json` or :meth:`content`."""
        send: Any = {"GET": self.sdk.get, "POST": self.sdk.post, "DELETE": self.sdk.delete}[method]
        answer: Awaitable[httpx2.Response] = send(
            url, cast_to=httpx2.Response, **({} if body is None else {"body": body})
        )
        return answer

    async def post(self, path: str, body: Mapping[str, Any], *, doing: str) -> dict[str, Any]:
        """POST to a path outside the SDK's surface, relative to ``base_url`` (an absolute URL is taken as it is)."""
        return await self.json(self.raw("POST", path, body), doing=doing)

    async def get(self, path: str, *, doing: str) -> dict[str, Any]:
        """GET of a path outside the SDK's surface."""
        return await self.json(self.raw("GET", path), doing=doing)

    async def pages(
        self, listing: Callable[..., Awaitable[Any]], *, doing: str, **query: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """Every object of a paginated list, which a method of the SDK asks for. Stops where a server repeats a page
        instead of going on. Raises StopError for a list that does not end."""
        seen: set[str] = set()
        after: dict[str, Any] = {}
        for _ in range(MOST_PAGES):
            answer = await self.json(listing(**query, **after), doing=doing, needs={"data": list}, kind="list")
            fresh = [
                item
                for item in answer["data"]
                if isinstance(item, dict) and isinstance(item.get("id"), str) and item["id"] not in seen
            ]
            for item in fresh:
                seen.add(item["id"])
                yield item
            if not answer.get("has_more") or not fresh:
                return
            after = {"after": fresh[-1]["id"]}
        raise StopError(
            f"{self.provider} answered {doing} with more than {MOST_PAGES} pages, so the list has no end. Everything "
            "so far is kept. Check the address (backend.base_url), then run the same command again."
        )

    async def delete(self, call: Awaitable[Any], *, doing: str, target: str | None = None) -> bool:
        """As :meth:`Calls.delete`. ``target`` is the id that the answer has to name, if it names one."""
        answer = self.json(call, doing=doing, equal={} if target is None else {"id": target})
        return await self.calls.delete(answer, doing=doing)

    def _seen(self, headers: Mapping[str, str]) -> None:
        if self.observer is not None:
            self.observer(headers)

    async def close(self) -> None:
        await self.sdk.close()


def open_client(context: Context, options: ScorerOptions, *, concurrency: int | None = None) -> WireClient:
    """A scorer's client of the config's endpoint, with a connection for each request that may be under way."""
    return WireClient.open(
        context.wire_endpoint,
        http_client=context.http_client,
        timeout=options.timeout,
        most=max(concurrency or options.concurrency, context.config.scoring.concurrency or 1),
    )


class WireScorer(Closing):
    """Client and capabilities of a scorer. Closing it closes the client.

    ``checks_model``: an answer has to name the model that was asked.
    """

    checks_model = True

    def __init__(self, client: WireClient, capabilities: ScorerCapabilities) -> None:
        self.client = client
        self.provider = client.provider
        self.capabilities = capabilities

    def watch(self, observer: Callable[[Mapping[str, str]], None]) -> None:
        """Have ``observer`` called with the headers of every answer."""
        self.client.observer = observer

    async def ask(self, path: str, model: str, fields: Mapping[str, Any], *, doing: str) -> dict[str, Any]:
        """What a model answers to a greedy request. Raises ContractError where another model has answered."""
        answer = await self.client.post(path, {"model": model, "temperature": 0, **fields}, doing=doing)
        if self.checks_model:
            check_model(self.provider, model, answer.get("model"))
        return answer

    async def completions(
        self, model: str, prompts: Sequence[Sequence[int]], fields: Mapping[str, Any], *, doing: str
    ) -> list[dict[str, Any]]:
        """Choices of a completions request, one a prompt and in its order."""
        # The SDK's typed method walks through every token id of the prompts before it sends them as they are.
        body = {"prompt": [list(ids) for ids in prompts], **fields}
        answer = await self.ask("/completions", model, body, doing=doing)
        return by_index(self.provider, answer.get("choices"), len(prompts))

    async def generate(self, model: str, asked: str | Sequence[Mapping[str, Any]], *, max_tokens: int) -> str:
        """The model's most likely answer, at temperature 0; see :class:`~daunce_api.providers.base.Generator`."""
        plain = isinstance(asked, str)
        path = "/completions" if plain else "/chat/completions"
        question = {"prompt": asked} if plain else {"messages": list(asked)}
        answer = await self.ask(path, model, {**question, "max_tokens": max_tokens}, doing="generating an answer")
        text = part_of(answer, "choices", 0, *(["text"] if plain else ["message", "content"]))
        if not isinstance(text, str) or not text:
            raise ContractError(f"{self.provider} generated no text. Give the answer instead.")
        return text

    async def close(self) -> None:
        await self.client.close()
