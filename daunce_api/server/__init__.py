"""OpenAI's wire format over a real language model on this machine: files, fine-tuning jobs, models, completions.

It is the embedded provider of ``kind: embedded`` and what ``daunce serve`` runs. Jobs train LoRA adapters for real;
``seed`` is honoured (the same file, seed and hyperparameters give the same bytes); state survives a restart.

Where it differs from OpenAI's service:

* ``echo`` answers hold a log-probability for the first id of a prompt too (OpenAI's schema has no null there): its
  value given the beginning-of-text token alone or, where the model has none, the end-of-text token.
* ``logprobs`` of completions goes to 20; ``return_token_ids`` and ``return_tokens_as_token_ids`` are vLLM's.
* the end token counts as generated and is among the log-probabilities, as in vLLM.
* ``learning_rate_multiplier: 1`` is AdamW at 1e-3 on rank-8 LoRA; ``auto`` is 3 epochs, batches of 8, multiplier 1.
* one choice a prompt (``n: 1``), no streaming, no validation file; each is refused with a 400.
* a batch (``/v1/batches``) starts at once, in the background, and never expires.
* ``dialect: vllm`` sends vLLM's leading null in echoed values and supports ``prompt_logprobs``; ``dialect: nebius`` is
  described in :mod:`daunce_api.server.nebius`.
* deleting a fine-tune deletes its checkpoints; cancelling a cancelled job is not an error.
"""

from __future__ import annotations

from collections.abc import Callable

from ..providers.server_process import EmbeddedServer, require_server_extra
from ..providers.server_settings import InjectSettings, ServerSettings

__all__ = ["EmbeddedServer", "InjectSettings", "ServerSettings", "run_server"]


def run_server(
    settings: ServerSettings,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until interrupted; ``on_ready`` is called with the base URL once requests are answered.

    Without ``settings.api_key`` only loopback hosts are allowed, and only requests from this machine. Raises
    ConfigurationError, MissingExtraError, RunLockedError (another server uses the state folder).
    """
    require_server_extra()
    from .run import serve

    serve(settings, host, port, on_ready=on_ready)
