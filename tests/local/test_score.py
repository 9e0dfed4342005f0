"""Scoring several sequences in a pass, what is held in memory, and what happens where memory runs out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from daunce_api.data.tokenizers import EncodedExample
from daunce_api.errors import ConfigurationError, DataError
from daunce_api.providers.local import memory, worker
from daunce_api.providers.local.adapters import save_adapter
from daunce_api.providers.local.engines import WorkerLostError
from daunce_api.providers.local.language import LanguageModel, LoraSettings
from daunce_api.providers.local.lora import ActiveFull, Batch
from daunce_api.providers.local.memory import Scored, passes_of
from daunce_api.providers.local.models import save_full
from daunce_api.providers.local.train import fresh_weights


@pytest.fixture
def sequences(examples: list[EncodedExample]) -> list[Scored]:
    return [(e.ids, e.targets) for e in examples * 2]


def save(model: LanguageModel, folder: Path, *, head: bool = False) -> Path:
    """An adapter that changes the model, on its layers or on its output head alone."""
    weights = fresh_weights(model.adapter_shapes(("lm_head",) if head else None), 4, 1)
    generator = torch.Generator().manual_seed(2)
    trained = {n: (a, torch.randn(b.shape, generator=generator) / 4) for n, (a, b) in weights.items()}
    save_adapter(folder, trained, LoraSettings(rank=4, alpha=8.0), model.name)
    return folder


def one_by_one(model: LanguageModel, sequences: list[Scored], adapter: Path | None) -> list[np.ndarray]:
    answers = model.token_logprobs([ids for ids, _ in sequences], adapter=adapter)
    return [a.logprobs[[t - 1 for t in targets]] for a, (_, targets) in zip(answers, sequences, strict=True)]


def assert_near(one: list[np.ndarray], other: list[np.ndarray], atol: float) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["base", "adapter", "head", "full"])
def test_several_in_a_pass_answer_as_one(model: LanguageModel, sequences: list[Scored], kind: str, tmp_path: Path):
    tuned = None
    if kind == "full":
        tuned = tmp_path / "full"
        with model.adapted.using(ActiveFull({n: t * 1.05 for n, t in model.adapted.own_weights.items()})):
            save_full(tuned, model.adapted.model, model.tokenizer.folder)
    elif kind != "base":
        tuned = save(model, tmp_path / "a", head=kind == "head")
    together = model.target_logprobs(sequences, adapter=tuned)
    assert_near(together, one_by_one(model, sequences, tuned), 1e-5)
    again = model.target_logprobs(sequences, adapter=tuned)
    assert all(map(np.array_equal, together, again))  # the same composition, the same bits
    assert_near(together, model.target_logprobs(sequences[::-1], adapter=tuned)[::-1], 1e-5)
    if tuned is not None:
        with pytest.raises(AssertionError):
            assert_near(together, model.target_logprobs(sequences), 1e-2)


def test_half_precision_moves_less_than_it_is_off_by_itself(
    model: LanguageModel, model_folder: Path, sequences: list[Scored]
):
    half = LanguageModel.load(model_folder, dtype="bfloat16")
    exact, plain = (one_by_one(m, sequences, None) for m in (model, half))
    together = half.target_logprobs(sequences)
    means = [np.array([a.mean() for a in answers]) for answers in (exact, plain, together)]
    assert np.std(means[2] - means[0]) < 1.5 * np.std(means[1] - means[0]) + 1e-6


@pytest.mark.parametrize(("quantisation", "near"), [("8bit", 0.2), ("4bit", 1e-4)])
def test_quantised_models_are_scored_in_batches(
    model_folder: Path, sequences: list[Scored], quantisation: str, near: float
):
    pytest.importorskip("bitsandbytes")
    held = LanguageModel.load(model_folder, quantisation=quantisation)
    assert_near(held.target_logprobs(sequences), one_by_one(held, sequences, None), near)


def test_rows_whose_positions_depend_on_padding_are_alone(
    model: LanguageModel, sequences: list[Scored], monkeypatch: pytest.MonkeyPatch
):
    rope = {"rope_type": "dynamic", "original_max_position_embeddings": 40}
    monkeypatch.setattr(model.adapted.config, "rope_parameters", rope)
    monkeypatch.delitem(model.adapted.__dict__, "alone_above", raising=False)
    seen: list[list[int]] = []
    hidden = model.adapted.hidden

    def noted(batch: Batch) -> torch.Tensor:
        seen.append(list(batch.ids.shape))
        return hidden(batch)

    monkeypatch.setattr(model.adapted, "hidden", noted)
    model.target_logprobs(sequences)
    model.adapted.__dict__.pop("alone_above")
    assert all(rows == 1 for rows, width in seen if width > 40)
    assert any(rows > 1 for rows, _ in seen)


def test_a_pass_that_does_not_fit_is_repeated_in_smaller_ones(
    model: LanguageModel, sequences: list[Scored], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    expected = model.target_logprobs(sequences)
    own = LanguageModel(model.name, model.adapted, model.tokenizer)
    own.target_logprobs(sequences[:1], adapter=save(model, tmp_path / "a"))
    monkeypatch.setattr(worker, "loaded", lambda _: own)
    hidden, tried = model.adapted.hidden, []

    def small(batch: Batch) -> torch.Tensor:
        tried.append(len(batch.counts))
        if len(batch.counts) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return hidden(batch)

    def ask(cuts: int) -> list[tuple[float, ...]]:
        return worker.run_score(worker.ModelSpec("m"), None, sequences, cuts)

    monkeypatch.setattr(model.adapted, "hidden", small)
    cuts = 0
    while True:
        try:
            answers = ask(cuts)
            break
        except WorkerLostError as error:
            if not error.out_of_memory:
                raise
            cuts += 1
    assert cuts > 1
    assert sorted(tried[:cuts], reverse=True) == tried[:cuts]
    assert_near([np.array(a) for a in answers], expected, 1e-5)
    assert not own._held  # the room of the other fine-tunes was needed
    monkeypatch.setattr(model.adapted, "hidden", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(0)


def test_fine_tunes_are_held_by_bytes(model: LanguageModel, tmp_path: Path):
    folders = [save(model, tmp_path / f"a{k}") for k in range(4)]
    size = (folders[0] / "adapter_model.safetensors").stat().st_size
    held = LanguageModel(model.name, model.adapted, model.tokenizer, budget=2 * size)
    active = [held._tuned(f) for f in folders]
    assert [key[0] for key in held._held] == [str(f) for f in folders[2:]]
    assert held._tuned(folders[3]) is active[3]
    assert held._tuned(folders[0]) is not active[0]
    tiny = LanguageModel(model.name, model.adapted, model.tokenizer, budget=1)
    assert tiny._tuned(folders[0]) is tiny._tuned(folders[0])  # the one in use is held whatever the budget


def test_an_adapter_of_another_shape_is_refused(model: LanguageModel, tmp_path: Path):
    shapes = {n: (n_in + 1, n_out) for n, (n_in, n_out) in model.adapter_shapes(None).items()}
    save_adapter(tmp_path / "a", fresh_weights(shapes, 4, 1), LoraSettings(rank=4), model.name)
    with pytest.raises(ConfigurationError, match=r"belongs to another model: its update of .*q_proj is 32 x 33"):
        model.target_logprobs([((1, 2), (1,))], adapter=tmp_path / "a")


def test_odd_requests(model: LanguageModel, sequences: list[Scored]):
    ids = sequences[0][0]
    none, one, empty = model.target_logprobs([(ids, ()), (ids[:2], (1,)), (ids[:1], ())])
    assert none.shape == empty.shape == (0,)
    np.testing.assert_allclose(one, model.token_logprobs([ids[:2]])[0].logprobs, atol=1e-5)
    with pytest.raises(DataError, match="outside"):
        model.target_logprobs([((1, model.vocabulary), (1,))])


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(1, 300), st.integers(1, 100))
def test_passes_hold_every_row_once_within_the_limit(lengths: list[int], limit: int, alone: int):
    passes = passes_of(lengths, limit, alone)
    assert sorted(i for p in passes for i in p) == list(range(len(lengths)))
    for p in passes:
        longest = max(lengths[i] for i in p)
        assert len(p) == 1 or (len(p) * longest <= limit and longest <= alone)
        assert sum(longest - lengths[i] for i in p) <= memory.WASTE


def test_free_memory_is_shared_and_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "_container_rest", lambda: [])
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("M", (), {"available": 4000}))
    assert (memory.default_budget(cpu, 1), memory.default_budget(cpu, 2)) == (2000, 1000)
    monkeypatch.setattr(memory, "_container_rest", lambda: [600])
    assert memory.default_budget(cpu, 1) == 300
    monkeypatch.undo()
    assert memory._container_rest(tmp_path) == []
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 5\n")
    for limit, rest in (("max", []), ("1000", [300]), ("500", [0])):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert memory._container_rest(tmp_path) == rest
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 250\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._container_rest(tmp_path) == [550]
