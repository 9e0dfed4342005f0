#!/bin/bash
# Modular MAX on this machine's CPU over daunce's own tiny model: a server without an entry for the first token.
#
#   bash examples/servers/max.sh FOLDER [PORT]     installs into FOLDER (1.2 GB), then serves until it is stopped
#
# Needs Python 3.10 to 3.14. The first start compiles the model, which takes minutes; later ones half a minute.
set -euo pipefail
FOLDER=$(mkdir -p "$1" && cd "$1" && pwd); PORT=${2:-8700}
if [ ! -x "$FOLDER/env/bin/max" ]; then
  "${PYTHON:-python3}" -m venv "$FOLDER/env"
  "$FOLDER/env/bin/pip" install 'max[serve]==26.7.0'
fi
# MAX reads float32 weights, and rope_theta where older configs have it.
[ -d "$FOLDER/model" ] || python - "$FOLDER/model" <<'MODEL'
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from daunce_api.providers.tokenizers import embedded_folder

folder = Path(sys.argv[1])
AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32).save_pretrained(folder)
AutoTokenizer.from_pretrained(embedded_folder()).save_pretrained(folder)
config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
content = json.loads(config.read_text())
theta = content.pop("rope_parameters", {}).get("rope_theta", 10000.0)
config.write_text(json.dumps({**content, "rope_theta": theta, "rope_scaling": None}))
tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}))
MODEL
unset PYTHONPATH
export MAX_SERVE_HOST=127.0.0.1 HF_HUB_OFFLINE=1 MODULAR_TELEMETRY_ENABLED=false MAX_SERVE_DISABLE_TELEMETRY=1
exec "$FOLDER/env/bin/max" serve --model "$FOLDER/model" --devices cpu --quantization-encoding float32 --enable-echo \
  --port "$PORT" --max-length 512
