"""A Tinker service on this machine that answers over HTTP as the SDK's own types and protobuf messages say.

The SDK's client is the real one: its session, its futures, its requests in protobuf. Only the model behind them is the
toy of ``provider_support``.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

import numpy as np
import pytest
from provider_support import sequence

pytest.importorskip("tinker")
pb: Any = pytest.importorskip("tinker.proto.tinker_public_pb2")

BASE = "Qwen/Base-8B"
TIME = "2026-11-22T00:00:00Z"
PROTO = "application/x-protobuf"
Answer = tuple[int, Any]


class TinkerStub:
    """State of the service. ``requests`` are (route, body) in order; ``faults`` answers a route instead, in order."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Any]] = []
        self.faults: dict[str, list[Answer]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.samplers: dict[str, str] = {}
        self.saved: dict[str, list[Any]] = {}
        self.keys: set[str] = set()
        self.url = ""
        self._futures: dict[str, Answer] = {}
        self._waiting: set[str] = set()
        self._numbers = count()

    def routes(self, method: str, path: str) -> list[Any]:
        """Bodies of the requests to one route."""
        return [body for asked, body in self.requests if asked == f"{method} {path}"]

    def answer(self, method: str, path: str, body: Any) -> Answer:
        route = f"{method} {path}"
        self.requests.append((route, body))
        if self.faults.get(path):
            return self.faults[path].pop(0)
        if path == "training_runs":
            return 200, {"training_runs": list(self.runs.values()), "cursor": self._cursor()}
        if (found := re.fullmatch(r"training_runs/([^/]+)", path)) is not None:
            return (200, self.runs[found[1]]) if found[1] in self.runs else (404, {"detail": "no such run"})
        if re.fullmatch(r"training_runs/[^/]+/checkpoints/.+", path):
            return 200, None
        if (found := re.fullmatch(r"training_runs/([^/]+)/checkpoints", path)) is not None:
            return 200, {"checkpoints": self.saved.get(found[1], [])}
        if path == "sessions/session-1/finish":
            return 200, {"type": "finish_session"}
        if path.startswith("samplers/"):
            return 200, {"sampler_id": path[9:], "base_model": BASE, "model_path": self.samplers[path[9:]]}
        known = getattr(self, "_" + path.replace("/", "_"), None)
        return (404, {"detail": f"no route {path}"}) if known is None else known(body)

    def _cursor(self) -> dict[str, int]:
        return {"offset": 0, "limit": 100, "total_count": len(self.runs)}

    def _client_config(self, body: Any) -> Answer:
        return 200, {"use_pyqwest_transport": False}

    def _client_dynamic_config(self, body: Any) -> Answer:
        return 200, {}

    def _create_session(self, body: Any) -> Answer:
        return 200, {"type": "create_session", "session_id": "session-1"}

    def _session_heartbeat(self, body: Any) -> Answer:
        return 200, {"type": "session_heartbeat"}

    def _telemetry(self, body: Any) -> Answer:
        return 200, {"status": "accepted"}

    def _get_server_capabilities(self, body: Any) -> Answer:
        models = [{"model_name": BASE, "trainable": True}, {"model_name": "x", "trainable": False}]
        return 200, {"supported_models": models}

    def _create_model(self, body: Any) -> Answer:
        run = f"run-{next(self._numbers)}"
        self.runs[run] = {
            "training_run_id": run,
            "base_model": body["base_model"],
            "model_owner": "me",
            "is_lora": True,
            "last_request_time": TIME,
            "user_metadata": body.get("user_metadata"),
        }
        return self._promise({"type": "create_model", "model_id": run})

    def _get_info(self, body: Any) -> Answer:
        return 200, {"type": "get_info", "model_data": {"model_name": BASE}, "model_id": body["model_id"]}

    def _forward_backward(self, body: Any) -> Answer:
        return self._promise(pb.ForwardBackwardOutput(loss_fn_output_type="scalar", metrics={"loss:sum": 1.0}))

    def _optim_step(self, body: Any) -> Answer:
        return self._promise({"metrics": {}})

    def _save_weights(self, body: Any) -> Answer:
        return self._saved(body, "save_weights", "weights", "training", "last_checkpoint")

    def _save_weights_for_sampler(self, body: Any) -> Answer:
        return self._saved(body, "save_weights_for_sampler", "sampler_weights", "sampler", "last_sampler_checkpoint")

    def _saved(self, body: Any, done: str, folder: str, kind: str, field: str) -> Answer:
        name = f"{folder}/{body['path']}"
        path = f"tinker://{body['model_id']}/{name}"
        checkpoint = {"checkpoint_id": name, "checkpoint_type": kind, "time": TIME, "tinker_path": path}
        self.runs[body["model_id"]][field] = checkpoint
        self.saved.setdefault(body["model_id"], []).insert(0, checkpoint)
        return self._promise({"type": done, "path": path})

    def _create_sampling_session(self, body: Any) -> Answer:
        name = f"sampler-{next(self._numbers)}"
        self.samplers[name] = body.get("model_path") or body["base_model"]
        return 200, {"type": "create_sampling_session", "sampling_session_id": name}

    def _asample(self, body: Any) -> Answer:
        ids = [i for chunk in body["prompt"]["chunks"] for i in chunk["tokens"]]
        model = self.samplers[body["sampling_session_id"]]
        values = sequence(model, ids)
        made_ids = [1] * (body["sampling_params"].get("max_tokens") or 1)
        made_values = sequence(model, [*ids, *made_ids])[len(ids) :]
        last = body.get("prompt_logprobs_last_n") or len(ids)
        shown = [np.nan if value is None or i < len(ids) - last else value for i, value in enumerate(values)]
        made = pb.SampledSequence(
            tokens=np.array(made_ids, np.int32).tobytes(),
            logprobs=np.array(made_values, np.float32).tobytes(),
            stop_reason=1,
        )
        answer = pb.SampleResponse(sequences=[made], prompt_logprobs=np.array(shown, np.float32).tobytes())
        status, promise = self._promise(answer)
        return status, {**promise, "sample_sequence_ids": ["sequence-1"]}

    def _promise(self, answer: Any, status: int = 200) -> tuple[int, dict[str, Any]]:
        """A future of an answer; who asks for the first time is told to try again."""
        name = f"request-{next(self._numbers)}"
        self._futures[name] = (status, answer)
        self._waiting.add(name)
        return 200, {"request_id": name}

    def _retrieve_future(self, body: Any) -> Answer:
        name = body["request_id"]
        if name in self._waiting:
            self._waiting.remove(name)
            return 200, {"type": "try_again", "request_id": name, "queue_state": "active"}
        return self._futures[name]


def _handler(stub: TinkerStub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            content = self.rfile.read(int(self.headers.get("content-length") or 0))
            stub.keys.add(self.headers.get("x-api-key") or self.headers.get("authorization") or "")
            path = self.path.partition("?")[0].removeprefix("/api/v1/")
            body: Any = json.loads(content) if content and self.headers["content-type"] != PROTO else None
            if self.headers["content-type"] == PROTO:
                body = pb.ForwardBackwardRequest.FromString(content)
            status, answer = stub.answer(self.command, path, body)
            message = hasattr(answer, "SerializeToString")
            sent = answer.SerializeToString() if message else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", PROTO if message else "application/json")
            self.send_header("content-length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = do_DELETE = _serve

        def log_message(self, *arguments: Any) -> None:
            """Nothing on the terminal."""

    return Handler


@contextmanager
def serving() -> Iterator[TinkerStub]:
    """A stub behind a port of this machine."""
    stub = TinkerStub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(stub))
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.05), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
