"""The attribution object: exact numbers, tables, and what survives on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from daunce_api import Attribution, Dataset, core
from daunce_api.attribution import TokenTable
from daunce_api.errors import ConfigurationError, DataError, StoreCorruptError
from daunce_api.report.sources import source_scores
from tests.core.problems import self_lds, top


def dataset(n: int, name: str, sources: tuple[str | None, ...]) -> Dataset:
    records = [{"id": f"{name}{i}", "prompt": f"p{i}", "completion": f"c{i}"} for i in range(n)]
    for i, record in enumerate(records):
        if (source := sources[i % len(sources)]) is not None:
            record["source"] = source
    return Dataset.from_records(records, name=name)


@pytest.fixture
def attribution() -> Attribution:
    rng = np.random.default_rng(5)
    inclusion = rng.random((12, 6)) < 0.5
    effect = rng.normal(size=(6, 4))
    test_loss = 2.0 - inclusion @ effect * 0.1
    train_loss = 1.5 - inclusion * 0.5 + rng.normal(scale=0.01, size=(12, 6))
    return Attribution(
        train=dataset(6, "t", ("a", "b", None)),
        test=dataset(4, "q", ("a", None)),
        members=tuple(range(12)),
        train_loss_KN=train_loss,
        test_loss_KM=test_loss,
        inclusion_KN=inclusion,
        estimator="covariance",
        noise=0.25,
        tokens={
            "test": TokenTable(
                (("x",), ("y", "z"), ("u",), ("v",)), tuple(rng.normal(size=(12, n)) for n in (1, 2, 1, 1))
            )
        },
        facts={"provider": "none"},
    )


def test_scores_are_a_table_of_ids(attribution: Attribution) -> None:
    table = attribution.scores()
    assert list(table.index) == [f"t{i}" for i in range(6)]
    assert list(table.columns) == [f"q{j}" for j in range(4)]
    a = attribution.train_loss_KN - attribution.train_loss_KN.mean(axis=0)
    b = attribution.test_loss_KM - attribution.test_loss_KM.mean(axis=0)
    np.testing.assert_allclose(table.to_numpy(), a.T @ b / 11)


@pytest.mark.parametrize("question", ["attribution", "retrieval"])
def test_top_ranks_the_one_test_example_and_chooses_once(
    attribution: Attribution, monkeypatch: pytest.MonkeyPatch, question: core.Question
) -> None:
    auto = replace(attribution, estimator="auto")
    whole = auto.ranking(4, question=question)
    ranked, chosen = [], []
    true_ranked, true_choose = core.top, core.choose
    monkeypatch.setattr(core, "top", lambda m, *a, **o: (ranked.append(m.test_KM.shape[1]), true_ranked(m, *a, **o))[1])
    monkeypatch.setattr(core, "choose", lambda *a: (chosen.append(1), true_choose(*a))[1])
    for j, test in enumerate(auto.test.ids):
        table = auto.top(test, k=4, question=question)
        assert table["id"].tolist() == [f"t{i}" for i in whole.index_Mk[j]]
        for column, values in (("score", whole.score_Mk), ("stderr", whole.stderr_Mk), ("z", whole.z_Mk)):
            assert values is not None
            np.testing.assert_allclose(table[column], values[j])
    assert ranked == [1] * 4
    assert len(chosen) == (0 if question == "attribution" else 4)
    auto.top("q0", k=4, question=question, fdr=0.1)
    assert ranked[4:] == [4], "a false-discovery rate is over all pairs"


def test_scores_are_those_of_the_estimator_that_is_chosen_already(
    attribution: Attribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(6)
    inclusion = rng.random((40, 6)) < 0.5
    loss = 2.0 - inclusion @ rng.normal(size=(6, 10)) * 0.1 + rng.normal(scale=0.01, size=(40, 10))
    auto = replace(
        attribution,
        members=tuple(range(40)),
        train_loss_KN=loss[:, :6],
        test_loss_KM=loss[:, 6:],
        inclusion_KN=inclusion,
        tokens={},
        estimator="auto",
    )
    expected = core.scores(auto.train_loss_KN, auto.test_loss_KM, inclusion, noise=auto.noise)
    assert auto.choice.estimator.name != "covariance"
    monkeypatch.setattr("daunce_api.core.choice.CrossValidator", None)
    np.testing.assert_allclose(auto.scores_NM(), expected, rtol=1e-9)
    np.testing.assert_allclose(auto.groups(train=None).score_GH, expected, rtol=1e-9)
    sources = source_scores(auto, [0, 1])
    np.testing.assert_allclose(
        sources.total_ST.sum(axis=0) * sources.columns_count, expected.sum(axis=0).reshape(2, 2).sum(axis=0)
    )


@pytest.mark.filterwarnings("error")
def test_a_test_example_without_losses_has_an_empty_ranking(attribution: Attribution) -> None:
    loss = attribution.test_loss_KM.copy()
    loss[:, 2] = np.nan
    gaps = replace(attribution, test_loss_KM=loss)
    assert gaps.top("q2").empty
    assert gaps.top("q1")["id"].tolist() == attribution.top("q1")["id"].tolist()
    assert np.isfinite(gaps.groups().stderr_GH).all(axis=0).tolist() == [True, True, False, True]


def test_scores_by_source_are_sums(attribution: Attribution) -> None:
    table, by_source = attribution.scores(), attribution.scores(by="source")
    assert list(by_source.index) == ["(none)", "a", "b"]
    np.testing.assert_allclose(by_source.loc["a"], table.loc[["t0", "t3"]].sum())


def test_sources_may_be_named_like_test_examples(attribution: Attribution) -> None:
    expected = attribution.scores(by="source").to_numpy()
    named = replace(attribution, train=dataset(6, "t", ("q1", "q2", "q0")))
    by_source = named.scores(by="source")
    assert list(by_source.index) == ["q0", "q1", "q2"]
    np.testing.assert_allclose(by_source.to_numpy(), expected)


def test_top_is_the_head_of_the_sorted_scores(attribution: Attribution) -> None:
    column = attribution.scores()["q1"]
    top = attribution.top("q1", k=3)
    assert list(top["id"]) == list(column.sort_values(ascending=False).index[:3])
    assert list(attribution.top("q1", k=2, opponents=True)["id"]) == list(column.sort_values().index[:2])
    assert (top["low"] < top["score"]).all()
    assert top.attrs["estimator"] == "covariance"
    assert set(top.columns) >= {
        "rank",
        "id",
        "source",
        "score",
        "stderr",
        "z",
        "distinguishable",
        "prompt",
        "completion",
    }


def test_a_column_does_not_depend_on_which_columns_are_asked_for(attribution: Attribution) -> None:
    automatic = attribution.with_estimator("auto")
    everything = automatic.ranking(3)
    for j, test in enumerate(automatic.test.ids):
        assert list(automatic.top(test, 3)["score"]) == pytest.approx(list(everything.score_Mk[j]))


def test_an_unknown_test_id_names_close_ones(attribution: Attribution) -> None:
    with pytest.raises(DataError, match="Did you mean"):
        attribution.top("q11")


def test_false_discovery_control_is_over_all_pairs(attribution: Attribution) -> None:
    strict = attribution.top("q0", 6, fdr=0.001)
    loose = attribution.top("q0", 6, fdr=0.9)
    assert strict["distinguishable"].sum() <= loose["distinguishable"].sum()
    assert list(strict["score"]) == list(loose["score"])


def test_it_prints_as_one_line(attribution: Attribution) -> None:
    assert repr(attribution) == "Attribution(12 members, 6 training x 4 test examples, estimator='covariance')"


def test_the_first_members_alone(attribution: Attribution) -> None:
    part = attribution.first(8)
    assert part.members == tuple(range(8))
    assert part.tokens["test"].logprobs[1].shape == (8, 2)
    np.testing.assert_array_equal(part.test_loss_KM, attribution.test_loss_KM[:8])


def test_what_is_saved_is_what_is_loaded(attribution: Attribution, tmp_path: Path) -> None:
    loaded = Attribution.load(attribution.save(tmp_path / "saved"))
    assert np.array_equal(loaded.scores_NM(), attribution.scores_NM())
    assert loaded.train.digest == attribution.train.digest
    assert (loaded.noise, loaded.rho, loaded.estimator, loaded.facts) == (
        0.25,
        "base",
        "covariance",
        {"provider": "none"},
    )
    for before, after in zip(attribution.tokens["test"].logprobs, loaded.tokens["test"].logprobs, strict=True):
        assert np.array_equal(before, after)
    assert not list((tmp_path / "saved").glob("*.part"))


def test_a_damaged_folder_is_refused(attribution: Attribution, tmp_path: Path) -> None:
    folder = attribution.save(tmp_path / "saved")
    (folder / "losses.npz").write_bytes(b"not a zip file")
    with pytest.raises(StoreCorruptError, match="without new fine-tunes"):
        Attribution.load(folder)
    (folder / "attribution.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(StoreCorruptError, match="format 99"):
        Attribution.load(folder)
    with pytest.raises(ConfigurationError, match="no saved attribution"):
        Attribution.load(tmp_path)


def test_few_members_have_no_quality(attribution: Attribution) -> None:
    assert attribution.self_lds is not None
    assert attribution.first(7).self_lds is None


def test_intervals_of_correlations_stay_within_one(attribution: Attribution) -> None:
    table = attribution.with_estimator("correlation").top("q1", 6)
    assert (table["high"] <= 1).all()
    assert (table["low"] >= -1).all()
    assert (table["low"] <= table["score"]).all()


@pytest.fixture
def with_checkpoints(attribution: Attribution) -> Attribution:
    rng = np.random.default_rng(8)
    train, test = (
        np.stack([share * x + 0.02 * rng.normal(size=x.shape) for share in (0.4, 0.8)])
        for x in (attribution.train_loss_KN, attribution.test_loss_KM)
    )
    train[0, 3] = np.nan  # a checkpoint that was not scored
    return replace(attribution, earlier=core.Checkpoints(train, test))


def test_earlier_checkpoints_reach_every_question(with_checkpoints: Attribution) -> None:
    without = replace(with_checkpoints, earlier=None)
    arrays = (without.train_loss_KN, without.test_loss_KM, without.inclusion_KN)
    known = {"estimator": "covariance", "noise": 0.25, "earlier": with_checkpoints.earlier}
    scores_NM = core.scores(*arrays, **known)
    np.testing.assert_array_equal(with_checkpoints.scores_NM(), scores_NM)
    assert not np.allclose(scores_NM, without.scores_NM())
    assert with_checkpoints.self_lds == self_lds(*arrays, **known)
    assert with_checkpoints.self_lds != without.self_lds
    best = with_checkpoints.top("q1", k=3)
    assert list(best["score"]) == pytest.approx(list(-np.sort(-scores_NM[:, 1])[:3]))
    errors = top(*arrays[:2], 3, inclusion_KN=arrays[2], **known).stderr_Mk
    assert errors is not None
    assert list(best["stderr"]) == pytest.approx(list(errors[1]))
    np.testing.assert_allclose(with_checkpoints.groups().score_GH[0], scores_NM[[0, 3]].sum(axis=0))
    assert with_checkpoints.choice.setting.checkpoints


def test_earlier_checkpoints_are_shown_cut_and_saved(with_checkpoints: Attribution, tmp_path: Path) -> None:
    assert repr(with_checkpoints).startswith("Attribution(12 members with 2 earlier checkpoints, 6 training")
    part = with_checkpoints.first(8).earlier
    assert part is not None
    assert part.train_loss_SKN.shape == (2, 8, 6)
    assert part.test_loss_SKM.shape == (2, 8, 4)
    loaded = Attribution.load(with_checkpoints.save(tmp_path / "a"))
    assert loaded.earlier is not None
    assert with_checkpoints.earlier is not None
    np.testing.assert_array_equal(loaded.earlier.train_loss_SKN, with_checkpoints.earlier.train_loss_SKN)
    np.testing.assert_array_equal(loaded.earlier.test_loss_SKM, with_checkpoints.earlier.test_loss_SKM)
    np.testing.assert_array_equal(loaded.scores_NM(), with_checkpoints.scores_NM())
    assert Attribution.load(replace(with_checkpoints, earlier=None).save(tmp_path / "b")).earlier is None
