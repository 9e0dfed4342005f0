"""Memory that runs out, workers that are killed or pinned, and what a plan reads."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from worker_tasks import counts, ends, visible

from daunce_api import RunConfig
from daunce_api.errors import ConfigurationError, TrainingCancelledError
from daunce_api.plan.tokens import epochs_of
from daunce_api.providers.local.engines import ProcessEngine, WorkerLostError, WorkerProcess
from daunce_api.providers.local.memory import Limits
from daunce_api.providers.local.options import options_of
from daunce_api.providers.local.store import MemberResult, MemberTask
from daunce_api.providers.local.worker import train_in_parts
from daunce_api.providers.registry import capabilities_of

GROUP = [(MemberTask(f"m{k}", b"", k, Path()), k) for k in range(4)]


@pytest.mark.parametrize(("fits", "cuts"), [((2, 100), 0), ((1, 30), 0), ((1, 30), 3), ((0, 0), 0), ((0, 0), 9)])
def test_memory_that_runs_out_costs_members_then_tokens_then_is_said(fits: tuple[int, int], cuts: int):
    tried: list[tuple[int, int]] = []
    began = cuts

    def train(batch: list[tuple[MemberTask, int]], tokens: int) -> list[MemberResult]:
        tried.append((len(batch), tokens))
        if len(batch) > fits[0] or tokens > fits[1]:
            raise torch.OutOfMemoryError("out of memory")
        return [MemberResult(m.key) for m, _ in batch]

    while True:  # as the trainer comes back with the members of a worker that ran out of memory
        try:
            results = train_in_parts(GROUP, Limits(4, 100), train, longest=25, cuts=cuts)
            break
        except WorkerLostError as error:
            if not error.out_of_memory:
                raise
            cuts += 1
    assert {r.key for r in results} == {f"m{k}" for k in range(4)}
    if fits == (2, 100):
        assert tried == [(4, 100), (2, 100), (2, 100)]
    elif fits == (1, 30):
        first = [(4, 100), (2, 100), (1, 100), (1, 50)][began:]
        assert tried == [*first, *4 * [(1, 25)]]
    else:
        assert all("gradient_checkpointing" in str(r.error) and "Tinker-compatible" in str(r.error) for r in results)
        assert not tried or tried[-1] == (1, 25)
    if not any(r.error for r in results):
        assert not began or (4, 100) not in tried


def test_a_killed_worker_is_known_from_one_that_ended_and_each_is_pinned_reports_and_stops(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    engine = ProcessEngine(1, gpus=True)
    try:
        with pytest.raises(WorkerLostError, match="SIGKILL, most often because memory ran out") as lost:
            engine.submit(ends, signal.SIGKILL).result(timeout=240)
        assert lost.value.out_of_memory
        assert engine.submit(visible, None).result(timeout=240) == ("3", None)  # and no secret of a provider
        worker, seen = engine._all[0], []
        assert isinstance(worker, WorkerProcess)
        pid = worker.call(counts, 3, on_report=seen.append)
        assert seen == [0, 1, 2]
        with pytest.raises(TrainingCancelledError):
            worker.call(counts, 6000, on_report=lambda _: worker.stop())
        assert worker.call(counts, 1) == pid  # it has kept what it has loaded
    finally:
        engine.close()
    two = ProcessEngine(3, gpus=True)
    assert [w._environment["CUDA_VISIBLE_DEVICES"] for w in two._all] == ["3", "5", "3"]  # type: ignore[attr-defined]
    two.close()


def test_a_plan_reads_no_weights_and_takes_the_recipes_epochs(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in model_folder.iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())

    def config(model: str, **options: object) -> RunConfig:
        return RunConfig.from_mapping(
            {
                "run_dir": str(tmp_path / "run"),
                "data": {"train": "t.jsonl", "test": "q.jsonl"},
                "backend": {"kind": "local", "model": model, "options": options},
            }
        )

    monkeypatch.setattr("daunce_api.providers.local.models.load_causal_lm", None)
    trainer, scorer = capabilities_of(config(str(bare)))
    assert trainer.max_context_tokens == scorer.max_context_tokens == 128
    assert not (tmp_path / "run").exists()
    assert epochs_of(config(str(bare)), 100, target=False) == (3, None)
    assert epochs_of(config("fresh", task="task.py:task"), 100, target=False) == (1, None)
    with pytest.raises(ConfigurationError, match="mps is not supported"):
        options_of(config(str(bare), device="mps"))
    held = [options_of(config(str(bare), device=device)).precision for device in ("cuda", "cpu")]
    assert held == ["bfloat16", "float32"]
