"""Fine-tunes by other people's layers and a loop that anybody can check, to hold the backend's against."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch

from daunce_api.data.tokenizers import EncodedExample
from daunce_api.providers.local.recipes import Recipe
from daunce_api.providers.local.training import batches_of, learning_rate_at


def train_plainly(model: Any, examples: list[EncodedExample], recipe: Recipe, seed: int) -> list[float]:
    """One example at a time, plain AdamW over what ``model`` lets be trained; the loss of every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    steps = batches_of(len(examples), recipe, seed)
    losses = []
    for step, (_, batch) in enumerate(steps):
        loss = torch.zeros(())
        for i in batch:
            ids, targets = examples[i].ids, list(examples[i].targets)
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            loss = loss - logprobs[[t - 1 for t in targets], [ids[t] for t in targets]].mean() / len(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, len(steps), recipe)
        optimizer.step()
        losses.append(loss.item())
    return losses


_BEFORE = """
import resource
import torch
from pathlib import Path
from daunce_api.providers.local.language import FullSettings, LanguageModel, LoraSettings
from daunce_api.providers.local.memory import plan_full_memory, plan_memory
from daunce_api.providers.objective import Objective
from daunce_api.providers.local.trainees import Member
from daunce_api.providers.local.training import train_full, train_members
from daunce_api.data.dataset import Dataset
from daunce_api.data.tokenizers import encode_example

torch.set_num_threads(1)
model = LanguageModel.load("daunce-tiny", gradient_checkpointing=checkpointing)
words = "river stone garden engine winter song bridge ".split()
texts = [
    {"prompt": f"Q: {i}\\nA:", "completion": " " + " ".join(words[i * j % 7] for j in range(40))}
    for i in range(64)
]
examples = [encode_example(e, model.tokenizer) for e in Dataset.from_records(texts)]
"""

_HELD = """
held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
"""

_AFTER = """
# Not ru_maxrss: a child inherits that of the process that started it.
status = Path("/proc/self/status").read_text()
peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
print(peak * 1024 - held, plan.estimate - plan.keep_bytes)
"""


def memory_used(warm_up: str, planned: str, **names: object) -> tuple[int, int]:
    """Bytes that a process of its own grows by while it runs ``planned``, which sets ``plan``, and what ``plan``
    expected. ``warm_up`` runs before; both have ``model``, 64 ``examples`` and these ``names``; ``checkpointing`` is
    the model's."""
    given = "".join(f"{name} = {value!r}\n" for name, value in ({"checkpointing": False} | names).items())
    code = given + _BEFORE + warm_up + _HELD + planned + _AFTER
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    used, estimate = map(int, done.stdout.split())
    return used, estimate
