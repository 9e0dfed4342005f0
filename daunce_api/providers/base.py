"""The two roles of a backend, and what each one can say of itself.

A ``Trainer`` turns a request into a model id; a ``Scorer`` turns (model id, token ids) into log-probabilities. Any
trainer goes with any scorer. Both are asynchronous context managers; neither retries by itself: training and
the scoring client decide that, from the class of the error (``daunce_api.errors``):

    TransientError        the same request may succeed later (429, 408, 5xx, connection)
    AmbiguousSubmitError  a submit got no usable answer: look the job up before submitting again
    RejectedError         this job or request will never be accepted
    DailyLimitError       park the run for hours
    StopError             credentials, permission or credit: stop everything
    ContractError         the answer is not what was requested: use nothing of it
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import TracebackType
from typing import Any, Literal, Protocol, Self, runtime_checkable

from ..data.tokenizers import EncodedExample
from ..errors import CapabilityError

Hyperparameters = Mapping[str, bool | int | float | str]
"""Provider hyperparameters by the provider's own names (``n_epochs``, ``learning_rate_multiplier``, ...)."""


class JobStatus(StrEnum):
    """State of a fine-tuning job; an unknown state of a provider counts as RUNNING."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


@dataclass(frozen=True, slots=True)
class JobRequest:
    """One fine-tuning job. ``key`` is unique to the attempt and travels in the job's metadata (or its suffix, where
    there is no metadata), so that a job whose submit got no answer can be found again. ``sequence`` counts what the
    run has sent; it travels in the metadata too, and tells a copy of the run from the run itself. None: not sent.
    ``validation_file_id``: a file that the provider reports the loss of; it changes nothing that is trained."""

    key: str
    model: str
    file_id: str
    seed: int
    hyperparameters: Hyperparameters
    suffix: str
    sequence: int | None = None
    validation_file_id: str | None = None

    def marked_suffix(self, characters: int) -> str:
        """As much of the readable suffix's end as fits (run key and member), then :func:`mark_of` the key."""
        mark = mark_of(self.key)
        return f"{self.suffix[-(characters - len(mark) - 1) :].lstrip('-')}-{mark}"


@dataclass(frozen=True, slots=True)
class JobEcho:
    """What an answer says about the request that it belongs to; None where it says nothing.

    Compared with the request before an answer is used (:func:`daunce_api.providers.identity.contradiction`).
    """

    key: str | None = None
    file_id: str | None = None
    model: str | None = None
    seed: int | None = None
    hyperparameters: Hyperparameters | None = None


def mark_of(key: str) -> str:
    """What stands for a job's key in names, where jobs have no metadata: 20 hexadecimal digits of its hash."""
    return hashlib.sha256(key.encode()).hexdigest()[:20]


@dataclass(frozen=True, slots=True)
class Job:
    """A provider's view of one job. ``error`` is set for failed jobs only; ``trained_tokens`` when it is reported.

    ``refused`` says of a failed job that what was requested is at fault (its file, a hyperparameter): another attempt
    would fail in the same way. ``blocked``: why nothing more becomes of this job, nor of another one, until a person
    acts; whoever waits for it stops with this sentence.
    """

    id: str
    status: JobStatus
    model: str | None = None
    error: str | None = None
    trained_tokens: int | None = None
    refused: bool = False
    blocked: str | None = None
    echo: JobEcho = JobEcho()


GRACE_SECONDS = 300.0
"""Grace period of a provider that nothing better is known of."""

EchoField = Literal["key", "file_id", "model", "seed", "hyperparameters"]


@dataclass(frozen=True, slots=True)
class TrainerCapabilities:
    """What a trainer can do; the plan shows it and training keeps to it.

    ``grace_seconds``: how long a job, file or model that was just made may be invisible (404, missing from a list,
    "not found" at job creation, 404 at completions); until then that means "not yet". 0 for a server that is never
    behind itself. ``listing_lag_seconds``: how long a submit or upload without an answer is looked for in the
    provider's lists before it is sent again; None: as long as the grace period. ``echoes``: the fields of
    :class:`JobEcho` that the provider fills in, and that are therefore compared with the request.
    ``epochs``: of a job whose hyperparameters do not say, None where the provider decides.
    ``max_context_tokens``: the longest training example, None where it is not known. ``checkpoints``:
    how many models of a job can be scored, the final one and those of the epochs before it (:class:`Checkpointing`).
    ``own_queue``: jobs wait for the user's own machines, where a long queue is no sign of a job that is stuck.
    ``workers``: how many of them are trained at once, where that is fewer than may be submitted. ``accepts``: what
    records may hold besides texts and contents in text (``tools``, ``images``, ``texts`` for text-only records,
    ``weights`` of whole records), and ``validation`` where a job takes a validation file.
    ``hyperparameters``: the names that the provider takes (empty: any), ``switches`` those that are true or false.
    ``models_persist``: models stay at the provider until they are deleted, whatever happens to this process;
    ``models_expire``: the provider deletes them by itself after ``ensemble.keep_days``.
    """

    provider: str
    max_concurrent_jobs: int
    min_examples: int = 1
    honours_seed: bool = True
    starts_from_fine_tune: bool = True
    hyperparameters: frozenset[str] = frozenset()
    switches: frozenset[str] = frozenset()
    epochs: int | None = None
    grace_seconds: float = GRACE_SECONDS
    listing_lag_seconds: float | None = None
    echoes: frozenset[EchoField] = frozenset()
    max_context_tokens: int | None = None
    checkpoints: int = 1
    own_queue: bool = False
    workers: int | None = None
    accepts: frozenset[str] = frozenset({"tools", "texts"})
    models_persist: bool = True
    models_expire: bool = False
    notes: tuple[str, ...] = ()


Scope = Literal["any", "one_token", "first_token"]


@dataclass(frozen=True, slots=True)
class ScorerCapabilities:
    """What a scorer can measure.

    ``scope``: ``any`` exact log-probabilities of any completion; ``one_token`` completions of one token that is
    among the most likely ones (others are censored); ``first_token`` the first token of longer completions, by the
    user's explicit choice. ``max_models``: how many models the endpoint holds at once, where changing them takes
    time. ``price_factor`` is what the provider takes of its list price for requests sent this way. ``hourly``: the
    endpoint is paid for by the hour. ``tried_on``: what a trial before a run may be sent to; a fine-tune where the
    base model is not served, nothing where every model has to be deployed for money first. ``one_turn``: a chat's
    answer is measured only where it is one turn. ``accepts``: as of a trainer. ``look`` raises CapabilityError for an
    example that the scorer could not ask about; the plan calls it for every one.
    ``fine_tunes_verified``: the numbers of fine-tunes are known to be right; where it is False a run scores its first
    finished member before it submits the second. ``refusal``: why nothing can be scored here at all.
    """

    provider: str
    scope: Scope
    max_context_tokens: int | None = None
    max_prompts_per_request: int = 1
    max_tokens_per_request: int | None = None
    max_concurrent_requests: int = 8
    max_models: int | None = None
    price_factor: float = 1.0
    hourly: bool = False
    tried_on: Literal["base", "fine_tune", "nothing"] = "base"
    one_turn: bool = False
    accepts: frozenset[str] = frozenset({"tools", "texts"})
    look: Callable[[EncodedExample], object] | None = field(default=None, compare=False, repr=False)
    fine_tunes_verified: bool = True
    refusal: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> str:
        """What a loss from this scorer is the loss of; every output names it where it is not the whole completion."""
        return "first completion token only" if self.scope == "first_token" else "completion"


def within_scope(example: EncodedExample, capabilities: ScorerCapabilities) -> EncodedExample:
    """The example with the targets that a scorer measures: all of them, or the first one for ``first_token``.

    Every example goes through here before it is scored, so that its key stands for what was measured. Raises
    CapabilityError for a longer completion where one token can be measured.
    """
    if capabilities.scope == "any" or len(example.targets) == 1:
        return example
    if capabilities.scope == "first_token":
        return replace(example, targets=example.targets[:1])
    raise CapabilityError(
        f"example {example.example.id!r} has a completion of {len(example.targets)} tokens, and "
        f"{capabilities.provider} shows the log-probability of one generated token only. Score on an endpoint with "
        "echo (vLLM, Together, Fireworks, `daunce serve`), use one-token labels, or set "
        "backend.scorer.options.first_token: true to attribute the first token alone, which is another question."
    )


def all_within_scope(examples: Sequence[EncodedExample], capabilities: ScorerCapabilities) -> Sequence[EncodedExample]:
    """:func:`within_scope` of each example."""
    return examples if capabilities.scope == "any" else tuple(within_scope(e, capabilities) for e in examples)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities (nats) of the target tokens of one example, in the order of ``EncodedExample.targets``.

    Where ``censored[t]`` is True the token was not among those that the endpoint lists, and ``logprobs[t]`` is an
    upper bound of its log-probability (the loss is at least ``-logprobs[t]``).
    """

    logprobs: tuple[float, ...]
    censored: tuple[bool, ...] = field(default=())

    @property
    def any_censored(self) -> bool:
        return any(self.censored)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a provider says of a base model before money is spent; ``shutdown_date`` is ``YYYY-MM-DD`` or None."""

    id: str
    shutdown_date: str | None = None


class Closing:
    """An asynchronous context manager that closes itself at the end of its block."""

    async def close(self) -> None:
        """Close what this opened or was given to close."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Trainer(AbstractAsyncContextManager["Trainer"], Protocol):
    """Fine-tuning jobs of one provider."""

    @property
    def capabilities(self) -> TrainerCapabilities: ...

    async def model_info(self, model: str) -> ModelInfo:
        """Raises RejectedError where the model does not exist (or was shut down)."""

    async def upload(self, name: str, content: bytes) -> str:
        """Upload a training file, return its id. Not idempotent: ask :meth:`find_file` first after any doubt."""

    async def find_file(self, name: str, size: int) -> str | None:
        """Id of an uploaded file of this name and size in bytes; names carry a content hash."""

    async def submit(self, request: JobRequest) -> Job:
        """Create a job, once: never retried inside. Raises AmbiguousSubmitError when no answer tells what happened."""

    async def find_job(self, key: str) -> Job | None:
        """The job whose request carried this key, or None."""

    async def get(self, job_id: str) -> Job: ...

    async def cancel(self, job_id: str) -> Job:
        """Ask for cancellation; a job that is already final is returned as it is."""

    async def delete_file(self, file_id: str) -> bool:
        """True when it is gone now or was already; False when the provider keeps it."""

    async def delete_model(self, model: str) -> bool:
        """True when it is gone now or was already; False when the provider keeps it."""


@runtime_checkable
class Checkpointing(Protocol):
    """A trainer that keeps models of a job from before its end, which are scored like the final one."""

    async def checkpoints(self, job_id: str) -> list[str]:
        """Models of a succeeded job from before its end, ascending by training step: neither its final model nor one
        of the same weights. Raises RejectedError where the job is not known."""


class Scorer(AbstractAsyncContextManager["Scorer"], Protocol):
    """Log-probabilities of given tokens under a given model."""

    @property
    def capabilities(self) -> ScorerCapabilities: ...

    @property
    def fingerprint(self) -> str:
        """Names everything besides model and token ids that an answer depends on (endpoint kind and parameters)."""

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        """One answer an example, in order. At most ``max_prompts_per_request`` examples.

        Raises ContractError where the answer does not hold what was requested, and the classes above.
        """


@runtime_checkable
class Listing(Protocol):
    """A trainer that can list what a run made at the provider."""

    async def jobs_of(self, run_key: str) -> list[Job]:
        """Every job whose key (``Job.echo.key``) begins with ``run_key``, whatever became of it. New jobs may be
        missing for ``grace_seconds``."""


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What a scorer found out about its endpoint. ``checked`` is False where the endpoint gives no means to check;
    ``largest_difference`` is in nats, between two ways to ask for the same number. ``generated``: what the model made,
    as an example whose targets are the generated tokens, with their log-probabilities when made and when scored.
    ``from_base``: how far a fine-tune's are from the base model's (root mean square, nats), where both are known."""

    checked: bool
    detail: str
    largest_difference: float | None = None
    generated: tuple[EncodedExample, tuple[float, ...], tuple[float, ...]] | None = field(default=None, repr=False)
    from_base: float | None = None


@runtime_checkable
class Metered(Protocol):
    """A scorer that shows the headers of its endpoint's answers, which carry its rate limits."""

    def watch(self, observer: Callable[[Mapping[str, str]], None]) -> None:
        """Have ``observer`` called with the headers of every answer."""


class HostRecords(Protocol):
    """Keeps which models may stand on a server, so that they can be taken off after a crash too."""

    def load_intent(self, model: str) -> None:
        """To be written before a model is loaded; an intent that is recorded already stays."""

    def unloaded(self, model: str) -> None:
        """The server no longer holds the model."""


@runtime_checkable
class Hosting(Protocol):
    """A scorer that puts models on a server for as long as they are scored."""

    def record(self, records: HostRecords) -> None:
        """Keep in ``records`` what is put on the server and taken off."""

    async def take_off(self, models: Sequence[str]) -> dict[str, str]:
        """Take off what an earlier process left there; why not, by model, where that failed."""


@runtime_checkable
class Generator(Protocol):
    """A scorer whose endpoint also generates answers: those of OpenAI's wire format; `local` and Tinker's do not."""

    async def generate(self, model: str, asked: str | Sequence[Mapping[str, Any]], *, max_tokens: int) -> str:
        """The most likely answer of a model to a prompt, or to chat messages (``role``, ``content``).

        Raises RejectedError where the model is not there, ContractError for an answer without a text.
        """


@runtime_checkable
class Probing(Protocol):
    """A scorer that can test its endpoint's numbers against the endpoint's own generation."""

    async def probe(self, model: str, example: EncodedExample) -> ProbeReport:
        """Raises ContractError where the endpoint returns numbers that are not what they seem (shifted by one)."""


@dataclass(slots=True)
class Swept:
    """What was deleted at a provider; ``kept`` names what could not be, and why."""

    files: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


@runtime_checkable
class Deferred(Protocol):
    """A scorer whose answers come hours later and stay at the provider until they are safe, so that an interrupted run
    finds what it has paid for."""

    @property
    def immediate(self) -> Scorer:
        """The scorer of the same numbers that answers at once, for whoever only looks at the endpoint."""

    async def score_replicate(self, model: str, batch: Sequence[EncodedExample], replicate: int) -> list[TokenScores]:
        """As ``score``; ``replicate`` tells measurements of the same examples apart."""

    async def release(self, model: str, batch: Sequence[EncodedExample], replicate: int) -> None:
        """The answers to these examples are on disk: what the provider keeps of them may be deleted."""

    async def sweep(self, models: Sequence[str]) -> Swept:
        """Stop what is under way for these models, and delete what earlier calls left at the provider."""
