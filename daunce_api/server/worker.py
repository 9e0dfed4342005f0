"""A process that holds the model: ``python -m daunce_api.server.worker``, spoken to over its standard streams.

One request at a time, in order; ``stop`` is heard while a job trains. The process ends when its input closes.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import queue
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import ConfigurationError, RejectedError, TrainingCancelledError
from .channel import NO_MODEL, STORAGE_FULL, Message, pack, read_message
from .training_data import TrainingFileError, read_training_file

if TYPE_CHECKING:
    from ..providers.local.language import LanguageModel

FIRST_TOKENS_KEPT = 4096


class _FaultError(Exception):
    def __init__(self, message: str, code: str = "server_error", param: str | None = None) -> None:
        super().__init__(message)
        self.error = {"message": message, "code": code, "param": param}


class Engine:
    """The requests that a worker answers. ``send`` is called with progress messages."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._stopped: set[str] = set()
        self._first: OrderedDict[tuple[str | None, int, int], Message] = OrderedDict()
        self._model: LanguageModel | None = None
        self._start_token = 0

    def send(self, message: Mapping[str, Any]) -> None:
        self._out.write(pack(message))
        self._out.flush()

    def stop(self, job: str) -> None:
        """From the reading thread: this job ends at its next step."""
        self._stopped.add(job)

    def answer(self, request: Message) -> None:
        """Do one request and send its answer, an error included."""
        number = request["id"]
        try:
            result = getattr(self, "op_" + str(request["op"]))(request)
        except _FaultError as fault:
            self.send({"id": number, "error": fault.error})
        except TrainingFileError as error:
            self.send({"id": number, "error": {"message": error.message, "code": error.code, "param": "training_file"}})
        except Exception as error:  # whatever it is, the process goes on and the server says it
            text = str(error) or type(error).__name__
            code = STORAGE_FULL if _disk_is_full(error) else "server_error"
            self.send({"id": number, "error": {"message": text, "code": code, "param": None}})
        else:
            self.send({"id": number, **result})

    def op_load(self, request: Message) -> Message:
        import torch

        from ..providers.local.language import LanguageModel

        torch.set_num_threads(int(request["threads"]))
        try:
            self._model = LanguageModel.load(request["model"], device=request["device"], dtype=request["dtype"])
        except ConfigurationError as error:
            raise _FaultError(str(error), NO_MODEL) from error
        tokenizer = self._model.tokenizer
        end = tokenizer.encode(tokenizer.end) if tokenizer.end else []
        begin = tokenizer.encode(tokenizer.begin) if tokenizer.begin else end
        self._start_token = begin[-1] if begin else 0
        return {
            "name": self._model.name,
            "tokenizer": str(tokenizer.folder),
            "max_context": self._model.max_context,
            "end": end[-1] if len(end) == 1 else None,
            "vocabulary": self._model.vocabulary,
            "fingerprint": _folder_digest(tokenizer.folder),
        }

    @property
    def model(self) -> LanguageModel:
        if self._model is None:
            raise _FaultError("no model is loaded")
        return self._model

    def op_score(self, request: Message) -> Message:
        """Log-probabilities (nats) of every id of every prompt.

        The first id of a prompt has nothing before it: its value is that of a text that starts there, that is given
        the model's beginning-of-text token alone or, where it has none, its end-of-text token (OpenAI's rule for an
        empty prompt).
        """
        adapter, top, prompts = request["adapter"], int(request["top"]), request["prompts"]
        path = Path(adapter) if adapter else None
        results = self.model.token_logprobs(prompts, adapter=path, top=top)
        answers = []
        for prompt, result in zip(prompts, results, strict=True):
            first = self._first_token(adapter, int(prompt[0]), top)
            answer = {"logprobs": [*first["logprobs"], *result.logprobs.tolist()]}
            if result.top_ids is not None and result.top_logprobs is not None:
                answer["top_ids"] = [*first["top_ids"], *result.top_ids.tolist()]
                answer["top_logprobs"] = [*first["top_logprobs"], *result.top_logprobs.tolist()]
            if not all(map(math.isfinite, answer["logprobs"])):
                raise _FaultError("the model gives log-probabilities that are not finite")
            answers.append(answer)
        return {"results": answers}

    def _first_token(self, adapter: str | None, token: int, top: int) -> Message:
        key = (adapter, token, top)
        if key not in self._first:
            path = Path(adapter) if adapter else None
            [result] = self.model.token_logprobs([[self._start_token, token]], adapter=path, top=top)
            entry: Message = {"logprobs": result.logprobs.tolist()}
            if result.top_ids is not None and result.top_logprobs is not None:
                entry |= {"top_ids": result.top_ids.tolist(), "top_logprobs": result.top_logprobs.tolist()}
            self._first[key] = entry
            if len(self._first) > FIRST_TOKENS_KEPT:
                self._first.popitem(last=False)
        self._first.move_to_end(key)
        return self._first[key]

    def op_generate(self, request: Message) -> Message:
        adapter = request["adapter"]
        outcome = self.model.generate(
            request["prompt"],
            adapter=Path(adapter) if adapter else None,
            max_tokens=int(request["max_tokens"]),
            temperature=float(request["temperature"]),
            top_p=float(request["top_p"]),
            seed=int(request["seed"]),
            stop_ids=tuple(request["stop_ids"]),
            top=int(request["top"]),
        )
        return {
            "ids": list(outcome.ids),
            "logprobs": [float(x) for x in outcome.logprobs],
            "top_ids": [list(map(int, row)) for row in outcome.top_ids],
            "top_logprobs": [list(map(float, row)) for row in outcome.top_logprobs],
            "finished": outcome.finished,
        }

    def op_unload(self, request: Message) -> Message:
        adapter = str(request["adapter"])
        self.model.unload(Path(adapter))
        for key in [k for k in self._first if k[0] == adapter]:
            del self._first[key]
        return {}

    def op_train(self, request: Message) -> Message:
        """Train one job. Progress goes out as ``step`` and ``checkpoint`` messages; ``stopped`` where told to."""
        from ..providers.local.language import LoraSettings

        number, job = request["id"], request["job"]
        model = self.model
        examples = read_training_file(Path(request["file"]), model.tokenizer, model.max_context)
        settings = LoraSettings(**request["settings"])
        start_from = request["start_from"]

        def on_step(step: int, total: int, loss: float) -> None:
            self.send({"id": number, "event": "step", "step": step, "total": total, "loss": loss})

        def checkpoint(epoch: int, path: Path) -> None:
            message = {"event": "checkpoint", "epoch": epoch, "path": str(path), "digest": _adapter_digest(path)}
            self.send({"id": number, **message})

        try:
            outcome = model.train(
                examples,
                settings=settings,
                seed=int(request["seed"]),
                out=Path(request["out"]),
                start_from=Path(start_from) if start_from else None,
                checkpoint=checkpoint,
                on_step=on_step,
                should_stop=lambda: job in self._stopped,
            )
        except TrainingCancelledError:
            return {"stopped": True}
        except RejectedError as error:
            raise _FaultError(str(error), "training_diverged", "hyperparameters") from None
        finally:
            self._stopped.discard(job)
        return {
            "losses": list(outcome.losses),
            "trained_tokens": outcome.trained_tokens,
            "digest": _adapter_digest(outcome.adapter),
        }


def _disk_is_full(error: Exception) -> bool:
    # safetensors has no class of its own for it: it prints what the operating system said.
    return (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)) or any(
        word in str(error) for word in ("StorageFull", "No space left", "QuotaExceeded")
    )


def _adapter_digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def _folder_digest(folder: Path) -> str:
    """SHA-256 of a base model: its weights, configuration and tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja"):
            digest.update(path.name.encode())
            with path.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def main() -> None:
    """Answer requests until the input closes."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # Whatever a library prints must not get between the messages.
    os.dup2(2, 1)
    engine = Engine(answers)
    waiting: queue.Queue[Message] = queue.Queue()

    def read() -> None:
        while (message := read_message(requests)) is not None:
            if message["op"] == "stop":
                engine.stop(str(message["job"]))
            else:
                waiting.put(message)
        # The server is gone. A job in progress is worthless without it.
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            engine.answer(waiting.get())
        except BrokenPipeError:
            os._exit(0)


if __name__ == "__main__":
    main()
