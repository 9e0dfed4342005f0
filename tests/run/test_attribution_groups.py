"""Group scores by any labels on both sides, and the tokens of a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import stats

from daunce_api import Attribution, Dataset, core
from daunce_api.attribution import TokenTable
from daunce_api.errors import ConfigurationError, DataError
from tests.core.problems import group_scores

TRAIN_LABELS = ["new", "old", "new", None, "old", "new"]
TEST_LABELS = [2, 10, 2, 2]


def dataset(n: int, name: str, sources: Sequence[str]) -> Dataset:
    return Dataset.from_records(
        [
            {"id": f"{name}{i}", "source": sources[i % len(sources)], "prompt": "p", "completion": "two words"}
            for i in range(n)
        ],
        name=name,
    )


def tokens(loss_KX: NDArray[Any], rng: np.random.Generator) -> TokenTable:
    """Two tokens an example, whose losses have the example's as their mean."""
    apart = rng.normal(0, 0.1, loss_KX.shape)
    logprobs = -np.stack([loss_KX + apart, loss_KX - apart], axis=-1)
    pieces = tuple((f"two{x}", " words") for x in range(loss_KX.shape[1]))
    return TokenTable(pieces, tuple(np.moveaxis(logprobs, 1, 0)))


@pytest.fixture
def attribution() -> Attribution:
    rng = np.random.default_rng(5)
    inclusion = rng.random((12, 6)) < 0.5
    test_loss = 2.0 - inclusion @ rng.normal(size=(6, 4)) * 0.1
    train_loss = 1.5 - inclusion * 0.5 + rng.normal(scale=0.01, size=(12, 6))
    return Attribution(
        train=dataset(6, "t", ("a", "b")),
        test=dataset(4, "q", ("c", "d")),
        members=tuple(range(12)),
        train_loss_KN=train_loss,
        test_loss_KM=test_loss,
        inclusion_KN=inclusion,
        estimator="covariance",
        tokens={"train": tokens(train_loss, rng), "test": tokens(test_loss, rng)},
    )


# -- labels -------------------------------------------------------------------------------------------------------


def test_groups_of_any_labels_are_sums_on_both_sides(attribution: Attribution) -> None:
    score = attribution.scores_NM()
    train, test = (np.array([str(x) for x in labels]) for labels in (TRAIN_LABELS, TEST_LABELS))
    groups = attribution.groups(train=TRAIN_LABELS, test=TEST_LABELS)
    assert groups.train_groups == ("new", "old", "(none)")
    assert groups.test_groups == (2, 10)
    expected = [[score[np.ix_(train == g, test == h)].sum() for h in ("2", "10")] for g in ("new", "old", "None")]
    np.testing.assert_allclose(groups.score_GH, expected)
    summed = group_scores(
        attribution.train_loss_KN,
        attribution.test_loss_KM,
        train.tolist(),
        test.tolist(),
        "covariance",
    )
    np.testing.assert_allclose(groups.stderr_GH, summed.stderr_GH)
    assert (groups.stderr_GH > 0).all()


def test_a_mapping_needs_no_order_and_may_know_more(attribution: Attribution) -> None:
    by_id = dict(zip(attribution.train.ids, TRAIN_LABELS, strict=True))
    shuffled = {"elsewhere": "x", **dict(reversed(by_id.items()))}
    expected = attribution.groups(train=TRAIN_LABELS).score_GH
    np.testing.assert_array_equal(attribution.groups(train=shuffled).score_GH, expected)
    series: Any = pd.Series(shuffled)
    np.testing.assert_array_equal(attribution.groups(train=series).score_GH, expected)


def test_labels_from_tables_and_arrays(attribution: Attribution) -> None:
    column: Any = pd.Series([3, 1, None, 3, 1, 3], index=attribution.train.ids)
    assert attribution.groups(train=column).train_groups == (3, 1, "(none)")
    array: Any = np.array([0, 1, 0, 1, 1, 10])
    assert list(attribution.scores(by=array).index) == [0, 1, 10]


def test_scores_are_a_table_of_groups(attribution: Attribution) -> None:
    score = attribution.scores()
    table = attribution.scores(by=TRAIN_LABELS, test_by=TEST_LABELS)
    assert list(table.index) == ["(none)", "new", "old"]
    assert table.index.name == "group"
    assert list(table.columns) == [2, 10]
    assert table.loc["old", 10] == pytest.approx(score.loc[["t1", "t4"], "q1"].sum())
    one_side = attribution.scores(test_by="source")
    assert list(one_side.index) == attribution.train.ids
    assert list(one_side.columns) == ["c", "d"]
    np.testing.assert_allclose(one_side["c"], score[["q0", "q2"]].sum(axis=1))


def test_both_sides_by_source(attribution: Attribution) -> None:
    groups = attribution.groups(test="source")
    assert (groups.train_groups, groups.test_groups) == (("a", "b"), ("c", "d"))
    assert attribution.groups(train=None).score_GH.shape == (6, 4)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (TRAIN_LABELS[:5], "5 labels were given for the 6 examples of t"),
        ({"t0": "x", "t3": "y"}, "lack 4 of 6 examples of t: 't1', 't2', 't4', 't5'"),
        ([1.5, *TRAIN_LABELS[1:]], "label of 't0' in t is 1.5"),
        ([True, *TRAIN_LABELS[1:]], "is True"),
    ],
)
def test_labels_that_are_missing_are_named(attribution: Attribution, labels: Any, words: str) -> None:
    for ask in (
        lambda: attribution.groups(train=labels),
        lambda: attribution.scores(by=labels),
        lambda: attribution.top_groups("q0", by=labels),
    ):
        with pytest.raises(DataError, match=words):
            ask()


def test_many_missing_labels_are_counted(attribution: Attribution) -> None:
    with pytest.raises(DataError, match=r"lack 6 of 6 .* 't4' and 1 more"):
        attribution.groups(train={})


def test_a_field_is_not_a_label(attribution: Attribution) -> None:
    field: Any = "author"
    with pytest.raises(ConfigurationError, match="cannot be summed by 'author'"):
        attribution.scores(by=field)


# -- rankings of groups -------------------------------------------------------------------------------------------


def test_groups_of_any_labels_are_ranked(attribution: Attribution) -> None:
    table = attribution.top_groups("q1", by=TRAIN_LABELS)
    sums = attribution.scores(by=TRAIN_LABELS)["q1"].sort_values(ascending=False)
    assert list(table["group"]) == list(sums.index)
    np.testing.assert_allclose(table["score"], sums)
    assert dict(zip(table["group"], table["examples"], strict=True)) == {"new": 3, "old": 2, "(none)": 1}
    assert table.attrs["question"] == "how much each group moves the answer's loss"


def test_the_question_reaches_the_ranking_of_groups(attribution: Attribution) -> None:
    automatic = attribution.with_estimator("auto")
    assert automatic.top_groups("q1").attrs["estimator"] != "correlation"
    table = automatic.top_groups("q1", question="retrieval")
    assert table.attrs["estimator"] == "correlation"
    assert table.attrs["question"] == "whose examples belong to the answer, by source"
    expected = automatic.with_estimator("correlation").scores(by="source")["q1"]
    np.testing.assert_allclose(table.set_index("source")["score"], expected[table["source"]])
    with pytest.raises(ConfigurationError, match="correlation"):
        attribution.top_groups("q1", question="retrieval")  # its estimator is covariance, by name


def test_false_discovery_control_is_over_all_groups_and_answers(attribution: Attribution) -> None:
    groups = attribution.groups()
    p_value = 2 * stats.t.sf(np.abs(groups.score_GH / groups.stderr_GH), 11)
    rate = float(np.sort(p_value, axis=None)[2] * p_value.size / 3) * 1.0001
    adjusted = (stats.false_discovery_control(p_value, axis=None) <= rate).reshape(p_value.shape)
    marked = {q: attribution.top_groups(q, fdr=rate) for q in attribution.test.ids}
    for j, (_, table) in enumerate(marked.items()):
        told = table.set_index("source")["distinguishable"]
        assert told[list(groups.train_groups)].tolist() == adjusted[:, j].tolist()
    assert sum(t["distinguishable"].sum() for t in marked.values()) >= 3
    assert not any(attribution.top_groups(q, fdr=1e-12)["distinguishable"].any() for q in attribution.test.ids)
    for rate in (0.0, 1.0):
        with pytest.raises(ConfigurationError, match=r"lies in \(0, 1\)"):
            attribution.top_groups("q0", fdr=rate)


# -- tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["auto", "covariance", "whitened", "half_whitened", "correlation"])
def test_tokens_of_either_side_add_up_to_the_pair(attribution: Attribution, estimator: str) -> None:
    made = attribution.with_estimator(estimator)
    table = made.token_scores("t4", "q1")
    assert list(table["side"]) == ["test", "test", "train", "train"]
    assert list(table["position"]) == [0, 1, 0, 1]
    assert list(table["token"]) == ["two1", " words", "two4", " words"]
    score = made.scores().loc["t4", "q1"]
    for side in ("test", "train"):
        assert table.loc[table["side"] == side, "score"].sum() == pytest.approx(score, rel=1e-6)
    assert table.attrs["score"] == pytest.approx(score, rel=1e-6)
    assert table.attrs["left_out"] == ""
    assert not table.attrs["final_only"]


def test_tokens_add_up_to_the_evidence_where_there_is_a_prior(attribution: Attribution) -> None:
    made = replace(attribution.with_estimator("auto"), prior="text")
    made.__dict__["prior_NM"] = attribution.with_estimator("covariance").scores_NM()
    assert made.choice.setting.tilt > 0
    assert made.scored.prior_NM is not None
    evidence = made.scored.block() - made.scored.prior_NM
    table = made.token_scores("t4", "q1")
    for side in ("test", "train"):
        assert table.loc[table["side"] == side, "score"].sum() == pytest.approx(evidence[4, 1], rel=1e-6)


def test_tokens_of_a_covariance_by_hand(attribution: Attribution) -> None:
    train_KT, test_KU = (-attribution.tokens[side].logprobs[i] for side, i in (("train", 3), ("test", 2)))
    score_TU = (train_KT - train_KT.mean(axis=0)).T @ (test_KU - test_KU.mean(axis=0)) / (len(train_KT) - 1)
    score_TU /= score_TU.size  # losses are means over tokens
    table = attribution.token_scores("t3", "q2")
    np.testing.assert_allclose(table["score"], [*score_TU.sum(axis=0), *score_TU.sum(axis=1)])


def test_tokens_of_one_side_say_why_the_other_is_missing(attribution: Attribution) -> None:
    alone = replace(attribution, tokens={"test": attribution.tokens["test"]})
    for made, words in (
        (alone, "training examples were not kept"),
        (attribution.with_estimator("inclusion"), "does not look at"),
    ):
        table = made.token_scores("t0", "q0")
        assert set(table["side"]) == {"test"}
        assert words in table.attrs["left_out"]
        assert table["score"].sum() == pytest.approx(made.scores().loc["t0", "q0"], rel=1e-6)


def test_tokens_that_cannot_be_had_are_errors(attribution: Attribution) -> None:
    with pytest.raises(DataError, match="of the answers were not kept"):
        replace(attribution, tokens={}).token_scores("t0", "q0")
    with pytest.raises(DataError, match="no example 't9'"):
        attribution.token_scores("t9", "q0")
    losses = attribution.train_loss_KN.copy()
    losses[:, 2] = np.nan
    unscored = replace(attribution, train_loss_KN=losses)
    with pytest.raises(DataError, match="No member has scored train example 't2'"):
        unscored.token_scores("t2", "q0")
    assert unscored.token_scores("t3", "q0").attrs["score"] == pytest.approx(unscored.scores().loc["t3", "q0"])
    gaps = losses.copy()
    gaps[3, 4] = np.nan
    with pytest.raises(DataError, match="losses of some members only"):
        replace(attribution, train_loss_KN=gaps).token_scores("t3", "q0")


def test_tokens_with_earlier_checkpoints_are_those_of_the_final_models(attribution: Attribution) -> None:
    rng = np.random.default_rng(8)
    losses = attribution.train_loss_KN, attribution.test_loss_KM
    stages = [0.5 * x[None] + 0.02 * rng.normal(size=(1, *x.shape)) for x in losses]
    made = replace(attribution, earlier=core.Checkpoints(*stages))
    table = made.token_scores("t1", "q3")
    assert table.attrs["final_only"]
    assert table.attrs["score"] == pytest.approx(attribution.scores().loc["t1", "q3"], rel=1e-6)
