"""Fine-tunes by other people's layers and a loop that anybody can check, to hold the backend's against."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from daunce_api.data.tokenizers import EncodedExample
from daunce_api.providers.local.language import LanguageModel
from daunce_api.providers.local.lora import AdaptedModel
from daunce_api.providers.local.options import FullSettings, LoraSettings, Recipe
from daunce_api.providers.local.train import (
    LoraTrainee,
    Member,
    Weights,
    batches_of,
    fine_tune,
    trained_tokens,
)


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
        optimizer.param_groups[0]["lr"] = recipe.rate(step, len(steps))
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_members(
    model: AdaptedModel,
    members: Sequence[Member],
    shapes: Mapping[str, tuple[int, int]],
    settings: LoraSettings,
    start: Weights | None = None,
    **options: Any,
) -> tuple[list[Weights], list[list[float]]]:
    """The adapters of K members after ``fine_tune`` with these ``options``, and their losses."""
    trainee = LoraTrainee(model, members, shapes, settings, start)
    losses = fine_tune(model, trainee, settings, **options)
    return [trainee.weights(k) for k in range(len(members))], losses


@dataclass(frozen=True)
class Trained:
    adapter: Path
    losses: tuple[float, ...]
    trained_tokens: int


def train_one(
    model: LanguageModel,
    examples: Sequence[EncodedExample],
    *,
    settings: LoraSettings | FullSettings,
    seed: int,
    out: Path,
    start_from: Path | None = None,
    checkpoint: Callable[[int, Path], None] | None = None,
    on_step: Callable[[int, int, list[float]], None] | None = None,
) -> Trained:
    """One fine-tune of a model, as the server makes it."""
    trainee = model.trainee([(examples, seed)], settings, start_from)

    def after_epoch(epoch: int) -> None:
        if checkpoint is not None:
            model.save(folder := out.with_name(f"{out.name}.epoch-{epoch}"), trainee)
            checkpoint(epoch, folder)

    [losses] = fine_tune(model.adapted, trainee, settings, after_step=on_step, after_epoch=after_epoch)
    model.save(out, trainee)
    return Trained(out, tuple(losses), trained_tokens(examples, settings))


_CODE = """
import resource
import tempfile
import torch
from pathlib import Path
from daunce_api.providers.local.options import LoraSettings, ModelSpec
from daunce_api.providers.local.store import MemberTask
from daunce_api.providers.local.worker import TrainTask, run_train
from daunce_api.providers.objective import Objective
from daunce_api.data.dataset import Dataset

words = "river stone garden engine winter song bridge ".split()
texts = [
    {"prompt": f"Q: {i}\\nA:", "completion": " " + " ".join(words[i * j % 7] for j in range(40))}
    for i in range(16)
]
data = Dataset.from_records(texts)
settings = LoraSettings(n_epochs=1, batch_size=16)

out = tempfile.mkdtemp()

def run(members):
    content = data.training_file(range(16), "last")
    group = tuple(MemberTask(f"m{k}", content, k, Path(out, str(k))) for k in range(members))
    spec = ModelSpec.of("daunce-tiny", memory_limit_gib=LIMIT / 2**30)
    results = run_train(TrainTask(spec, settings, Objective(), group))
    assert not any(r.error for r in results), results[0].error

run(1)
held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
run(16)
# Not ru_maxrss: a child inherits that of the process that started it.
status = Path("/proc/self/status").read_text()
peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
print(peak * 1024 - held)
"""


def memory_used(limit: int) -> int:
    """Bytes that a process of its own grows by while it trains 16 members within ``limit`` bytes."""
    code = _CODE.replace("LIMIT", str(limit))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)
