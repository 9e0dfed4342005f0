"""Modular MAX, where one is running (examples/servers/max.sh FOLDER): right lengths, and no entry for the first token.

DAUNCE_MAX=http://127.0.0.1:8700/v1 MAX_MODEL=FOLDER/model pytest -s -m long tests/providers/test_real_max.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_servers import live, small_run

from daunce_api import Run
from daunce_api.cli.doctor import examine
from daunce_api.providers.registry import open_backend

URL, pytestmark = live("DAUNCE_MAX")
FOLDER = os.environ.get("MAX_MODEL", "model")


def run_of(folder: Path, **options: Any) -> Run:
    scorer = {"kind": "echo", "base_url": URL, "options": {"max_context_tokens": 512, **options}}
    return small_run(folder, {"kind": "local", "model": FOLDER, "scorer": scorer}, {})


def test_without_its_dialect_the_endpoint_is_refused_in_words_that_name_it(tmp_path: Path) -> None:
    findings = examine(run_of(tmp_path))
    (failed,) = [check for check in findings.checks if check.ok is False]
    print(f"\n{failed.detail}")
    assert "dialect: max" in failed.detail


async def test_with_it_every_value_is_that_of_a_forward_pass(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = run_of(tmp_path, dialect="max")
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    apart: list[float] = []
    async with open_backend(run.config) as backend:
        for example in (*run.encoded(run.train), *run.encoded(run.test)):
            (scores,) = await backend.scorer.score(FOLDER, [example])
            with torch.no_grad():
                logprobs = torch.log_softmax(model(torch.tensor([example.ids])).logits[0], -1)
            expected = [float(logprobs[t - 1, example.ids[t]]) for t in example.targets]
            apart += np.abs(np.array(scores.logprobs) - expected).tolist()
    print(f"\nMAX against PyTorch: {len(apart)} tokens, at most {max(apart):.2g} nats apart")
    assert max(apart) < 2e-4


def test_with_it_the_doctor_finds_the_endpoint_usable(tmp_path: Path) -> None:
    findings = examine(run_of(tmp_path, dialect="max"))
    print(f"\n{findings.text()}")
    assert findings.ok
