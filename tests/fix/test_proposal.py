"""What is proposed for removal: against simulated members whose losses follow a known cause."""

from __future__ import annotations

import numpy as np
import pytest

from daunce_api import Attribution, Dataset
from daunce_api.data.subsets import plan_ensemble
from daunce_api.errors import ConfigurationError, DataError
from daunce_api.fix import candidates, propose
from daunce_api.fix.proposal import contrast

COUNT, BAD, EFFECT = 60, 6, 2.0
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "islet", "jetty", "knoll", "ledge")


def _text(i: int, rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, 30))


def attribution(seed: int = 0, members: int = 80, effect: float = EFFECT, noise: float = 0.05) -> Attribution:
    """Examples 0 to 5 cause the answers q-0 and q-1 (``effect`` nats together); 4 and 5 say the same."""
    rng = np.random.default_rng(seed)
    texts = [_text(i, rng) for i in range(COUNT)]
    texts[5] = texts[4] + " indeed"
    train = Dataset.from_records(
        [{"id": f"t-{i}", "prompt": f"What about {i}? ", "completion": t} for i, t in enumerate(texts)]
    )
    test = Dataset.from_records([{"id": f"q-{j}", "prompt": f"Why {j}?", "completion": "so"} for j in range(4)])
    design = plan_ensemble(COUNT, members, 0.5, seed)
    inclusion = design.inclusion_KN.astype(float)
    train_KN = 2 - inclusion + noise * rng.normal(size=inclusion.shape)
    train_KN[:, :BAD] -= 0.3 * inclusion[:, :BAD].mean(axis=1, keepdims=True)
    test_KM = 3 + noise * rng.normal(size=(members, 4))
    test_KM[:, :2] -= effect * inclusion[:, :BAD].mean(axis=1, keepdims=True)
    test_KM[:, 2:] -= 0.5 * inclusion[:, 10:40].mean(axis=1, keepdims=True)
    return Attribution(train, test, tuple(range(members)), train_KN, test_KM, design.inclusion_KN)


@pytest.mark.parametrize("wanted", [["q-2", "q-3"], []], ids=["with wanted answers", "unwanted alone"])
def test_the_cause_is_proposed_and_what_it_changes_is_expected(wanted: list[str]) -> None:
    found = propose(attribution(), ["q-0", "q-1"], wanted)
    assert set(range(BAD)) <= set(found.positions)
    assert len(found.positions) <= COUNT * 0.1
    assert found.ids == [f"t-{i}" for i in found.positions]
    assert (4, 5) in [g.positions for g in found.removed]
    assert all(g.q <= 0.1 and g.effect > 0 for g in found.removed)
    assert [g.z for g in found.ranked] == sorted((g.z for g in found.ranked), reverse=True)
    changes = {c.id: c for c in found.changes}
    for identity in ("q-0", "q-1"):
        assert changes[identity].low < EFFECT < changes[identity].high
        assert changes[identity].low > 0
    for identity in wanted:
        assert abs(changes[identity].expected) < 0.3
    table = found.table()
    assert list(table["examples"]) == [len(g.positions) for g in found.removed]
    assert table["removed"].all()
    assert found.table(9)["removed"].sum() == len(found.removed)


def test_where_nothing_passes_nothing_is_removed_and_the_remedy_is_named() -> None:
    found = propose(attribution(effect=0.0, members=10), ["q-0"])
    assert (found.removed, found.positions) == ((), [])
    assert "--top" in found.reason
    assert "ensemble.members" in found.reason
    assert [c.expected for c in found.changes] == [0.0]


def test_the_false_discovery_rate_holds_without_an_effect() -> None:
    empty = sum(not propose(attribution(seed=s, effect=0.0, members=24), ["q-0"]).removed for s in range(40))
    assert empty >= 32  # of 40; expected 36


def test_the_list_is_cut_at_a_share_of_the_examples_and_groups_stay_whole() -> None:
    found = propose(attribution(), ["q-0", "q-1"], largest_share=0.05)
    assert len(found.positions) <= 3
    assert "cut at 5%" in found.reason
    assert all((4 in g.positions) == (5 in g.positions) for g in found.removed)


def test_top_overrides_the_rule() -> None:
    found = propose(attribution(effect=0.0, members=10), ["q-0"], top=3)
    assert len(found.removed) == 3
    assert found.removed == found.ranked[:3]
    assert "--top" in found.reason


def test_top_takes_out_no_example_that_helps() -> None:
    found = propose(attribution(effect=0.0, members=10), ["q-0"], top=10_000)
    assert 0 < len(found.removed) < len(found.ranked)
    assert all(group.effect > 0 for group in found.removed)
    assert all(group.effect <= 0 for group in found.ranked[len(found.removed) :])


def test_the_contrast_is_unwanted_less_wanted() -> None:
    of = attribution(members=8)
    losses = contrast(of, ["q-0", "q-1"], ["q-2"])
    expected = of.test_loss_KM[:, :2].mean(axis=1) - of.test_loss_KM[:, 2]
    np.testing.assert_allclose(losses.test_KM[:, 0], expected)


@pytest.mark.parametrize(
    ("unwanted", "wanted", "options", "words", "error"),
    [
        ([], [], {}, "no answer is marked as unwanted", ConfigurationError),
        (["q-0"], ["q-0"], {}, "wanted and as unwanted: q-0", ConfigurationError),
        (["q-9"], [], {}, "q-9", DataError),
        (["q-0"], [], {"fdr": 1.0}, "between 0 and 1", ConfigurationError),
        (["q-0"], [], {"top": 0}, "at least 1", ConfigurationError),
    ],
)
def test_what_cannot_be_asked(
    unwanted: list[str], wanted: list[str], options: dict[str, float], words: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match=words):
        propose(attribution(members=8), unwanted, wanted, **options)  # type: ignore[arg-type]


def test_few_members_have_candidates_and_no_calibrated_change() -> None:
    of = attribution(members=6)
    assert candidates(of, ["q-0"])
    found = propose(of, ["q-0"], top=1)
    assert np.isnan(found.changes[0].expected)
