"""What a user says of a classifier of their own, and how it is found from a config.

    backend:
      kind: local
      model: fresh                    # or a safetensors file of weights that everything starts from
      options:
        task: digits_task.py:task     # a file beside the training data, or an installed package.module:name
        inputs: digits.npz            # its array x: a record's prompt is a row number

A record of the data is ``{"prompt": "17", "completion": "cat"}``: which input, and its class.

**Importing a task runs its code** with the rights of who starts the run, in the workers that train and score. It is the
only option that does so; nothing is imported where a run is only read (status, report). Run configs of others only
after reading the file that ``task`` names.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...data.dataset import Example, Message
from ...data.tokenizers import EncodedExample
from ...errors import ConfigurationError, DataError
from .losses import ExampleLoss, example_cross_entropy
from .options import TaskSpec

_CHAT = "a classifier's examples are prompt/completion records: which input, and its class."


@dataclass(frozen=True)
class ClassifierTask:
    """A classifier: ``model_factory`` makes modules that map inputs (B, ...) to logits (B, classes).

    ``classes`` names them in order; None where completions are class numbers. ``loss`` is what training minimises,
    (logits (B, classes), labels (B,)) -> (B,) nats. ``read`` maps the prompts of n records to inputs (n, ...), and is
    needed where the config names no ``inputs``. Any object or module with these names will do in its place.
    """

    model_factory: Callable[[], nn.Module]
    classes: Sequence[str] | None = None
    loss: ExampleLoss = example_cross_entropy
    read: Callable[[Sequence[str]], Tensor] | None = None


def load_task(spec: TaskSpec) -> ClassifierTask:
    """Import what ``spec.task`` names. Raises ConfigurationError where that fails or it is no task."""
    place, name = spec.place
    try:
        module = _import_file(place) if isinstance(place, Path) else importlib.import_module(place)
        found: Any = getattr(module, name) if name else module
    except Exception as error:  # the user's code may fail in any way
        raise ConfigurationError(
            f"backend.options.task {spec.task!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(found, "model_factory", None)):
        raise ConfigurationError(f"backend.options.task {spec.task!r} has no model_factory; see ClassifierTask.")
    given = {key: getattr(found, key) for key in ("classes", "loss", "read") if getattr(found, key, None) is not None}
    return ClassifierTask(found.model_factory, **given)


def _import_file(path: Path) -> ModuleType:
    name = f"daunce_task_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None or not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # the file may import its neighbours
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class Records:
    """Inputs and labels of records."""

    def __init__(self, task: ClassifierTask, inputs: str | None) -> None:
        """Raises ConfigurationError where neither the config nor the task says where inputs come from."""
        self._task = task
        self._array = None if inputs is None else _array(Path(inputs))
        if self._array is None and task.read is None:
            raise ConfigurationError("set backend.options.inputs (an .npz or .npy file), or give the task a read().")
        self._classes = None if task.classes is None else {str(c): i for i, c in enumerate(task.classes)}

    def read(self, records: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """Inputs (n, ...) and labels (n,) of (prompt, completion) pairs. Raises DataError that lists every problem."""
        rows, labels = [self._row(p) for p, _ in records], [self._label(c) for _, c in records]
        problems = sorted({found for found in (*rows, *labels) if isinstance(found, str)})
        if problems:
            raise DataError("records do not fit the task; nothing was computed.", problems)
        if self._array is not None:
            return self._array[torch.tensor(rows)], torch.tensor(labels)
        return self._user_inputs([prompt for prompt, _ in records]), torch.tensor(labels)

    def _user_inputs(self, prompts: Sequence[str]) -> Tensor:
        try:
            inputs = torch.as_tensor(self._task.read(prompts))  # type: ignore[misc]
        except Exception as error:  # the user's code may fail in any way
            raise DataError(f"the task's read() failed: {type(error).__name__}: {error}") from error
        if len(inputs) != len(prompts):
            raise DataError(f"the task's read() gave {len(inputs)} inputs for {len(prompts)} prompts")
        return inputs

    def _row(self, prompt: str) -> int | str:
        """The row of the inputs that a prompt names, or what is wrong with it."""
        if self._array is None or (prompt.isascii() and prompt.isdigit() and int(prompt) < len(self._array)):
            return 0 if self._array is None else int(prompt)
        return f"prompt {prompt[:40]!r} is no row number below {len(self._array)}"

    def _label(self, completion: str) -> int | str:
        """The number of a class, or what is wrong with it."""
        if self._classes is not None:
            return self._classes.get(completion, f"completion {completion[:40]!r} is no class of the task")
        good = completion.isascii() and completion.isdigit()
        return int(completion) if good else f"completion {completion[:40]!r} is no class number"


def _array(path: Path) -> Tensor:
    try:
        loaded = np.load(path, allow_pickle=False)
        array = loaded["x"] if isinstance(loaded, Mapping) else loaded
    except KeyError as error:
        raise ConfigurationError(f"{path.name} holds no array x; backend.options.inputs needs one.") from error
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as an array: {error}") from error
    return torch.from_numpy(np.ascontiguousarray(array))


class TaskTokenizer:
    """Stands in for a tokenizer: one id for the input, one for the class, which is the one target."""

    begin = ""
    end = ""

    def __init__(self, spec: TaskSpec) -> None:
        self.name = spec.task
        self._spec = spec
        self._texts: dict[int, str] = {}

    @property
    def fingerprint(self) -> str:
        """Changes with the task's file, the inputs and the start."""
        return self._spec.digest()

    def encode_example(self, example: Example) -> EncodedExample:
        """Raises DataError for a chat."""
        if example.is_chat:
            raise DataError(f"example {example.id!r} is a chat; {_CHAT}")
        return EncodedExample(example, (self._id(example.prompt), self._id(example.completion)), (1,))

    def encode(self, text: str) -> list[int]:
        return [self._id(text)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return [self._id(text)], [(0, len(text))]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._texts.get(i, "?") for i in ids]

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """Raises DataError: there are no chats here."""
        raise DataError(_CHAT)

    def _id(self, text: str) -> int:
        number = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big")
        self._texts[number] = text
        return number
