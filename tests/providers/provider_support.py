"""A toy language model of known probabilities, scripted servers, and short ways to make the objects under test."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from daunce_api._util.clock import Clock, InstantClock
from daunce_api.config import RunConfig
from daunce_api.data.dataset import Example, Message
from daunce_api.data.tokenizers import EncodedExample
from daunce_api.providers.endpoint import Endpoint
from daunce_api.providers.registry import Context
from tests.scripted_server import KEY, ScriptedServer, encoded

__all__ = [
    "BATCH",
    "KEY",
    "LONG",
    "SHORT",
    "Server",
    "body_of",
    "chat",
    "encoded",
    "polling",
    "run_config",
    "sequence",
    "toy",
    "truth",
]

VOCABULARY = 40


@lru_cache(maxsize=4096)
def toy(model: str, prefix: tuple[int, ...]) -> tuple[float, ...]:
    """Log-probabilities of the next token: a softmax of hashed numbers, different for every model and prefix."""
    digest = hashlib.sha512(json.dumps([model, prefix]).encode()).digest()
    logits = [digest[i % 64] / 40 + (digest[(7 * i + 3) % 64] / 97) for i in range(VOCABULARY)]
    total = math.log(sum(math.exp(v) for v in logits))
    return tuple(v - total for v in logits)


def truth(model: str, example: EncodedExample) -> tuple[float, ...]:
    """What an honest server says of an example's targets."""
    return tuple(toy(model, example.ids[:t])[example.ids[t]] for t in example.targets)


def sequence(model: str, ids: Sequence[int]) -> list[float | None]:
    """The log-probability of every token but the first."""
    return [None, *(toy(model, tuple(ids[:t]))[ids[t]] for t in range(1, len(ids)))]


class Server(ScriptedServer):
    def context(self, config: RunConfig, base_url: str = "http://wire.test/v1") -> Context:
        return Context(config, Endpoint(base_url, KEY, "the server"), self.http())

    @property
    def paths(self) -> list[str]:
        return [f"{r.method} {r.url.path}" for r in self.requests]


def body_of(request: Any) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(request.content)
    return body


def run_config(kind: str = "openai_wire", scorer: str | None = None, **changes: Any) -> RunConfig:
    """A config; ``options`` are the scorer's, ``trainer_options`` the trainer's."""
    options = changes.pop("options", {})
    backend = {
        "kind": kind,
        "model": changes.pop("model", "gpt-4o-mini"),
        "base_url": changes.pop("base_url", "http://wire.test/v1"),
        "api_key_env": changes.pop("api_key_env", None),
        "tokenizer": changes.pop("tokenizer", None),
        "options": changes.pop("trainer_options", {}),
        "scorer": {"kind": scorer, "options": options},
    }
    data = {"train": "train.jsonl", "test": "test.jsonl", "loss_on": changes.pop("loss_on", "last")}
    return RunConfig.from_mapping({"data": data, "backend": backend, **changes})


def chat(*contents: str, name: str = "c") -> Example:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    return Example(name, messages=tuple(Message(roles[i % 2], c) for i, c in enumerate(contents)))


def polling(thing: Any, clock: Clock | None = None) -> Any:
    """A trainer or a host that polls on a clock of the test's."""
    thing.poll = replace(thing.poll, clock=clock or InstantClock())
    return thing


LONG = encoded(range(1, 16), range(9, 15), "long")
SHORT = encoded([3, 4, 5, 6], [2, 3], "short")
PAIR = encoded([7, 8], [1], "pair")
BATCH = [LONG, SHORT, PAIR]
