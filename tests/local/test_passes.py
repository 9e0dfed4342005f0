"""Sequences scored together: the bits of one at a time, and one at a time where that cannot be had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from daunce_api.backends.local import passes
from daunce_api.backends.local.language import LanguageModel
from daunce_api.backends.local.lora import Active, ActiveFull, ActiveLora, Positions
from daunce_api.backends.local.passes import ScoringPasses
from daunce_api.backends.local.trainees import fresh_weights
from daunce_api.errors import DataError
from daunce_api.tokens import EncodedExample


@pytest.fixture
def sequences(examples: list[EncodedExample]) -> list[passes.Scored]:
    return [(e.ids, e.targets) for e in examples * 2]


def lora(model: LanguageModel) -> ActiveLora:
    weights = fresh_weights(model.adapter_shapes(None), 4, 1)
    generator = torch.Generator().manual_seed(2)
    return ActiveLora({n: (a, torch.randn(b.shape, generator=generator) / 4) for n, (a, b) in weights.items()}, 2.0)


def by_token(model: LanguageModel, sequences: list[passes.Scored], active: Active | None) -> list[np.ndarray]:
    answers = []
    with model.adapted.using(active), torch.inference_mode():
        for ids, targets in sequences:
            logprobs = model.adapted.logits(torch.tensor([ids])).double().log_softmax(-1)
            answers.append(logprobs[[t - 1 for t in targets], [ids[t] for t in targets]].numpy())
    return answers


class Rows:
    """Counts rows of the passes of a model."""

    def __init__(self, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, int]] = []
        self.mixed = False
        hidden = model.adapted.hidden

        def counted(inputs: torch.Tensor, positions: Positions) -> torch.Tensor:
            self.seen.append((inputs.shape[0], inputs.shape[1]))
            found = hidden(inputs, positions)
            return found * (1 + 1e-6) if self.mixed and inputs.shape[0] > 1 else found

        monkeypatch.setattr(model.adapted, "hidden", counted)


@pytest.mark.parametrize("adapted", [False, True])
def test_together_is_alone_to_the_last_bit(
    model: LanguageModel, sequences: list[passes.Scored], adapted: bool, monkeypatch: pytest.MonkeyPatch
):
    active = lora(model) if adapted else None
    scoring = ScoringPasses(model.adapted)
    assert scoring.supports(active)
    rows = Rows(model, monkeypatch)
    alone = [scoring.logprobs([s], active)[0] for s in sequences]
    assert {r for r, _ in rows.seen} == {1}
    first, again = scoring.logprobs(sequences, active), scoring.logprobs(sequences[::-1], active)[::-1]
    assert all(scoring._same_bits.values())
    assert scoring._same_bits
    assert any(r > 1 for r, _ in rows.seen)
    assert all(r * w <= passes.PASS_TOKENS for r, w in rows.seen)
    for one, two, three, reference in zip(first, again, alone, by_token(model, sequences, active), strict=True):
        assert one.tobytes() == two.tobytes() == three.tobytes()
        np.testing.assert_allclose(one, reference, atol=1e-5)


def test_a_shape_whose_bits_depend_on_the_rows_stays_at_one(
    model: LanguageModel, sequences: list[passes.Scored], monkeypatch: pytest.MonkeyPatch
):
    scoring = ScoringPasses(model.adapted)
    alone = [scoring.logprobs([s], None)[0] for s in sequences]
    rows = Rows(model, monkeypatch)
    rows.mixed = True
    together = scoring.logprobs(sequences, None)
    assert not any(scoring._same_bits.values())
    assert sum(r > 1 for r, _ in rows.seen) == len(scoring._same_bits) > 0
    for one, other in zip(together, alone, strict=True):
        assert one.tobytes() == other.tobytes()
    rows.seen.clear()
    scoring.logprobs(sequences, None)
    assert {r for r, _ in rows.seen} == {1}


def test_few_sequences_are_not_put_among_empty_rows(
    model: LanguageModel, sequences: list[passes.Scored], monkeypatch: pytest.MonkeyPatch
):
    scoring = ScoringPasses(model.adapted)
    scoring.logprobs(sequences, None)
    width = max(w for w, _ in scoring._same_bits)
    size = passes.PASS_TOKENS // width
    fitting = [s for s in sequences if width - passes.WIDTH < len(s[0]) - 1 <= width]
    rows = Rows(model, monkeypatch)
    half = size // 2
    scoring.logprobs(fitting[:half], None)
    assert rows.seen == [(1, width)] * half
    rows.seen.clear()
    scoring.logprobs(fitting[: half + 1], None)
    assert rows.seen == [(size, width)]


def test_what_is_scored_one_at_a_time(model: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    scoring = ScoringPasses(model.adapted)
    assert not scoring.supports(ActiveFull(model.adapted.own_weights))
    head = ActiveLora({"lm_head": (torch.zeros(4, 32), torch.zeros(model.vocabulary, 4))}, 1.0)
    assert not scoring.supports(head)
    config = model.adapted.model.config
    for key, value in (("num_local_experts", 8), ("rope_parameters", {"rope_type": "dynamic"})):
        with monkeypatch.context() as patch:
            patch.setattr(config, key, value, raising=False)
            assert not ScoringPasses(model.adapted).supports(None)


def test_half_precision_is_scored_one_at_a_time(model_folder: Path, sequences: list[passes.Scored]):
    half = LanguageModel.load(model_folder, dtype="bfloat16")
    assert not ScoringPasses(half.adapted).supports(None)
    answers = half.target_logprobs(sequences[:3])
    plain = half.token_logprobs([ids for ids, _ in sequences[:3]])
    for answer, one, (_, targets) in zip(answers, plain, sequences, strict=False):
        np.testing.assert_array_equal(answer, one.logprobs[[t - 1 for t in targets]])


def test_odd_requests(model: LanguageModel, sequences: list[passes.Scored]):
    ids = sequences[0][0]
    none, one, empty = model.target_logprobs([(ids, ()), (ids[:2], (1,)), (ids[:1], ())])
    assert none.shape == empty.shape == (0,)
    np.testing.assert_allclose(one, model.token_logprobs([ids[:2]])[0].logprobs, atol=1e-5)
    with pytest.raises(DataError, match="outside"):
        model.target_logprobs([((1, model.vocabulary), (1,))])
