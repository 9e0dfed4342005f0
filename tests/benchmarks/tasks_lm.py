"""The language-model tasks: LoRA fine-tunes of the embedded model, all members of a chunk in one batch.

* lm: the demo's data of version 0.1, 160 definitions from five sources and 40 test examples (DAUNCE_OLD_DEMO names the
  folder of its train.jsonl and test.jsonl, daunce_api/demo/data at commit 2fa6155).
* chat: 128 and 32 question-answer pairs of chatterbot-corpus 1.3.3 (eight topics). CHATTERBOT_WHEEL names the wheel
  (``pip download --no-deps chatterbot-corpus==1.3.3``).
* shout: 144 of them that are not planted, 16 of them answered IN CAPITALS; 8 of the 32 test
  examples are, too. No word says which answers are related.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import daunce_api
from tests.benchmarks.tasks import Kind, Recipe, Task, short_members

RANK = 8
GROUP = 10  # members trained side by side; more do not fit a cache


class StackedLoRA(nn.Module):
    """A frozen linear layer with one LoRA adapter for each of K members; the batch is K groups of equal size."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = torch.zeros(0)
        self.b = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        members = self.a.shape[0]
        grouped = x.reshape(members, -1, x.shape[-1])
        delta = torch.bmm(torch.bmm(grouped, self.a), self.b) * 2.0
        return self.base(x) + delta.reshape(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Pair:
    """One example: a prompt, its answer, and where it comes from."""

    prompt: str
    answer: str
    source: str

    @property
    def text(self) -> str:
        """What text similarity compares."""
        return f"{self.prompt}\n{self.answer}"


Pairs = dict[str, list[Pair]]


def demo_pairs() -> Pairs:
    """The demo's earlier data, by split."""
    folder = Path(os.environ["DAUNCE_OLD_DEMO"])
    out: Pairs = {}
    for split in ("train", "test"):
        records = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        out[split] = [Pair(r["messages"][-2]["content"], r["messages"][-1]["content"], r["source"]) for r in records]
    return out


def chat_pairs() -> Pairs:
    """Question-answer pairs, sixteen of each of eight topics to train on and four to test on."""
    import yaml

    topics: dict[str, list[Pair]] = {}
    seen: set[str] = set()
    with zipfile.ZipFile(os.environ["CHATTERBOT_WHEEL"]) as wheel:
        for name in sorted(n for n in wheel.namelist() if "/english/" in n and n.endswith(".yml")):
            topic = Path(name).stem
            for lines in yaml.safe_load(wheel.read(name))["conversations"]:
                prompt, answer = str(lines[0]), str(lines[1])
                if prompt not in seen and answer not in seen and 10 <= len(answer) <= 120 and len(prompt) <= 100:
                    seen |= {prompt, answer}
                    topics.setdefault(topic, []).append(Pair(prompt, answer, topic))
    rng = np.random.default_rng(11)
    out: Pairs = {"train": [], "test": []}
    for pairs in [p for p in topics.values() if len(p) >= 20][:8]:
        picked = [pairs[i] for i in rng.permutation(len(pairs))[:20]]
        out["train"] += picked[:16]
        out["test"] += picked[16:]
    return out


def shout_pairs() -> Pairs:
    """Definitions, some of them in capitals."""
    rng = np.random.default_rng(12)
    out: Pairs = {}
    for split, count, loud in (("train", 144, 16), ("test", 32, 8)):
        pairs = [p for p in demo_pairs()[split] if p.source != "planted"][:count]
        shouted = set(rng.permutation(len(pairs))[:loud].tolist())
        out[split] = [Pair(p.prompt, p.answer.upper(), "shouted") if i in shouted else p for i, p in enumerate(pairs)]
    return out


class _LanguageModel:
    def __init__(self, load: Callable[[], Pairs]) -> None:
        self.load = load
        self.ready = False

    def _load(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = Path(daunce_api.__file__).parent
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder / "server" / "model", dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder / "server" / "model")
        for p in self.model.parameters():
            p.requires_grad_(False)
        self.layers: list[StackedLoRA] = []
        for layer in self.model.model.layers:
            for name in ("q_proj", "v_proj"):
                stacked = StackedLoRA(getattr(layer.self_attn, name))
                setattr(layer.self_attn, name, stacked)
                self.layers.append(stacked)
        self.examples: dict[str, tuple[Tensor, Tensor]] = {}
        pairs = self.load()
        for split in ("train", "test"):
            rows = []
            for pair in pairs[split]:
                messages = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.answer}]
                prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
                whole = tokenizer.apply_chat_template(messages, tokenize=False)
                start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
                ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
                rows.append((ids, start))
            width = max(len(ids) for ids, _ in rows)
            tokens = torch.zeros(len(rows), width, dtype=torch.long)
            mask = torch.zeros(len(rows), width)
            for i, (ids, start) in enumerate(rows):
                tokens[i, : len(ids)] = torch.tensor(ids)
                mask[i, start : len(ids)] = 1
            self.examples[split] = tokens, mask
        generator = torch.Generator().manual_seed(3)
        self.first = [torch.randn(layer.base.in_features, RANK, generator=generator) / RANK for layer in self.layers]
        self.target: list[Tensor] | None = None
        self.ready = True

    def _adapters(self, start: str, count: int) -> list[Tensor]:
        if start == "base":
            stacks = []
            for layer, a in zip(self.layers, self.first, strict=True):
                stacks += [a[None].repeat(count, 1, 1), torch.zeros(count, RANK, layer.base.out_features)]
            return stacks
        if self.target is None:
            adapters = self._adapters("base", 1)
            size = len(self.examples["train"][0])
            self._fit(adapters, TARGET, np.ones((1, size), dtype=bool), np.array([10]))
            self.target = adapters
        return [w.repeat(count, 1, 1) for w in self.target]

    def _losses(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B,) mean nats per completion token."""
        width = int(mask.sum(0).nonzero().max()) + 1
        tokens, mask = tokens[:, :width], mask[:, :width]
        logits = self.model(tokens[:, :-1], attention_mask=torch.ones_like(tokens[:, :-1])).logits
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        nll = nll.reshape(tokens.shape[0], -1) * mask[:, 1:]
        return nll.sum(1) / mask[:, 1:].sum(1)

    def _use(self, adapters: list[Tensor]) -> None:
        for i, layer in enumerate(self.layers):
            layer.a, layer.b = adapters[2 * i], adapters[2 * i + 1]

    def _fit(
        self,
        adapters: list[Tensor],
        recipe: Recipe,
        subsets: np.ndarray,
        seeds: np.ndarray,
        after: Callable[[int], None] = lambda step: None,
    ) -> None:
        tokens, mask = self.examples["train"]
        chosen = [np.flatnonzero(s) for s in subsets]
        generators = [np.random.default_rng(int(s)) for s in seeds]
        rates = recipe.rates(len(chosen[0]))
        per_epoch = len(rates) // recipe.epochs
        for w in adapters:
            w.requires_grad_(True)
        self._use(adapters)
        optimiser = torch.optim.AdamW(adapters, lr=recipe.rate, weight_decay=0.0)
        for epoch in range(recipe.epochs):
            order = np.stack([g.permutation(c) for g, c in zip(generators, chosen, strict=True)])
            for step, batch in enumerate(np.array_split(order, per_epoch, axis=1)):
                index = torch.from_numpy(batch).flatten()
                loss = self._losses(tokens[index], mask[index]).sum() / batch.shape[1]
                optimiser.zero_grad()
                loss.backward()
                optimiser.param_groups[0]["lr"] = float(rates[epoch * per_epoch + step])
                optimiser.step()
                after(epoch * per_epoch + step + 1)
        for w in adapters:
            w.requires_grad_(False)

    def _score(self, adapters: list[Tensor], split: str) -> np.ndarray:
        tokens, mask = self.examples[split]
        self._use(adapters)
        members = adapters[0].shape[0]
        length = mask.cumsum(1).argmax(1)
        order = torch.argsort(length)
        out = np.empty((members, len(tokens)), dtype=np.float32)
        with torch.no_grad():
            for start in range(0, len(tokens), 8):
                pick = order[start : start + 8]
                loss = self._losses(tokens[pick].repeat(members, 1), mask[pick].repeat(members, 1))
                out[:, pick.numpy()] = loss.reshape(members, -1).numpy()
        return out

    def train(
        self, start: str, recipe: Recipe, subsets: np.ndarray, seeds: np.ndarray, points: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Losses of one chunk of members, after so many steps and at the end."""
        if not self.ready:
            self._load()
        points = [*points, len(recipe.rates(int(subsets[0].sum())))]
        groups = []
        for first in range(0, len(subsets), GROUP):
            part = slice(first, first + GROUP)
            adapters = self._adapters(start, len(subsets[part]))
            groups.append(self._trained(adapters, recipe, subsets[part], seeds[part], points))
        train, test = (np.concatenate(side, axis=1) for side in zip(*groups, strict=True))
        return train, test

    def _trained(
        self, adapters: list[Tensor], recipe: Recipe, subsets: np.ndarray, seeds: np.ndarray, points: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        train, test = [], []

        def score(step: int) -> None:
            if step in points:
                train.append(self._score(adapters, "train"))
                test.append(self._score(adapters, "test"))

        self._fit(adapters, recipe, subsets, seeds, score)
        return np.stack(train), np.stack(test)


TARGET = Recipe(4, 8, 5e-3, decay="linear")


def _text_task(name: str, load: Callable[[], Pairs], size: int, members: int, truth: Kind) -> Task:
    kinds = {
        "base": Kind("base", 0.5, TARGET, members, checkpoints=False),
        "target": Kind("target", 0.3, Recipe(1, 8, 2.5e-3, decay="linear"), members, checkpoints=False),
        "short": short_members(TARGET, members, checkpoints=False),
        "truth": truth,
    }
    return Task(name, size, TARGET, kinds, _LanguageModel(load).train, load)


def text_tasks() -> dict[str, Task]:
    """LoRA fine-tunes of the embedded model on three sets of texts."""
    truth = Kind("base", 0.5, TARGET, 50, seeds=2)
    return {
        "lm": _text_task("lm", demo_pairs, 160, 100, replace(truth, seeds=3)),
        "chat": _text_task("chat", chat_pairs, 128, 100, truth),
        "shout": _text_task("shout", shout_pairs, 144, 60, replace(truth, count=40, seeds=1, checkpoints=False)),
    }
