"""Request bodies: what is accepted, and OpenAI-shaped refusals of everything else."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, ValidationInfo, field_validator
from pydantic_core import from_json
from starlette.requests import Request

from .api_errors import ApiError, invalid, missing

MAX_SEED = 2**31 - 1
MAX_METADATA = 16
MAX_TOP_LOGPROBS = 20
LEAST_TEMPERATURE = 1e-4

Int = Annotated[int, Strict()]
Str = Annotated[str, Strict()]
Bool = Annotated[bool, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]

_fields: set[str] = set()
"""Names of the fields of all bodies and their parts."""


class StrictBody(BaseModel):
    """A body, or a part of one, in which unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        _fields.update(cls.model_fields)


class Hyperparameters(StrictBody):
    """OpenAI's; ``auto`` is 3 epochs, batches of 8, multiplier 1."""

    n_epochs: Annotated[Int, Field(ge=1, le=50)] | Literal["auto"] = "auto"
    batch_size: Annotated[Int, Field(ge=1, le=256)] | Literal["auto"] | None = "auto"
    learning_rate_multiplier: Annotated[Number, Field(gt=0)] | Literal["auto"] = "auto"

    def resolved(self) -> tuple[int, int, float]:
        """(epochs, batch size, multiplier) with the automatic values filled in."""
        epochs = 3 if self.n_epochs == "auto" else self.n_epochs
        batch = 8 if self.batch_size in ("auto", None) else int(self.batch_size)
        rate = 1.0 if self.learning_rate_multiplier == "auto" else self.learning_rate_multiplier
        return epochs, batch, rate


class _Supervised(StrictBody):
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)


class _Method(StrictBody):
    type: Literal["supervised"]
    supervised: _Supervised | None = None


Metadata = Annotated[
    dict[Annotated[Str, Field(max_length=64)], Annotated[Str, Field(max_length=512)]], Field(max_length=MAX_METADATA)
]


class NewJob(StrictBody):
    """What every dialect's ``POST /v1/fine_tuning/jobs`` has."""

    model: Str
    training_file: Str
    suffix: Annotated[Str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[Int, Field(ge=0, le=MAX_SEED)] | None = None
    validation_file: None = None


class CreateJob(NewJob):
    """``POST /v1/fine_tuning/jobs``."""

    hyperparameters: Hyperparameters | None = None
    method: _Method | None = None
    metadata: Metadata | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None

    def chosen_hyperparameters(self) -> Hyperparameters:
        """Those of ``method`` before the deprecated ones at the top."""
        if self.method is not None and self.method.supervised is not None:
            return self.method.supervised.hyperparameters
        return self.hyperparameters or Hyperparameters()


class CreateBatch(StrictBody):
    """``POST /v1/batches``."""

    input_file_id: Str
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None


class _Sampling(StrictBody):
    model: Str
    n: Annotated[Int, Field(ge=1, le=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[Int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[Str, Field(min_length=1)] | Annotated[list[Str], Field(max_length=4)] | None = None
    stream: Literal[False] | None = None
    frequency_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    user: Str | None = None
    return_token_ids: Bool = False
    return_tokens_as_token_ids: Bool = False

    @property
    def stops(self) -> list[str]:
        """The stop sequences, without empty ones."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [s for s in given if s]

    @property
    def sampling(self) -> dict[str, Any]:
        """Temperature, nucleus and seed as the model takes them. OpenAI's default temperature is 1; without a seed
        every request is sampled anew. Dividing by a temperature below 1e-4 overflows: that is greedy sampling."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return {
            "temperature": temperature if temperature >= LEAST_TEMPERATURE else 0.0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "seed": secrets.randbelow(2**63) if self.seed is None else self.seed % 2**63,
        }


class CreateCompletion(_Sampling):
    """``POST /v1/completions``; ``prompt_logprobs``, ``return_token_ids`` and
    ``return_tokens_as_token_ids`` as vLLM has them."""

    prompt: Str | list[Str] | list[Int] | list[list[Int]]
    echo: Bool | None = None
    logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    max_tokens: Annotated[Int, Field(ge=0)] | None = None
    best_of: Annotated[Int, Field(ge=1, le=1)] | None = None
    prompt_logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt, as text or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class _TextPart(StrictBody):
    type: Literal["text"]
    text: Str


class _Function(StrictBody):
    name: Annotated[Str, Field(min_length=1)]
    arguments: Str


class _Call(StrictBody):
    id: Str
    type: Literal["function"]
    function: _Function


class ChatMessage(StrictBody):
    """One turn: a text, calls, or the result of one."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    name: Str | None = None
    tool_calls: Annotated[list[_Call], Field(min_length=1, max_length=128)] | None = None
    content: Annotated[Str | list[_TextPart] | None, Field(validate_default=True)] = None
    tool_call_id: Str | None = None
    reasoning_content: Str | None = None
    # An earlier answer, sent back as it came, has these too.
    refusal: None = Field(None, exclude=True)
    annotations: Annotated[list[Any], Field(max_length=0)] | None = Field(None, exclude=True)
    audio: None = Field(None, exclude=True)
    function_call: None = Field(None, exclude=True)

    @field_validator("content")
    @classmethod
    def _says_something(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("tool_calls") is None:
            raise ValueError("content is missing, and the message calls no tool")
        return value

    @field_validator("tool_calls")
    @classmethod
    def _is_an_answer(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("role") != "assistant":
            raise ValueError("only the assistant calls tools")
        return value

    def as_record(self) -> dict[str, Any]:
        """The message as given."""
        return self.model_dump(exclude_unset=True, exclude_none=True)


class CreateChatCompletion(_Sampling):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048)]
    tools: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=128)] | None = None
    parallel_tool_calls: Bool | None = None
    logprobs: Bool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    max_tokens: Annotated[Int, Field(ge=1)] | None = None
    response_format: Annotated[dict[Literal["type"], Literal["text"]], Field(min_length=1)] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None


Body = TypeVar("Body", bound=StrictBody)


async def read_body(request: Request, kind: type[Body], check: Callable[[dict[str, Any]], None] | None = None) -> Body:
    """The JSON body of a request; ``check`` sees it before it is validated. Raises ApiError 400 that names the
    parameter that is wrong."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise invalid(
            f"Unsupported content type: '{content_type[:80]}'. This API method only accepts 'application/json' "
            "requests, but you specified another in your Content-Type header."
        )
    try:
        raw = from_json(await request.body(), allow_inf_nan=False)
    except ValueError:
        raise invalid(
            "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP "
            "library correctly. The request expects a JSON payload in UTF-8.)"
        ) from None
    if not isinstance(raw, dict):
        raise invalid("The body must be a JSON object.")
    if check is not None:
        check(raw)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ApiError:
    problem = error.errors(include_input=False, include_url=False)[0]
    place = problem["loc"]
    if problem["type"] == "extra_forbidden":
        name = ".".join(map(str, place))[:100]
        return invalid(f"Unrecognized request argument supplied: {name}", param=name, code="unknown_parameter")
    name = _parameter(place)
    if problem["type"] == "missing":
        return missing(name)
    message = problem["msg"].removeprefix("Value error, ")
    if place[0] in _UNSUPPORTED:
        return invalid(
            f"'{name}' is not supported by this server as given: {message}.", param=name, code="unsupported_value"
        )
    return invalid(f"Invalid value for '{name}': {message}.", param=name, code="invalid_value")


def _parameter(place: tuple[str | int, ...]) -> str:
    """The parameter's own name out of pydantic's path, which also names the members of unions."""
    kept: list[str] = []
    for part in place:
        if part in _fields or (kept == ["messages"] and isinstance(part, int)) or kept == ["metadata"]:
            kept.append(str(part))
    return ".".join(kept)[:100]


_UNSUPPORTED = frozenset(
    (
        *("n", "stream", "best_of", "frequency_penalty", "presence_penalty", "logit_bias", "method"),
        *("validation_file", "integrations", "response_format", "store", "service_tier"),
    )
)
"""Parameters of OpenAI's with values that this server does not support."""
