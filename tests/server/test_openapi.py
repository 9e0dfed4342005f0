"""A server fuzzed from a description of its routes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from daunce_api.server import EmbeddedServer
from daunce_api.server.app import ROUTES

from .conftest import raw
from .openapi_document import document


@pytest.mark.slow
def test_requests_made_from_the_description_never_break_the_server(server: EmbeddedServer, tmp_path: Path) -> None:
    """Schemathesis: answers have the described statuses and shapes, whatever is sent, and none is a server error."""
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("schemathesis is not installed")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    description = tmp_path / "openapi.json"
    description.write_text(json.dumps(document((method, path, handler.__name__) for method, path, handler in ROUTES)))
    url = server.base_url.removesuffix("/v1")
    command = [program, "run", str(description), "--url", url, "--checks", checks]
    key = ["-H", f"authorization: Bearer {server.api_key}"]
    fuzz = subprocess.run(
        [*command, *key, "--max-examples", "5", "--no-color"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert fuzz.returncode == 0, fuzz.stdout[-5000:]
    with raw(server) as client:
        assert client.get("/v1/models").status_code == 200
