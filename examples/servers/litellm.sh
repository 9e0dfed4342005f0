#!/bin/bash
# LiteLLM's proxy in front of `daunce serve`: a gateway between a run and a server of OpenAI's wire.
#
#   bash examples/servers/litellm.sh FOLDER [PORT]  installs into FOLDER (0.6 GB), then serves until it is stopped
#
# base_url is http://127.0.0.1:PORT/openai, the pass-through. The proxy's own /v1/fine_tuning belongs to its paid version.
set -euo pipefail
FOLDER=$(mkdir -p "$1" && cd "$1" && pwd); PORT=${2:-4000}; BEHIND=$((PORT + 1))
if [ ! -x "$FOLDER/env/bin/litellm" ]; then
  "${PYTHON:-python3}" -m venv "$FOLDER/env"
  "$FOLDER/env/bin/pip" install 'litellm[proxy]==1.106.12'  # 1.107.0 is listed as compromised
fi
cat > "$FOLDER/litellm.yaml" <<CONFIG
model_list:
  - model_name: daunce-tiny
    litellm_params: {model: text-completion-openai/daunce-tiny, api_base: "http://127.0.0.1:$BEHIND/v1", api_key: none}
files_settings: [{custom_llm_provider: openai, api_base: "http://127.0.0.1:$BEHIND/v1", api_key: none}]
finetune_settings: [{custom_llm_provider: openai, api_base: "http://127.0.0.1:$BEHIND/v1", api_key: none}]
CONFIG
python -m daunce_api serve --port "$BEHIND" --state-dir "$FOLDER/state" &
trap 'kill $(jobs -p)' EXIT
# LiteLLM puts OPENAI_API_BASE in front of what follows /openai. Without a key it starts for local trials alone.
env -u PYTHONPATH LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY=true LITELLM_LOCAL_MODEL_COST_MAP=True LITELLM_MODE=PRODUCTION OPENAI_API_KEY=none \
  OPENAI_API_BASE="http://127.0.0.1:$BEHIND/v1" \
  "$FOLDER/env/bin/litellm" --config "$FOLDER/litellm.yaml" --host 127.0.0.1 --port "$PORT" &
wait -n
