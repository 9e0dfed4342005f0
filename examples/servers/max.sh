#!/bin/bash
# Modular MAX on this machine's CPU over daunce's own tiny model: a server whose echo leaves out the first token.
#
#   bash examples/servers/max.sh FOLDER [PORT]      installs into FOLDER (1.1 GB), then serves until it is stopped
#
# Needs Python 3.10 to 3.13. The first start compiles for some minutes.
set -euo pipefail
FOLDER=$(mkdir -p "$1" && cd "$1" && pwd); PORT=${2:-8700}
cd "$FOLDER"
if [ ! -x env/bin/max ]; then
  "${PYTHON:-python3}" -m venv env
  env/bin/pip install 'max[serve]==26.7.0'
fi
if [ ! -d model ]; then  # in float32, and in the words of older versions of transformers
  python - <<'PYTHON'
import json, shutil
from pathlib import Path
from transformers import AutoModelForCausalLM
from daunce_api.providers.tokenizers import embedded_folder

folder = Path("model")
shutil.copytree(embedded_folder(), folder)
AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype="float32").save_pretrained(folder)
for name, old in (("config.json", "rope_parameters"), ("tokenizer_config.json", "")):
    content = json.loads((folder / name).read_text())
    rope = content.pop(old, {})
    new = {"rope_theta": rope["rope_theta"], "rope_scaling": None} if rope else {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / name).write_text(json.dumps({**content, **new}))
PYTHON
fi
export MAX_SERVE_HOST=127.0.0.1 HF_HUB_OFFLINE=1 MODULAR_TELEMETRY_ENABLED=false MAX_SERVE_DISABLE_TELEMETRY=1
exec env/bin/max serve --model "$FOLDER/model" --devices cpu --quantization-encoding float32 --enable-echo \
  --port "$PORT" --max-length 512
