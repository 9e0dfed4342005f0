"""Sequences scored together: on a CPU the bits of one at a time, and one at a time where that cannot be had; elsewhere
in passes of fixed shapes, which the tests ask for here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from daunce_api.data.tokenizers import EncodedExample
from daunce_api.errors import DataError
from daunce_api.providers.local import passes
from daunce_api.providers.local.language import LanguageModel
from daunce_api.providers.local.lora import Active, ActiveFull, ActiveLora, Positions
from daunce_api.providers.local.passes import ScoringPasses
from daunce_api.providers.local.trainees import fresh_weights


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


def example_means(answers: list[np.ndarray]) -> np.ndarray:
    return np.array([a.mean() for a in answers])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fixed_shapes_do_not_depend_on_the_batch(
    model: LanguageModel,
    model_folder: Path,
    sequences: list[passes.Scored],
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
):
    held = LanguageModel.load(model_folder, dtype=dtype)
    active = lora(model)
    scoring = ScoringPasses(held.adapted, fixed=True)
    assert scoring.supports(active)
    rows = Rows(held, monkeypatch)
    together = scoring.logprobs(sequences, active)
    sizes = passes.ACCELERATOR
    assert len(rows.seen) < len(sequences) / 4
    assert all(w % sizes.width == 0 and r == sizes.tokens // w for r, w in rows.seen)
    shapes = set(rows.seen)
    for answers in (
        scoring.logprobs(sequences[::-1], active)[::-1],
        [scoring.logprobs([s], active)[0] for s in sequences],
    ):
        assert all(one.tobytes() == other.tobytes() for one, other in zip(together, answers, strict=True))
    assert set(rows.seen) == shapes
    # Padding moves values by less than half precision itself.
    exact, plain = (example_means(by_token(m, sequences, active)) for m in (model, held))
    padded = example_means(together)
    assert np.std(padded - exact) < 1.5 * np.std(plain - exact) + 1e-6
    assert np.std(padded - plain) < np.std(plain - exact) + 1e-6


def test_a_pass_that_does_not_fit_is_made_smaller(
    model: LanguageModel, sequences: list[passes.Scored], monkeypatch: pytest.MonkeyPatch
):
    scoring = ScoringPasses(model.adapted, fixed=True)
    expected = scoring.logprobs(sequences, None)
    hidden, asked, fits = model.adapted.hidden, [], 5

    def small(inputs: torch.Tensor, positions: Positions) -> torch.Tensor:
        asked.append(inputs.shape[0])
        if inputs.shape[0] > fits:
            raise torch.OutOfMemoryError("out of memory")
        return hidden(inputs, positions)

    monkeypatch.setattr(model.adapted, "hidden", small)
    scoring = ScoringPasses(model.adapted, fixed=True)
    for one, other in zip(scoring.logprobs(sequences, None), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert asked[:5] == [64, 32, 16, 8, 4]
    assert max(asked[5:]) <= 5
    fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        scoring.logprobs(sequences[:1], None)


def test_fixed_shapes_are_for_other_devices_and_for_floats(
    model: LanguageModel, model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    half = LanguageModel.load(model_folder, dtype="bfloat16").adapted
    assert half.output.vocabulary == model.vocabulary
    assert ScoringPasses(half, fixed=True).supports(None)
    assert not ScoringPasses(half).supports(None)
    with monkeypatch.context() as patch:
        patch.setattr(type(half), "device", torch.device("cuda"))
        assert ScoringPasses(half).supports(None)


@pytest.mark.parametrize("quantisation", ["8bit", "4bit"])
def test_quantised_rows(model: LanguageModel, model_folder: Path, sequences: list[passes.Scored], quantisation: str):
    pytest.importorskip("bitsandbytes")
    held = LanguageModel.load(model_folder, quantisation=quantisation)
    scoring = ScoringPasses(held.adapted, fixed=True)
    assert not ScoringPasses(held.adapted).supports(None)
    assert scoring.supports(None) == (quantisation == "4bit")
    if quantisation == "4bit":
        together = scoring.logprobs(sequences, None)
        alone = [scoring.logprobs([s], None)[0] for s in sequences]
        assert all(map(np.array_equal, together, alone))
        np.testing.assert_allclose(example_means(together), example_means(by_token(held, sequences, None)), atol=1e-4)


def test_odd_requests(model: LanguageModel, sequences: list[passes.Scored]):
    ids = sequences[0][0]
    none, one, empty = model.target_logprobs([(ids, ()), (ids[:2], (1,)), (ids[:1], ())])
    assert none.shape == empty.shape == (0,)
    np.testing.assert_allclose(one, model.token_logprobs([ids[:2]])[0].logprobs, atol=1e-5)
    with pytest.raises(DataError, match="outside"):
        model.target_logprobs([((1, model.vocabulary), (1,))])
