"""A whole run through real HTTP: what it leaves, what it repeats, what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daunce_api import Attribution, Dataset, Run, RunConfig
from daunce_api.core import SelfLDS, scores
from daunce_api.core.quality import Curve
from daunce_api.data.dataset import Example
from daunce_api.data.subsets import plan_ensemble
from daunce_api.data.tokenizers import EncodedExample, encode_example
from daunce_api.errors import (
    BudgetError,
    CapabilityError,
    ContractError,
    NotEnoughMembersError,
    RunChangedError,
    StoreError,
)
from daunce_api.plan import Plan, make_plan
from daunce_api.providers.openai_wire.echo import EchoScorer
from daunce_api.server import EmbeddedServer
from daunce_api.store import RunStore

MakeConfig = Callable[..., RunConfig]


def test_a_run_trains_scores_and_attributes(make_config: MakeConfig) -> None:
    run = Run.create(make_config())
    heard: list[str] = []
    progress: list[tuple[int, int, int]] = []
    attribution = run.execute(on_event=lambda e: heard.append(e.kind), on_progress=lambda *p: progress.append(p))

    assert attribution.train_loss_KN.shape == (4, 24)
    assert attribution.test_loss_KM.shape == (4, 3)
    expected = plan_ensemble(24, 4, 0.5, seed=3).inclusion_KN
    assert np.array_equal(attribution.inclusion_KN, expected)
    assert heard.count("submitted") == 4
    assert {p[0] for p in progress if p[1] == p[2]} == {0, 1, 2, 3}
    covariance = attribution.with_estimator("covariance").scores_NM()
    train_c = attribution.train_loss_KN - attribution.train_loss_KN.mean(axis=0)
    test_c = attribution.test_loss_KM - attribution.test_loss_KM.mean(axis=0)
    np.testing.assert_allclose(covariance, train_c.T @ test_c / 3, rtol=1e-10)
    assert attribution.noise == pytest.approx(0.0, abs=1e-9)

    saved = Attribution.load(attribution.save(run.run_dir / "saved"))
    assert np.array_equal(saved.scores_NM(), attribution.scores_NM())
    assert saved.train.digest == run.train.digest
    assert "is job" in (run.run_dir / "daunce.log").read_text()


@pytest.fixture
def run_dir(make_config: MakeConfig, finished: Path) -> Path:
    """A finished run of four members in the folder that the config of this test names."""
    return Path(shutil.copytree(finished, make_config().run_dir))


def test_the_same_command_again_does_nothing(
    make_config: MakeConfig, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Run.open(run_dir).attribution()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a finished run needs no backend")

    monkeypatch.setattr("daunce_api.score.work.open_backend", refuse)
    again = Run.create(make_config()).execute()
    assert np.array_equal(again.train_loss_KN, first.train_loss_KN)


def test_one_run_encodes_every_example_once_and_plans_once(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    plans: list[object] = []

    def counted(example: Example, *options: Any) -> EncodedExample:
        encoded.append(example.id)
        return encode_example(example, *options)

    def planned(*given: Any, **options: Any) -> Plan:
        plans.append(given)
        return make_plan(*given, **options)

    monkeypatch.setattr("daunce_api.data.encoded.encode_example", counted)
    monkeypatch.setattr("daunce_api.plan.inputs.make_plan", planned)
    run = Run.create(make_config(ensemble={"members": 2}))
    run.plan().check()
    run.execute()
    assert run.status().complete
    assert len(plans) == 1
    assert sorted(encoded) == sorted([*run.train.ids, *run.test.ids])


def test_a_training_file_that_is_too_long_is_asked_for_once(make_config: MakeConfig, data: tuple[Path, Path]) -> None:
    """The server's context is not known beforehand here: `openai_wire` is any server."""
    with data[0].open("a") as file:
        file.write(json.dumps({"prompt": "word " * 3000, "completion": "b"}) + "\n")
    config = make_config(ensemble={"members": 2, "subset_ratio": 0.95})
    run = Run.create(config)
    assert run.material.ensemble.inclusion_KN[:, -1].all()
    with pytest.raises(NotEnoughMembersError, match="the model's context length is"):
        run.execute()
    with RunStore.open(run.run_dir, read_only=True) as store:
        assert [job.attempt for job in store.jobs.rows()] == [1, 1]


def test_more_members_keep_the_earlier_ones(make_config: MakeConfig, run_dir: Path) -> None:
    small = Run.open(run_dir).attribution()
    heard: list[int | None] = []
    grown = Run.create(make_config(ensemble={"members": 6})).execute(
        on_event=lambda e: heard.append(e.member) if e.kind == "submitted" else None
    )
    assert sorted(m for m in heard if m is not None) == [4, 5]
    assert np.array_equal(grown.train_loss_KN[:4], small.train_loss_KN)


@pytest.mark.usefixtures("run_dir")
def test_a_changed_config_is_refused_with_the_difference(make_config: MakeConfig) -> None:
    changed = make_config(ensemble={"subset_ratio": 0.75})
    with pytest.raises(RunChangedError, match=r"subset_ratio: 0\.5 -> 0\.75"):
        Run.create(changed).execute()


@pytest.mark.usefixtures("run_dir")
def test_changed_data_are_refused(make_config: MakeConfig, data: tuple[Path, Path]) -> None:
    with data[0].open("a") as file:
        file.write('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(RunChangedError, match=r"examples of data\.train"):
        Run.create(make_config()).execute()


def test_a_run_folder_stands_alone(make_config: MakeConfig, data: tuple[Path, Path]) -> None:
    run = Run.create(make_config(ensemble={"members": 2}))
    attribution = run.execute()
    for path in data:
        path.unlink()
    opened = Run.open(run.run_dir)
    assert np.array_equal(opened.attribution().scores_NM(), attribution.scores_NM())
    status = opened.status()
    assert (status.members_scored, status.members_asked, status.complete) == (2, 2, True)


def test_opening_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no run"):
        Run.open(tmp_path)


def test_members_start_from_the_target(make_config: MakeConfig) -> None:
    config = make_config(
        ensemble={"members": 2, "start_from": "target"},
        training={
            "hyperparameters": {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 3},
            "target_hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 3},
        },
    )
    run = Run.create(config)
    attribution = run.execute()
    assert attribution.rho == pytest.approx(0.25)  # one epoch of half the data against two of all
    with RunStore.open(run.run_dir, read_only=True) as store:
        target = store.jobs.ready_models()[-1]
        assert all(target in job.request_json for job in store.jobs.rows() if job.member >= 0)


def test_members_are_stopped_when_more_no_longer_help(make_config: MakeConfig) -> None:
    config = make_config(
        ensemble={"members": 40, "stop": {"self_lds": 0.001, "min_members": 8, "check_every": 4}},
        scoring={"noise_probe": 0},
        training={"hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 10}},
    )
    run = Run.create(config)
    attribution = run.execute()
    assert 8 <= len(attribution.members) < 40
    again = Run.create(config).execute()
    assert again.members == attribution.members


def quality(members: int, value: float, limit: float) -> SelfLDS:
    """An estimate of .1 either way, and a curve through it that rises to a limit."""
    curve = Curve(limit**-2, members * (value**-2 - limit**-2))
    return SelfLDS(value, value - 0.1, value + 0.1, "whitened", members, value, 1.0, curve)


def test_the_configs_rule_decides_when_a_run_stops(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Member 4 brings a gain, 5 none (with a flat curve). Each rule: tests/train/test_stopping_rule.py."""
    values = {3: (0.3, 0.9), 4: (0.6, 0.61), 5: (0.61, 0.615)}
    monkeypatch.setattr("daunce_api.train.stopping.MINIMUM_MEMBERS", 3)
    monkeypatch.setattr(
        Attribution, "self_lds", property(lambda a: quality(len(a.members), *values[min(len(a.members), 5)]))
    )
    stop = {"plateau": 0.02, "min_members": 3, "check_every": 1}
    config = make_config(ensemble={"members": 12, "stop": stop}, backend={"max_concurrent_jobs": 1})
    run = Run.create(config)
    assert len(run.execute().members) < 12
    with RunStore.open(run.run_dir, read_only=True) as store:
        stop = store.history.stop()
    assert stop is not None
    assert "2 more members would add about 0.00" in stop.reason
    assert run.plan().nothing_missing


def test_a_budget_that_is_too_small_is_refused_before_anything_is_sent(make_config: MakeConfig) -> None:
    config = make_config(budget={"max_usd": 0.01, "price": {"training": 1000.0, "input": 1000.0}})
    with pytest.raises(BudgetError):
        Run.create(config).execute()
    assert not config.run_dir.exists()


def test_clean_deletes_what_the_run_created(make_config: MakeConfig, server: EmbeddedServer) -> None:
    import openai

    client = openai.OpenAI(base_url=server.base_url, api_key=server.api_key)
    before = {m.id for m in client.models.list()}
    run = Run.create(make_config(name="cleaned", ensemble={"members": 2}))
    run.execute()
    assert len({m.id for m in client.models.list()} - before) == 2
    report = Run.open(run.run_dir).clean()
    assert (len(report.models), len(report.files), report.kept) == (2, 2, {})
    assert {m.id for m in client.models.list()} == before
    assert Run.open(run.run_dir).status().members_scored == 2


def test_scores_follow_from_the_arrays_alone(finished: Path) -> None:
    a = Run.open(finished).attribution()
    direct = scores(a.train_loss_KN, a.test_loss_KM, a.inclusion_KN, "half_whitened", noise=a.noise)
    assert np.array_equal(a.with_estimator("half_whitened").scores_NM(), direct)


def test_attribute_is_one_call(make_config: MakeConfig, data: tuple[Path, Path], tmp_path: Path) -> None:
    """On the session's server; the notebook of examples/uses does it with one of its own."""
    from daunce_api import attribute

    attribution = attribute(
        Dataset.from_jsonl(data[0]),
        data[1],
        backend=make_config().backend.model_dump(exclude_none=True),
        members=2,
        run_dir=tmp_path / "one-call",
        training={"hyperparameters": {"n_epochs": 1}},
    )
    table = attribution.scores()
    assert table.shape == (24, 3)
    assert list(table.columns) == ["q0", "q1", "q2"]
    proponents = attribution.top("q0", k=5)
    assert list(proponents["rank"]) == [1, 2, 3, 4, 5]
    assert (proponents["score"].diff().dropna() <= 0).all()


def test_the_first_token_alone_is_named_in_every_output(
    make_config: MakeConfig, data: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from daunce_api.cli import terminal
    from daunce_api.report.page import write_report_of

    for path in data:  # answers that begin alike are refused
        path.write_text(path.read_text().replace("A kind of stone", "Some stone"))
    scorer = {"kind": "chat_token", "options": {"first_token": True}}
    config = make_config(ensemble={"members": 2}, scoring={"noise_probe": 0}, backend={"scorer": scorer})
    run = Run.create(config)
    attribution = run.execute()
    said = "first completion token only"
    assert attribution.measured == said
    assert 0 <= attribution.censored <= 1
    terminal.status(run.status())
    terminal.rankings(attribution, {"q0": attribution.top("q0", 2)}, test="q0", fdr=None)
    assert capsys.readouterr().out.count(said) == 2
    assert said in write_report_of(run, attribution).read_text()
    assert Attribution.load(attribution.save(run.run_dir / "saved")).measured == said


def test_a_longer_completion_is_refused_where_one_token_can_be_measured(make_config: MakeConfig) -> None:
    config = make_config(backend={"scorer": {"kind": "chat_token"}})
    with pytest.raises(CapabilityError, match="first_token"):
        Run.create(config).execute()
    assert not config.run_dir.exists()


def test_a_server_that_answers_with_the_base_model_ends_the_run_early(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The costliest wrong number: it is found with the first two members, not after all are paid for."""
    honest = EchoScorer.complete

    async def base_model_only(self: EchoScorer, model: str, prompts: Any, **options: Any) -> list[dict[str, Any]]:
        return await honest(self, "daunce-tiny", prompts, **options)

    monkeypatch.setattr(EchoScorer, "complete", base_model_only)
    run = Run.create(make_config(ensemble={"members": 12}, backend={"max_concurrent_jobs": 1}))
    with pytest.raises(ContractError, match="answers with the base model"):
        run.execute()
    with RunStore.open(run.run_dir, read_only=True) as store:
        assert 2 <= len(store.jobs.rows()) <= 4


def test_the_endpoint_is_tested_before_anything_is_paid_for(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def shifted(self: EchoScorer, model: str, example: EncodedExample) -> None:
        asked.append(model)
        raise ContractError("the values are shifted by one position")

    monkeypatch.setattr(EchoScorer, "probe", shifted)
    run = Run.create(make_config())
    with pytest.raises(ContractError, match="shifted"):
        run.execute()
    assert asked == ["daunce-tiny"]
    with RunStore.open(run.run_dir, read_only=True) as store:
        assert (store.jobs.rows(), store.jobs.files()) == ([], [])
