"""A small complete run in another process, killed whenever it pleases, and the questions asked afterwards."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import yaml

from daunce_api import Dataset, Run, RunConfig
from daunce_api.providers.probe import tokens_of_test
from daunce_api.providers.server_settings import InjectSettings
from daunce_api.server import EmbeddedServer, ServerSettings
from daunce_api.store import RunStore
from tests.store_rows import by_key

from .proxy import AFTER, BEFORE, Proxy, Sent

KEY = "sk-MARKED-7c1f0a9e5b3d4826"
"""The API key of every test here; it must be found nowhere."""
KEY_VARIABLE = "RELIABILITY_API_KEY"
MEMBERS, TRAIN, TEST = 4, 24, 3
PROMPTS, CONCURRENCY, NOISE = 4, 2, 2
"""Examples a request, requests at once, and training examples that each member is asked twice."""
IN_FLIGHT = PROMPTS * CONCURRENCY
"""Examples that can be under way when a client dies."""
PRICE = {"training": 1000.0, "input": 100.0}
"""Dollars a million tokens: a job costs cents, so that sums are not lost in rounding."""
WORDS = ("amber", "basalt", "cedar", "delta", "ember", "fjord", "grove", "heath", "islet", "jetty", "knoll", "lagoon")

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    ["daunce_api.cli", "daunce_api.run", "daunce_api.providers.openai_wire.trainer", "daunce_api.report.of_run"]
)


def write_data(folder: Path) -> None:
    """24 training and 3 test examples in two voices."""
    train = [
        {
            "id": f"t{i}",
            "source": ("sea", "land")[i % 2],
            "messages": [
                {"role": "user", "content": f"What is {word} {i}?"},
                {"role": "assistant", "content": f"A kind of {('wave', 'stone')[i % 2]} near the {word}."},
            ],
        }
        for i, word in enumerate(WORDS * (TRAIN // len(WORDS)))
    ]
    for side, records in (("train", train), ("test", [{**train[i], "id": f"q{i}"} for i in range(TEST)])):
        Dataset.from_records(records, name=f"{side}.jsonl").to_jsonl(folder / f"{side}.jsonl")


def config_of(folder: Path, run_dir: Path, base_url: str, **sections: dict[str, Any]) -> RunConfig:
    """The small run: 4 members, 27 examples, seven batches a member."""
    content: dict[str, Any] = {
        "name": "storm",
        "run_dir": str(run_dir),
        "data": {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")},
        "backend": {
            "kind": "openai_wire",
            "model": "daunce-tiny",
            "base_url": base_url,
            "api_key_env": KEY_VARIABLE,
            "options": {"listing_lag_seconds": 0, "grace_seconds": 1, "timeout": 240},
            "scorer": {
                "options": {
                    "prompts_per_request": PROMPTS,
                    "concurrency": CONCURRENCY,
                    "return_token_ids": True,
                    "timeout": 240,
                }
            },
        },
        "ensemble": {"members": MEMBERS, "seed": 3},
        "training": {"hyperparameters": {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 3}},
        "scoring": {"noise_probe": NOISE},
        "budget": {"max_usd": 50.0, "price": PRICE},
    }
    for name, section in sections.items():
        content[name] = _merged(content.get(name, {}), section)
    return RunConfig.from_mapping(content)


def _merged(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}
    return new


def save_config(config: RunConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    return path


# -- the server -------------------------------------------------------------------------------------------------------


class Provider:
    """A server that can be killed and started again on the same state, behind a proxy whose address stays."""

    def __init__(self, state_dir: Path, inject: str | None = None) -> None:
        self.state_dir = state_dir
        self.inject = inject
        self.proxy = Proxy()
        self.server: EmbeddedServer | None = None
        self.kills = 0

    def __enter__(self) -> Provider:
        self.proxy.__enter__()
        self.start()
        return self

    def __exit__(self, *details: Any) -> None:
        self.stop()
        self.proxy.__exit__(*details)

    def start(self) -> None:
        inject = None if self.inject is None else InjectSettings.parse(self.inject)
        settings = ServerSettings(state_dir=self.state_dir, api_key=KEY, inject=inject)
        self.server = EmbeddedServer(settings).start()
        self.proxy.upstream = self.server.base_url

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
        self.server = None

    def kill(self) -> None:
        """SIGKILL; its model processes end with it."""
        if self.server is not None and self.server.pid is not None:
            os.kill(self.server.pid, signal.SIGKILL)
            self.kills += 1
        self.stop()

    def api(self) -> openai.OpenAI:
        """The official SDK, past the proxy."""
        if self.server is None:
            raise RuntimeError("no server runs")
        http = httpx2.Client(trust_env=False, timeout=240)
        return openai.OpenAI(base_url=self.server.base_url, api_key=KEY, max_retries=8, http_client=http)


# -- a client ---------------------------------------------------------------------------------------------------------


def _live(arguments: list[str], output: str, environment: dict[str, str]) -> None:
    """What a client process does: the command line, its output in a file."""
    os.environ.update(environment)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    from daunce_api.cli import main

    main(arguments)


@dataclass
class Client:
    """One life of ``daunce``; ``output`` collects what all lives printed."""

    arguments: list[str]
    output: Path
    environment: dict[str, str] = field(default_factory=lambda: {KEY_VARIABLE: KEY, "OMP_NUM_THREADS": "1"})

    def start(self) -> Any:
        process = _PROCESSES.Process(target=_live, args=(self.arguments, str(self.output), self.environment))
        process.start()
        return process

    def run(self, seconds: float = 240) -> int:
        """The exit code of an undisturbed life."""
        process = self.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise AssertionError(f"the client did not end in {seconds} s:\n{self.printed()[-3000:]}")
        return int(process.exitcode)

    def printed(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""


# -- what is asked afterwards -----------------------------------------------------------------------------------------


def outcome(run_dir: Path) -> dict[str, Any]:
    """Everything that must be equal, to the bit, however often a run was disturbed."""
    with RunStore.open(run_dir, read_only=True) as store:
        scores = {
            (member, replicate): {key: value.logprobs for key, value in by_key(store, member, replicate).items()}
            for member in range(MEMBERS)
            for replicate in (0, 1)
        }
        spent = store.ledger.spent()
    run = Run.open(run_dir)
    attribution = run.attribution()
    return {
        "scores": scores,
        "spent": round(spent, 9),
        "train": attribution.train_loss_KN.tobytes(),
        "test": attribution.test_loss_KM.tobytes(),
        "attribution": np.asarray(attribution.scores_NM()).tobytes(),
    }


def jobs_of(provider: Provider, run_dir: Path) -> list[Any]:
    """The run's jobs, as the server lists them."""
    with RunStore.open(run_dir, read_only=True) as store:
        key = store.run_key
    for _ in range(50):  # the server may commit faults, of which the SDK repeats some
        with suppress(openai.OpenAIError, ValueError):
            jobs = [*provider.api().fine_tuning.jobs.list(limit=100)]
            return [job for job in jobs if (job.metadata or {}).get("daunce_key", "").startswith(key)]
    raise AssertionError("the server does not list its jobs")


def files_of(provider: Provider, run_dir: Path) -> list[Any]:
    """The run's training files, as the server lists them."""
    with RunStore.open(run_dir, read_only=True) as store:
        key = store.run_key
    return [f for f in provider.api().files.list() if f.filename.startswith(f"daunce-{key}-")]


def asked(sent: list[Sent]) -> Counter[tuple[str, tuple[int, ...]]]:
    """How often each (model, token ids) was scored: a request that met a dead server was not."""
    counts: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for request in sent:
        if request.route == "POST /v1/completions" and request.status == 200:
            body = json.loads(request.body)
            if body.get("echo"):
                counts.update((body["model"], tuple(ids)) for ids in body["prompt"])
    return counts


def encoded_ids(config: RunConfig) -> set[tuple[int, ...]]:
    """Token ids of every example of a run."""
    material = Run.create(config).material
    return {tuple(e.ids) for e in material.encoded}


def scored_too_often(config: RunConfig, sent: list[Sent]) -> int:
    """Examples that were sent beyond what an undisturbed run sends: each (member, example) once, the first ``NOISE``
    training examples twice."""
    examples = encoded_ids(config)
    counts = {pair: n for pair, n in asked(sent).items() if pair[1] in examples}
    models = {model for model, _ in counts} - {config.backend.model}
    total = sum(n for (model, _), n in counts.items() if model in models)
    return total - len(models) * (len(examples) + NOISE)


def check_run(provider: Provider, config: RunConfig, expected: dict[str, Any], sent: list[Sent], deaths: int) -> int:
    """Raises AssertionError where a promise was broken; returns how many examples were scored more than once."""
    jobs = jobs_of(provider, config.run_dir)
    keys = Counter((job.metadata or {})["daunce_key"] for job in jobs)
    assert max(keys.values()) == 1, f"submitted twice: {keys}"
    assert len(jobs) == MEMBERS, f"{len(jobs)} jobs for {MEMBERS} members: {keys}"
    assert {job.status for job in jobs} == {"succeeded"}
    names = Counter(f.filename for f in files_of(provider, config.run_dir))
    assert max(names.values()) == 1, f"uploaded twice: {names}"
    assert len(names) == MEMBERS
    again = scored_too_often(config, sent)
    assert 0 <= again <= deaths * IN_FLIGHT, f"{again} examples were scored again after {deaths} deaths"
    found = outcome(config.run_dir)
    # At most what was under way at each death is sent and booked again: one test of the endpoint, and full batches.
    longest = max(len(ids) for ids in encoded_ids(config))
    lost = deaths * (IN_FLIGHT * longest + CONCURRENCY * tokens_of_test(longest)) * PRICE["input"] / 1e6
    assert bill(provider, config, sent) <= found["spent"] + 1e-9, "the ledger says less than the bill"
    assert found["spent"] <= expected["spent"] + lost + 1e-9, f"${found['spent']} after {deaths} deaths"
    for name, value in expected.items():
        if name == "spent":
            continue
        assert found[name] == value, f"{name} differs from the undisturbed run{_difference(found[name], value)}"
    return again


def bill(provider: Provider, config: RunConfig, sent: list[Sent]) -> float:
    """Dollars of what the server trained and of every prompt that it answered, whoever got the answer."""
    jobs = sum(job.trained_tokens or 0 for job in jobs_of(provider, config.run_dir)) * PRICE["training"]
    bodies = [json.loads(s.body) for s in sent if s.route == "POST /v1/completions" and s.status == 200]
    return (jobs + sum(len(ids) for body in bodies for ids in body["prompt"]) * PRICE["input"]) / 1e6


def _difference(found: Any, expected: Any) -> str:
    """Where scores differ: member, replicate and example of the first few."""
    if not isinstance(found, dict):
        return f": {found!r}"[:200]
    places = [
        (place, key, found[place].get(key), rows.get(key))
        for place, rows in expected.items()
        for key in rows.keys() | found[place].keys()
        if found[place].get(key) != rows.get(key)
    ]
    return f" at {len(places)} places, such as {places[:3]}"


# -- storms -----------------------------------------------------------------------------------------------------------


class Killer:
    """Kills the client at a moment drawn anew for every life: after a time, or around a request to the server."""

    def __init__(self, provider: Provider, rng: random.Random) -> None:
        self._provider = provider
        self._rng = rng
        self.moments: Counter[str] = Counter()
        """Kills by moment."""

    def strike(self, process: Any) -> bool:
        """Wait for the moment and kill; False where the client had ended before."""
        moment = self._rng.choice(("after a time", BEFORE, AFTER))
        if moment == "after a time":
            process.join(10 ** self._rng.uniform(-1.7, 0.4))
        else:
            self._at_a_request(process, moment, self._rng.randint(1, 12))
        kill(process)
        process.join()
        killed = bool(process.exitcode == -signal.SIGKILL)
        if killed:
            self.moments[moment] += 1
        return killed

    def _at_a_request(self, process: Any, moment: str, count: int) -> None:
        """Kill in the middle of the ``count``-th request, if there is one within six seconds."""
        left = count
        lock = threading.Lock()

        def hook(_: Sent, when: str) -> None:
            nonlocal left
            with lock:
                left -= when == moment
                if left == 0:
                    kill(process)

        self._provider.proxy.hook = hook
        process.join(6.0)
        self._provider.proxy.hook = None


def kill(process: Any) -> None:
    """SIGKILL to a process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
