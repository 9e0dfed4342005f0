"""llama.cpp's server itself, which ignores ``echo`` and answers with what it generated: refused in plain words.

Runs where ``DAUNCE_LLAMA_CPP_PYTHON`` names a Python that has ``xllamacpp``, and ``DAUNCE_GGUF`` a model file.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from provider_support import BATCH, run_config

from daunce_api.errors import ContractError, DaunceError
from daunce_api.providers import vllm
from daunce_api.providers.base import ProbeReport
from daunce_api.providers.endpoint import Endpoint
from daunce_api.providers.openai_wire import echo
from daunce_api.providers.registry import Context

PYTHON, MODEL = os.environ.get("DAUNCE_LLAMA_CPP_PYTHON"), os.environ.get("DAUNCE_GGUF")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (PYTHON and MODEL), reason="DAUNCE_LLAMA_CPP_PYTHON and DAUNCE_GGUF name no server"),
]

SERVE = """
import sys, time
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.port = sys.argv[1], 512, int(sys.argv[2])
server = xllamacpp.Server(parameters)
time.sleep(600)
"""
START_SECONDS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    port = free_port()
    log = tmp_path_factory.mktemp("llama") / "log"
    with log.open("wb") as output:
        command = [str(PYTHON), "-c", SERVE, str(MODEL), str(port)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            yield Endpoint(f"http://127.0.0.1:{port}/v1", provider="llama.cpp")
        finally:
            process.kill()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx2.get(url, trust_env=False).status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text()[-2000:]}")


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_echo_that_is_ignored_is_refused(llama_cpp: Endpoint, max_tokens: int) -> None:
    config = run_config(scorer="echo", options={"max_tokens": max_tokens, "check_model_name": False})
    async with echo.open_scorer(Context(config, llama_cpp)) as scorer:
        for example in BATCH:
            with pytest.raises(ContractError, match=r"no log-probabilities.*daunce serve"):
                await scorer.score("m", [example])


async def test_prompt_logprobs_that_are_ignored_are_refused(llama_cpp: Endpoint) -> None:
    async with vllm.open_scorer(Context(run_config(scorer="prompt_logprobs"), llama_cpp)) as scorer:
        with pytest.raises(ContractError):
            await scorer.score("m", BATCH[:1])


async def test_no_probe_passes(llama_cpp: Endpoint) -> None:
    """It says that nothing could be checked, or refuses; it never says that all is well."""
    config = run_config(scorer="echo", options={"check_model_name": False})
    async with echo.open_scorer(Context(config, llama_cpp)) as scorer:
        try:
            report = await scorer.probe("m", BATCH[0])
        except DaunceError as error:
            report = ProbeReport(False, str(error))
    assert not report.checked
