"""Log-probabilities of sequences under an adapter by vLLM itself: gpu_vllm.py MODEL ADAPTER SEQUENCES.json ANSWER.json

Imports nothing of ours, so that it runs in vLLM's own environment.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(model: str, adapter: str, sequences: str, answer: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    prompts = [{"prompt_token_ids": ids} for ids in json.loads(Path(sequences).read_text())]
    length = 1 + max(len(p["prompt_token_ids"]) for p in prompts)
    server = LLM(
        model,
        dtype=json.loads((Path(model) / "config.json").read_text())["dtype"],
        skip_tokenizer_init=True,
        enable_lora=True,
        lora_target_modules=["q_proj", "k_proj", "v_proj"],  # without the head, which prompt_logprobs maps wrongly
        max_model_len=length,
        gpu_memory_utilization=0.4,
        max_num_batched_tokens=max(2048, length),
        enforce_eager=True,  # prompts alone gain nothing from compiling, which takes longer than all the rest
    )
    settings = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    request = LoRARequest("adapter", 1, adapter)
    server.generate(prompts[:1], settings, lora_request=request)
    start = time.perf_counter()
    outputs = server.generate(prompts, settings, lora_request=request)
    seconds = time.perf_counter() - start
    logprobs = [
        [entry[token].logprob for token, entry in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:], strict=True)]
        for o in outputs
    ]
    Path(answer).write_text(json.dumps({"seconds": seconds, "logprobs": logprobs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
