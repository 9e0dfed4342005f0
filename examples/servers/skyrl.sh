#!/bin/bash
# SkyRL (Tinker's wire, real LoRA training and log-probabilities) on this machine's CPU, over daunce's own tiny model.
#
#   bash examples/servers/skyrl.sh FOLDER [PORT]     installs into FOLDER (5.7 GB), then serves until it is stopped
#
# Needs uv and Python 3.12. On GPUs take SkyRL's own instructions instead: its FSDP backend trains models of tens of
# billions of parameters, and run.yaml stays the same. SkyRL 0.4 speaks to the package tinker 0.25: pip install "tinker<0.26".
set -euo pipefail
FOLDER=$(mkdir -p "$1" && cd "$1" && pwd); PORT=${2:-8411}
MODEL=${MODEL:-$(python -c "from daunce_api.providers.tokenizers import embedded_folder; print(embedded_folder())")}
cd "$FOLDER"
if [ ! -x env/bin/python ]; then
  uv venv -p 3.12 env
  echo torch==2.13.0 > override.txt
  uv pip install -p env/bin/python --override override.txt 'skyrl[tinker,jax]==0.4.0' torch==2.13.0 aiohttp
fi
# uv run starts it, since SkyRL reads its parent's command line; the folder of checkpoints has to be absolute.
export VIRTUAL_ENV=$FOLDER/env JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
export XLA_FLAGS=--xla_cpu_multi_thread_eigen=false JAX_COMPILATION_CACHE_DIR=$FOLDER/jax
exec uv run --no-project --active --offline -m skyrl.tinker.api --base-model "$MODEL" --backend jax \
  --backend-config '{"max_lora_adapters": 20, "max_lora_rank": 32}' --checkpoints-base "$FOLDER/ckpt" \
  --database-url "sqlite:///$FOLDER/tx.db" --host 127.0.0.1 --port "$PORT"
