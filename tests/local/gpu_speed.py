"""Members a minute of a random 1B Llama in bfloat16 on one GPU: 1, 8 and 32 adapters together, and a PEFT loop; then
scoring under one of the adapters, against vLLM. Without a GPU, the same with a tiny model in float32 on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from daunce_api.data.dataset import Dataset
from daunce_api.data.tokenizers import EncodedExample
from daunce_api.providers.local.adapters import save_adapter, shapes_of, target_modules
from daunce_api.providers.local.language import LanguageModel
from daunce_api.providers.local.lora import AdaptedModel
from daunce_api.providers.local.memory import default_budget, limits_of
from daunce_api.providers.local.options import LoraSettings
from daunce_api.providers.local.train import LoraTrainee, Member, fine_tune

GPU = torch.cuda.is_available()
SETTINGS = LoraSettings(n_epochs=1, batch_size=8, learning_rate=3e-3, targets=("q_proj", "v_proj"))
LENGTH, EXAMPLES = (256, 32) if GPU else (24, 16)


def model_of(device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128_256}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    if not GPU:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **sizes, **heads))
    return model.to(torch.bfloat16 if GPU else torch.float32).eval().requires_grad_(False)


def seconds(work: Callable[[], object]) -> float:
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare_with_vllm(folder: Path, examples: list[EncodedExample], ours: list[list[float]], rate: float) -> None:
    """Scores the same sequences by vLLM in a process of its own, and says how far the two are apart."""
    python = os.environ.get("VLLM_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import vllm"], capture_output=True, check=False).returncode:
        print(f"vLLM scoring: not compared, {python} cannot import vllm (set VLLM_PYTHON to one that can)")
        return
    (folder / "sequences.json").write_text(json.dumps([e.ids for e in examples]))
    script = Path(__file__).with_name("gpu_vllm.py")
    names = ("model", "adapter", "sequences.json", "answer.json")
    subprocess.run([python, script, *(folder / name for name in names)], check=True)
    answer = json.loads((folder / "answer.json").read_text())
    theirs = [[values[t - 1] for t in e.targets] for values, e in zip(answer["logprobs"], examples, strict=True)]
    apart = max(abs(sum(a) - sum(b)) / len(a) for a, b in zip(ours, theirs, strict=True))
    print(
        f"vLLM scoring: {EXAMPLES / answer['seconds']:8.1f} sequences a second, ours {rate:.1f}; an example's mean "
        f"log-probability differs by {apart:.2g} nats at most"
    )
    assert apart < (0.1 if GPU else 1e-3), "vLLM scores another model"


def main() -> None:
    device = "cuda" if GPU else "cpu"
    base = model_of(device)
    model = AdaptedModel(base)
    folder = Path(tempfile.mkdtemp())
    base.save_pretrained(folder / "model")
    examples = [
        EncodedExample(
            example,
            tuple(torch.randint(0, base.config.vocab_size, (LENGTH,)).tolist()),
            tuple(range(LENGTH // 2, LENGTH)),
        )
        for example in Dataset.from_records([{"prompt": f"{i}", "completion": "x"} for i in range(EXAMPLES)])
    ]
    shapes = shapes_of(model, target_modules(model, SETTINGS.targets))
    numbers = SETTINGS.rank * sum(map(sum, shapes.values()))
    budget = default_budget(model.device, 1)
    print(f"{torch.cuda.get_device_name() if GPU else 'CPU'}; budget {budget >> 20:,} MiB; files under {folder}")
    for members in (1, 8, 32):
        limits = limits_of(
            model, member_bytes=20 * numbers, members=members, longest=LENGTH, budget=budget, tokens=None
        )
        trainee = LoraTrainee(model, [Member(examples, k) for k in range(limits.members)], shapes, SETTINGS)
        held = torch.cuda.memory_allocated() if GPU else 0
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        took = seconds(lambda t=trainee, most=limits.tokens: fine_tune(model, t, SETTINGS, max_tokens=most))
        peak = torch.cuda.max_memory_allocated() - held if GPU else 0
        rate = 60 * limits.members / took
        print(f"{limits.members:3d} together: {rate:8.1f} members a minute, {peak >> 20:,} MiB")
        assert peak <= budget, "more memory than the budget"
    save_adapter(folder / "adapter", trainee.weights(0), SETTINGS, "random")
    scoring, ours = LanguageModel("random", model, None), []  # type: ignore[arg-type] - no text is read
    rows = [(e.ids, e.targets) for e in examples]
    scoring.target_logprobs(rows[:1], adapter=folder / "adapter")
    rate = EXAMPLES / seconds(lambda: ours.extend(scoring.target_logprobs(rows, adapter=folder / "adapter")))
    print(f"scoring: {rate:8.1f} sequences a second")
    wrapped = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)

    def loop() -> None:
        for first in range(0, EXAMPLES, 8):
            ids = torch.tensor([e.ids for e in examples[first : first + 8]], device=device)
            labels = ids.clone()
            labels[:, : LENGTH // 2] = -100
            wrapped(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    print(f"PEFT loop:    {60 / seconds(loop):8.1f} members a minute")
    compare_with_vllm(folder, examples, [answer.tolist() for answer in ours], rate)


if __name__ == "__main__":
    main()
