"""What every method is given: the same model, data, fine-tuned weights and ground truth, in plain PyTorch.

A subject's model has exactly the trained weights as parameters (of the language model the LoRA matrices; its frozen
base are buffers), so that "the gradient" is the same thing for every library. ``model(x)`` gives logits and
``losses(logits, y)`` the nats of each example: cross-entropy, or the mean over completion tokens (labels -100
elsewhere).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.benchmarks.tasks import CACHE, Task, _fit, all_tasks, losses

State = dict[str, Tensor]
CHECKPOINTS = 10
FIRST_SEED = 1000


@dataclass
class Subject:
    """One task as white-box methods see it; ``texts`` where examples are text."""

    task: Task
    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    losses: Callable[[Tensor, Tensor], Tensor]
    margins: Callable[[Tensor, Tensor], Tensor]
    layers: list[str]
    texts: tuple[list[str], list[str]] | None = None
    target: State | None = None
    checkpoints: list[State] | None = None
    checkpoint_seconds: float = 0.0

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    def truth(self) -> tuple[np.ndarray, np.ndarray]:
        """Inclusion (S, N) and seed-averaged losses (S, M) of the retrained models."""
        found = losses(self.task, "truth")
        return found["inclusion"], found["test"]

    def loaded(self, state: State) -> nn.Module:
        """The model with these weights, in evaluation mode."""
        self.model.load_state_dict(state, strict=False)
        return self.model.eval()

    def with_weights(self) -> Subject:
        """Target and ten models of the same recipe on all training examples; trained once, then from the cache."""
        path = CACHE / "peers" / self.name / "weights.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            target, _ = _weights(self.task, [])
            start = time.perf_counter()
            checkpoints, seconds = _weights(self.task, [FIRST_SEED + i for i in range(CHECKPOINTS)])
            seconds = seconds or time.perf_counter() - start
            temporary = path.with_suffix(".part")
            torch.save({"target": target[0], "checkpoints": checkpoints, "seconds": seconds}, temporary)
            temporary.rename(path)
        stored = torch.load(path, weights_only=True)
        self.target, self.checkpoints = stored["target"], stored["checkpoints"]
        self.checkpoint_seconds = stored["seconds"]
        self.loaded(stored["target"])
        return self


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    own = logits.gather(-1, labels[..., None])
    others = logits.scatter(-1, labels[..., None], -torch.inf)
    return own[..., 0] - others.logsumexp(-1)


def _image_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.logsumexp(-1) - logits.gather(-1, labels[..., None])[..., 0]


def _per_token(values: Tensor, labels: Tensor) -> Tensor:
    known = (labels >= 0).to(values.dtype)
    return (values * known).sum(-1) / known.sum(-1)


def _text_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return _per_token(_image_losses(logits, labels.clamp(min=0)), labels)


def _text_margins(logits: Tensor, labels: Tensor) -> Tensor:
    return _per_token(_margin(logits, labels.clamp(min=0)), labels)


class LoraLinear(nn.Module):
    """A frozen linear layer and a LoRA update of rank r, as two bias-free linear layers that every library knows."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.register_buffer("weight", base.weight.detach())
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the layer."""
        out: Tensor = nn.functional.linear(x, self.weight) + 2.0 * self.b(self.a(x))  # type: ignore[arg-type]
        return out


class LoraModel(nn.Module):
    """Tokens (B, T) -> logits (B, T, V). A causal mask is given whole, so that nothing depends on the data's values."""

    def __init__(self, model: Any, rank: int) -> None:
        super().__init__()
        self.inner = model
        model.set_attn_implementation("eager")  # second derivatives
        for layer in model.model.layers:
            for name in ("q_proj", "v_proj"):
                setattr(layer.self_attn, name, LoraLinear(getattr(layer.self_attn, name), rank))
        for module in model.modules():
            if isinstance(module, nn.Linear) and module in self._adapters():
                continue
            for name, value in list(module.named_parameters(recurse=False)):
                del module._parameters[name]
                module.register_buffer(name, value.detach(), persistent=False)

    def _adapters(self) -> set[nn.Module]:
        return {m for layer in self.modules() if isinstance(layer, LoraLinear) for m in (layer.a, layer.b)}

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        width = tokens.shape[-1]
        mask = torch.full((width, width), torch.finfo(torch.float32).min).triu(1)[None, None]
        logits: Tensor = self.inner(tokens, attention_mask=mask, use_cache=False).logits
        return logits


def subject(name: str) -> Subject:
    """One task's subject, without weights."""
    task = all_tasks()[name]
    owner: Any = task.train.__self__  # type: ignore[attr-defined]
    if name == "lm":
        return _language(task, owner)
    if name == "resnet":
        from tests.benchmarks.tasks_resnet import network

        data, model = owner.load(), network()
    else:
        owner.start("base", 1, np.array([0]))
        data = owner.data
        inputs, hidden, classes = owner.sizes
        model = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    train, test = (data["x"], data["y"]), (data["test_x"], data["test_y"])
    return Subject(task, model.eval(), train, test, _image_losses, _margin, layers)


def _language(task: Task, owner: Any) -> Subject:
    from transformers import AutoModelForCausalLM

    import daunce_api
    from daunce_api.attribution.similarity import example_texts
    from daunce_api.data.dataset import Dataset
    from tests.benchmarks.tasks_lm import RANK

    owner._load()
    folder = next(iter(daunce_api.__path__))
    fresh = AutoModelForCausalLM.from_pretrained(f"{folder}/server/model", dtype=torch.float32)
    model = LoraModel(fresh, RANK).eval()
    sides = []
    for split in ("train", "test"):
        tokens, mask = owner.examples[split]
        sides.append((tokens[:, :-1].contiguous(), torch.where(mask[:, 1:] > 0, tokens[:, 1:], -100)))
    texts = [
        example_texts(Dataset.from_jsonl(f"{folder}/../examples/uses/backdoor/{split}.jsonl"))
        for split in ("train", "test")
    ]
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith((".a", ".b"))]
    return Subject(task, model, sides[0], sides[1], _text_losses, _text_margins, layers, (texts[0], texts[1]))


def _weights(task: Task, seeds: list[int]) -> tuple[list[State], float]:
    """The target (no seeds), or models of all training examples with these seeds, and the seconds of training alone."""
    owner: Any = task.train.__self__  # type: ignore[attr-defined]
    if task.name == "resnet":
        if not seeds:
            return [owner.target()], 0.0
        members = owner.whole(seeds)
        return [members.state(i) for i in range(len(seeds))], 0.0
    whole = np.ones((max(1, len(seeds)), task.size), dtype=bool)
    numbers = np.array(seeds)
    if task.name == "lm":
        if not owner.ready:
            owner._load()
        stack = owner._adapters("base" if seeds else "target", len(whole))
        start = time.perf_counter()
        if seeds:
            owner._fit(stack, task.target, whole, numbers)
        return [_lora_state(stack, i) for i in range(len(whole))], time.perf_counter() - start
    stack = owner.start("base" if seeds else "target", len(whole), numbers)
    start = time.perf_counter()
    if seeds:
        _fit(stack, owner.data["x"], owner.data["y"], task.target, whole, numbers)
    return [_mlp_state(stack, i) for i in range(len(whole))], time.perf_counter() - start


def _mlp_state(stack: list[Tensor], member: int) -> State:
    w1, b1, w2, b2 = (w[member].detach() for w in stack)
    return {"0.weight": w1.T.clone(), "0.bias": b1[0].clone(), "2.weight": w2.T.clone(), "2.bias": b2[0].clone()}


def _lora_state(stack: list[Tensor], member: int) -> State:
    state = {}
    for i, (a, b) in enumerate(zip(stack[::2], stack[1::2], strict=True)):
        path = f"inner.model.layers.{i // 2}.self_attn.{('q_proj', 'v_proj')[i % 2]}"
        state[f"{path}.a.weight"] = a[member].detach().T.clone()
        state[f"{path}.b.weight"] = b[member].detach().T.clone()
    return state
