"""lm-evaluation-harness's ``local-completions`` and our scoring client on one server: same numbers, and how fast.

    DAUNCE_LM_EVAL_PYTHON=... python tests/benchmarks/lm_eval_comparison.py [--url BASE_URL --model MODEL] [--keep FILE]

``DAUNCE_LM_EVAL_PYTHON`` is a Python that has ``lm-eval[api]`` and transformers. Without ``--url`` a ``daunce serve``
of the embedded model is started. Each side gets the same token ids of the demo's examples; rounds alternate, and the
figures are medians of examples a second. ``--keep`` adds the rounds of earlier calls that are kept in a file, so that
a long comparison can be measured in parts. ``--prompt-logprobs`` measures our scorer of that name too, which vLLM
serves. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from daunce_api.data.dataset import Dataset
from daunce_api.data.tokenizers import EncodedExample, LocalTokenizer, encode_example
from daunce_api.providers.base import ScorerCapabilities
from daunce_api.providers.endpoint import Endpoint
from daunce_api.providers.openai_wire.client import WireClient
from daunce_api.providers.openai_wire.echo import EchoOptions, EchoScorer
from daunce_api.providers.tokenizers import embedded_folder
from daunce_api.providers.vllm import VllmOptions, VllmScorer
from daunce_api.score.client import ScoringClient
from daunce_api.server import EmbeddedServer, ServerSettings
from daunce_api.store import RunStore

Answer = tuple[list[float], float]
"""Summed log-probabilities (nats) of every example, and seconds."""
SETTINGS = {
    "default": (1, 1),
    "concurrent": (1, 8),
    "batched": (16, 1),
    "both": (16, 8),
    "as ours": (32, 8),  # our scorers' own batches and concurrency
    "larger": (64, 8),
}
"""lm-eval's (batch_size, num_concurrent); the fastest of them is what ours is held against."""
HARNESS = """
import json, sys, time
from lm_eval.models.openai_completions import LocalCompletionsAPI
from tests.store_rows import by_key
job = json.load(open(sys.argv[1]))
requests = [(("", ""), context, completion) for context, completion in job["pairs"]]
found = {}
for name, (batch_size, concurrent) in job["settings"].items():
    model = LocalCompletionsAPI(
        model=job["model"], base_url=job["base_url"] + "/completions", tokenizer=job["tokenizer"],
        tokenizer_backend="huggingface", batch_size=batch_size, num_concurrent=concurrent,
    )
    start = time.perf_counter()
    values = model._loglikelihood_tokens(requests)
    found[name] = {"seconds": time.perf_counter() - start, "values": [v for v, _ in values]}
json.dump(found, open(sys.argv[2], "w"))
"""


Scorers = dict[str, Callable[[Endpoint], EchoScorer | VllmScorer]]


def examples() -> list[EncodedExample]:
    tokenizer = LocalTokenizer(embedded_folder())
    folder = Path(str(files("daunce_api") / "cli" / "demo" / "data"))
    data = [*Dataset.from_jsonl(folder / "train.jsonl"), *Dataset.from_jsonl(folder / "test.jsonl")]
    distinct = {e.key: e for e in (encode_example(example, tokenizer) for example in data)}
    return list(distinct.values())


def harness(endpoint: Endpoint, model: str, chosen: list[EncodedExample]) -> dict[str, dict[str, Any]]:
    """By setting: summed log-probabilities (nats) by lm-eval, and the seconds that it took without its start."""
    job = {
        "model": model,
        "base_url": endpoint.base_url,
        "tokenizer": str(embedded_folder()),
        "settings": SETTINGS,
        "pairs": [(list(e.ids[: e.targets[0]]), list(e.ids[e.targets[0] :])) for e in chosen],
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("harness.py", "job.json", "answer.json")]
        paths[0].write_text(HARNESS)
        paths[1].write_text(json.dumps(job))
        environment = os.environ | {"OPENAI_API_KEY": endpoint.api_key, "HF_HUB_OFFLINE": "1"}
        subprocess.run(
            [os.environ["DAUNCE_LM_EVAL_PYTHON"], *map(str, paths)], env=environment, check=True, capture_output=True
        )
        answer: dict[str, dict[str, Any]] = json.loads(paths[2].read_text())
    return answer


def echo(endpoint: Endpoint) -> EchoScorer:
    options = EchoOptions(return_token_ids=True)
    return EchoScorer(WireClient.open(endpoint), options.capabilities("the server"), options)


def prompt_logprobs(endpoint: Endpoint) -> VllmScorer:
    options = VllmOptions(adapters=False)
    capabilities = ScorerCapabilities("vLLM", "any", max_prompts_per_request=options.prompts_per_request)
    return VllmScorer(WireClient.open(endpoint), capabilities, options)


async def ours(scorer: EchoScorer | VllmScorer, model: str, chosen: list[EncodedExample]) -> Answer:
    """The same by the scoring client, with every check and the store's transactions."""
    with (
        tempfile.TemporaryDirectory() as folder,
        RunStore.create_or_open(Path(folder) / "run", {"config": {}}) as store,
    ):
        async with scorer:
            client = ScoringClient(scorer, store)
            start = time.perf_counter()
            await client.score_member(1, model, chosen)
            seconds = time.perf_counter() - start
        answers = store.scores.load(1).scores()
        ids = store.scores.ids_of(chosen).tolist()
    return [sum(answers[i].logprobs) for i in ids], seconds


def compare(
    endpoint: Endpoint, model: str, scorers: Scorers, rounds: int, kept: list[dict[str, float]]
) -> dict[str, Any]:
    """Measure ``rounds`` more rounds, which are added to ``kept``; the figures of all of them together."""
    chosen = examples()
    reference, _ = asyncio.run(ours(echo(endpoint), model, chosen))
    furthest = 0.0
    for _ in range(rounds):
        seconds = {}
        for name, answer in harness(endpoint, model, chosen).items():
            seconds[name] = answer["seconds"]
            furthest = max(furthest, *(abs(a - b) for a, b in zip(answer["values"], reference, strict=True)))
        for name, open_scorer in scorers.items():
            runs = [asyncio.run(ours(open_scorer(endpoint), model, chosen)) for _ in range(3)]
            seconds[name] = statistics.median(took for _, took in runs)
        kept.append(seconds)
    rate = {name: len(chosen) / statistics.median(k[name] for k in kept) for name in kept[0]}
    best = max(rate[name] for name in SETTINGS)
    return {
        "examples": len(chosen),
        "rounds": len(kept),
        "largest_difference_nats": furthest,
        "examples_per_second": {name: round(value, 1) for name, value in rate.items()},
        "ours_over_default": {name: round(rate[name] / rate["default"], 2) for name in scorers},
        "ours_over_best": {name: round(rate[name] / best, 2) for name in scorers},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare with lm-evaluation-harness on one server.")
    parser.add_argument("--url", help="base URL of a completions server; default: a server of the embedded model")
    parser.add_argument("--model", default="daunce-tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="file of the rounds measured so far")
    parser.add_argument("--prompt-logprobs", action="store_true")
    given = parser.parse_args()
    scorers: Scorers = {"echo": echo}
    if given.prompt_logprobs:
        scorers["prompt_logprobs"] = prompt_logprobs
    kept = json.loads(given.keep.read_text()) if given.keep and given.keep.exists() else []
    if any(seconds.keys() != {*SETTINGS, *scorers} for seconds in kept):
        parser.error(f"{given.keep} holds rounds of other settings or scorers; name another file.")
    if given.url:
        result = compare(Endpoint(given.url), given.model, scorers, given.rounds, kept)
    else:
        with tempfile.TemporaryDirectory() as folder, EmbeddedServer(ServerSettings(state_dir=Path(folder))) as server:
            endpoint = Endpoint(server.base_url, server.api_key)
            result = compare(endpoint, given.model, scorers, given.rounds, kept)
    if given.keep:
        given.keep.write_text(json.dumps(kept))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
