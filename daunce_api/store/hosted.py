"""``store.hosted``: models that may stand on a scoring server."""

from __future__ import annotations

from .part import Part


class Hosted(Part):
    """What a run put on its scoring server (adapters, deployments) and has not taken off, as far as is known."""

    def load_intent(self, model: str) -> None:
        """Write this before a model is loaded. Idempotent."""
        with self._db.transaction():
            if model not in self.models():
                self._db.put("hosted", (model, self._now()))
                self._log(f"hosted {model}", "", "intent", "")

    def unloaded(self, model: str) -> None:
        """The server no longer holds the model."""
        with self._db.transaction():
            if model in self.models():
                self._db.execute("DELETE FROM hosted WHERE model = ?", (model,))
                self._log(f"hosted {model}", "intent", "unloaded", "")

    def models(self) -> list[str]:
        """Models that may still be loaded, oldest first."""
        return [str(model) for model, _ in self._db.rows("hosted", "ORDER BY rowid")]
