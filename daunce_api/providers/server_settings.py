"""Settings of `daunce serve`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import Field, field_validator

from ..errors import ConfigurationError
from .options import Options, parse_options

BASE_LEARNING_RATE = 1e-3
"""AdamW learning rate of the LoRA weights at ``learning_rate_multiplier: 1`` (and ``auto``)."""


class InjectSettings(Options):
    """Faults that the server makes on purpose, so that clients can be tested against them.

    Rates are probabilities from 0 to 1. Which request is hit depends on ``seed`` and on how many requests to the same
    route came before it, and on nothing else: the same requests in the same order meet the same faults. Job faults
    depend on ``seed`` and on how many jobs were created before.
    """

    rate_limit: float = Field(0, ge=0, le=1, description="429 with retry-after")
    rate_limit_bare: float = Field(0, ge=0, le=1, description="429 without retry-after")
    error_500: float = Field(0, ge=0, le=1)
    error_502: float = Field(0, ge=0, le=1, description="502 with an HTML body, as a proxy in between sends it")
    timeout_before: float = Field(0, ge=0, le=1, description="hang, then close; nothing was done")
    timeout_after: float = Field(0, ge=0, le=1, description="do what was requested, then hang and close")
    drop: float = Field(0, ge=0, le=1, description="do it, then break the connection in the middle of the body")
    truncated: float = Field(0, ge=0, le=1, description="do it, then send half of the JSON as if it were all")
    malformed: float = Field(0, ge=0, le=1, description="do it, then send a body that is not JSON")
    job_failure: float = Field(0, ge=0, le=1, description="the job fails after it has started to run")
    job_stuck: float = Field(0, ge=0, le=1, description="the job stays running until it is cancelled")
    model_deleted: float = Field(0, ge=0, le=1, description="the job's model vanishes at the second use")
    swapped: float = Field(
        0, ge=0, le=1, description="do it, then answer with another request's answer, and vice versa"
    )
    duplicated: float = Field(0, ge=0, le=1, description="do it, then send the answer before it once more instead")
    job_lag: float = Field(0, ge=0, description="seconds for which a new job is neither found nor listed")
    file_lag: float = Field(0, ge=0, description="seconds for which a new file is not found, listed or usable by a job")
    model_lag: float = Field(0, ge=0, description="seconds for which a model that was just trained answers 404")
    list_lag: float = Field(0, ge=0, description="seconds for which lists lack what is new, although it is found by id")
    daily_limit_after: int | None = Field(None, ge=0, description="jobs accepted before the daily limit is reached")
    retry_after: float = Field(1.0, ge=0, le=120, description="seconds in the Retry-After of rate_limit")
    hang: float = Field(30.0, ge=0, description="seconds that the timeouts hang; longer than the client waits")
    seed: int = 0

    @property
    def lags(self) -> bool:
        """Whether anything that is new is hidden for a while."""
        return max(self.job_lag, self.file_lag, self.model_lag, self.list_lag) > 0

    @classmethod
    def parse(cls, text: str) -> InjectSettings:
        """From a command-line option: ``rate_limit=0.1,error_500=0.05,seed=3``.

        Raises ConfigurationError that names the part that is wrong and what is known.
        """
        values: dict[str, Any] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, sign, value = (s.strip() for s in part.partition("="))
            if not sign or name not in cls.model_fields:
                raise ConfigurationError(
                    f"--inject: {part!r} is not NAME=VALUE with a known name. Names: {', '.join(cls.model_fields)}."
                )
            if name in values:
                raise ConfigurationError(f"--inject: {name} is given twice")
            values[name] = value
        settings = parse_options(cls, values, "--inject")
        total = sum(getattr(settings, name) for name in REQUEST_FAULTS)
        if total > 1 + 1e-9 or not math.isfinite(total):
            raise ConfigurationError(f"--inject: the rates of the request faults add up to {total:g}, more than 1")
        return settings


REQUEST_FAULTS = (
    "rate_limit",
    "rate_limit_bare",
    "error_500",
    "error_502",
    "timeout_before",
    "timeout_after",
    "drop",
    "truncated",
    "malformed",
    "swapped",
    "duplicated",
)
"""Faults of single requests; at most one of them hits a request."""


class ServerSettings(Options):
    """What is served, where its state is kept, and who may use it. ``inject`` may be a string, as in a command."""

    model: str = Field("daunce-tiny", description="daunce-tiny, a Hugging Face id or model folder")
    state_dir: Path = Field(
        default_factory=lambda: platformdirs.user_state_path("daunce-api") / "server",
        description="files, jobs and adapters; kept between starts",
    )
    api_key: str | None = Field(
        None, pattern="^[!-~]+$", repr=False, description="key that clients must send; None: loopback only"
    )
    inject: InjectSettings | None = None
    dialect: Literal["openai", "vllm", "nebius"] = Field(
        "openai", description="the service whose wire format is spoken"
    )
    workers: int = Field(1, ge=1, le=64, description="jobs trained at once, one process each")
    threads: int = Field(1, ge=1, description="torch threads of each process")
    device: str = "cpu"
    dtype: str = "float32"
    requests_per_minute: int = Field(60_000, ge=1, description="rate limit over all clients")

    @field_validator("inject", mode="before")
    @classmethod
    def _as_on_the_command_line(cls, given: Any) -> Any:
        return InjectSettings.parse(given) if isinstance(given, str) else given
