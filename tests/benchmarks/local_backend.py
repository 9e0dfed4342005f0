"""The local backend against the usual loops: ratios, peak memory and the floor, all measured in one run.

    python tests/benchmarks/local_backend.py [tiny] [mlp] [resnet] [smollm] [scoring]

Every variant runs in a process of its own with one torch thread. Times are CPU seconds of the process per member and
optimiser step, the best of two repeats that alternate between the variants; peak memory is the growth of the resident
set over what the process held before training. A loop's time per member does not depend on the number of members, so
loops are measured on fewer. ``scoring`` is CPU time an example, the median of five repeats.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPEATS = 2
MEMBERS = 32
EXAMPLES = 80

Step = Callable[[], tuple[int, Any]]
"""Does some work; returns the member-steps that it did and what it found."""


def texts(count: int) -> list[dict[str, str]]:
    import random

    words = ["river", "stone", "garden", "machine", "winter", "song", "letter", "mountain", "engine", "paper", "glass"]
    rng = random.Random(0)
    return [
        {
            "prompt": f"Q: What is {rng.choice(words)} {rng.choice(words)}?\nA:",
            "completion": " A " + " ".join(rng.choice(words) for _ in range(rng.randint(4, 28))) + ".",
        }
        for _ in range(count)
    ]


def folder_of(name: str) -> str:
    """What a model is loaded by."""
    if name != "smollm2-135m":
        return name
    from smollm2 import converted

    return str(converted())


class Language:
    """The same members and steps for every variant: rank-8 LoRA on q and v, batches of 8, one epoch."""

    def __init__(self, name: str, examples: int, dtype: str = "float32") -> None:
        from daunce_api.data.dataset import Dataset
        from daunce_api.data.tokenizers import encode_example
        from daunce_api.providers.local.language import LanguageModel, LoraSettings

        self.model = LanguageModel.load(folder_of(name), dtype=dtype)
        data = Dataset.from_records(texts(2 * examples))
        self.examples = [encode_example(e, self.model.tokenizer) for e in data]
        self.settings = LoraSettings(n_epochs=1, targets=("q_proj", "v_proj"))
        self.size = examples

    def subset(self, member: int) -> list[Any]:
        import random

        return random.Random(member).sample(self.examples, self.size)

    def ours(self, members: int, tokens: int | None = None) -> Step:
        from daunce_api.providers.local.memory import limits_of
        from daunce_api.providers.local.train import LoraTrainee, Member, fine_tune

        shapes = self.model.adapter_shapes(self.settings.targets)
        sizes = {"member_bytes": 1, "members": members, "longest": max(len(e.ids) for e in self.examples)}
        most = limits_of(self.model.adapted, **sizes, budget=1 << 40, tokens=tokens).tokens

        def step() -> tuple[int, Any]:
            group = [Member(self.subset(k), k) for k in range(members)]
            trainee = LoraTrainee(self.model.adapted, group, shapes, self.settings)
            losses = fine_tune(self.model.adapted, trainee, self.settings, max_tokens=most)
            return sum(map(len, losses)), [history[-1] for history in losses]

        return step

    def batches(self, member: int) -> list[dict[str, Any]]:
        """Padded batches in the order that our own training takes, with masks and labels as the usual loop has them."""
        import torch

        from daunce_api.providers.local.train import batches_of

        subset = self.subset(member)
        out = []
        for _, chosen in batches_of(len(subset), self.settings, member):
            rows = [subset[i] for i in chosen]
            width = max(len(e.ids) for e in rows)
            ids = torch.zeros(len(rows), width, dtype=torch.long)
            labels = torch.full((len(rows), width), -100)
            mask = torch.zeros(len(rows), width, dtype=torch.long)
            for r, example in enumerate(rows):
                ids[r, : len(example.ids)] = torch.tensor(example.ids)
                mask[r, : len(example.ids)] = 1
                labels[r, list(example.targets)] = ids[r, list(example.targets)]
            out.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        return out

    def _peft(self) -> Any:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        return get_peft_model(self.model.adapted.model, config)

    def peft_loop(self, members: int) -> Step:
        import torch
        from transformers import get_cosine_schedule_with_warmup

        def step() -> tuple[int, Any]:
            done = 0
            for member in range(members):
                wrapped = self._peft()
                optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
                batches = self.batches(member)
                schedule = get_cosine_schedule_with_warmup(optimizer, 1, len(batches))
                for batch in batches:
                    wrapped(**batch).loss.backward()
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                    done += 1
                wrapped.unload()
            return done, None

        return step

    def trainer(self, members: int) -> Step:
        import tempfile

        from transformers import Trainer, TrainingArguments

        def step() -> tuple[int, Any]:
            done = 0
            for member in range(members):
                rows = [
                    {
                        "input_ids": list(e.ids),
                        "labels": [t if i in set(e.targets) else -100 for i, t in enumerate(e.ids)],
                    }
                    for e in self.subset(member)
                ]
                wrapped = self._peft()
                with tempfile.TemporaryDirectory() as folder:
                    arguments = TrainingArguments(
                        folder,
                        per_device_train_batch_size=8,
                        num_train_epochs=1,
                        learning_rate=1e-3,
                        lr_scheduler_type="cosine",
                        report_to="none",
                        save_strategy="no",
                        logging_strategy="no",
                        disable_tqdm=True,
                        use_cpu=True,
                        seed=member,
                    )
                    result = Trainer(wrapped, arguments, train_dataset=rows, data_collator=_collate).train()
                done += result.global_step
                wrapped.unload()
            return done, None

        return step


class Scoring:
    """The log-probabilities of the same completions under each of several rank-8 adapters."""

    def __init__(self, name: str, members: int, examples: int) -> None:
        import tempfile

        import torch

        from daunce_api.data.dataset import Dataset
        from daunce_api.data.tokenizers import encode_example
        from daunce_api.providers.local.adapters import save_adapter
        from daunce_api.providers.local.language import LanguageModel, LoraSettings
        from daunce_api.providers.local.train import fresh_weights

        self.model = LanguageModel.load(folder_of(name))
        encoded = [encode_example(e, self.model.tokenizer) for e in Dataset.from_records(texts(examples))]
        self.sequences = [(e.ids, e.targets) for e in encoded]
        self.held = tempfile.TemporaryDirectory()
        self.adapters = [Path(self.held.name) / str(k) for k in range(members)]
        generator = torch.Generator().manual_seed(0)
        for k, folder in enumerate(self.adapters):
            fresh = fresh_weights(self.model.adapter_shapes(None), 8, k)
            weights = {n: (a, torch.randn(b.shape, generator=generator) / 50) for n, (a, b) in fresh.items()}
            save_adapter(folder, weights, LoraSettings(), self.model.name)

    def together(self) -> tuple[int, Any]:
        found = [self.model.target_logprobs(self.sequences, adapter=a) for a in self.adapters]
        return len(found) * len(self.sequences), [float(v) for answers in found for answer in answers for v in answer]

    def alone(self) -> tuple[int, Any]:
        found = []
        for adapter in self.adapters:
            answers = self.model.token_logprobs([ids for ids, _ in self.sequences], adapter=adapter)
            for answer, (_, targets) in zip(answers, self.sequences, strict=True):
                found += [float(answer.logprobs[t - 1]) for t in targets]
        return len(self.adapters) * len(self.sequences), found


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    import torch

    width = max(len(r["input_ids"]) for r in rows)

    def padded(key: str, fill: int) -> Any:
        return torch.tensor([r[key] + [fill] * (width - len(r[key])) for r in rows])

    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


class Images:
    """Classifier members: 1,000 random examples, halves, one or two epochs of SGD."""

    def __init__(self, kind: str) -> None:
        import numpy as np
        import torch

        sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
        from vision_models import MLP, ResNet9

        from daunce_api.providers.local.classifier import ClassifierSettings

        torch.manual_seed(0)
        if kind == "mlp":
            self.factory: Callable[[], Any] = lambda: MLP(64, 32, 10)
            self.x, self.members, self.loops = torch.randn(1000, 64), 100, 10
            self.settings = ClassifierSettings(batch_size=25)
        else:
            width = int(kind.removeprefix("resnet"))
            self.factory = lambda: ResNet9(channels=1, width=width)
            self.x, self.members, self.loops = torch.randn(64, 1, 16, 16), 8, 8
            self.settings = ClassifierSettings(batch_size=16, n_epochs=2, momentum=0.9, learning_rate=0.03)
        self.y = torch.randint(0, 10, (len(self.x),))
        rng = np.random.default_rng(0)
        self.inclusion = np.zeros((self.members, len(self.x)), dtype=bool)
        for row in self.inclusion:
            row[rng.permutation(len(row))[: len(row) // 2]] = True
        self.steps = self.settings.n_epochs * -(-(len(self.x) // 2) // self.settings.batch_size)

    def ours(self) -> Step:
        from daunce_api.providers.local.classifier import Classifier

        classifier = Classifier(self.factory)

        def step() -> tuple[int, Any]:
            classifier.train(self.x, self.y, self.inclusion, range(self.members), self.settings)
            return self.members * self.steps, None

        return step

    def loop(self) -> Step:
        import numpy as np
        import torch

        def step() -> tuple[int, Any]:
            done = 0
            for member in range(self.loops):
                torch.manual_seed(member)
                model = self.factory()
                optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=self.settings.momentum)
                positions = np.flatnonzero(self.inclusion[member])
                for _ in range(self.settings.n_epochs):
                    for batch in torch.from_numpy(np.random.permutation(positions)).split(self.settings.batch_size):
                        loss = torch.nn.functional.cross_entropy(model(self.x[batch]), self.y[batch])
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                        done += 1
            return done, None

        return step


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def variant(name: str) -> Step:
    """The work of one variant, by its name on this script's command line."""
    kind, _, rest = name.partition(":")
    if kind.startswith("score "):
        path = kind.removeprefix("score ")
        scoring = Scoring(path, *((4, 200) if path == "daunce-tiny" else (2, 24)))
        return scoring.together if rest == "together" else scoring.alone
    if kind in ("tiny", "smollm"):
        what, _, dtype = rest.partition("@")
        what, _, tokens = what.partition(" of ")
        path, members, examples = ("daunce-tiny", MEMBERS, EXAMPLES) if kind == "tiny" else ("smollm2-135m", 4, 16)
        language = Language(path, examples, dtype or "float32")
        few = 2 if kind == "tiny" else 1
        return {
            "together": lambda: language.ours(members, int(tokens) if tokens else None),
            "alone": lambda: language.ours(1),
            "peft loop": lambda: language.peft_loop(few),
            "transformers.Trainer": lambda: language.trainer(few),
        }[what]()
    images = Images(kind)
    return images.ours() if rest == "together" else images.loop()


def child(name: str) -> None:
    """Answer each line of standard input with one JSON object: seconds a member-step, peak growth in MiB, findings."""
    import torch

    torch.set_num_threads(1)
    step = variant(name)
    held = _resident_mib()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        with contextlib.redirect_stdout(sys.stderr):  # transformers.Trainer prints
            steps, found = step()
        seconds = (time.process_time() - start) / steps
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - held
        print(json.dumps({"seconds": seconds, "peak_mib": peak, "found": found}), flush=True)


def measure(
    names: list[str], repeats: int = REPEATS, of_repeats: Callable[[list[float]], float] = min
) -> dict[str, dict[str, Any]]:
    """Best time of each variant, or what else ``of_repeats`` takes of its times; repeats alternate, so that a busy
    machine disturbs all alike."""
    children = {}
    for name in names:
        command = [sys.executable, __file__, "--child", name]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        while process.stdout.readline().strip() != "ready":
            if process.poll() is not None:
                raise SystemExit(f"{name} did not start")
        children[name] = process
    results: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, process in children.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            seconds[name].append(answer["seconds"])
            results[name] = {**answer, "seconds": of_repeats(seconds[name])}
    for process in children.values():
        process.communicate()
    return results


def report(title: str, names: list[str], repeats: int = REPEATS) -> dict[str, dict[str, Any]]:
    results = measure(names, repeats)
    reference = results[names[0]]["seconds"]
    print(f"\n{title}")
    for name in names:
        r = results[name]
        print(
            f"  {name:32s} {1e3 * r['seconds']:9.3f} ms a member-step, {r['seconds'] / reference:6.2f} x the first's, "
            f"peak +{r['peak_mib']:.0f} MiB"
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["tiny", "mlp", "resnet", "smollm", "scoring"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    if "tiny" in args.what:
        names = ["tiny:together", "tiny:alone", "tiny:peft loop", "tiny:transformers.Trainer"]
        results = report(f"{MEMBERS} LoRA members of the embedded model", names)
        half = report("The same with the frozen model in bfloat16", ["tiny:together@bfloat16", "tiny:alone@bfloat16"])
        _loss_change(results[names[0]], half["tiny:together@bfloat16"])
    if "mlp" in args.what:
        report("100 MLP members (64-32-10)", ["mlp:together", "mlp:loop"], 5)
    if "resnet" in args.what:
        for width in (4, 8, 16):
            report(f"8 ResNet-9 members (width {width}, 16 x 16)", [f"resnet{width}:together", f"resnet{width}:loop"])
    if "scoring" in args.what:
        for path in ("daunce-tiny", "smollm2-135m"):
            score(path)
    if "smollm" in args.what:
        names = ["smollm:together", "smollm:together of 768", "smollm:together of 1024", "smollm:alone"]
        names += ["smollm:peft loop"]
        full = report("4 LoRA members of SmolLM2-135M", names, 1)
        half = report("The same with the frozen model in bfloat16", ["smollm:together@bfloat16"], 1)
        _loss_change(full["smollm:together"], half["smollm:together@bfloat16"])


def score(path: str) -> None:
    names = [f"score {path}:together", f"score {path}:alone"]
    results = measure(names, 5, statistics.median)
    print(f"\nLog-probabilities under adapters of {path}")
    for name in names:
        r = results[name]
        print(f"  {name:32s} {1 / r['seconds']:9.1f} examples a CPU second, peak +{r['peak_mib']:.0f} MiB")
    together, alone = (results[name] for name in names)
    change = max(abs(a - b) for a, b in zip(together["found"], alone["found"], strict=True))
    print(f"  together: {alone['seconds'] / together['seconds']:.2f} x as fast; differs by {change:.1g} nats at most")


def _loss_change(full: dict[str, Any], half: dict[str, Any]) -> None:
    change = [abs(a - b) for a, b in zip(full["found"], half["found"], strict=True)]
    print(
        f"  bfloat16: {full['seconds'] / half['seconds']:.2f} x as fast; a member's last loss changes by "
        f"{sum(change) / len(change):.4f} nats on average, {max(change):.4f} at most"
    )


if __name__ == "__main__":
    main()
