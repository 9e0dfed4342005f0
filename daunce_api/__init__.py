"""Which of my fine-tuning examples made the model answer this? Training-data attribution with API calls alone.

    from daunce_api import attribute
    attribution = attribute("train.jsonl", "test.jsonl", backend="embedded", members=32)
    attribution.top("q-17", k=10)

``Run`` gives the steps one by one, and answers further questions (``run.ask``); everything else lives in its module.
"""

from __future__ import annotations

from importlib import import_module as _import
from typing import TYPE_CHECKING, Any

from ._util.version import __version__
from .config import RunConfig
from .data.dataset import Dataset, Example, Message
from .errors import DaunceError

if TYPE_CHECKING:
    from .attribution import Attribution
    from .run import Run, attribute

__all__ = [
    "Attribution",
    "Dataset",
    "DaunceError",
    "Example",
    "Message",
    "Run",
    "RunConfig",
    "__version__",
    "attribute",
]


# Imported on first use: they bring SciPy, pandas and HTTP clients, which `import daunce_api` need not wait for.
_DEFERRED = {"Attribution": ".attribution", "Run": ".run", "attribute": ".run"}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _DEFERRED:
        return getattr(_import(_DEFERRED[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
