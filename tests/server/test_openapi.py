"""The API's description of itself, and a server fuzzed from it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest

from daunce_api.server import EmbeddedServer
from daunce_api.server.app import _ROUTES

from .conftest import raw


def test_every_route_and_its_errors_are_described(server: EmbeddedServer) -> None:
    description: dict[str, Any] = httpx2.get(server.base_url.removesuffix("/v1") + "/openapi.json").json()
    described = {(m.upper(), p) for p, methods in description["paths"].items() for m in methods}
    assert described == {(m, p.replace(":path}", "}")) for m, p, *_ in _ROUTES}
    operations = [o for methods in description["paths"].values() for o in methods.values()]
    assert len({o["operationId"] for o in operations}) == len(_ROUTES)
    assert all({"200", "400", "401", "404", "413", "429", "503"} <= set(o["responses"]) for o in operations)
    assert server.api_key not in str(description)


@pytest.mark.slow
def test_requests_made_from_the_description_never_break_the_server(server: EmbeddedServer, tmp_path: Path) -> None:
    """Schemathesis: answers have the described statuses and shapes, whatever is sent, and none is a server error."""
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("schemathesis is not installed")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [program, "run", server.base_url.removesuffix("/v1") + "/openapi.json", "--checks", checks]
    key = ["-H", f"authorization: Bearer {server.api_key}"]
    fuzz = subprocess.run(
        [*command, *key, "--max-examples", "15", "--no-color"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert fuzz.returncode == 0, fuzz.stdout[-5000:]
    with raw(server) as client:
        assert client.get("/v1/models").status_code == 200
