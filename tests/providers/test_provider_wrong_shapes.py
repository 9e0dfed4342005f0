"""Every exact scorer against the same faults: values of a neighbour under right ids, other orders, integer codes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx2
import numpy as np
import pytest
from provider_support import BATCH, LONG, VOCABULARY, Server, body_of, encoded, run_config, toy

from daunce_api.data.dataset import Example
from daunce_api.data.tokenizers import EncodedExample, encode_example
from daunce_api.errors import ContractError, ProviderError, RejectedError, StopError, TransientError
from daunce_api.providers import sglang, vllm
from daunce_api.providers.base import ProbeReport, Probing, Scorer, TokenScores
from daunce_api.providers.openai_wire import echo
from daunce_api.providers.probe import distance_from_base
from daunce_api.providers.together import scorer as together_scorer
from daunce_api.providers.tokenizers import tokenizer_of

TINY = tokenizer_of(run_config(model="daunce-tiny"))
TEXT = encode_example(Example("p", prompt="Q: What is naïve ✓?\nA:", completion=" a word."), TINY)
ROW_AFTER, LEFT, RIGHT = "the row after the token", "shifted left", "shifted right"
Values = list[float | None]


def row(model: str, ids: Sequence[int]) -> tuple[float, ...]:
    """Log-probabilities of the next token, by its id modulo the toy's vocabulary."""
    return toy(model, tuple(i % VOCABULARY for i in ids))


class Engine:
    """A server of one of the kinds. ``fault`` spoils the prompt's values and nothing else: lengths and ids are right;
    ``generates`` False: requests for more than one token are refused; ``tells_ids`` False: no ids of what it made."""

    def __init__(self, fault: str | None = None, *, generates: bool = True, tells_ids: bool = True) -> None:
        self.fault = fault
        self.generates = generates
        self.tells_ids = tells_ids
        self.reverse = False

    def rows(self, model: str, ids: Sequence[int]) -> list[tuple[float, ...] | None]:
        """For each token the row that its value is read from."""
        if self.fault == ROW_AFTER:
            return [None, *(row(model, ids[: t + 1]) for t in range(1, len(ids)))]
        return [None, *(row(model, ids[:t]) for t in range(1, len(ids)))]

    def values(self, model: str, ids: Sequence[int]) -> Values:
        read = self.rows(model, ids)
        values: Values = [None if r is None else r[i % VOCABULARY] for r, i in zip(read, ids, strict=True)]
        if self.fault == LEFT:
            return [None, *values[2:], values[-1]]
        return [None, values[1], *values[1:-1]] if self.fault == RIGHT else values

    def made(self, model: str, ids: Sequence[int], count: int, text: str | None = None) -> tuple[list[int], Values]:
        """Greedy tokens and their values; where a text is given, such that it is read again as the same tokens."""
        made: list[int] = []
        values: Values = []
        for _ in range(count):
            following = row(model, [*ids, *made])
            ranked = sorted(range(VOCABULARY), key=following.__getitem__, reverse=True)
            best = ranked[0]
            if text is not None:
                known = TINY.encode(text)
                best = next(i for i in range(40, 2000) if TINY.encode(text + TINY.pieces([i])[0]) == [*known, i])
                text += TINY.pieces([best])[0]
            made.append(best)
            values.append(following[best % VOCABULARY])
        return made, values

    def __call__(self, request: httpx2.Request) -> Any:
        body = body_of(request)
        asked = body.get("max_tokens") or body.get("sampling_params", {}).get("max_new_tokens")
        if asked and asked > 1 and not self.generates:
            return httpx2.Response(400, json={"error": {"message": "one token at most", "code": 400}})
        if "input_ids" in body:
            return self.sglang(body, asked)
        if isinstance(body["prompt"], str):
            return self.together(body, asked)
        return self.completions(body, asked or 0)

    def completions(self, body: dict[str, Any], asked: int) -> Any:
        model, choices = body["model"], []
        for index, ids in enumerate(body["prompt"]):
            made, values = self.made(model, ids, asked)
            choice: dict[str, Any] = {"index": index, "text": ""}
            shown = [*self.values(model, ids), *values] if body.get("echo") else values
            rows = [*self.rows(model, ids), *(row(model, [*ids, *made[:t]]) for t in range(asked))]
            tops = [self.listed(r) for r in rows][-len(shown) :] if shown else []
            choice["logprobs"] = {"token_logprobs": shown, "top_logprobs": tops, "tokens": ["x"] * len(shown)}
            if body.get("return_token_ids") and self.tells_ids:
                choice |= {"token_ids": made, "prompt_token_ids": ids}
            if body.get("prompt_logprobs"):
                choice["prompt_logprobs"] = self.tables(model, ids)
            choices.append(choice)
        return httpx2.Response(200, content=json.dumps({"model": model, "choices": choices}))

    def listed(self, read: tuple[float, ...] | None) -> dict[str, float] | None:
        if read is None:
            return None
        ranked = sorted(range(VOCABULARY), key=read.__getitem__, reverse=not self.reverse)
        return {f"t{i}": read[i] for i in (ranked if self.reverse else ranked[:3])}

    def tables(self, model: str, ids: Sequence[int]) -> list[Any]:
        found: list[Any] = [None]
        for i, value, read in list(zip(ids, self.values(model, ids), self.rows(model, ids), strict=True))[1:]:
            assert read is not None
            best = max(range(VOCABULARY), key=read.__getitem__)
            rank = sorted(read, reverse=True).index(read[i % VOCABULARY]) + 1
            entries = {str(best): {"logprob": read[best], "rank": 1}, str(i): {"logprob": value, "rank": rank}}
            found.append(dict(reversed(entries.items())) if self.reverse else entries)
        return found

    def sglang(self, body: dict[str, Any], asked: int) -> Any:
        model, ids, start = body.get("lora_path", "base"), body["input_ids"], body.get("logprob_start_len", 0)
        triples = [[v, i, None] for v, i in zip(self.values(model, ids), ids, strict=True)][start:]
        made, values = self.made(model, ids, asked)
        output = [[v, i, None] for v, i in zip(values, made, strict=True)]
        meta = {"prompt_tokens": len(ids), "input_token_logprobs": triples, "output_token_logprobs": output}
        if not self.tells_ids:
            del meta["output_token_logprobs"]
        return {"text": "x", "meta_info": meta}

    def together(self, body: dict[str, Any], asked: int) -> Any:
        model, ids = body["model"], TINY.encode(body["prompt"])
        made, values = self.made(model, ids, asked, body["prompt"])
        logprobs = {"token_logprobs": values, "tokens": [TINY.pieces([i])[0] for i in made]}
        if self.tells_ids:
            logprobs["token_ids"] = [float(i) for i in made]
        found = {"token_logprobs": self.values(model, ids), "token_ids": [float(i) for i in ids]}
        choices = [{"index": 0, "text": "", "logprobs": logprobs}]
        return {"model": model, "choices": choices, "prompt": [{"text": body["prompt"], "logprobs": found}]}


KINDS: dict[str, tuple[Callable[[Any], Any], dict[str, Any], EncodedExample]] = {
    "echo": (echo.open_scorer, {"return_token_ids": True}, LONG),
    "prompt_logprobs": (vllm.open_scorer, {}, LONG),
    "sglang": (sglang.open_scorer, {}, LONG),
    "together": (together_scorer.open_scorer, {}, TEXT),
}


def make(kind: str, handler: Any, **options: Any) -> Scorer:
    opened, needed, _ = KINDS[kind]
    backend = kind if kind == "together" else "openai_wire"
    config = run_config(backend, kind, model="daunce-tiny", options={**needed, **options})
    scorer: Scorer = opened(Server(handler).context(config))
    return scorer


async def probed(kind: str, handler: Any, **options: Any) -> Any:
    scorer = make(kind, handler, **options)
    assert isinstance(scorer, Probing)
    return await scorer.probe("ft", KINDS[kind][2])


@pytest.mark.parametrize("kind", KINDS)
async def test_an_honest_server_passes_the_probe(kind: str) -> None:
    report = await probed(kind, Engine())
    assert report.checked
    assert report.largest_difference == 0.0
    assert "at 8 tokens" in report.detail
    example = KINDS[kind][2]
    (scores,) = await make(kind, Engine()).score("ft", [example])
    assert scores.logprobs == tuple(row("ft", example.ids[:t])[example.ids[t] % VOCABULARY] for t in example.targets)


@pytest.mark.parametrize("kind", KINDS)
async def test_values_of_the_row_after_the_token_are_seen_by_the_probe_alone(kind: str) -> None:
    """Lengths, ids, signs and lists of likely tokens are all in order."""
    assert await make(kind, Engine(ROW_AFTER)).score("ft", [KINDS[kind][2]])
    with pytest.raises(ContractError, match="off by one"):
        await probed(kind, Engine(ROW_AFTER))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", [LEFT, RIGHT])
async def test_values_of_a_neighbour_under_right_ids_are_seen(kind: str, fault: str) -> None:
    with pytest.raises(ContractError, match=r"off by one|shifted against each other"):
        await probed(kind, Engine(fault))


@pytest.mark.parametrize("kind", KINDS)
async def test_where_the_probe_cannot_tell_it_says_so(kind: str) -> None:
    refused = await probed(kind, Engine(generates=False))
    assert (refused.checked, refused.largest_difference) == (False, None)
    assert "does not generate" in refused.detail
    if kind != "echo":  # which then compares the most likely tokens
        assert not (await probed(kind, Engine(tells_ids=False))).checked


@pytest.mark.parametrize("kind", KINDS)
async def test_a_model_that_is_not_served_is_left_for_another_probe(kind: str) -> None:
    gone = httpx2.Response(404, json={"error": {"message": "no such model", "code": 404}})
    with pytest.raises(RejectedError, match="no such model"):
        await probed(kind, lambda _: gone)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_probe_keeps_to_the_context(kind: str) -> None:
    limit = len(KINDS[kind][2].ids) + 2
    engine, longest = Engine(), 0

    def handler(request: httpx2.Request) -> Any:
        nonlocal longest
        body = body_of(request)
        text = body.get("inputs") or body.get("prompt") or body.get("input_ids")
        ids = TINY.encode(text) if isinstance(text, str) else text[0] if isinstance(text[0], list) else text
        asked = body.get("max_tokens") or body.get("sampling_params", {}).get("max_new_tokens")
        longest = max(longest, len(ids) + (asked or 0))
        return engine(request)

    assert (await probed(kind, handler, max_context_tokens=limit)).checked
    assert longest <= limit


@pytest.mark.parametrize("kind", ["echo", "prompt_logprobs"])
async def test_the_order_of_likely_tokens_says_nothing(kind: str) -> None:
    engine = Engine()
    straight = await make(kind, engine, **({"logprobs": 3} if kind == "echo" else {})).score("ft", BATCH)
    engine.reverse = True
    assert await make(kind, engine, **({"logprobs": 3} if kind == "echo" else {})).score("ft", BATCH) == straight


CODES: list[tuple[int, type[ProviderError], str]] = [
    (400, RejectedError, "bad request"),
    (404, RejectedError, "no such model"),
    (401, StopError, "API key"),
    (429, TransientError, "slow down"),
    (503, TransientError, "busy"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("status", "error", "message"), CODES)
async def test_integer_error_codes_keep_their_meaning(
    kind: str, status: int, error: type[ProviderError], message: str
) -> None:
    said = {"object": "error", "message": message, "type": "x", "param": None, "code": status}
    for body in (said, {"error": said}):
        answer = httpx2.Response(status, json=body, headers={"retry-after": "2"})
        with pytest.raises(error, match=message) as info:
            await make(kind, lambda _, answer=answer: answer).score("ft", [KINDS[kind][2]])
        assert info.value.status == status
        assert getattr(info.value, "retry_after", 2.0) == 2.0


@pytest.mark.parametrize("kind", ["echo", "prompt_logprobs", "sglang"])
async def test_what_was_generated_is_there_to_be_compared_with_the_base_model(kind: str) -> None:
    scorer = make(kind, Engine())
    report = await probed(kind, Engine())
    assert report.generated is not None
    whole, made, scored = report.generated
    assert made == pytest.approx(scored)
    assert whole.targets == tuple(range(len(whole.ids) - 8, len(whole.ids)))
    await distance_from_base(scorer, "daunce-tiny", "ft", report)


class Base:
    """A scorer that knows the base model's values of what was generated."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = values

    async def score(self, model: str, batch: Any) -> list[TokenScores]:
        return [TokenScores(tuple(self.values))]


@pytest.mark.parametrize(
    ("lost", "sigma", "refused"), [(0.7, 0.0, 400), (0.7, 0.02, 380), (0.0, 0.03, 0), (0.0, 1e-6, 0)]
)
async def test_a_part_of_an_adapter_that_is_lost_is_told_from_rounding(lost: float, sigma: float, refused: int) -> None:
    """bfloat16 moves a value by some hundredths; 400 endpoints, at fine-tunes that differ from the base by .3 nats."""
    rng, said = np.random.default_rng(0), 0
    for _ in range(400):
        made = rng.uniform(-2, 0, 8)
        base = made - np.abs(rng.normal(0, 0.3, 8))
        scored = (1 - lost) * made + lost * base + rng.normal(0, sigma, 8)
        report = ProbeReport(True, "", 0.0, (encoded(range(9), range(1, 9)), tuple(made), tuple(scored)))
        try:
            await distance_from_base(Base(base), "base", "ft", report)  # type: ignore[arg-type]
        except ContractError:
            said += 1
    assert said >= refused if refused else said == 0
