"""What a run was started with, and which parts of it may change later."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from ..config import RunConfig, earlier_default
from ..errors import ConfigurationError

MAY_CHANGE = (
    "attribution.",
    "backend.api_key_env",
    "backend.max_concurrent_jobs",
    "backend.minutes_per_job",
    "backend.options.echoes",
    "backend.options.grace_seconds",
    "backend.options.listing_lag_seconds",
    "backend.scorer.api_key_env",
    "budget.",
    "data.test",
    "data.train",
    "data.validation",
    "ensemble.checkpoints",
    "ensemble.stop",
    "run_dir",
    "scoring.cache",
    "scoring.concurrency",
    "scoring.noise_probe",
    "scoring.target",
    "training.max_attempts",
    "training.min_members",
)
"""Keys (or beginnings of keys, with a dot at the end) that a run may be continued with under another value.

None of them changes what has been trained or measured already. The data's paths are here because their digests are
compared apart from them. Besides these, ``ensemble.members`` may grow: members do not depend on how many there are.
"""

_DIGESTS = {"train_digest": "digest of the examples of data.train", "tokenizer": "digest of the tokenizer's files"}

MISSING = "(not set)"


def flatten(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as dotted keys; what stands under ``config`` loses that prefix, as in the config file."""
    flat: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else str(key))
        else:
            flat[path.removeprefix("config.")] = value

    walk(manifest, "")
    return flat


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Lines such as ``ensemble.members: 24 -> 32``: those that forbid going on, and those that are allowed."""
    old, new = flatten(_in_todays_keys(before)), flatten(after)
    forbidden: list[str] = []
    allowed: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, MISSING), new.get(key, MISSING)
        if a == b and type(a) is type(b):
            continue
        line = f"{_DIGESTS.get(key, key)}: {_show(a)} -> {_show(b)}"
        if a == MISSING and b in (_defaults().get(key, MISSING), earlier_default(key)):
            continue  # a key that this version has and the run's did not: what it did then is the default now
        grows = key == "ensemble.members" and isinstance(a, int) and isinstance(b, int) and b > a
        (allowed if grows or _may_change(key) else forbidden).append(line)
    return forbidden, allowed


def _in_todays_keys(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """The manifest of an earlier version with the config keys of this one; keys that are gone forbid nothing."""
    if "config" not in manifest:
        return manifest
    try:
        config, _ = RunConfig.from_manifest(manifest)
    except (ConfigurationError, KeyError):  # a manifest without a config is compared as it is
        return manifest
    return {**manifest, "config": config.model_dump(mode="json")}


@cache
def _defaults() -> dict[str, Any]:
    """The value of every config key that has a default."""
    return flatten({"config": RunConfig.from_mapping({"data": {"train": "-", "test": "-"}}).model_dump(mode="json")})


def _may_change(key: str) -> bool:
    return any(key == m or key.startswith(m if m.endswith(".") else m + ".") or key + "." == m for m in MAY_CHANGE)


def _show(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
