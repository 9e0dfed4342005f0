"""A completions server over a toy language model, honest or wrong in one of the ways that real servers are."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import httpx2

VOCABULARY = 16
TEMPLATE = [1, 2]
CONTEXT = 12


def distribution(model: str, before: Sequence[int]) -> list[float]:
    """Log-probabilities (nats) over the vocabulary after some ids: any, but always the same."""
    digest = hashlib.sha256(f"{model}{list(before)}".encode()).digest()
    weights = [1.0 + digest[i] for i in range(VOCABULARY)]
    return [math.log(w / sum(weights)) for w in weights]


class ToyServer:
    """``fault`` names what is wrong with the answers; ``tells_ids`` is what vLLM does when asked for token ids."""

    def __init__(self, fault: str | None = None, *, tells_ids: bool = True) -> None:
        self.fault = fault
        self.tells_ids = tells_ids

    def __call__(self, request: httpx2.Request) -> dict[str, Any]:
        if request.method == "GET":
            return {"object": "list", "data": []}
        body = json.loads(request.content)
        model = "base" if self.fault == "base_model" else body["model"]
        choices = [self._choice(i, model, ids, body) for i, ids in enumerate(body["prompt"])]
        if self.fault == "choice_missing":
            choices = choices[:-1]
        if self.fault == "choices_reversed":
            choices.reverse()
        if self.fault == "index_repeated":
            choices = [{**c, "index": 0} for c in choices]
        named = "other-adapter" if self.fault == "wrong_adapter" else body["model"]
        return {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": named, "choices": choices}

    def _choice(self, index: int, model: str, sent: list[int], body: dict[str, Any]) -> dict[str, Any]:
        ids = list(sent)
        if self.fault == "template":
            ids = TEMPLATE + ids
        if self.fault == "template_truncated":
            ids = (TEMPLATE + ids)[: len(sent)]
        if self.fault == "truncated":
            ids = ids[-CONTEXT:]
        if self.fault == "shifted_ids":
            ids = [(i + 1) % VOCABULARY for i in ids]
        generated: list[int] = []
        for _ in range(body["max_tokens"]):
            after = distribution(model, ids + generated)
            generated.append(after.index(max(after)))
        echo = body["echo"] and self.fault != "echo_ignored"
        shown = ids + generated if echo else generated
        first = 0 if echo else len(ids)
        lists = [
            None if first + t == 0 else distribution(model, (ids + generated)[: first + t]) for t in range(len(shown))
        ]
        values: list[Any] = [None if d is None else d[token] for d, token in zip(lists, shown, strict=True)]
        tops: list[Any] = [None if d is None else {f"t{d.index(max(d))}": max(d)} for d in lists]
        if echo:
            values, tops = self._spoil(values, tops, model, ids + generated)
        choice: dict[str, Any] = {"index": index, "text": "", "finish_reason": "length"}
        if self.fault != "no_logprobs":
            choice["logprobs"] = {
                "tokens": [f"t{i}" for i in shown],
                "token_logprobs": values,
                "top_logprobs": tops if body["logprobs"] else [],
                "text_offset": [0] * len(shown),
            }
        if body.get("return_token_ids") and self.tells_ids:
            choice |= {"prompt_token_ids": ids, "token_ids": generated}
        return choice

    def _spoil(self, values: list[Any], tops: list[Any], model: str, ids: list[int]) -> tuple[list[Any], list[Any]]:
        last = len(values) - 1
        match self.fault:
            case "off_by_one":  # the row after the token instead of the row before it, as in llama-cpp-python
                rows = [distribution(model, ids[: t + 1]) for t in range(len(ids))]
                return [row[token] for row, token in zip(rows, ids, strict=True)], [{"top": max(row)} for row in rows]
            case "values_shifted":
                return [*values[1:], values[-1]], [*tops[1:], tops[-1]]
            case "tops_shifted":
                return values, [None, {"t": -9.0}, *tops[2:]] if last < 2 else [None, *[{"t": -30.0}] * last]
            case "zeros":
                return [0.0] * len(values), tops
            case "null":
                return [*values[:-1], None], tops
            case "minus_9999":
                return [*values[:-1], -9999.0], tops
            case "positive":
                return [*values[:-1], 0.5], tops
            case "nan":
                return [*values[:-1], "NaN"], tops
            case "text":
                return [*values[:-1], "-1.0"], tops
            case "true":
                return [*values[:-1], True], tops
            case "one_short":
                return values[1:], tops[1:]
        return values, tops
