"""Options of one kind of backend: a pydantic model each, with the same messages as the config's own keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..config import RunConfig, close_to
from ..errors import ConfigurationError
from .base import EchoField, ScorerCapabilities, TrainerCapabilities


class Options(BaseModel):
    """Base of every kind's options: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    where: ClassVar[str] = "backend.options"
    together: ClassVar[tuple[str, ...]] = ()
    """Options that are given together or not at all."""
    what: ClassVar[str] = ""
    """What these are for."""

    @classmethod
    def of(cls, config: RunConfig, **presets: Any) -> Self:
        """The config's options, over ``presets``; one that is null is left out.

        Raises ConfigurationError that lists every problem.
        """
        section = config.backend if cls.where == Options.where else config.backend.scorer
        given = {name: value for name, value in section.options.items() if value is not None}
        options = parse_options(cls, {**presets, **given}, cls.where)
        values = [getattr(options, name) for name in cls.together]
        if any(values) and not all(values):
            listed = f"{', '.join(cls.together[:-1])} and {cls.together[-1]}"
            raise ConfigurationError(f"{cls.where}: {listed} {cls.what}.")
        return options


class TrainerOptions(Options):
    """What every trainer at an address can be given in ``backend.options``."""

    timeout: float = Field(120.0, gt=0, description="seconds that a request may take (uploads: at least 600)")
    min_examples: int = Field(1, ge=1, description="fewest examples that the provider accepts in a training file")
    echoes: frozenset[EchoField] = Field(
        frozenset(("key", "file_id", "model", "seed", "hyperparameters")),
        description="fields of a job that the server repeats as they were sent; the others are not compared",
    )

    def capabilities(self, config: RunConfig, provider: str, jobs: int, **differences: Any) -> TrainerCapabilities:
        """What a trainer with these options can do: ``jobs`` at once where the config gives no number, and the
        provider's ``differences``."""
        known = {"min_examples": self.min_examples, "echoes": self.echoes}
        return TrainerCapabilities(provider, config.backend.max_concurrent_jobs or jobs, **{**known, **differences})


class ScorerOptions(Options):
    """What every scorer of an endpoint can be given in ``backend.scorer.options``."""

    where: ClassVar[str] = "backend.scorer.options"

    max_context_tokens: int | None = Field(None, ge=1, description="longest prompt of the model; default: unknown")
    concurrency: int = Field(8, ge=1, description="requests that the endpoint takes at once")
    timeout: float = Field(120.0, gt=0, description="seconds that a request may take")

    def capabilities(self, provider: str, **differences: Any) -> ScorerCapabilities:
        """What a scorer with these options can do: any completion, exactly, but for the provider's ``differences``."""
        known = {"max_context_tokens": self.max_context_tokens, "max_concurrent_requests": self.concurrency}
        return ScorerCapabilities(provider, **{"scope": "any", **known, **differences})


class BatchOptions(ScorerOptions):
    """What scorers of several prompts a request can be given besides."""

    prompts_per_request: int = Field(32, ge=1, le=2048)
    tokens_per_request: int = Field(16_384, ge=1)

    def capabilities(self, provider: str, **differences: Any) -> ScorerCapabilities:
        """Any completion, exactly, in batches of prompts."""
        most = {"max_prompts_per_request": self.prompts_per_request, "max_tokens_per_request": self.tokens_per_request}
        return super().capabilities(provider, **most, **differences)


OptionsT = TypeVar("OptionsT", bound=Options)


def parse_options(kind: type[OptionsT], given: Mapping[str, Any], where: str) -> OptionsT:
    """Options of a backend, checked; ``where`` is the key in the config, such as ``backend.options``.

    Raises ConfigurationError that lists every problem, with the close match of an unknown key.
    """
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        lines = [f"{where} has problems:"]
        for problem in error.errors():
            place = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                lines.append(f"  {place}: unknown key; {close_to(place, kind.model_fields)}")
            else:
                lines.append(f"  {place}: {problem['msg']}")
        raise ConfigurationError("\n".join(lines)) from None
