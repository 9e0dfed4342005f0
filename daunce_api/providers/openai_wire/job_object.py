"""What a fine-tuning job in OpenAI's wire format says of itself."""

from __future__ import annotations

from typing import Any

from ..base import JobEcho
from ..calls import NO_REASON
from ..contract import part_of
from ..identity import count

KEY_FIELD = "daunce_key"


def echo_of(answer: dict[str, Any], key: str | None) -> JobEcho:
    """What a job object repeats of its request. The hyperparameters of the method win over the older top-level ones."""
    method = part_of(answer, "method", "type")
    found = (part_of(answer, "method", method, "hyperparameters"), answer.get("hyperparameters"))
    settings: dict[str, Any] = next((each for each in found if isinstance(each, dict)), {})
    return JobEcho(
        key=key,
        file_id=text(answer.get("training_file")),
        model=text(answer.get("model")),
        seed=count(answer.get("seed")),
        hyperparameters={
            str(name): value
            for name, value in settings.items()
            if isinstance(value, int | float | str) and not isinstance(value, bool)
        },
    )


def metadata_key(job: dict[str, Any]) -> str | None:
    return text(part_of(job, "metadata", KEY_FIELD))


def names_of(job: dict[str, Any]) -> list[str]:
    return [str(job.get(name)) for name in ("suffix", "user_provided_suffix", "fine_tuned_model")]


def text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def reason_of(error: object) -> str:
    """Text of a failed job's ``error``, which may be ``{}``, null or hold nulls only."""
    if isinstance(error, dict):
        parts = [str(error[name]) for name in ("code", "message", "param") if error.get(name)]
        if parts:
            return ": ".join(parts)
    return NO_REASON


def names_a_parameter(error: object) -> bool:
    """Whether a failed job names the parameter that was invalid (``training_file``, most often)."""
    return isinstance(error, dict) and isinstance(error.get("param"), str)
