"""The echo scorer: right numbers from an honest server, no number at all from the others."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import httpx2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_completions import CONTEXT, ToyServer, distribution
from wire_support import KEY, Server, encoded, failing, openai_error

from daunce_api.config import RunConfig
from daunce_api.errors import ContractError, RejectedError, TransientError
from daunce_api.providers.base import ScorerCapabilities
from daunce_api.providers.contract import by_index, check_model, scores_of
from daunce_api.providers.endpoint import Endpoint
from daunce_api.providers.openai_wire.echo import EchoOptions, EchoScorer, open_scorer, presets
from daunce_api.providers.registry import Context
from daunce_api.score.health import check_members_differ

LONG = encoded(range(1, 16), range(9, 15), "long")
BATCH = [LONG, encoded([3, 4, 5, 6], [2, 3], "short"), encoded([7, 8], [1], "pair")]


def truth(model: str, example: Any) -> tuple[float, ...]:
    return tuple(distribution(model, example.ids[:t])[example.ids[t]] for t in example.targets)


@pytest.mark.parametrize("options", [{}, {"max_tokens": 1}, {"logprobs": 0}, {"return_token_ids": True}])
@pytest.mark.parametrize("fault", [None, "choices_reversed"])
async def test_an_honest_server_is_read_exactly(options: dict[str, Any], fault: str | None) -> None:
    server = Server(ToyServer(fault))
    scores = await server.echo(**options).score("ft-1", BATCH)
    assert [s.logprobs for s in scores] == [truth("ft-1", e) for e in BATCH]
    assert not any(s.any_censored for s in scores)
    body = server.body()
    assert body["prompt"] == [list(e.ids) for e in BATCH]
    assert (body["echo"], body["model"], body["temperature"]) == (True, "ft-1", 0)
    assert body["max_tokens"] == options.get("max_tokens", 0)
    assert body.get("return_token_ids") is (True if "return_token_ids" in options else None)


CAUGHT = {
    "echo_ignored": "no log-probabilities",
    "no_logprobs": "no log-probabilities",
    "template": "adds, drops or truncates",
    "truncated": "adds, drops or truncates",
    "one_short": "adds, drops or truncates",
    "wrong_adapter": "another model",
    "choice_missing": "2 choices for 3 prompts",
    "index_repeated": "numbered its choices",
    "tops_shifted": "shifted",
    "zeros": "not measurements",
    "null": "'None'",
    "nan": "'NaN'",
    "text": "'-1.0'",
    "true": "'True'",
    "minus_9999": "stand-in",
    "positive": "never above 0",
}


@pytest.mark.parametrize(("fault", "words"), CAUGHT.items())
async def test_wrong_answers_raise_in_plain_words(fault: str, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        await Server(ToyServer(fault)).echo().score("ft-1", BATCH)


async def test_ignored_echo_with_a_generated_token_names_the_way_out() -> None:
    with pytest.raises(ContractError, match=r"ignores echo.*vLLM"):
        await Server(ToyServer("echo_ignored")).echo(max_tokens=1).score("ft-1", BATCH)


@pytest.mark.parametrize("fault", ["shifted_ids", "template_truncated"])
async def test_other_ids_of_the_right_number_are_seen_where_they_are_returned(fault: str) -> None:
    with pytest.raises(ContractError, match="other tokens than were sent"):
        await Server(ToyServer(fault)).echo(return_token_ids=True).score("ft-1", BATCH)


async def test_ids_that_were_asked_for_must_come() -> None:
    with pytest.raises(ContractError, match="does not return the token ids"):
        await Server(ToyServer(tells_ids=False)).echo(return_token_ids=True).score("ft-1", BATCH)


def opened(server: Server, address: str = "http://wire.test/v1", **options: Any) -> EchoScorer:
    content: dict[str, Any] = {
        "data": {"train": "a", "test": "b"},
        "backend": {"kind": "openai_wire", "base_url": address, "scorer": {"kind": "echo", "options": options}},
    }
    endpoint = Endpoint(address, KEY, "the server")
    return open_scorer(Context(RunConfig.from_mapping(content), endpoint, server.http()))


class Listing:
    """A toy server that says whose it is, or answers with what it is given."""

    def __init__(self, owner: str | None, fault: str | None = None, tells_ids: bool = True) -> None:
        self.owner = owner
        self.toy = ToyServer(fault, tells_ids=tells_ids)

    def __call__(self, request: httpx2.Request) -> Any:
        if request.method != "GET":
            return self.toy(request)
        if self.owner is None:
            return httpx2.Response(404, json={"detail": "Not Found"})
        return {"object": "list", "data": [{"id": "m", "owned_by": self.owner}]}


async def test_ids_are_compared_where_the_server_says_that_it_is_vllm() -> None:
    """No dialect in the config; the server is asked once."""
    server = Server(Listing("vllm"))
    scorer = opened(server)
    first, again = await asyncio.gather(scorer.score("ft-1", BATCH), scorer.score("ft-1", BATCH))
    assert [s.logprobs for s in first] == [s.logprobs for s in again] == [truth("ft-1", e) for e in BATCH]
    assert [r.url.path for r in server.requests] == ["/v1/models", "/v1/completions", "/v1/completions"]
    assert all(server.body(i)["return_token_ids"] is True for i in (1, 2))
    with pytest.raises(ContractError, match="other tokens than were sent"):
        await opened(Server(Listing("vllm", "shifted_ids"))).score("ft-1", BATCH)
    # An older version that returns none is scored as before.
    assert await opened(Server(Listing("vllm", tells_ids=False))).score("ft-1", BATCH)


@pytest.mark.parametrize("owner", ["me", None])
async def test_another_server_is_not_asked_for_ids(owner: str | None) -> None:
    server = Server(Listing(owner))
    assert await opened(server).score("ft-1", BATCH)
    assert "return_token_ids" not in server.body()


@pytest.mark.parametrize(
    "options", [{"dialect": "plain"}, {"return_token_ids": False}, {"return_token_ids": True}, {"dialect": "vllm"}]
)
async def test_a_config_that_says_what_to_do_is_followed_without_a_look(options: dict[str, Any]) -> None:
    server = Server(Listing("vllm"))
    await opened(server, **options).score("ft-1", BATCH)
    assert [r.url.path for r in server.requests] == ["/v1/completions"]
    assert ("return_token_ids" in server.body()) == (options in ({"return_token_ids": True}, {"dialect": "vllm"}))


async def test_too_long_a_prompt_is_never_sent() -> None:
    server = Server(ToyServer())
    with pytest.raises(RejectedError, match=r"'long' has 15 tokens.*12"):
        await server.echo(max_context_tokens=CONTEXT).score("ft-1", BATCH)
    assert not server.requests
    await server.echo(max_context_tokens=15).score("ft-1", BATCH)
    with pytest.raises(RejectedError):
        await server.echo(max_context_tokens=15, max_tokens=1).score("ft-1", BATCH)


def test_fields_of_the_servers_own_are_part_of_the_fingerprint() -> None:
    """A cached score of one template or adapter setting is not that of another."""
    server = Server(ToyServer())
    plain = server.echo().fingerprint
    assert plain == "completions-echo max_tokens=0"
    one, other = (server.echo(extra_body={"a": 1, "b": b}).fingerprint for b in (1, 2))
    assert len({plain, one, other}) == 3
    assert server.echo(extra_body={"b": 1, "a": 1}).fingerprint == one
    assert server.echo(extra_body={}).fingerprint == plain


LLAMA_CPP = {"content": [{"id": 5, "token": "x", "logprob": -0.5, "top_logprobs": []}]}


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": None},
        {"choices": [1]},
        {"choices": [{"index": 0}]},
        {"choices": [{"index": 0, "logprobs": []}]},
        {"choices": [{"index": 0, "logprobs": LLAMA_CPP}]},
        {"error": {"message": "a gateway's error with status 200"}},
    ],
)
async def test_answers_of_another_shape(answer: dict[str, Any]) -> None:
    with pytest.raises(ContractError):
        await Server(lambda _: answer).echo().score("m", BATCH[:1])
    with pytest.raises(TransientError):
        await Server(lambda _: [answer]).echo().score("m", BATCH[:1])


@pytest.mark.parametrize("fault", ["off_by_one", "values_shifted"])
async def test_off_by_one_is_seen_by_the_probe(fault: str) -> None:
    server = Server(ToyServer(fault))
    if fault == "off_by_one":  # length, signs and lists of likely tokens are all in order
        assert await server.echo().score("ft-1", BATCH)
    for options in ({"return_token_ids": True}, {}):
        early = fault == "off_by_one" and not options  # its lists are those of the next position
        words = "off by one.*one position too early.*dialect: max" if early else "off by one"
        with pytest.raises(ContractError, match=words):
            await server.echo(**options).probe("ft-1", LONG)


@pytest.mark.parametrize("fault", [None, "base_model"])
async def test_a_server_of_the_base_model_shows_as_no_variance_over_members(fault: str | None) -> None:
    """Every single answer is in order, so only the members together tell."""
    scorer = Server(ToyServer(fault)).echo(return_token_ids=True)
    models = ["ft-0", "ft-1", "ft-2"]
    assert (await scorer.probe(models[0], LONG)).checked
    loss_KN = np.array([[-np.mean(s.logprobs) for s in await scorer.score(model, BATCH)] for model in models])
    if fault is None:
        check_members_differ(loss_KN, models)
    else:
        with pytest.raises(ContractError, match="base model"):
            check_members_differ(loss_KN, models)


@pytest.mark.parametrize("tells_ids", [True, False])
@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_the_probe_passes_an_honest_server(tells_ids: bool, max_tokens: int) -> None:
    server = Server(ToyServer(tells_ids=tells_ids))
    scorer = server.echo(return_token_ids=tells_ids, max_tokens=max_tokens)
    for example in BATCH:
        report = await scorer.probe("ft-1", example)
        assert report.checked
        assert report.largest_difference == 0.0
    assert len(server.requests) <= 4 * len(BATCH)


async def test_the_probe_says_where_it_cannot_tell() -> None:
    report = await Server(ToyServer()).echo(logprobs=0).probe("ft-1", LONG)
    assert not report.checked
    assert report.largest_difference is None


@pytest.mark.parametrize(
    ("asked", "answered", "fine"),
    [
        ("m", "m", True),
        ("m", None, True),
        ("m", "", True),
        ("gpt-x", "gpt-x-2026-01-31", True),
        ("m", "org/m", True),
        ("org/m", "m", True),
        ("adapter-1", "adapter-12", False),
        ("ft:m:a", "m", False),
        ("m", "m-2026", False),
    ],
)
def test_model_names(asked: str, answered: object, fine: bool) -> None:
    if fine:
        check_model("s", asked, answered)
    else:
        with pytest.raises(ContractError, match="another model"):
            check_model("s", asked, answered)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, -9999.0, 0.1])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_odd_value_among_good_ones(odd: float, place: int) -> None:
    values: list[Any] = [-1.0, -3.0, -2.0]
    values[place] = odd
    with pytest.raises(ContractError):
        scores_of("s", encoded([1, 2, 3, 4], [1, 2, 3]), [None, *values])


@pytest.mark.parametrize("values", [[None, None, 0.0, 0.0], [None, 0.0, 0.0, 0.0], [0.0, None, 0.0, 0.0]])
def test_zeros_behind_a_prompt_that_is_left_out_are_no_measurements(values: list[Any]) -> None:
    with pytest.raises(ContractError, match="not measurements"):
        scores_of("s", encoded([1, 2, 3, 4], [2, 3]), values)


def test_one_certain_token_is_a_measurement() -> None:
    assert scores_of("s", encoded([1, 2], [1]), [None, 0.0]).logprobs == (0.0,)
    assert scores_of("s", encoded([1, 2, 3, 4], [3]), [None, None, None, 0.0]).logprobs == (0.0,)
    assert scores_of("s", encoded([1, 2, 3, 4], [2, 3]), [None, -1.0, 0.0, 0.0]).logprobs == (0.0, 0.0)


def test_round_off_above_zero_is_zero() -> None:
    example = encoded([1, 2, 3], [1, 2])
    assert scores_of("s", example, [None, 1e-9, -0.25]).logprobs == (0.0, -0.25)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@given(JSON, st.integers(0, 3))
def test_no_json_at_all_is_taken_for_an_answer(answer: Any, count: int) -> None:
    example = encoded([1, 2, 3], [2])
    try:
        by_index("s", answer, count)
        scores = scores_of("s", example, answer)
    except ContractError:
        return
    assert len(scores.logprobs) == 1
    assert -9000 < scores.logprobs[0] <= 0


@given(st.lists(st.none() | st.floats() | st.integers(-10, 1), max_size=6))
def test_every_list_gives_finite_numbers_or_an_error(values: list[Any]) -> None:
    example = encoded([1, 2, 3, 4], [2, 3])
    try:
        scores = scores_of("s", example, values)
    except ContractError:
        return
    assert len(values) == 4
    assert all(-9000 < v <= 0 for v in scores.logprobs)


def max_answer(body: dict[str, Any], *, wrong: bool = False) -> dict[str, Any]:
    """Modular MAX's: no entry for the first token, one generated token whatever max_tokens says."""
    choices = []
    for index, ids in enumerate(body["prompt"]):
        values = toy_values([*ids, 1])
        tops = [{"x": v, "y": 0.0} for v in values]
        choices.append({"index": index, "logprobs": {"token_logprobs": values[1:], "top_logprobs": tops[1:]}})
    return {"model": body["model"], "choices": choices}


def toy_values(ids: list[int]) -> list[float]:
    return [-0.1 * (i + 1) - 0.01 * token for i, token in enumerate(ids)]


async def test_a_server_that_leaves_the_first_position_out_is_one_option_away() -> None:
    example = encoded([5, 6, 7, 8], [2, 3])

    def handler(request: httpx2.Request) -> Any:
        return max_answer(json.loads(request.content))

    values = toy_values([5, 6, 7, 8])
    dialect = presets("max", None)
    (scores,) = await Server(handler).echo(**dialect).score("m", [example])
    assert scores.logprobs == (values[2], values[3])
    with pytest.raises(ContractError, match=r"first token of a prompt \(Modular MAX\).*dialect: max"):
        await Server(handler).echo(max_tokens=1).score("m", [example])


async def test_values_that_stand_one_position_too_early_name_the_option() -> None:
    """At max_tokens: 0 the list has the right length; only the test of the endpoint sees that it is shifted."""

    def handler(request: httpx2.Request) -> Any:
        body = json.loads(request.content)
        choices = []
        for index, ids in enumerate(body["prompt"]):
            made = [3] * body["max_tokens"]
            values = [-0.5 * (t + 1) for t in range(len(ids) + len(made))]
            shown = [*values[1 : len(ids)], -9.0] if body["echo"] else values[len(ids) :]
            tokens = {"token_logprobs": shown, "tokens": ["x"] * len(shown)}
            choices.append({"index": index, "logprobs": tokens, "token_ids": made})
        return {"model": body["model"], "choices": choices}

    with pytest.raises(ContractError, match=r"one position too early.*dialect: max"):
        await Server(handler).echo(logprobs=0).probe("m", encoded([5, 6, 7, 8], [2, 3]))


async def test_a_refused_max_tokens_says_what_to_set() -> None:
    refused = failing(400, openai_error("max_tokens must be at least 1"))
    with pytest.raises(RejectedError, match=r"Set backend\.scorer\.options\.max_tokens: 1"):
        await Server(refused).echo().score("m", [encoded([5, 6, 7, 8], [2, 3])])


async def test_ids_are_asked_of_servers_that_name_themselves() -> None:
    for owner, asked in (("daunce", True), ("vllm", True), ("system", None)):
        bodies: list[dict[str, Any]] = []

        def handler(request: httpx2.Request, owner: str = owner, bodies: Any = bodies) -> Any:
            if request.method == "GET":
                return {"data": [{"id": "m", "owned_by": owner}]}
            bodies.append(json.loads(request.content))
            ids = bodies[-1]["prompt"][0]
            logprobs = {"token_logprobs": [None, *([-1.0] * (len(ids) - 1))]}
            return {"model": "m", "choices": [{"index": 0, "logprobs": logprobs, "prompt_token_ids": [9, *ids[1:]]}]}

        server = Server(handler)
        options = EchoOptions()
        scorer = EchoScorer(server.client(), ScorerCapabilities("test", "any"), options, detect=True)
        with pytest.raises(ContractError, match="other tokens"):
            await scorer.score("m", [encoded([5, 6, 7, 8], [2, 3])])
        assert bodies[0].get("return_token_ids") is asked
