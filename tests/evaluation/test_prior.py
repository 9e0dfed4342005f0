"""The prior: what is added to scores of few members, and that everything says how much of a score it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

import daunce_api
from daunce_api import Attribution, RunConfig
from daunce_api.attribution.similarity import gradient_cosine, prior_of
from daunce_api.core import choose, estimate, fit, member_losses
from daunce_api.core.choice import prior_weight
from daunce_api.data.dataset import Dataset
from daunce_api.errors import ConfigurationError, DataError
from tests.core.problems import top

WORDS = ["ash", "birch", "cedar", "dogwood", "elm", "fir", "ginkgo", "hazel", "ivy", "juniper"]


def problem(members: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """40 training examples, 10 answers: each is moved by the four examples of its topic, and by luck."""
    rng = np.random.default_rng(seed)
    influence = np.repeat(np.eye(10), 4, axis=0)
    inclusion = rng.random((members, 40)) < 0.5
    train = 2 - inclusion + rng.normal(size=inclusion.shape)
    test = 5 - inclusion @ influence + 2 * rng.normal(size=(members, 10))
    return train, test, inclusion, influence


def attribution(members: int = 10) -> Attribution:
    train, test, inclusion, _ = problem(members)
    rows = [{"id": f"t{i}", "prompt": f"say {WORDS[i // 4]}", "completion": f"a tree {i}"} for i in range(40)]
    asked = [{"id": f"q{j}", "prompt": f"tell {WORDS[j]}", "completion": "a leaf"} for j in range(10)]
    sides = Dataset.from_records(rows, name="train"), Dataset.from_records(asked, name="test")
    return Attribution(*sides, tuple(range(members)), train, test, inclusion, prior="text")


def correlation(score: np.ndarray, influence: np.ndarray) -> float:
    return float(np.mean([np.corrcoef(score[:, j], influence[:, j])[0, 1] for j in range(10)]))


def test_few_members_gain_by_a_prior_that_they_bear_out() -> None:
    gains = []
    for seed in range(8):
        train, test, inclusion, influence = problem(10, seed)
        losses = member_losses(train, test, inclusion, prior_NM=influence)
        choice = choose(losses)
        assert choice.setting.prior > 0
        plain = fit(losses, choice.estimator.name, replace(choice.setting, prior=0.0)).dense()
        gains.append(
            correlation(fit(losses, choice.estimator.name, choice.setting).dense(), influence)
            - correlation(plain, influence)
        )
    assert np.mean(gains) > 0.1


def test_a_prior_that_knows_nothing_gets_next_to_nothing() -> None:
    weights = []
    for seed in range(30):
        train, test, inclusion, _ = problem(12, seed)
        prior = np.random.default_rng(seed).normal(size=(40, 10))
        weights.append(prior_weight(member_losses(train, test, inclusion, prior_NM=prior))[0])
    assert np.median(weights) == 0
    assert np.mean(weights) < 0.12


def test_the_more_members_the_less_of_it() -> None:
    weights = []
    for members in (10, 40, 160):
        train, test, inclusion, influence = problem(members)
        weights.append(choose(member_losses(train, test, inclusion, prior_NM=influence)).setting.prior)
    assert weights[0] > weights[1] > weights[2] > 0


def test_self_lds_judges_the_mixture_inside_the_folds() -> None:
    train, test, inclusion, influence = problem(24)
    with_prior = estimate(member_losses(train, test, inclusion, prior_NM=influence)).raw
    assert with_prior > estimate(member_losses(train, test, inclusion)).raw + 0.03


def test_every_table_says_what_is_evidence_and_what_prior() -> None:
    made = attribution()
    assert "standard deviations of prior" in made.choice.why
    top = made.top("q3", 5)
    assert list(top["score"]) == pytest.approx(list(top["evidence"] + top["prior"]))
    assert list(top["z"]) == pytest.approx(list(top["evidence"] / top["stderr"]))
    assert list((top["low"] + top["high"]) / 2) == pytest.approx(list(top["evidence"]))
    groups = made.top_groups("q3", 3, by=[WORDS[i // 4] for i in range(40)])
    assert groups["group"][0] == WORDS[3]
    assert list(groups["score"]) == pytest.approx(list(groups["evidence"] + groups["prior"]))
    without = replace(made, prior="none")
    assert "evidence" not in without.top("q3", 5).columns
    named = made.with_estimator("covariance")
    assert np.array_equal(named.scores_NM(), without.with_estimator("covariance").scores_NM())
    ranking = made.ranking(4, columns=[3])
    assert ranking.prior_Mk is not None
    assert np.allclose(made.scored.z_block(), without.scored.z_block()), "significance is the evidence's"


def test_scores_of_related_pairs_are_drawn_towards_zero_less() -> None:
    train, test, inclusion, influence = problem(10)
    losses = member_losses(train, test, inclusion, prior_NM=influence)
    choice = choose(losses)
    assert choice.setting.tilt > 0
    evidence, plain = (
        fit(losses, choice.estimator.name, replace(choice.setting, prior=0.0, tilt=tilt)).dense()
        for tilt in (choice.setting.tilt, 0.0)
    )
    related = influence > 0
    assert (np.abs(evidence) > np.abs(plain))[related].all()
    assert (np.abs(evidence) < np.abs(plain))[~related].all()
    assert choose(losses, "whitened").setting.tilt == 0


@pytest.mark.parametrize("per", ["test", "train"])
def test_rankings_and_groups_are_those_of_the_scores(per: Literal["test", "train"]) -> None:
    made = attribution()
    score = made.scores_NM()
    ranking = top(
        made.train_loss_KN, made.test_loss_KM, 4, inclusion_KN=made.inclusion_KN, prior_NM=made.prior_NM, per=per
    )
    table = score.T if per == "test" else score
    assert np.allclose(ranking.score_Mk, -np.sort(-table, axis=1)[:, :4])
    groups = made.groups(train=[WORDS[i // 4] for i in range(40)])
    assert np.allclose(groups.score_GH, score.reshape(10, 4, 10).sum(axis=1))
    assert (groups.stderr_GH > 0).all()


def test_it_survives_saving(tmp_path: Path) -> None:
    made = attribution()
    loaded = Attribution.load(made.save(tmp_path / "saved"))
    assert loaded.prior == "text"
    assert np.array_equal(loaded.scores_NM(), made.scores_NM())


def test_runs_of_before_have_none() -> None:
    data = {"data": {"train": "a", "test": "b"}}
    assert RunConfig.from_mapping(data).attribution.prior == "auto"
    kept, _ = RunConfig.from_manifest({"config": data, "version": 1})
    assert kept.attribution.prior == "none"


def test_what_a_prior_needs() -> None:
    made = attribution()
    with pytest.raises(ConfigurationError, match="prior_model"):
        prior_of(made.train, made.test, "gradient")
    with pytest.raises(ConfigurationError, match="no folder"):
        prior_of(made.train, made.test, "gradient", "/nowhere")
    with pytest.raises(DataError, match="The prior has shape"):
        member_losses(*problem(4)[:3], prior_NM=np.zeros((3, 3)))


def test_gradients_of_the_base_model_know_what_text_does() -> None:
    pytest.importorskip("transformers")
    made = attribution()
    folder = Path(daunce_api.__file__).parent / "server" / "model"
    few = Dataset.from_records([e.to_record() for e in list(made.train)[::2]], name="few")
    cosine = gradient_cosine(folder, list(few), list(made.test))
    assert cosine.shape == (20, 10)
    assert np.abs(cosine).max() <= 1
    own = np.repeat(np.eye(10), 2, axis=0) > 0
    assert cosine[own].mean() > cosine[~own].mean()
    assert prior_of(few, made.test, "auto", str(folder)) is not None
