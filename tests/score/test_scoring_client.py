"""The scoring client asks for what is missing, once, within its limits, and keeps what it gets."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_scorer import ProbingScorer, ScriptedScorer, example, scores

from daunce_api._util.clock import InstantClock
from daunce_api.config import RunConfig
from daunce_api.data.tokenizers import EncodedExample
from daunce_api.errors import (
    BudgetError,
    ContractError,
    DailyLimitError,
    RejectedError,
    StopError,
    StoreError,
    TransientError,
)
from daunce_api.plan.inputs import TESTS
from daunce_api.providers.base import ProbeReport, TokenScores
from daunce_api.providers.probe import tokens_of_test
from daunce_api.score.client import ScoringClient, batches
from daunce_api.score.members import MemberScoring
from daunce_api.score.sending import Budget
from daunce_api.store import RunStore
from tests.store_rows import by_key, put

EXAMPLES = [example(f"e{i}", [7, i, i + 1], [1, 2]) for i in range(10)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with RunStore.create_or_open(tmp_path / "run", {"config": {}}) as opened:
        yield opened


def client(scorer: ScriptedScorer, store: RunStore, **options: Any) -> ScoringClient:
    return ScoringClient(scorer, store, clock=InstantClock(), **options)


async def test_everything_is_scored_once_and_kept(store: RunStore) -> None:
    scorer = ScriptedScorer()
    scoring = client(scorer, store)
    assert await scoring.score_member(3, "ft-3", EXAMPLES) == 10
    assert by_key(store, 3) == {e.key: scores("ft-3", e) for e in EXAMPLES}
    assert await scoring.score_member(3, "ft-3", EXAMPLES) == 0
    assert [len(ids) for _, ids in scorer.sent] == [4, 4, 2]
    assert scoring.sender.requests == 3


async def test_equal_tokens_are_sent_once_whatever_their_id(store: RunStore) -> None:
    scorer = ScriptedScorer()
    twins = [example("a", [1, 2]), example("b", [1, 2]), example("c", [1, 2, 3], [1]), example("d", [1, 2, 3], [1, 2])]
    assert await client(scorer, store).score_member(0, "ft", twins) == 3
    assert len(scorer.sent[0][1]) == 3


async def test_only_what_is_missing_is_sent(store: RunStore) -> None:
    put(store, 0, 0, "scripted", {e.key: scores("ft", e) for e in EXAMPLES[:7]})
    scorer = ScriptedScorer()
    seen: list[tuple[int, int]] = []
    report = lambda *done: seen.append(done)  # noqa: E731
    assert await client(scorer, store).score_member(0, "ft", EXAMPLES, on_progress=report) == 3
    assert scorer.sent == [("ft", ["e7", "e8", "e9"])]
    assert seen == [(10, 10)]


async def test_equal_beginnings_stand_beside_each_other(store: RunStore) -> None:
    scorer = ScriptedScorer(prompts=2)
    mixed = [example(str(ids), ids) for ids in ([5, 5, 1], [9, 9, 1], [5, 5, 2], [9, 9, 2])]
    await client(scorer, store, concurrency=1).score_member(0, "ft", mixed)
    assert [names for _, names in scorer.sent] == [["[5, 5, 1]", "[5, 5, 2]"], ["[9, 9, 1]", "[9, 9, 2]"]]


async def test_concurrency_is_bounded_over_all_members(store: RunStore) -> None:
    scorer = ScriptedScorer(prompts=1)
    scoring = client(scorer, store, concurrency=4)
    await asyncio.gather(*(scoring.score_member(k, f"ft-{k}", EXAMPLES) for k in range(5)))
    assert scorer.most_running == 4
    assert len(scorer.sent) == 50
    for k in range(5):
        assert by_key(store, k) == {e.key: scores(f"ft-{k}", e) for e in EXAMPLES}


async def test_the_scorers_own_limit_is_the_default(store: RunStore) -> None:
    scorer = ScriptedScorer(prompts=1)
    await client(scorer, store).score_member(0, "ft", EXAMPLES)
    assert scorer.most_running == 3


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 40)))
def test_batches_keep_order_and_limits(lengths: list[int], prompts: int, tokens: int | None) -> None:
    items = [(str(i), example(str(i), range(n))) for i, n in enumerate(lengths)]
    made = batches(items, prompts, tokens)
    assert [item for batch in made for item in batch] == items
    for batch in made:
        assert 1 <= len(batch) <= prompts
        assert len(batch) == 1 or tokens is None or sum(len(e.ids) for _, e in batch) <= tokens


class RecordingClock(InstantClock):
    """Remembers every wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        await super().sleep(seconds)


def failing_times(count: int, error: Exception) -> Any:
    left = [count]

    def script(model: str, batch: Sequence[EncodedExample]) -> Exception | None:
        left[0] -= 1
        return error if left[0] >= 0 else None

    return script


async def test_transient_errors_are_repeated_after_growing_waits(store: RunStore) -> None:
    clock = RecordingClock()
    scorer = ScriptedScorer(failing_times(5, TransientError("busy")))
    scoring = ScoringClient(scorer, store, clock=clock)
    assert await scoring.score_member(0, "ft", EXAMPLES[:2]) == 2
    assert len(clock.waits) == 5
    assert scoring.sender.requests == 6
    for wait, longest in zip(clock.waits, [0.5, 1, 2, 4, 8], strict=True):
        assert longest / 2 <= wait <= longest


async def test_retry_after_is_honoured(store: RunStore) -> None:
    clock = RecordingClock()
    scorer = ScriptedScorer(failing_times(2, TransientError("slow down", retry_after=20.0)))
    await ScoringClient(scorer, store, clock=clock).score_member(0, "ft", EXAMPLES[:2])
    assert all(20.0 <= wait <= 22.1 for wait in clock.waits)


async def test_what_the_headers_say_bounds_the_requests_at_once(store: RunStore) -> None:
    class Metered(ScriptedScorer):
        def watch(self, observer: Any) -> None:
            self.observer = observer

        async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
            self.observer({"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "60s"})
            return await super().score(model, batch)

    scorer = Metered(prompts=1)
    scoring = client(scorer, store, concurrency=8)
    await scoring.score_member(0, "ft", EXAMPLES[:1])
    await scoring.score_member(0, "ft", EXAMPLES)
    assert len(scorer.sent) == 10
    assert scorer.most_running == 1


@pytest.mark.parametrize(("status", "most"), [(429, 5), (503, 8)])
async def test_a_rate_limit_halves_the_requests_at_once(store: RunStore, status: int, most: int) -> None:
    error = TransientError("slow down", retry_after=0.1)
    error.status = status
    scorer = ScriptedScorer(failing_times(1, error), prompts=1)
    scoring = client(scorer, store, concurrency=8)
    await scoring.score_member(0, "ft", EXAMPLES[:1])
    await scoring.score_member(0, "ft", EXAMPLES)
    assert scorer.most_running <= most
    assert (scorer.most_running == 8) == (most == 8)


@pytest.mark.parametrize(("retry_after", "tries"), [(None, 12), (0.0, 12), (-3.0, 12), (250.0, 3)])
async def test_patience_is_bounded(store: RunStore, retry_after: float | None, tries: int) -> None:
    scorer = ScriptedScorer(failing_times(99, TransientError("down", retry_after)))
    clock = RecordingClock()
    with pytest.raises(TransientError, match=rf"Given up after {tries} tries.*run the same command again"):
        await ScoringClient(scorer, store, clock=clock).score_member(0, "ft", EXAMPLES[:2])
    assert len(scorer.sent) == tries
    assert min(clock.waits) > 0.2


async def test_a_wait_beyond_all_patience_parks_the_run(store: RunStore) -> None:
    scorer = ScriptedScorer(failing_times(99, TransientError("down", 700.0)))
    with pytest.raises(DailyLimitError, match="no further request for 11 min 40 s"):
        await client(scorer, store).score_member(0, "ft", EXAMPLES[:2])
    assert len(scorer.sent) == 1


async def test_a_request_that_waits_keeps_its_place(store: RunStore) -> None:
    scorer = ScriptedScorer(failing_times(6, TransientError("429", 1.0)), prompts=1)
    await client(scorer, store, concurrency=2).score_member(0, "ft", EXAMPLES)
    assert len(scorer.sent) == 16
    assert {tuple(ids) for _, ids in scorer.sent[:6]} == {("e0",), ("e1",)}


@pytest.mark.parametrize("kind", [RejectedError, ContractError])
async def test_the_example_at_fault_is_named_and_the_others_are_kept(store: RunStore, kind: type) -> None:
    def script(model: str, batch: Sequence[EncodedExample]) -> Exception | None:
        return kind("no") if any(e.example.id == "e6" for e in batch) else None

    scorer = ScriptedScorer(script, prompts=8)
    with pytest.raises(kind, match="member 2, example 'e6': no"):
        await client(scorer, store, concurrency=1).score_member(2, "ft", EXAMPLES)
    assert by_key(store, 2).keys() == {e.key for e in EXAMPLES[:6]}
    assert len(scorer.sent) == 6  # 8, then 4, 4, 2, 2 ... down to the one


async def test_a_batch_that_is_only_too_big_is_split(store: RunStore) -> None:
    scorer = ScriptedScorer(lambda _, batch: RejectedError("too large") if len(batch) > 2 else None, prompts=8)
    assert await client(scorer, store).score_member(0, "ft", EXAMPLES) == 10


async def test_a_model_that_is_gone_is_not_searched_for_an_example(store: RunStore) -> None:
    gone = RejectedError("model_not_found")
    gone.status = 404
    scorer = ScriptedScorer(lambda *_: gone, prompts=8)
    with pytest.raises(RejectedError, match=r"^member 1: model_not_found") as caught:
        await client(scorer, store, concurrency=1).score_member(1, "ft", EXAMPLES)
    assert caught.value.status == 404
    assert len(scorer.sent) == 1


async def test_after_an_error_nothing_new_is_sent_and_what_was_under_way_is_kept(store: RunStore) -> None:
    def script(model: str, batch: Sequence[EncodedExample]) -> Exception | None:
        return StopError("no credit") if batch[0].example.id == "e0" else None

    scorer = ScriptedScorer(script, prompts=1)
    with pytest.raises(StopError):
        await client(scorer, store, concurrency=3).score_member(0, "ft", EXAMPLES)
    assert len(scorer.sent) == 3
    assert by_key(store, 0).keys() == {EXAMPLES[1].key, EXAMPLES[2].key}


async def test_programming_errors_are_not_hidden(store: RunStore) -> None:
    with pytest.raises(ZeroDivisionError):
        await client(ScriptedScorer(lambda *_: ZeroDivisionError()), store).score_member(0, "ft", EXAMPLES)


async def test_cancelling_keeps_the_finished_batches(store: RunStore) -> None:
    blocked = asyncio.Event()

    class Slow(ScriptedScorer):
        async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
            if len(self.sent) == 2:
                blocked.set()
                await asyncio.Event().wait()
            return await super().score(model, batch)

    store.ledger.reserve("scoring of member 0", WHOLE, purpose="score")
    scoring = client(Slow(), store, concurrency=1, budget=Budget(1.0, WHOLE))
    task = asyncio.create_task(scoring.score_member(0, "ft", EXAMPLES))
    await blocked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(by_key(store, 0).keys()) == 8
    assert store.ledger.spent() == WHOLE + 6  # the two examples whose answer was lost are sent again


async def test_a_short_answer_is_no_answer(store: RunStore) -> None:
    class Short(ScriptedScorer):
        async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
            return (await super().score(model, batch))[1:]

    with pytest.raises(ContractError, match="0 answers for 1"):
        await client(Short(), store).score_member(0, "ft", EXAMPLES)
    assert not by_key(store, 0).keys()


async def test_noise_is_probed_on_the_first_examples(store: RunStore) -> None:
    scoring = client(ScriptedScorer(), store)
    assert await scoring.measure(0, "ft", EXAMPLES[:3]) == 3
    assert await scoring.measure(0, "ft", EXAMPLES[:3]) == 0
    assert by_key(store, 0, replicate=1).keys() == {e.key for e in EXAMPLES[:3]}
    assert not by_key(store, 0).keys()


FINE = ProbeReport(True, "fine", 0.01)


async def test_the_endpoint_is_tested_once_with_the_base_and_with_every_model_that_is_scored(store: RunStore) -> None:
    scorer = ProbingScorer([TransientError("busy"), *[FINE] * 6])
    scoring = client(scorer, store)
    assert await scoring.probe("base", EXAMPLES[4]) == FINE
    await asyncio.gather(*(scoring.score_member(k, f"ft-{k}", EXAMPLES) for k in (2, 0, 1)))
    assert await client(scorer, store).probe("base", EXAMPLES[0]) == FINE
    await client(scorer, store).score_member(3, "ft-3", EXAMPLES)
    await client(scorer, store).score_member(3, "ft-3-earlier", EXAMPLES, 1, twice=EXAMPLES[:2])
    await client(scorer, store).score_member(3, "ft-3", EXAMPLES, twice=EXAMPLES[:4])
    assert scorer.probed[:2] == [("base", "e4")] * 2
    # The same example whatever is missing, so that a replay sends what was recorded.
    assert sorted(scorer.probed[2:]) == [(f"ft-{k}", "e0") for k in (0, 1, 2, 3)] + [("ft-3-earlier", "e0")]


async def test_an_older_recording_holds_no_test_of_fine_tunes(store: RunStore) -> None:
    scorer = ProbingScorer([FINE])
    scoring = client(scorer, store, replayed=1)
    await scoring.probe("base", EXAMPLES[0])
    await scoring.score_member(0, "ft", EXAMPLES)
    assert [model for model, _ in scorer.probed] == ["base"]


async def test_an_endpoint_that_does_not_serve_the_base_is_tested_with_fine_tunes(store: RunStore) -> None:
    scorer = ProbingScorer([RejectedError("not served"), FINE, FINE])
    scoring = client(scorer, store)
    report = await scoring.probe("base", EXAMPLES[0])
    assert report is not None
    assert not report.checked
    await asyncio.gather(*(scoring.score_member(k, f"ft-{k}", EXAMPLES) for k in (5, 7)))
    assert [model for model, _ in scorer.probed] == ["base", "ft-5", "ft-7"]


async def test_an_endpoint_that_is_wrong_for_fine_tunes_stops_before_any_value_is_stored(store: RunStore) -> None:
    scorer = ProbingScorer([FINE, ContractError("off by one"), ContractError("off by one")])
    scoring = client(scorer, store)
    await scoring.probe("base", EXAMPLES[0])
    found = await asyncio.gather(
        *(scoring.score_member(k, f"ft-{k}", EXAMPLES) for k in (4, 6)), return_exceptions=True
    )
    assert [type(error) for error in found] == [ContractError] * 2
    assert not scorer.sent
    assert store.scores.models() == []


async def test_a_scorer_without_a_probe_is_not_probed(store: RunStore) -> None:
    assert await client(ScriptedScorer(), store).probe("base", EXAMPLES[0]) is None


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_interrupted_anywhere_the_scores_are_the_same(data: st.DataObject, tmp_path_factory: Any) -> None:
    """Runs that stop at random requests with random errors end, taken up again, in the scores of a quiet run, and send
    nothing again but what was under way."""
    path = tmp_path_factory.mktemp("run") / "run"
    kinds = st.sampled_from([None, None, TransientError("busy"), StopError("stop"), RejectedError("no")])
    # Drawn beforehand: how many requests there are depends on when the writing thread has its turns.
    lives = [data.draw(st.lists(kinds, min_size=30, max_size=30)) for _ in range(2)]

    async def once(store: RunStore, fates: Iterator[Exception | None]) -> ScriptedScorer:
        scorer = ScriptedScorer(lambda *_: next(fates, None), prompts=3)
        with contextlib.suppress(StopError, RejectedError):
            await client(scorer, store, concurrency=2).score_member(0, "ft", EXAMPLES)
        return scorer

    kept: set[str] = set()
    for fates in (*lives, []):
        with RunStore.create_or_open(path, {"config": {}}) as store:
            scorer = asyncio.run(once(store, iter(fates)))
            again = {e.key for e in EXAMPLES if any(e.example.id in ids for _, ids in scorer.sent)}
            assert not again & kept
            kept = by_key(store, 0).keys()
    with RunStore.open(path, read_only=True) as store:
        assert by_key(store, 0) == {e.key: scores("ft", e) for e in EXAMPLES}


async def test_when_the_store_takes_nothing_more_no_member_sends_anything_more(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is under way is lost with the disk; nothing else is asked for, whichever member would be next."""
    scorer = ScriptedScorer(prompts=1)

    def full(*_: object) -> None:
        raise StoreError("no space is left")

    monkeypatch.setattr(store.scores, "save", full)
    scoring = client(scorer, store)
    found = await asyncio.gather(
        *(scoring.score_member(k, f"ft-{k}", EXAMPLES) for k in (1, 2, 3)), return_exceptions=True
    )
    assert [type(error) for error in found] == [StoreError] * 3
    assert len(scorer.sent) <= scorer.capabilities.max_concurrent_requests


# -- money --------------------------------------------------------------------------------------------------------


def bill(scorer: ScriptedScorer) -> float:
    """What the endpoint bills at a dollar a token: every prompt that it got, answered or not."""
    sizes = {e.example.id: len(e.ids) for e in EXAMPLES}
    return float(sum(sizes[name] for _, names in scorer.sent for name in names))


WHOLE = float(sum(len(e.ids) for e in EXAMPLES))


@pytest.mark.parametrize("fault", ["half of the answers lost", "one bad value an answer", "quiet"])
async def test_what_is_sent_again_is_booked_before(store: RunStore, fault: str) -> None:
    """Beside the reservation of one measurement of each model, which the caller makes."""
    sent: list[int] = []

    def script(model: str, batch: Sequence[EncodedExample]) -> Exception | None:
        sent.append(len(batch))
        if fault == "quiet":
            return None
        if fault == "one bad value an answer":
            return ContractError("above zero") if len(batch) > 1 else None
        return TransientError("connection lost") if len(sent) % 2 else None

    scorer = ScriptedScorer(script)
    store.ledger.reserve("scoring of member 0", WHOLE, purpose="score")
    await client(scorer, store, budget=Budget(1.0, None)).score_member(0, "ft", EXAMPLES)
    assert store.ledger.spent() == pytest.approx(bill(scorer))
    assert (bill(scorer) > WHOLE) == (fault != "quiet")


@pytest.mark.parametrize("death", [1, 2, 4])
async def test_the_ledger_is_never_less_than_the_bill_wherever_a_process_is_killed(
    store: RunStore, tmp_path: Path, death: int
) -> None:
    """A copy of the folder, made while requests are under way, is what a killed process leaves."""
    killed = tmp_path / "killed"
    paid: list[float] = []

    def script(model: str, batch: Sequence[EncodedExample]) -> None:
        if len(scorer.sent) >= death and not killed.exists():
            shutil.copytree(store.run_dir, killed)
            paid.append(bill(scorer))  # what is under way is acted on

    scorer, after = ScriptedScorer(script, prompts=2), ScriptedScorer(prompts=2)
    store.ledger.reserve("scoring of member 0", WHOLE, purpose="score")
    await client(scorer, store, budget=Budget(1.0)).score_member(0, "ft", EXAMPLES)
    with RunStore.create_or_open(killed, {"config": {}}) as resumed:
        await client(after, resumed, budget=Budget(1.0)).score_member(0, "ft", EXAMPLES)
        billed = paid[0] + bill(after)
        assert billed > WHOLE
        assert billed <= resumed.ledger.spent() <= billed + 1e-6
        client(after, resumed, budget=Budget(1.0))
        assert resumed.ledger.spent() <= billed + 1e-6, "what was left in flight is booked once"


async def test_a_request_that_was_given_up_is_booked_when_it_is_sent_again(store: RunStore) -> None:
    lost = ScriptedScorer(lambda *_: TransientError("the answer was lost"))
    store.ledger.reserve("scoring of member 0", WHOLE, purpose="score")
    with pytest.raises(TransientError):
        await client(lost, store, concurrency=1, budget=Budget(1.0)).score_member(0, "ft", EXAMPLES)
    good = ScriptedScorer()
    await client(good, store, budget=Budget(1.0)).score_member(0, "ft", EXAMPLES)
    assert store.ledger.spent() == pytest.approx(bill(lost) + bill(good))


async def test_at_the_cap_nothing_is_sent_again_and_what_was_scored_is_kept(store: RunStore) -> None:
    def script(model: str, batch: Sequence[EncodedExample]) -> Exception | None:
        return TransientError("connection lost") if batch[0].example.id == "e8" else None

    scorer = ScriptedScorer(script)
    cap = WHOLE + 7.0  # one repeat of e8 and e9, six tokens
    store.ledger.reserve("scoring of member 0", WHOLE, purpose="score", cap=cap)
    with pytest.raises(BudgetError, match=r"budget\.max_usd"):
        await client(scorer, store, concurrency=1, budget=Budget(1.0, cap)).score_member(0, "ft", EXAMPLES)
    assert bill(scorer) <= store.ledger.spent() <= cap
    assert len(by_key(store, 0)) == 8


async def test_refusals_that_cost_nothing_are_not_booked(store: RunStore) -> None:
    busy = TransientError("slow down", retry_after=0.1)
    busy.status = 429
    scorer = ScriptedScorer(failing_times(3, busy))
    await client(scorer, store, budget=Budget(1.0, None)).score_member(0, "ft", EXAMPLES[:2])
    large = ScriptedScorer(lambda _, batch: RejectedError("too large") if len(batch) > 2 else None, prompts=8)
    await client(large, store, budget=Budget(1.0, None)).score_member(1, "ft", EXAMPLES)
    assert store.ledger.spent() == 0


async def test_the_test_with_the_base_model_is_booked_and_those_of_fine_tunes_are_part_of_their_price(
    store: RunStore,
) -> None:
    lost = TransientError("the answer was lost")
    scoring = client(ProbingScorer([FINE, FINE, lost, FINE]), store, budget=Budget(1e-6, 1.0))
    await scoring.probe("base", EXAMPLES[0])
    await scoring.score_member(0, "ft", EXAMPLES)
    one = tokens_of_test(3) * 1e-6
    assert store.ledger.spent_by_purpose() == {"probe": pytest.approx(one)}
    await scoring.score_member(1, "ft-1", EXAMPLES)  # sent again: booked on top
    assert store.ledger.spent_by_purpose() == {"probe": pytest.approx(2 * one)}
    poor = client(ProbingScorer([FINE]), store, budget=Budget(1.0, 1.0))
    store.set_value(TESTS, None)
    with pytest.raises(BudgetError):
        await poor.probe("base", EXAMPLES[0])


async def test_progress_counts_what_is_scored_not_what_is_measured_again(store: RunStore) -> None:
    seen: list[tuple[int, int]] = []
    scoring = client(ScriptedScorer(), store)
    await scoring.score_member(1, "ft", EXAMPLES, twice=EXAMPLES[:4], on_progress=lambda *report: seen.append(report))
    assert [done for done, _ in seen] == [4, 8, 10]


async def test_a_complete_model_has_its_row_of_losses(store: RunStore) -> None:
    await client(ScriptedScorer(), store).score_member(1, "ft", EXAMPLES)
    rows = store.scores.load_losses(1, 0, "nll")
    assert {tuple(g.tolist()) for g in store.scores.groups().values()} == {tuple(range(10))}
    expected = [-sum(scores("ft", e).logprobs) for e in EXAMPLES]
    assert rows[0].loss.tolist() == pytest.approx(expected, rel=1e-15)


class Accompanied(ScriptedScorer):
    """Remembers of each request how many were under way with it at the most."""

    def __init__(self) -> None:
        super().__init__(prompts=1)
        self.beside: dict[str, list[int]] = {}

    async def score(self, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        answer = asyncio.ensure_future(super().score(model, batch))
        most = 0
        while not answer.done():
            await asyncio.sleep(0)
            most = max(most, self.running)
        self.beside.setdefault(batch[0].example.id, []).append(most)
        return await answer


async def test_noise_is_measured_in_the_company_of_the_other_requests(store: RunStore) -> None:
    """A server that batches answers alone to the bit, and otherwise among others."""
    scorer = Accompanied()
    config = RunConfig.from_mapping({"data": {"train": "a", "test": "b"}, "scoring": {"noise_probe": 1}})

    class Nothing:
        async def earlier_models(self, member: int, wanted: int) -> dict[int, str]:
            return {}

    jobs: Any = Nothing()
    await MemberScoring(client(scorer, store), store, jobs, config, (), tuple(EXAMPLES)).member(0, "ft")
    twice = [most for most in scorer.beside.values() if len(most) == 2]
    assert len(twice) == 1
    assert min(twice[0]) > 1
    assert len(by_key(store, 0).keys()) == len(EXAMPLES)
    assert len(by_key(store, 0, replicate=1).keys()) == 1
