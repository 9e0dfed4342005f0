"""Fine-tunes of one model that are held in memory, by their folders."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from ...errors import ConfigurationError
from .adapters import CONFIG, WEIGHTS, load_adapter
from .full import is_full, load_full
from .lora import Active, ActiveFull, ActiveLora, AdaptedModel

_ADAPTERS = 64
_FULL = 2
"""Full fine-tunes are as large as the model itself; two, since two members may be scored in turn."""


class HotFineTunes:
    """The fine-tunes that were used last. Read again where their file has changed."""

    def __init__(self, name: str, model: AdaptedModel) -> None:
        self._name = name
        self._model = model
        self._held: OrderedDict[str, tuple[tuple[int, int], Active]] = OrderedDict()

    def get(self, folder: Path) -> Active:
        """The fine-tune of a PEFT adapter folder or a model folder.

        Raises ConfigurationError where the folder holds neither, or belongs to another model.
        """
        full = not (folder / CONFIG).exists() and is_full(folder)
        try:
            stat = (next(folder.glob("*.safetensors")) if full else folder / WEIGHTS).stat()
        except OSError as error:
            raise ConfigurationError(f"{folder} is no PEFT adapter folder: {error.strerror}") from error
        stamp = (stat.st_mtime_ns, stat.st_ino)
        key = str(folder)
        with self._model.lock:
            held = self._held.get(key)
            if held is None or held[0] != stamp:
                if full:  # there is room before another copy of the model is read
                    self._forget(_FULL - 1)
                active = ActiveFull(load_full(folder, self._model)) if full else self._lora(folder)
                held = self._held[key] = (stamp, active)
            self._held.move_to_end(key)
            while len(self._held) > _ADAPTERS:
                self._held.popitem(last=False)
            return held[1]

    def drop(self, folder: Path) -> None:
        """Forget a folder; nothing happens where it is not held."""
        with self._model.lock:
            self._held.pop(str(folder), None)

    def _forget(self, kept: int) -> None:
        full = [k for k, (_, active) in self._held.items() if isinstance(active, ActiveFull)]
        for key in full[: max(0, len(full) - kept)]:
            del self._held[key]

    def _lora(self, folder: Path) -> ActiveLora:
        loaded = load_adapter(folder)
        unknown = [n for n in loaded.weights if n not in self._model.modules]
        if unknown:
            raise ConfigurationError(f"{folder.name} belongs to another model: {self._name} has no {unknown[0]}")
        return ActiveLora(self._model.placed(loaded.weights), loaded.scaling)
