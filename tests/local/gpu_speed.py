"""Members a minute of a random 1B Llama in bfloat16 on one GPU: 1, 8 and 32 adapters together, and a PEFT loop."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from daunce_api.data.dataset import Dataset
from daunce_api.data.tokenizers import EncodedExample
from daunce_api.providers.local.adapters import shapes_of, target_modules
from daunce_api.providers.local.lora import AdaptedModel
from daunce_api.providers.local.options import LoraSettings
from daunce_api.providers.local.score import FineTunes, Passes, default_budget, limits_of
from daunce_api.providers.local.train import LoraTrainee, Member, fine_tune

SETTINGS = LoraSettings(n_epochs=1, batch_size=8, targets=("q_proj", "v_proj"))
LENGTH, EXAMPLES = 256, 32


def main() -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    config = LlamaConfig(vocab_size=128_256, num_key_value_heads=8, tie_word_embeddings=True, **sizes)
    with torch.device("cuda"):
        base = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    folder = Path(tempfile.mkdtemp())
    model = AdaptedModel(base)
    examples = [
        EncodedExample(
            example,
            tuple(torch.randint(0, 128_256, (LENGTH,)).tolist()),
            tuple(range(LENGTH // 2, LENGTH)),
        )
        for example in Dataset.from_records([{"prompt": f"{i}", "completion": "x"} for i in range(EXAMPLES)])
    ]
    shapes = shapes_of(model, target_modules(model, SETTINGS.targets))
    numbers = SETTINGS.rank * sum(map(sum, shapes.values()))
    budget = default_budget(model.device, 1)
    print(f"{torch.cuda.get_device_name()}; budget {budget >> 20:,} MiB; files under {folder}")
    for members in (1, 8, 32):
        limits = limits_of(
            model, member_bytes=20 * numbers, members=members, longest=LENGTH, budget=budget, tokens=None
        )
        group = [Member(examples, k) for k in range(limits.members)]
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        fine_tune(model, LoraTrainee(model, group, shapes, SETTINGS), SETTINGS, max_tokens=limits.tokens)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() - held
        print(
            f"{limits.members:3d} together: {60 * limits.members / seconds:8.1f} members a minute, {peak >> 20:,} MiB"
        )
        assert peak <= budget, "more memory than the budget"
    start = time.perf_counter()
    scoring = Passes(model, FineTunes("random", model))
    scoring.logprobs([(e.ids, e.targets) for e in examples], None)
    print(f"scoring: {EXAMPLES / (time.perf_counter() - start):8.1f} sequences a second")
    wrapped = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for first in range(0, EXAMPLES, 8):
        ids = torch.tensor([e.ids for e in examples[first : first + 8]], device="cuda")
        labels = ids.clone()
        labels[:, : LENGTH // 2] = -100
        wrapped(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    print(f"PEFT loop:    {60 / (time.perf_counter() - start):8.1f} members a minute")


if __name__ == "__main__":
    main()
