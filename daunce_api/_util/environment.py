"""The environment of worker processes: what Python, PyTorch and the model's files need, and no secret of a provider."""

from __future__ import annotations

import os
from pathlib import Path

_NAMES = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP"),
        *("VIRTUAL_ENV", "CONDA_PREFIX", "SYSTEMROOT", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"),
    )
)
_PREFIXES = (
    *("LC_", "PYTHON", "LD_", "DYLD_", "XDG_", "SSL_CERT", "REQUESTS_CA_", "CURL_CA_"),
    *("OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "CUDA_", "NVIDIA_", "NCCL_", "HIP_", "ROCR_", "TRITON_"),
    # HF_TOKEN is among these: without it the weights of a gated model cannot be loaded.
    *("TORCH", "PYTORCH_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "BNB_"),
)


def worker_environment() -> dict[str, str]:
    """The environment for a child process that imports this very package.

    API keys of providers and of the server itself stay out of it: ``/proc/PID/environ`` shows a process's environment
    for as long as it runs.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.upper() in _NAMES or name.upper().startswith(_PREFIXES)
    }
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))]
    return {**kept, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
