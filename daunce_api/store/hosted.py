"""Models that may stand on a scoring server: written before one is asked for, and when it is gone."""

from __future__ import annotations

from .records import Records

_HOSTED = "hosted"


class HostedRecords(Records):
    """What a run put on its scoring server (adapters, deployments) and has not taken off, as far as is known."""

    def load_intent(self, model: str) -> None:
        """To be written before a model is asked for; one that is there already stays."""
        with self._db.transaction():
            models = self.hosted()
            if model not in models:
                self._set_meta(_HOSTED, [*models, model])
                self._log(f"hosted {model}", "", "intent", "")

    def unloaded(self, model: str) -> None:
        """The server no longer holds the model."""
        with self._db.transaction():
            models = self.hosted()
            if model in models:
                self._set_meta(_HOSTED, [m for m in models if m != model])
                self._log(f"hosted {model}", "intent", "unloaded", "")

    def hosted(self) -> list[str]:
        """Models that may still be there, in the order in which they were asked for."""
        return list(self._meta(_HOSTED) or ())
