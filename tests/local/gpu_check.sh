#!/bin/sh
# One GPU, under six minutes: correctness against the CPU, memory against the budget, and members a minute of a random
# 1B Llama in bfloat16 against a PEFT loop; then the same sequences scored under the same adapter by vLLM, where it can be
# imported by $VLLM_PYTHON (default: python). Without a GPU a tiny model takes the same path on the CPU; vLLM starts slowly
# there (SPEED_SECONDS=600, VLLM_CPU_KVCACHE_SPACE=1).
set -e
cd "$(dirname "$0")/../.."
timeout 150 python -m pytest -q tests/local/test_cuda.py
timeout "${SPEED_SECONDS:-200}" python tests/local/gpu_speed.py "$@"
