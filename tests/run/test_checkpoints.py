"""Models of earlier epochs as further rows: scored, kept, counted, recorded, and nothing changed without them."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from test_interrupted import start, wait_until

from daunce_api import Attribution, Run, RunConfig
from daunce_api.attribution.from_store import assemble
from daunce_api.cli import terminal
from daunce_api.cli.doctor import examine
from daunce_api.data.tokenizers import EncodedExample
from daunce_api.errors import CapabilityError, ConfigurationError, ContractError, RejectedError, StopError
from daunce_api.providers.base import JobStatus, TokenScores
from daunce_api.providers.openai_wire.echo import EchoScorer
from daunce_api.providers.openai_wire.trainer import WireTrainer
from daunce_api.providers.probe import tokens_of_test
from daunce_api.providers.replay import record, replay
from daunce_api.server import EmbeddedServer
from daunce_api.store import RunStore
from daunce_api.train import EventKind
from tests.run.conftest import small_config, write_data
from tests.store_rows import put

MakeConfig = Callable[..., RunConfig]
RECIPE = {"hyperparameters": {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 3}}


@pytest.fixture
def with_checkpoints(make_config: MakeConfig) -> MakeConfig:
    """A run of jobs of three epochs; ``checkpoints`` of each are scored."""

    def make(checkpoints: int = 3, **sections: Any) -> RunConfig:
        ensemble = {"checkpoints": checkpoints, **sections.pop("ensemble", {})}
        return make_config(training=RECIPE, ensemble=ensemble, **sections)

    return make


@pytest.fixture(scope="module")
def whole(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[tuple[int, int, int]]]:
    """A finished run of three models a member, and its progress."""
    folder = tmp_path_factory.mktemp("whole")
    progress: list[tuple[int, int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_SERVER_KEY", server.api_key)
        run = Run.create(
            small_config(server, folder, write_data(folder), training=RECIPE, ensemble={"members": 4, "checkpoints": 3})
        )
        run.execute(on_progress=lambda *p: progress.append(p))
    return run, progress


def same(a: Attribution, b: Attribution) -> bool:
    """Whether two attributions have the same losses to the last bit, those of checkpoints included."""
    assert a.earlier is not None
    assert b.earlier is not None
    pairs = [
        (a.train_loss_KN, b.train_loss_KN),
        (a.test_loss_KM, b.test_loss_KM),
        (a.earlier.train_loss_SKN, b.earlier.train_loss_SKN),
        (a.earlier.test_loss_SKM, b.earlier.test_loss_SKM),
    ]
    return all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)


def test_checkpoints_are_further_rows(whole: tuple[Run, list[tuple[int, int, int]]], tmp_path: Path) -> None:
    run, progress = whole
    attribution = run.attribution()
    earlier = attribution.earlier
    assert earlier is not None
    assert (earlier.train_loss_SKN.shape, earlier.test_loss_SKM.shape) == ((2, 4, 24), (2, 4, 3))
    means = [*earlier.train_loss_SKN.mean(axis=(1, 2)), attribution.train_loss_KN.mean()]
    assert means[0] > means[1] > means[2]  # ascending by epoch: losses fall, and no model is there twice
    stages = [*zip(earlier.train_loss_SKN, earlier.test_loss_SKM, strict=True)]
    stages.append((attribution.train_loss_KN, attribution.test_loss_KM))
    products = [(a - a.mean(axis=0)).T @ (b - b.mean(axis=0)) for a, b in stages]
    covariance = attribution.with_estimator("covariance").scores_NM()
    np.testing.assert_allclose(covariance, sum(products) / (3 * 3), rtol=1e-9)

    assert same(attribution, Attribution.load(attribution.save(tmp_path / "saved")))
    status = run.status()
    assert (status.members_scored, status.models_scored, status.models_asked) == (4, 12, 12)
    last = {member: (done, total) for member, done, total in progress}
    asked = len({e.key for e in run.material.encoded})
    assert last == dict.fromkeys(range(4), (3 * asked, 3 * asked))


def test_status_and_doctor_tell_of_checkpoints(
    with_checkpoints: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.create(with_checkpoints(2, ensemble={"members": 2}))
    run.execute()
    terminal.status(run.status())
    assert "4 of 4 scored, the checkpoints of earlier epochs among them" in capsys.readouterr().out
    findings = examine(run)
    assert "the last 3 models of each job can be scored; ensemble.checkpoints asks for 2" in findings.text()
    refused = examine(Run.create(with_checkpoints(5)))
    assert not refused.ok
    assert any("set ensemble.checkpoints to 3" in advice for advice in refused.advice)


def test_checkpoints_can_be_added_to_a_finished_run_and_change_nothing_else(
    with_checkpoints: MakeConfig, whole: tuple[Run, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Run.create(with_checkpoints(1)).execute()
    assert plain.earlier is None
    assert np.array_equal(plain.train_loss_KN, whole[0].attribution().train_loss_KN)
    assert np.array_equal(plain.test_loss_KM, whole[0].attribution().test_loss_KM)
    heard: list[str] = []
    more = Run.create(with_checkpoints(2)).execute(on_event=lambda e: heard.append(e.kind))
    assert "submitted" not in heard
    assert more.earlier is not None
    assert np.array_equal(more.train_loss_KN, plain.train_loss_KN)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("everything is there")

    monkeypatch.setattr("daunce_api.score.work.open_backend", refuse)
    assert same(Run.create(with_checkpoints(2)).execute(), more)
    assert Run.create(with_checkpoints(1)).execute().earlier is None


def test_checkpoints_that_cannot_be_had_are_refused_before_anything_is_sent(make_config: MakeConfig) -> None:
    with pytest.raises(CapabilityError, match=r"OpenAI-wire server offers 3 models of each job.*Set it to 3"):
        Run.create(make_config(ensemble={"checkpoints": 4})).execute()
    config = make_config(ensemble={"checkpoints": 2})  # one epoch
    with pytest.raises(ConfigurationError, match="job of 1 epoch makes only 1 model"):
        Run.create(config).execute()
    assert not config.run_dir.exists()


def test_a_checkpoint_that_is_gone_leaves_its_member_with_fewer(
    with_checkpoints: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = WireTrainer.checkpoints
    asked: list[str] = []

    async def one_too_many(self: WireTrainer, job_id: str) -> list[str]:
        first = not asked  # seen before the answer is awaited: members are asked for side by side
        asked.append(job_id)
        models = await listed(self, job_id)
        return [models[0], f"{models[1]}9"] if first else models

    monkeypatch.setattr(WireTrainer, "checkpoints", one_too_many)
    heard: list[str] = []
    run = Run.create(with_checkpoints(3))
    attribution = run.execute(on_event=lambda e: heard.append(e.message) if e.kind is EventKind.FEWER_MODELS else None)
    assert len(asked) == 4
    assert len(heard) == 1
    assert "is used without ft:" in heard[0]
    assert attribution.members == (0, 1, 2, 3)
    assert attribution.earlier is not None
    missing = np.isnan(attribution.earlier.train_loss_SKN).all(axis=2)
    assert missing.sum(axis=1).tolist() == [0, 1]
    assert np.isfinite(attribution.scores_NM()).all()
    assert run.status().complete
    assert same(Run.create(with_checkpoints(3)).execute(), attribution)
    assert len(asked) == 4


@pytest.mark.parametrize(("status", "again"), [(404, True), (405, False), (501, False)])
def test_a_server_without_checkpoints_is_told_once(
    with_checkpoints: MakeConfig, monkeypatch: pytest.MonkeyPatch, status: int, again: bool
) -> None:
    """A new job's list may be invisible for the grace period (``grace_seconds: 1`` here), so a 404 is asked again until
    that is over. Any other refusal is final at once."""
    asked: list[str] = []

    async def no_such_route(self: WireTrainer, job_id: str) -> list[str]:
        asked.append(job_id)
        error = RejectedError("refused")
        error.status = status
        raise error

    monkeypatch.setattr(WireTrainer, "checkpoints", no_such_route)
    heard: list[str] = []
    run = Run.create(with_checkpoints(2))
    assert run.execute(on_event=lambda e: heard.append(e.kind)).earlier is None
    requests = Counter(asked)
    assert heard.count("fewer_models") == len(requests) == 4
    if again:
        assert min(requests.values()) >= 2
    else:
        assert set(requests.values()) == {1}
    assert run.status().complete
    before = len(asked)
    assert Run.create(with_checkpoints(2)).execute().earlier is None
    assert len(asked) == before  # that there are none is known


def test_a_server_that_answers_for_checkpoints_with_the_base_model_is_found_out(
    with_checkpoints: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = EchoScorer.complete

    async def forgets_checkpoints(self: EchoScorer, model: str, prompts: Any, **options: Any) -> list[dict[str, Any]]:
        return await honest(self, "daunce-tiny" if "ckpt-step" in model else model, prompts, **options)

    monkeypatch.setattr(EchoScorer, "complete", forgets_checkpoints)
    with pytest.raises(ContractError, match="answers with the base model"):
        Run.create(with_checkpoints(2)).execute()


def test_scoring_of_checkpoints_is_paid_for_once(with_checkpoints: MakeConfig) -> None:
    price = {"training": 0.0, "input": 1000.0, "output": 0.0}
    run = Run.create(with_checkpoints(2, budget={"price": price}))
    plan = run.plan()
    run.execute()
    # To the token: 8 models once and tested, the base model tested, and 4 final models measured twice on 2 examples.
    lengths = {e.key: len(e.ids) for e in run.material.encoded}
    twice = sum(len(e.ids) for e in run.material.encoded_train[:2])
    test = tokens_of_test(min(lengths.values()))
    assert plan.usd == pytest.approx((8 * (sum(lengths.values()) + test) + test + 4 * twice) * price["input"] / 1e6)
    with RunStore.open(run.run_dir, read_only=True) as store:
        assert store.ledger.spent_by_purpose()["probe"] == pytest.approx(test * price["input"] / 1e6)
        assert store.ledger.spent() == pytest.approx(plan.usd)
    # Nothing is missing, so nothing is bought, whatever the cap.
    assert Run.create(with_checkpoints(2, budget={"price": price, "max_usd": plan.usd})).execute().earlier is not None
    assert run.status().usd == pytest.approx(plan.usd)


def test_a_cap_of_what_the_plan_says_is_enough(with_checkpoints: MakeConfig) -> None:
    price = {"training": 20.0, "input": 1000.0, "output": 0.0}
    usd = Run.create(with_checkpoints(2, budget={"price": price})).plan().usd
    capped = Run.create(with_checkpoints(2, budget={"price": price, "max_usd": usd}))
    capped.execute()
    assert capped.status().usd == pytest.approx(usd, rel=0.02)


def test_what_was_scored_before_an_interruption_is_not_reserved_again(
    with_checkpoints: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = EchoScorer.score
    price = {"training": 0.0, "input": 1000.0, "output": 0.0}
    run = Run.create(with_checkpoints(3, budget={"price": price}))

    def settled() -> int:
        with RunStore.open(run.run_dir, read_only=True) as store:
            scored = {t.subject for t in store.transitions() if t.after == "settled"}
        return sum(subject.startswith("spend scoring of") for subject in scored)

    async def no_credit(self: EchoScorer, model: str, batch: Sequence[EncodedExample]) -> list[TokenScores]:
        if "-m3-" in model and model.endswith("ckpt-step-3"):  # the earliest one, which comes last
            # An answer that the error cuts off is lost, sent again and booked again, so nothing else is under way.
            async with asyncio.timeout(240):
                while settled() < 11:  # noqa: ASYNC110 - what is waited for is on disk
                    await asyncio.sleep(0.05)
            raise StopError("no credit is left")
        return await honest(self, model, batch)

    monkeypatch.setattr(EchoScorer, "score", no_credit)
    with pytest.raises(StopError):
        run.execute()
    monkeypatch.setattr(EchoScorer, "score", honest)
    run.execute()
    with RunStore.open(run.run_dir, read_only=True) as store:
        reserved = Counter(t.subject for t in store.transitions() if t.after == "reserved")
        assert store.ledger.unsettled() == {}
    tests = [subject for subject in reserved if subject.startswith("spend test of ")]
    assert len(tests) == 1  # of the endpoint with the base model; those of other models are part of their price
    assert len(reserved) - len(tests) == 4 + 12  # jobs and models
    assert max(reserved.values()) == 1


def test_censored_losses_of_a_checkpoint_are_kept_as_bounds(with_checkpoints: MakeConfig) -> None:
    """Early models list fewer of the right tokens; an example without a value would cost the whole stage."""
    run = Run.create(with_checkpoints(2))
    examples = {e.key: e for e in run.material.encoded}
    dim = next(iter(examples))
    with RunStore.create_or_open(run.run_dir, run.manifest()) as store:
        for k in range(4):
            key = f"k-m{k}-a1"
            store.jobs.intent(key, k, 1, "{}")
            store.jobs.state(key, JobStatus.SUCCEEDED, f"ft:{k}")
            store.jobs.checkpoints_found(key, [f"ft:{k}:step-1"])
            plain = {name: TokenScores((-1.0 - k,) * len(e.targets)) for name, e in examples.items()}
            put(store, k, 0, "f", plain)
            size = len(examples[dim].targets)
            put(store, k, 0, "f", {**plain, dim: TokenScores((-3.0,) * size, (True,) * size)}, 1)
        attribution = assemble(store, run.material, run.config)
    assert attribution.earlier is not None
    assert np.isfinite(attribution.earlier.train_loss_SKN).all()
    assert np.isfinite(attribution.earlier.test_loss_SKM).all()
    assert attribution.censored == 0.0  # of the final models


def test_a_recorded_run_with_checkpoints_replays_bit_for_bit(with_checkpoints: MakeConfig, tmp_path: Path) -> None:
    recorded = Run.create(with_checkpoints(2)).execute(session=record(tmp_path / "recording"))
    again = Run.create(with_checkpoints(2, run_dir=str(tmp_path / "again")))
    assert same(again.execute(session=replay(tmp_path / "recording")), recorded)


def rows(config: RunConfig) -> int:
    """Scores of checkpoints on disk, seen from outside."""
    try:
        with sqlite3.connect(f"file:{config.run_dir}/run.sqlite?mode=ro", uri=True) as database:
            return int(database.execute("SELECT SUM(n) FROM blobs WHERE checkpoint > 0").fetchone()[0] or 0)
    except sqlite3.Error:
        return 0


def test_killed_while_checkpoints_are_scored_a_run_goes_on_and_ends_with_the_same_bits(
    with_checkpoints: MakeConfig, whole: tuple[Run, Any]
) -> None:
    one_by_one = {"scorer": {"options": {"prompts_per_request": 1}}}
    config = with_checkpoints(3, backend=one_by_one, scoring={"noise_probe": 2, "concurrency": 1})
    process = start(config)
    wait_until(lambda: rows(config) > 0)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=240)
    run = Run.create(config)
    assert 0 < rows(config) < 8 * len({e.key for e in run.material.encoded})
    assert same(run.execute(), whole[0].attribution())
    assert rows(config) == 8 * len({e.key for e in run.material.encoded})
    with RunStore.open(config.run_dir, read_only=True) as store:
        assert [job.attempt for job in store.jobs.rows()] == [1] * 4


def test_clean_deletes_checkpoints_and_leaves_a_complete_run(
    with_checkpoints: MakeConfig, server: EmbeddedServer
) -> None:
    run = Run.create(with_checkpoints(2, ensemble={"members": 2}))
    attribution = run.execute()
    with RunStore.open(run.run_dir, read_only=True) as store:
        models = [m for job in store.jobs.rows() for m in (job.model, *(store.jobs.checkpoints(job.key) or ())) if m]
    assert len(models) == 6  # two epochs before the last are kept, whatever is asked for
    took = run.status().seconds
    report = Run.open(run.run_dir).clean()
    assert run.status().seconds == took  # deleting is no part of the run
    assert sorted(report.models) == sorted(models)
    client = openai.OpenAI(base_url=server.base_url, api_key=server.api_key, max_retries=0)
    for model in models:
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(model)
    assert same(Run.open(run.run_dir).attribution(), attribution)
    # More of them cannot be had any more, and nobody waits for them.
    assert Run.create(with_checkpoints(3, ensemble={"members": 2})).execute().members == (0, 1)
