"""What is slow to compute is kept with the run: computed once, the same as computed anew, and free to be deleted."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daunce_api import Attribution, core
from daunce_api.attribution import similarity
from daunce_api.attribution.derived import digest_of
from daunce_api.data.dataset import Dataset


def attribution(folder: Path | None, members: int = 12, questions: int = 3) -> Attribution:
    draw = np.random.default_rng(0)
    train = Dataset.from_records([{"prompt": f"say w{i % 5}", "completion": f"tree {i}"} for i in range(30)])
    test = Dataset.from_records([{"prompt": f"tell w{j}", "completion": "leaf"} for j in range(questions)])
    inclusion = draw.random((members, 30)) < 0.5
    loss = draw.exponential(size=(members, 30))
    asked = 3 - inclusion[:, :5] * 0.4 + 0.1 * draw.normal(size=(members, 5))
    return Attribution(
        train, test, tuple(range(members)), loss, asked[:, :questions], inclusion, prior="text", derived=folder
    )


class Calls:
    """Counts the calls of what is slow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for module, name in ((core, "choose"), (core, "estimate"), (similarity, "bm25_scores")):
            monkeypatch.setattr(module, name, self._counted(name, getattr(module, name)))

    def _counted(self, name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.names.append(name)
            return function(*args, **options)

        return call

    def take(self) -> list[str]:
        names, self.names = sorted(self.names), []
        return names


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def results(made: Attribution) -> list[Any]:
    quality = made.self_lds
    assert quality is not None
    assert quality.curve is not None
    choice = made.choice
    return [
        (choice.estimator, choice.setting, choice.why, choice.question),
        repr(asdict(quality)),
        (quality.gain(7), quality.interval(20), quality.expected([12, 24]).tolist()),
        made.scores_NM().tobytes(),
    ]


def test_computed_once_and_the_same(tmp_path: Path, calls: Calls) -> None:
    fresh = results(attribution(None))
    assert calls.take() == ["bm25_scores", "choose", "estimate"]
    first = results(attribution(tmp_path / "derived"))
    assert calls.take() == ["bm25_scores", "choose", "estimate"]
    assert results(attribution(tmp_path / "derived")) == first == fresh
    assert calls.take() == []


def test_whatever_changes_them_computes_them_again(tmp_path: Path, calls: Calls) -> None:
    made = attribution(tmp_path)
    results(made)
    calls.take()
    moved = made.test_loss_KM.copy()
    moved[3, 1] = np.nextafter(moved[3, 1], 9)
    for other in (
        replace(made, test_loss_KM=moved),
        replace(made, noise=0.01),
        replace(made, rho=0.3),
        replace(made, inclusion_KN=~made.inclusion_KN),
        replace(made, prior="none"),
        made.with_estimator("covariance"),
        made.first(10),
        replace(made, earlier=core.Checkpoints(made.train_loss_KN[None] + 1, made.test_loss_KM[None] + 1)),
    ):
        assert other.choice is not None
        assert other.self_lds is not None
        assert calls.take() == ["choose", "estimate"]


def test_the_prior_of_a_further_question_is_one_column(tmp_path: Path, calls: Calls) -> None:
    two = attribution(tmp_path, questions=2).prior_NM
    three = attribution(tmp_path, questions=3).prior_NM
    assert calls.take() == ["bm25_scores", "bm25_scores"]
    assert two is not None
    assert three is not None
    assert np.array_equal(two, three[:, :2])
    whole = attribution(None).prior_NM
    assert whole is not None
    assert np.array_equal(three, whole)
    other = replace(attribution(tmp_path), train=Dataset.from_records([{"text": f"w{i}"} for i in range(30)]))
    assert calls.take() == ["bm25_scores"]
    assert other.prior_NM is not None
    assert calls.take() == ["bm25_scores"]
    assert not np.array_equal(other.prior_NM, three)


@pytest.mark.parametrize("damage", ["deleted", "cut", "nonsense", "read-only"])
def test_what_is_kept_may_be_lost(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "derived"
    first = results(attribution(folder))
    for path in folder.iterdir():
        if damage == "deleted":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(path.read_bytes()[:-30])
        elif damage == "nonsense":
            path.write_bytes(b'{"a": 1}')
    if damage == "read-only":
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        folder.write_text("no folder")  # root writes to read-only folders, too
    assert results(attribution(folder)) == first


def test_only_so_many_are_kept(tmp_path: Path) -> None:
    made = attribution(tmp_path)
    for k in range(60):
        assert replace(made, noise=k / 1000, estimator="covariance").choice is not None
    assert (tmp_path / "choices.json").read_text().count('"estimator"') == 50


def test_a_digest_tells_kinds_and_shapes_apart() -> None:
    kinds = [None, "", "a", 0, 0.0, False, [0, 0], [[0], [0]], np.zeros(2, np.float32), ["a", "b"], ["ab"]]
    assert len({digest_of(kind) for kind in kinds}) == len(kinds) - 1  # None is the empty text
    assert digest_of("a", "b") != digest_of("b", "a")
