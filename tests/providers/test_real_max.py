"""Modular MAX, whose echo leaves out the first token: refused as it is, right by one option, where one is running
(examples/servers/max.sh FOLDER).

    DAUNCE_MAX=http://127.0.0.1:8700 MAX_MODEL=FOLDER/model pytest -s -m long tests/providers/test_real_max.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_servers import live, small_run

from daunce_api import Run
from daunce_api.cli.doctor import examine
from daunce_api.providers.registry import open_backend

URL, pytestmark = live("DAUNCE_MAX")
MODEL = os.environ.get("MAX_MODEL", "")


def config(folder: Path, **options: Any) -> Run:
    options = {"max_context_tokens": 512, **options}
    scorer = {"kind": "echo", "base_url": f"{URL}/v1", "options": options}
    return small_run(folder, {"kind": "local", "model": MODEL, "scorer": scorer}, {})


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_without_the_option_it_is_refused_by_a_text_that_names_it(max_tokens: int, tmp_path: Path) -> None:
    findings = examine(config(tmp_path, max_tokens=max_tokens))
    (bad,) = [check for check in findings.checks if check.ok is False]
    assert "dialect: max" in bad.detail


async def test_with_it_values_are_those_of_pytorch(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    run = config(tmp_path, dialect="max")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    furthest = 0.0
    async with open_backend(run.config) as backend:
        for example in run.encoded(run.train):
            (scores,) = await backend.scorer.score(MODEL, [example])
            with torch.no_grad():
                logprobs = torch.log_softmax(model(torch.tensor([example.ids])).logits[0], -1)
            reference = np.array([float(logprobs[t - 1, example.ids[t]]) for t in example.targets])
            furthest = max(furthest, float(np.abs(reference - scores.logprobs).max()))
    print(f"\nMAX against PyTorch: at most {furthest:.2g} nats a token")
    assert furthest < 1e-3


def test_with_it_the_doctor_is_content(tmp_path: Path) -> None:
    assert examine(config(tmp_path, dialect="max")).ok
