"""What tests against servers of others share: one small run, and the losses that PyTorch gives for its members.

Servers are started by the scripts in ``examples/servers``; a test runs where an environment variable names its server.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daunce_api import Run
from daunce_api.providers.tokenizers import embedded_folder
from daunce_api.store import RunStore

MEMBERS = 6


def live(variable: str) -> tuple[str, list[pytest.MarkDecorator]]:
    """Address of a server, and the marks of a module that is tested against it."""
    url = os.environ.get(variable)
    skip = pytest.mark.skipif(url is None, reason=f"{variable} names no server")
    return url or "", [pytest.mark.long, pytest.mark.timeout(3600), skip]


def small_run(folder: Path, backend: dict[str, Any], hyperparameters: dict[str, Any], **ensemble: Any) -> Run:
    """A run of ``MEMBERS`` members on 24 examples of the demo, with 2 questions."""
    data = Path(str(files("daunce_api") / "cli" / "demo" / "data"))
    for side, count in (("train", 24), ("test", 2)):
        lines = (data / f"{side}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{side}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    config = {
        "run_dir": "run",
        "data": {"train": "train.jsonl", "test": "test.jsonl"},
        "backend": backend,
        "ensemble": {"members": MEMBERS, "seed": 1, **ensemble},
        "training": {"hyperparameters": {"n_epochs": 2, "batch_size": 4, **hyperparameters}},
        "scoring": {"noise_probe": 2, "cache": False},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config))
    return Run.create(path)


def models_of(run: Run) -> dict[int, str]:
    """The final model of each member, -1 for the target."""
    with RunStore.open(run.run_dir, read_only=True) as store:
        return store.jobs.ready_models()


def away_from_peft(run: Run, adapter_of: Callable[[str], Path], name: str) -> np.ndarray[Any, Any]:
    """Losses of a run minus those of a PEFT float32 forward of its members' adapters, in nats; printed in brief.

    One value a member and example. ``adapter_of`` gives the folder of a model.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    examples = [*run.encoded(run.train), *run.encoded(run.test)]
    differences: list[float] = []
    for member, model in sorted(models_of(run).items()):
        with RunStore.open(run.run_dir, read_only=True) as store:
            scores = store.scores.load(member).scores()
            ids = store.scores.find_ids(examples)
        base = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32)
        tuned = PeftModel.from_pretrained(base, str(adapter_of(model))).eval()
        for example, number in zip(examples, ids.tolist(), strict=True):
            if number not in scores:  # the target model answers the questions alone
                continue
            with torch.no_grad():
                logprobs = torch.log_softmax(tuned(torch.tensor([example.ids])).logits[0].float(), -1)
            reference = np.mean([float(logprobs[t - 1, example.ids[t]]) for t in example.targets])
            differences.append(float(reference - np.mean(scores[number].logprobs)))
    found = np.array(differences)
    rms, largest = np.sqrt((found**2).mean()), np.abs(found).max()
    print(f"\n{name} against PEFT: {found.size} losses, rms {rms:.2g}, max {largest:.2g}, mean {found.mean():.1g} nats")
    return found
