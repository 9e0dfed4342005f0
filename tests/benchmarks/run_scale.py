"""What a large run costs the client's own process: CPU seconds and peak memory, provider excluded.

    python -m tests.benchmarks.run_scale                        # N = 50,000, 200 questions, K = 100
    python -m tests.benchmarks.run_scale --examples 5000
    python -m tests.benchmarks.run_scale --members 20
    python -m tests.benchmarks.run_scale --small                # some seconds; also run by the tests

The provider is a process of its own that answers at once, over real HTTP (token-id prompts, echo). Models are planted
as trained, so that everything measured is planning, scoring and what comes after. ``--over-http`` members are scored
through HTTP; the others are written by the store as the client writes them, which is what makes the full size
affordable. Prints one JSON object; ``RESULTS-scale.md`` holds the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

MODEL = "daunce-tiny"
VOCABULARY = 4096
ANSWER_WORDS = 30
T = TypeVar("T")


# -- the provider -------------------------------------------------------------------------------------------------


def serve(ready: Any) -> None:
    """Answer completions at once: log-probabilities follow from model and token alone."""
    values: dict[str, list[str]] = {}

    def of_model(model: str) -> list[str]:
        if model not in values:
            draw = np.random.default_rng(abs(hash(model)) % 2**32)
            shared = np.random.default_rng(0).exponential(2.0, VOCABULARY)
            values[model] = [repr(-float(v)) for v in shared + 0.2 * draw.random(VOCABULARY)]
        return values[model]

    def answer(body: dict[str, Any]) -> str:
        table, choices = of_model(body["model"]), []
        for index, ids in enumerate(body["prompt"]):
            made = [] if body["echo"] else [1] * max(1, body["max_tokens"])
            shown = [*ids, *made] if body["echo"] else made
            listed = ",".join([("null" if body["echo"] else table[shown[0]]), *(table[i] for i in shown[1:])])
            rest = '"finish_reason":"length","text":""'
            extra = f',"token_ids":{made},"prompt_token_ids":{ids}' if not body["echo"] else ""
            numbers = f'"tokens":[],"token_logprobs":[{listed}],"top_logprobs":[]'
            choices.append(f'{{"index":{index},{rest},"logprobs":{{{numbers}}}{extra}}}')
        named = f'"id":"c","object":"text_completion","created":0,"model":"{body["model"]}"'
        return f'{{{named},"choices":[{",".join(choices)}]}}'

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                line, *fields = head.decode().split("\r\n")
                sizes = [f.split(":", 1)[1] for f in fields if f.lower().startswith("content-length:")]
                content = await reader.readexactly(int(sizes[0])) if sizes else b""
                path = line.split()[1]
                if path.endswith("/completions"):
                    text = answer(json.loads(content))
                elif path.rstrip("/").endswith("/models"):
                    text = '{"object":"list","data":[]}'
                else:
                    text = json.dumps({"id": path.rpartition("/models/")[2], "object": "model", "owned_by": "system"})
                raw = text.encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(raw)
                )
                writer.write(raw)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0, limit=2**24)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


@contextmanager
def provider() -> Iterator[int]:
    """The provider's port, while it runs."""
    parent, child = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(child,), daemon=True)
    process.start()
    try:
        yield int(parent.recv())
    finally:
        process.terminate()
        process.join()


# -- the client ---------------------------------------------------------------------------------------------------


def write_data(folder: Path, examples: int, questions: int) -> None:
    draw = random.Random(0)
    words = [f"w{i}" for i in range(2000)]
    for name, count in (("train", examples), ("test", questions)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for i in range(count):
                record = {
                    "id": f"{name}-{i}",
                    "source": f"s{i % 7}",
                    "prompt": f"Question {i} {' '.join(draw.choices(words, k=5))}",
                    "completion": "".join(f" {draw.choice(words)[1:2]}" for _ in range(ANSWER_WORDS)),
                }
                file.write(json.dumps(record) + "\n")


def config_of(folder: Path, port: int, members: int) -> Any:
    import daunce_api.server
    from daunce_api import RunConfig

    tokenizer = Path(daunce_api.server.__file__).parent / "model"
    return RunConfig.from_mapping(
        {
            "name": "scale",
            "run_dir": str(folder / "run"),
            "data": {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")},
            "backend": {
                "kind": "openai_wire",
                "model": MODEL,
                "base_url": f"http://127.0.0.1:{port}/v1",
                "tokenizer": str(tokenizer),
                "options": {"listing_lag_seconds": 0},
                "scorer": {"options": {"prompts_per_request": 64}},
            },
            "ensemble": {"members": members, "seed": 1},
            "training": {"hyperparameters": {"n_epochs": 1}},
            "scoring": {"noise_probe": 4, "cache": False},
        }
    )


def plant(run: Any, members: int, store: Any) -> None:
    """Jobs that have made their models already."""
    from daunce_api.providers.base import JobStatus

    for k in range(members):
        key = f"{store.run_key}-m{k}-a1"
        store.jobs.intent(key, k, 1, "{}")
        store.jobs.submitted(key, f"job-{k}")
        store.jobs.state(key, JobStatus.SUCCEEDED, f"ft:scale-m{k}", trained_tokens=1)


def fill(run: Any, store: Any, members: list[int]) -> int:
    """Scores of members, in batches as the client saves them."""
    from daunce_api.attribution.matrices import finish
    from daunce_api.providers.base import TokenScores
    from daunce_api.store import ScoreBatch

    examples = run.material.encoded
    ids = store.scores.ids_of(examples)
    sizes = [len(e.targets) for e in examples]
    shared = np.random.default_rng(0).exponential(2.0, sum(sizes))
    edges = np.cumsum([0, *sizes]).tolist()
    order = np.unique(ids, return_index=True)[1]
    for k in members:
        values = (-(shared + 0.2 * np.random.default_rng(k + 1).random(len(shared)))).tolist()
        for replicate, places in ((1, order[:4]), (0, order)):
            for start in range(0, len(places), 64):
                part = places[start : start + 64]
                answers = [TokenScores(tuple(values[edges[i] : edges[i + 1]])) for i in part.tolist()]
                store.scores.save(store.scores.scored_with or "f", [ScoreBatch(k, replicate, 0, ids[part], answers)])
        finish(store, ids, k, 0, "mean")
    return len(members) * len(order)


class Meter:
    """CPU seconds of this process, and of what it started and waited for, by step."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}

    def __call__(self, name: str, action: Callable[[], T]) -> T:
        start, wall = time.process_time(), time.perf_counter()
        result = action()
        self.figures[name] = round(time.process_time() - start, 3)
        self.figures[f"{name}, wall"] = round(time.perf_counter() - wall, 2)
        return result


def command(*arguments: str) -> float:
    """CPU seconds of a fresh `daunce` process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "daunce_api", *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)


def measure(
    examples: int, questions: int, members: int, over_http: int, folder: Path, port: int, commands: bool = True
) -> dict[str, Any]:
    """One run of this size; CPU seconds of this process by step."""
    from daunce_api import Run
    from daunce_api.report import write_report
    from daunce_api.store import RunStore

    meter = Meter()
    write_data(folder, examples, questions)
    config = config_of(folder, port, members)

    def create() -> Run:
        made = Run.create(config)
        made.plan().check()
        _ = made.material
        return made

    run = meter("create and plan", create)
    lengths = {e.key: len(e.targets) for e in run.material.encoded}
    distinct, tokens = len(lengths), sum(lengths.values())
    meter.figures["answers, tokens"] = round(tokens / distinct, 1)
    with RunStore.create_or_open(config.run_dir, run.manifest()) as store:
        run.keep(store)
        plant(run, members, store)
    if over_http:
        first = config.model_copy(update={"ensemble": config.ensemble.model_copy(update={"members": over_http})})
        with RunStore.open(config.run_dir) as store, store._db.transaction():
            store._set_meta("manifest", {**store.manifest, "config": first.model_dump(mode="json")})
        start = time.process_time()
        Run.create(first).execute()
        spent = 1e6 * (time.process_time() - start)
        meter.figures["scored over HTTP, us of an example"] = round(spent / (over_http * distinct), 1)
    with RunStore.create_or_open(config.run_dir, run.manifest()) as store:
        half = members // 2
        fill(run, store, list(range(over_http, half)))

    def resume() -> None:
        with RunStore.create_or_open(config.run_dir, run.manifest()) as store:
            from daunce_api.attribution.from_store import complete_members

            assert len(complete_members(store, run.material)) == half
            for k in range(members):
                store.scores.measured(k)

    meter("resume: what is missing", resume)
    with RunStore.create_or_open(config.run_dir, run.manifest()) as store:
        start = time.process_time()
        stored = fill(run, store, list(range(half, members)))
        meter.figures["store, us of an example"] = round(1e6 * (time.process_time() - start) / stored, 1)

    def finish_run() -> None:
        write_report(run.attribution(), folder / "report.html")

    meter("from the last answer to the report", finish_run)
    meter.figures["peak memory, GB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    if commands:
        meter.figures["daunce top"] = command("top", str(config.run_dir), "--test", "test-0")
        meter.figures["daunce status"] = command("status", str(config.run_dir))
        meter.figures["daunce --help"] = command("--help")
    size = sum(p.stat().st_size for p in Path(config.run_dir).glob("run.sqlite*"))
    meter.figures["run.sqlite, times the raw values"] = round(size / (8 * tokens * members), 3)
    return meter.figures


def main() -> None:
    """Measure one size and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--examples", type=int, default=50_000)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--members", type=int, default=100)
    parser.add_argument("--over-http", type=int, default=2, help="0, or at least 2")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    if given.small:
        given.examples, given.questions, given.members = 300, 10, 8
    folder = Path(tempfile.mkdtemp(prefix="daunce-scale-"))
    try:
        with provider() as port:
            sizes = (given.examples, given.questions, given.members, given.over_http)
            figures = measure(*sizes, folder, port)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        json.dumps(
            {"examples": given.examples, "questions": given.questions, "members": given.members, **figures}, indent=1
        )
    )


if __name__ == "__main__":
    main()
